from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.inference.scores import semantic_scores
from segvit.losses import LOSS_TERMS
from segvit.losses.segmentation_loss import LEAST_SCORE, LossNormalizer, SegmentationLoss, loss_problems
from segvit.losses.term import LossTerm
from segvit.output import SegmentationOutput

N = 4


def make_output(
    batch: int, size: tuple[int, int], grid: tuple[int, int] = (3, 4), stride: int = 4, num_classes: int = N
) -> SegmentationOutput:
    padded = (grid[0] * stride, grid[1] * stride)

    def prediction(auxiliary: tuple[SegmentationOutput, ...]) -> SegmentationOutput:
        class_logits = torch.randn(batch, num_classes, num_classes + 1, dtype=torch.float64, requires_grad=True)
        mask_logits = torch.randn(batch, num_classes, *grid, dtype=torch.float64, requires_grad=True)
        return SegmentationOutput(class_logits, mask_logits, auxiliary, size, padded)

    return prediction((prediction(()), prediction(())))


def reference_terms(prediction: SegmentationOutput, labels: Tensor, *, keep_ignored: bool) -> dict[str, Tensor]:
    """The formulas, one pixel set at a time in plain loops."""
    height, width = prediction.image_size
    num_classes = prediction.mask_logits.shape[1]
    assert prediction.class_logits is not None
    weighted, weight_sum, focals, dices = [], 0.0, [], []
    for image in range(len(labels)):
        for query in range(num_classes):
            is_present = bool((labels[image] == query).any())
            target, weight = (query, 1.0) if is_present else (num_classes, 0.1)
            weighted.append(-weight * prediction.class_logits[image, query].log_softmax(0)[target])
            weight_sum += weight
            if not is_present:
                continue
            masks = prediction.mask_logits[image : image + 1, query : query + 1]
            logits = F.interpolate(masks, size=prediction.padded_size, mode="bilinear", align_corners=False)
            p = logits[0, 0, :height, :width].sigmoid()
            t = (labels[image] == query).double()
            if not keep_ignored:
                p, t = p[labels[image] != 255], t[labels[image] != 255]
            focal = -0.25 * t * (1 - p) ** 2 * p.log() - 0.75 * (1 - t) * p**2 * (1 - p).log()
            focals.append(focal.mean())
            dices.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    count = max(len(focals), 1)
    return {
        "class": torch.stack(weighted).sum() / weight_sum,
        "focal": 20.0 * torch.stack(focals).sum() / count if focals else torch.zeros(()).double(),
        "dice": torch.stack(dices).sum() / count if dices else torch.zeros(()).double(),
    }


CASES = ["dense", "ignore", "one image ignored", "single class", "all ignored"]


def some_labels(case: str, size: tuple[int, int], batch: int = 3, num_classes: int = N) -> Tensor:
    labels = torch.randint(0, num_classes, (batch, *size))
    if case in ("ignore", "one image ignored"):
        labels[:, :4] = 255
    if case == "one image ignored":
        labels[-1] = 255
    if case == "single class":
        labels[:] = num_classes // 2
    if case == "all ignored":
        labels[:] = 255
    return labels


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    keep_ignored=st.booleans(),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cut=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    batch=st.integers(1, 3),
    num_classes=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_loss__equals_plain_loops_with_gradients(
    case: str,
    keep_ignored: bool,
    grid: tuple[int, int],
    cut: tuple[int, int],
    batch: int,
    num_classes: int,
    seed: int,
) -> None:
    """Any height and width, also smaller than the pixels that the mask grid covers."""
    torch.manual_seed(seed)
    size = (4 * grid[0] - cut[0], 4 * grid[1] - cut[1])
    output = make_output(batch, size, grid, num_classes=num_classes)
    labels = some_labels(case, size, batch, num_classes)
    loss = SegmentationLoss(num_classes, count_ignored_as_background=keep_ignored)
    terms = loss(output, labels)
    expected: dict[str, Tensor] = {}
    for prefix, prediction in (
        ("", output),
        ("auxiliary.0.", output.auxiliary[0]),
        ("auxiliary.1.", output.auxiliary[1]),
    ):
        values = reference_terms(prediction, labels, keep_ignored=keep_ignored)
        expected |= {prefix + name: value for name, value in values.items()}
    total = torch.stack(list(expected.values())).sum()
    assert list(terms) == [*expected, "total"]
    for name, value in (expected | {"total": total}).items():
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-12)

    assert output.class_logits is not None
    leaves = [output.class_logits, output.mask_logits, output.auxiliary[1].mask_logits]
    gradients = torch.autograd.grad(terms["total"], leaves, allow_unused=True)
    references = torch.autograd.grad(total, leaves, allow_unused=True)
    for leaf, gradient, reference in zip(leaves, gradients, references, strict=True):
        reference = torch.zeros_like(leaf) if reference is None else reference
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-12)


