"""Fitting what is restored to a teacher's features: what is found, what it reports, and which models it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import segvit
from segvit.backbones.downsampling import rows_at
from segvit.distillation import RIDGE, distillation_problem

SMALL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": (64, 96),
    "decoder_layers": 1,
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "backbone_options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
    "out_layers": (1, 3),
}


def pair(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher = segvit.build_model(segvit.ModelConfig(**SMALL), 3)
    config = segvit.ModelConfig(**SMALL, structure="anchored", shrink_at=2, **options)
    student = segvit.build_model(config, 3)
    segvit.take_weights(student, teacher)
    return student.eval(), teacher.eval()


def batches(count: int = 3, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 64, 96, generator=generator) for _ in range(count)]


def errors(student: Any, teacher: Any, images: list[Tensor]) -> float:
    """Squared distance of what was left out, over the square of what it should be; block 3 alone is read shrunk."""
    missing, whole = 0.0, 0.0
    with torch.no_grad():
        for batch in images:
            found, wanted = student.features(batch)[1].tokens, teacher.features(batch)[1].tokens
            kept = student.backbone(batch)[1].kept
            assert kept is not None
            found, wanted = (rows_at(tokens, kept.left_out) for tokens in (found, wanted))
            missing += float((found - wanted).square().sum())
            whole += float(wanted.square().sum())
    return missing / whole


def test_fit_upsampling__reports_the_errors_of_the_features_and_lowers_them() -> None:
    student, teacher = pair()
    images = batches()
    before = errors(student, teacher, images)
    fit = segvit.fit_upsampling(student, teacher, images)
    assert fit == pytest.approx((before, errors(student, teacher, images)), rel=1e-3)
    assert 0.0 < fit.after < 0.9 * fit.before


def test_fit_upsampling__is_the_ridge_regression_on_what_tells_the_patches_from_their_stand_ins() -> None:
    student, teacher = pair()
    upsampling = student.decoder.upsampling
    inputs, missing = [], []
    with torch.no_grad():
        for batch in batches():
            shrunk = student.backbone(batch)[1:]
            [stand_in], difference = upsampling.stand_ins(shrunk)
            wanted = rows_at(teacher.features(batch)[1].tokens, shrunk[0].kept.left_out)
            inputs.append(difference.flatten(0, 1).double())
            missing.append((wanted - stand_in).flatten(0, 1).double())
    x, y = torch.cat(inputs), torch.cat(missing)
    penalty = RIDGE * x.square().sum(0).mean()
    # The same as least squares over the data and one more row a channel.
    more = torch.cat((x, penalty.sqrt() * torch.eye(48, dtype=torch.float64)))
    expected = torch.linalg.lstsq(more, torch.cat((y, torch.zeros(48, 48, dtype=torch.float64)))).solution
    segvit.fit_upsampling(student, teacher, batches())
    torch.testing.assert_close(upsampling.corrections[0].weight.T.double(), expected, rtol=1e-3, atol=1e-4)


def test_fit_upsampling__changes_the_corrections_alone() -> None:
    student, teacher = pair()
    ours, theirs = (copy.deepcopy(model.state_dict()) for model in (student, teacher))
    segvit.fit_upsampling(student, teacher, batches(1))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, ours[name])}
    assert changed == {"decoder.upsampling.corrections.0.weight"}
    assert all(torch.equal(value, theirs[name]) for name, value in teacher.state_dict().items())


def test_fit_upsampling__processes_with_other_images_each_find_what_one_would() -> None:
    """Each adds the other's sums to its own."""
    student, teacher = pair()
    whole = segvit.fit_upsampling(student, teacher, batches(4))
    expected = student.decoder.upsampling.corrections[0].weight.clone()
    sums: list[Tensor] = []
    student, teacher = pair()
    segvit.fit_upsampling(student, teacher, batches(4)[:2], lambda own: sums.append(own.clone()))
    others = iter(sums)
    student, teacher = pair()

    def add_up(own: Tensor) -> None:
        own.add_(next(others))

    fit = segvit.fit_upsampling(student, teacher, batches(4)[2:], add_up)
    assert fit == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(student.decoder.upsampling.corrections[0].weight, expected, rtol=1e-3, atol=1e-5)


def test_fit_upsampling__where_no_patch_is_left_out_there_is_nothing_to_fit() -> None:
    student, teacher = pair(keep_unlike=0.99)
    assert segvit.fit_upsampling(student, teacher, batches(1)) == (0.0, 0.0)
    assert not student.decoder.upsampling.corrections[0].weight.any()


def test_fit_upsampling__without_an_image() -> None:
    with pytest.raises(ValueError, match=r"^there is no image to fit the upsampling to$"):
        segvit.fit_upsampling(*pair(), [])


@pytest.mark.parametrize(
    ("student", "teacher", "problem"),
    [
        ({"structure": "anchored", "shrink_at": 2}, {}, None),
        ({"structure": "anchored", "shrink_at": 2}, {"structure": "linear"}, None),
        (
            {"structure": "anchored", "shrink_at": 2, "keep_unlike": 0.0},
            {"structure": "anchored", "shrink_at": 3},
            None,
        ),
        ({"structure": "anchored", "shrink_at": 2, "out_layers": (0, 3)}, {}, r"out_layers (0, 3) are not those of"),
        (
            {"structure": "naive_qd", "shrink_at": 2, "out_layers": (3,)},
            {},
            "structure naive_qd restores no features",
        ),
        ({}, {}, "structure cascade restores no features"),
        (
            {"structure": "anchored", "shrink_at": 2},
            {"structure": "shrunk", "shrink_at": 2},
            "structure shrunk has no features at all patches",
        ),
        (
            {"structure": "anchored", "shrink_at": 2, "backbone": "vit_small_patch16_224"},
            {},
            "its backbone is vit_tiny_patch16_224 with",
        ),
        # Named or not: what counts is what is read.
        (
            {"structure": "anchored", "out_layers": None, "backbone_options": {}},
            {"out_layers": (5, 7, 11), "backbone_options": {}},
            None,
        ),
        (
            {"structure": "anchored", "out_layers": None, "backbone_options": {}},
            {"out_layers": (3, 7, 11), "backbone_options": {}},
            "out_layers (5, 7, 11) are not those of its teacher, (3, 7, 11)",
        ),
    ],
)
def test_distillation_problem(student: dict[str, Any], teacher: dict[str, Any], problem: str | None) -> None:
    found = distillation_problem(*(segvit.ModelConfig(**SMALL | own) for own in (student, teacher)))
    assert (found or "").startswith(problem or "") if problem else found is None
    if problem:
        small, large = (segvit.build_model(segvit.ModelConfig(**SMALL | own), 3) for own in (student, teacher))
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            segvit.fit_upsampling(small, large, [])
        assert str(refused.value) == found
