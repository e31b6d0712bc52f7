from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.losses.segmentation_loss import LossNormalizer, SegmentationLoss
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
    terms = SegmentationLoss(1, class_weight=2.0, focal_weight=3.0, dice_weight=5.0)(
        output, torch.zeros(1, 1, 1).long()
    )
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
    loss = SegmentationLoss(N)
    whole = loss(output, labels)
    size = 4 // shares
    bounds = [(start, start + size) for start in range(0, 4, size)]
    parts = [loss.normalizer(labels[a:b]) for a, b in bounds]
    shared = LossNormalizer(
        torch.stack([part.class_weight_sum for part in parts]).sum() / shares,
        torch.stack([part.num_masks for part in parts]).sum() / shares,
    )
    results = [loss(rows(output, a, b), labels[a:b], shared) for a, b in bounds]
    for name, value in whole.items():
        mean = torch.stack([result[name] for result in results]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-12, atol=1e-12)


def test_normalizer__counts() -> None:
    labels = torch.tensor([[[0, 0], [1, 255]], [[255, 255], [255, 255]]])
    normalizer = SegmentationLoss(N).normalizer(labels)
    assert normalizer.num_masks.item() == 2
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


def test_loss__negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="dice_weight must be >= 0, got -1"):
        SegmentationLoss(N, dice_weight=-1.0)