def test_loss__one_known_case() -> None:
    """One pixel, one class, logits 0: every probability is one half."""
    output = SegmentationOutput(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 1), (), (1, 1), (1, 1))
    weights = {"dice": 5.0, "class": 2.0, "focal": 3.0}
    terms = SegmentationLoss(1, weights)(output, torch.zeros(1, 1, 1).long())
    assert list(terms) == [*weights, "total"]
    assert terms["class"].item() == pytest.approx(2 * math.log(2))
    assert terms["focal"].item() == pytest.approx(3 * 0.25 * 0.25 * math.log(2))
    assert terms["dice"].item() == pytest.approx(5 * (1 - 2 / 2.5))
    assert terms["total"].item() == pytest.approx(sum(terms[name].item() for name in ("class", "focal", "dice")))


def rows(output: SegmentationOutput, start: int, stop: int) -> SegmentationOutput:
    assert output.class_logits is not None
    return output._replace(
        class_logits=output.class_logits[start:stop],
        mask_logits=output.mask_logits[start:stop],
        auxiliary=tuple(rows(item, start, stop) for item in output.auxiliary),
    )


@settings(max_examples=25, deadline=None)
@given(shares=st.sampled_from([2, 4]), seed=st.integers(0, 1000), ignored=st.integers(0, 4))
def test_normalizer__mean_of_shares_is_the_whole_batch(shares: int, seed: int, ignored: int) -> None:
    """What two processes average, or two micro-batches accumulate, is what one process computes."""
    torch.manual_seed(seed)
    output, labels = make_output(4, (12, 16)), torch.randint(0, N, (4, 12, 16))
    labels[:ignored] = 255
    loss = SegmentationLoss(N, {"class": 1.0, "focal": 20.0, "dice": 1.0, "cross_entropy": 2.0})
    whole = loss(output, labels)
    size = 4 // shares
    bounds = [(start, start + size) for start in range(0, 4, size)]
    parts = [loss.normalizer(labels[a:b]) for a, b in bounds]
    shared = LossNormalizer(*(torch.stack(scalars).sum() / shares for scalars in zip(*parts, strict=True)))
    results = [loss(rows(output, a, b), labels[a:b], shared) for a, b in bounds]
    for name, value in whole.items():
        mean = torch.stack([result[name] for result in results]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-12, atol=1e-12)


def test_normalizer__counts() -> None:
    labels = torch.tensor([[[0, 0], [1, 255]], [[255, 255], [255, 255]]])
    normalizer = SegmentationLoss(N).normalizer(labels)
    assert normalizer.num_masks.item() == 2
    assert normalizer.num_pixels.item() == 3
    assert normalizer.class_weight_sum.item() == pytest.approx(2 * 1.0 + 6 * 0.1)


def test_loss__half_precision_output_is_compared_in_float32() -> None:
    output = SegmentationOutput(
        torch.randn(1, N, N + 1).bfloat16(), torch.randn(1, N, 2, 2).bfloat16(), (), (8, 8), (8, 8)
    )
    assert output.class_logits is not None
    upcast = output._replace(class_logits=output.class_logits.float(), mask_logits=output.mask_logits.float())
    labels = torch.randint(0, N, (1, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        terms = SegmentationLoss(N)(output, labels)
    for name, value in SegmentationLoss(N)(upcast, labels).items():
        assert terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], value)


