"""Feature distillation: what it measures, what it trains, and which models it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import segvit
from segvit.backbones.feature_map import FeatureMap
from segvit.distillation import distillation_problem, feature_error

SMALL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": (64, 96),
    "decoder_layers": 1,
    "dropout": 0.0,
    "drop_path_rate": 0.0,
    "backbone_options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
    "out_layers": (1, 3),
}


def pair(**options: Any) -> tuple[segvit.SegViT, segvit.SegViT]:
    torch.manual_seed(0)
    teacher = segvit.build_model(segvit.ModelConfig(**SMALL), 3)
    config = segvit.ModelConfig(**SMALL, structure="anchored", shrink_at=2, **options)
    student = segvit.build_model(config, 3)
    segvit.take_weights(student, teacher)
    return student, teacher


def unlike_its_start(student: segvit.SegViT) -> None:
    """Give the upsampling weights of its own: those that start at zero hide others from the gradient."""
    for name, parameter in student.decoder.named_parameters():
        if name.startswith("upsampling."):
            nn.init.normal_(parameter, std=0.1)


def test_feature_error__squared_distance_in_units_of_the_wanted_length() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    found = wanted + torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    maps = [FeatureMap(tokens, (1, 2), 16, (1, 2)) for tokens in (found, wanted)]
    assert float(feature_error(*maps)) == pytest.approx((1 + 4) / (25 + 25))


def test_feature_distillation__is_nothing_where_no_patch_is_left_out() -> None:
    student, teacher = pair(keep_edges=0.99)
    loss = segvit.FeatureDistillation(student, teacher)(torch.randn(2, 3, 64, 96))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_feature_distillation__mean_over_the_features_that_the_stages_read() -> None:
    student, teacher = pair()
    images = torch.randn(2, 3, 64, 96)
    loss = segvit.FeatureDistillation(student, teacher)(images)
    whole, wanted = student.features(images), teacher.backbone(images)
    assert [one.tokens.shape for one in whole] == [one.tokens.shape for one in wanted]
    assert torch.equal(whole[0].tokens, wanted[0].tokens)  # read before anything is left out
    error = (whole[1].tokens - wanted[1].tokens).square().sum() / wanted[1].tokens.square().sum()
    torch.testing.assert_close(loss, error / 2)


def test_feature_distillation__gradients_for_what_makes_the_features_alone() -> None:
    student, teacher = pair()
    unlike_its_start(student)
    student.freeze_blocks(1)
    distillation = segvit.FeatureDistillation(student, teacher).train()
    assert student.training
    assert not teacher.training
    distillation(torch.randn(2, 3, 64, 96)).backward()
    learning = {name for name, one in student.named_parameters() if one.grad is not None and one.grad.any()}
    assert learning == {name for name, one in student.named_parameters() if one.requires_grad}
    parts = {".".join(name.split(".")[: 2 if name.startswith("decoder") else 4]) for name in learning}
    assert parts == {"decoder.upsampling", *(f"backbone.vit.blocks.{block}" for block in (1, 2, 3))}
    assert all(one.grad is None for one in teacher.parameters())


def test_feature_distillation__an_optimizer_brings_the_features_nearer() -> None:
    student, teacher = pair()
    unlike_its_start(student)
    distillation = segvit.FeatureDistillation(student, teacher).train()
    images = torch.randn(4, 3, 64, 96)
    optimizer = torch.optim.AdamW([one for one in student.parameters() if one.requires_grad], lr=1e-3)
    errors = []
    for _ in range(20):
        loss = distillation(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    ("student", "teacher", "problem"),
    [
        ({"structure": "anchored", "shrink_at": 2}, {}, None),
        ({"structure": "anchored", "shrink_at": 2}, {"structure": "linear"}, None),
        ({"structure": "anchored", "shrink_at": 2, "keep_edges": 0.0}, {"structure": "anchored", "shrink_at": 3}, None),
        ({"structure": "anchored", "shrink_at": 2, "out_layers": (0, 3)}, {}, r"out_layers (0, 3) are not those of"),
        (
            {"structure": "naive_qd", "shrink_at": 2, "out_layers": (3,)},
            {},
            "structure naive_qd has no features at all",
        ),
        ({}, {"structure": "shrunk", "shrink_at": 2}, "structure shrunk has no features at all patches"),
        ({"backbone": "vit_small_patch16_224"}, {}, "its backbone is vit_tiny_patch16_224 with"),
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
        models = [segvit.build_model(segvit.ModelConfig(**SMALL | own), 3) for own in (student, teacher)]
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            segvit.FeatureDistillation(*models)
        assert str(refused.value) == found