def test_loss__labels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels are \(8, 8\) pixels, the images \(10, 13\)"):
        SegmentationLoss(N)(make_output(1, (10, 13)), torch.zeros(1, 8, 8).long())


@pytest.mark.parametrize(
    ("weights", "structure", "problems"),
    [
        ({"dice": 1.0, "focal": 0.0, "class": 1.0}, "cascade", []),
        ({"cross_entropy": 1.0}, "cascade", []),
        ({"dice": 5.0, "class": 0.0}, "cascade", ["structure cascade: the loss has terms of masks alone"]),
        ({"class": 1.0}, "single", ["structure single: the loss has terms of classes alone"]),
        ({"dice": 5.0}, None, []),
        ({"cross_entropy": 1, "dice": 0}, "linear", []),
        (
            {"dcie": 1.0, "focal": -1.0, "class": 0},
            None,
            [
                "unknown loss term 'dcie'; choose from dice, class, focal, focal_balanced, focal_hard, dice_hard, ",
                "weight of loss term focal must be a number >= 0, got -1.0; 0 leaves it out",
            ],
        ),
        ({"dice": 0.0}, None, ["the loss has no term of weight > 0, got {'dice': 0.0}; name one"]),
        ({"dice": math.nan, "focal": 1}, None, ["weight of loss term dice must be a number >= 0, got nan"]),
        ({"dice": "1", "focal": 1}, None, ["weight of loss term dice must be a number >= 0, got '1'"]),
        (
            {"class": 1.0, "dice": 1.0, "cross_entropy": 1.0},
            "linear",
            [
                "structure linear: loss term class compares classes, which a structure without masks has none of; use",
                "structure linear: loss term dice compares masks, which a structure without masks has none of; use",
            ],
        ),
    ],
)
def test_loss_problems__all_at_once(weights: dict[str, float], structure: str | None, problems: list[str]) -> None:
    found = loss_problems(weights, structure)
    assert len(found) == len(problems)
    assert all(text.startswith(start) for text, start in zip(found, problems, strict=True))
    if problems and structure is None:
        with pytest.raises(ValueError, match=re.escape(found[0])):
            SegmentationLoss(N, weights)


def test_loss__term_of_weight_zero_is_not_computed() -> None:
    broken = LossTerm(name="broken", compares="pixels", function=lambda *_: pytest.fail("computed"))
    LOSS_TERMS.register("broken", broken)
    terms = SegmentationLoss(N, {"dice": 1.0, "broken": 0.0})(
        make_output(1, (12, 16)), some_labels("dense", (12, 16), batch=1)
    )
    assert [name for name in terms if "." not in name] == ["dice", "total"]


@pytest.mark.parametrize("labels", [[3, 0], [-1, 4], [255, 200]])
@pytest.mark.parametrize("weights", [None, {"cross_entropy": 1.0}])
def test_loss__label_that_is_no_class_is_refused(labels: list[int], weights: dict[str, float] | None) -> None:
    output = SegmentationOutput(torch.zeros(1, 3, 4), torch.zeros(1, 3, 1, 2), (), (1, 2), (1, 2))
    loss = SegmentationLoss(3, weights)
    wrong = [label for label in labels if label not in (0, 1, 2, 255)]
    message = f"labels hold {', '.join(map(str, wrong))}; allowed are the classes 0 to 2 and 255 for ignored"
    for ask in (loss.normalizer, lambda labels: loss(output, labels)):
        with pytest.raises(ValueError, match=message):
            ask(torch.tensor([[labels]]))


def test_loss__ignore_index_that_is_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="ignore index 255 is one of the 300 classes 0 to 299"):
        SegmentationLoss(300)
    labels = torch.tensor([[[255, -1]]])
    assert SegmentationLoss(300, ignore_index=-1).present_classes(labels).nonzero().tolist() == [[0, 255]]


@pytest.mark.parametrize("ignore_index", [-1, 65535])
@pytest.mark.parametrize("term", ["dice", "cross_entropy"])
def test_loss__class_255_counts_in_labels_of_8_bits(ignore_index: int, term: str) -> None:
    output = SegmentationOutput(torch.zeros(1, 300, 301), torch.randn(1, 300, 1, 2), (), (1, 2), (1, 2))
    loss = SegmentationLoss(300, {term: 1.0}, ignore_index=ignore_index, count_ignored_as_background=False)
    labels = torch.tensor([[[255, 7]]])
    assert loss.normalizer(labels.byte()).num_pixels == 2
    assert loss(output, labels.byte())["total"] == loss(output, labels)["total"]


def test_loss__compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    output, labels = make_output(1, (12, 16)), some_labels("dense", (12, 16), batch=1)
    loss = SegmentationLoss(output.mask_logits.shape[1], {"class": 1.0, "cross_entropy": 1.0})
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(output, labels), loss(output, labels))
    with pytest.raises(RuntimeError, match="a label is neither a class"):
        compiled(output, torch.full_like(labels, 99))


def test_loss__of_an_output_without_masks() -> None:
    output = SegmentationOutput(None, torch.zeros(1, 3, 1, 2), (), (1, 2), (1, 2))
    with pytest.raises(ValueError, match="loss term focal, dice compares masks, which a structure without masks has"):
        SegmentationLoss(3, {"focal": 1.0, "dice": 1.0})(output, torch.zeros(1, 1, 2).long())


def smooth_l1(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    difference = F.smooth_l1_loss(logits.sigmoid(), target, reduction="none")
    return (difference if counted is None else difference * counted).mean((1, 2))


@pytest.mark.parametrize("keep_ignored", [True, False])
def test_loss__terms_of_ones_own_beside_the_published(keep_ignored: bool) -> None:
    LOSS_TERMS.register("smooth_l1", LossTerm(name="smooth_l1", compares="masks", function=smooth_l1))
    entropy = LOSS_TERMS.get("class").function
    LOSS_TERMS.register("certain", LossTerm(name="certain", compares="classes", function=lambda *x: entropy(*x) ** 2))
    own = LossTerm(name="far", compares="pixels", function=lambda logits, labels: logits.sum(1) * (labels == 1))
    LOSS_TERMS.register("far", own)
    weights = {"smooth_l1": 3.0, "dice": 1.0, "certain": 0.5, "far": 0.1}
    output, labels = make_output(2, (11, 14)), some_labels("ignore", (11, 14), batch=2)
    loss = SegmentationLoss(N, weights, count_ignored_as_background=keep_ignored)
    terms = loss(output, labels)
    present, losses = loss.present_classes(labels), []
    for image, index in present.nonzero().tolist():
        full = F.interpolate(output.mask_logits[image, index][None, None], size=output.padded_size, mode="bilinear")
        counted = None if keep_ignored else (labels[image : image + 1] != 255)
        losses.append(smooth_l1(full[0, :, :11, :14], (labels[image : image + 1] == index).double(), counted))
    expected = 3.0 * torch.stack(losses).mean()
    torch.testing.assert_close(terms["smooth_l1"], expected, rtol=1e-9, atol=0)
    gradient = torch.autograd.grad(terms["smooth_l1"], output.mask_logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, output.mask_logits), rtol=1e-8, atol=1e-12)
    logits = (semantic_scores(output, (11, 14)) + LEAST_SCORE).log().sum(1) * (labels == 1)
    torch.testing.assert_close(terms["far"], 0.1 * logits.sum() / (labels != 255).sum())
    assert terms["total"].item() == pytest.approx(sum(terms[name].item() for name in terms if name != "total"))


def test_loss__mask_term_that_gives_no_loss_a_mask_is_refused() -> None:
    LOSS_TERMS.register("scalar", LossTerm(name="scalar", compares="masks", function=lambda logits, *_: logits.mean()))
    with pytest.raises(ValueError, match=r"loss term scalar gives shape \(\) for \d masks; return one loss a mask"):
        SegmentationLoss(N, {"scalar": 1.0})(make_output(1, (12, 16)), some_labels("dense", (12, 16), batch=1))
