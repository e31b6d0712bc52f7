"""Terms of balanced classes and of hard pixels, by hand on a few pixels; label smoothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from segvit.losses.cross_entropy import balanced_cross_entropy, hard_cross_entropy, pixel_cross_entropy
from segvit.losses.focal import balanced_focal_loss, focal_pixels
from segvit.losses.hard_pixels import hard_dice_loss, hard_focal_loss, hardest
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.output import SegmentationOutput


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    """One mask of 4 x 4 pixels, three of them its own."""
    torch.manual_seed(0)
    target = torch.zeros(1, 4, 4)
    target[0, 0, :3] = 1
    return torch.randn(1, 4, 4), target


def test_hardest__the_share_of_largest_loss_that_counts() -> None:
    losses = torch.arange(16.0).view(1, 4, 4)
    assert hardest(losses, None, 0.125).nonzero().tolist() == [[0, 3, 2], [0, 3, 3]]
    counted = losses < 14
    assert hardest(losses, counted, 0.125).nonzero().tolist() == [[0, 3, 0], [0, 3, 1]]
    assert not hardest(losses, torch.zeros_like(counted), 0.125).any()


def test_hard_focal_loss__mean_over_the_two_hardest_of_sixteen() -> None:
    logits, target = masks()
    pixels = focal_pixels(logits, target)
    assert float(hard_focal_loss(logits, target, None)) == pytest.approx(float(pixels.flatten().topk(2).values.mean()))


def test_hard_dice_loss__easy_pixels_off_the_mask_are_left_out() -> None:
    logits, target = masks()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    chosen = torch.zeros(16)
    chosen[entropy.flatten().topk(2).indices] = 1
    chosen = torch.maximum(chosen, target.flatten())
    mask = logits.sigmoid().flatten() * chosen
    expected = 1 - (2 * (mask * target.flatten()).sum() + 1) / (mask.sum() + 3 + 1)
    assert float(hard_dice_loss(logits, target, None)) == pytest.approx(float(expected))


def test_balanced_focal_loss__a_half_on_the_mask_and_a_half_off_it() -> None:
    logits, target = masks()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    pixels = ((logits.sigmoid() - target) ** 2 * entropy).flatten()
    on = target.flatten() > 0
    expected = (pixels[on].mean() + pixels[~on].mean()) / 2
    assert float(balanced_focal_loss(logits, target, None)) == pytest.approx(float(expected))
    counted = torch.ones(1, 4, 4, dtype=torch.bool)
    counted[0, 3] = False
    kept = pixels[:12]
    expected = (kept[on[:12]].mean() + kept[~on[:12]].mean()) / 2
    assert float(balanced_focal_loss(logits, target, counted)) == pytest.approx(float(expected))


def test_balanced_cross_entropy__every_class_of_an_image_weighs_the_same() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 4)
    labels = torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 0]]])
    counted = torch.ones(1, 2, 4, dtype=torch.bool)
    counted[0, 1, 3] = False
    plain = pixel_cross_entropy(logits, labels)
    balanced = balanced_cross_entropy(logits, labels, counted)
    expected = (plain[(labels == 0) & counted].mean() + plain[labels == 1].mean()) / 2
    assert float(balanced[counted].mean()) == pytest.approx(float(expected))


def test_hard_cross_entropy__the_mean_is_that_of_the_hardest_quarter() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 3, 2, 4), torch.randint(0, 3, (1, 2, 4))
    counted = torch.ones(1, 2, 4, dtype=torch.bool)
    hard = hard_cross_entropy(logits, labels, counted)
    assert float(hard.mean()) == pytest.approx(
        float(pixel_cross_entropy(logits, labels).flatten().topk(2).values.mean())
    )


@pytest.mark.parametrize(
    "name", ["focal_balanced", "focal_hard", "dice_hard", "cross_entropy_balanced", "cross_entropy_hard"]
)
def test_terms__learn_and_are_the_same_in_shares_of_a_batch(name: str) -> None:
    torch.manual_seed(0)
    loss = SegmentationLoss(3, {name: 2.0, "class": 1.0, "dice": 1.0}, count_ignored_as_background=False)
    labels = torch.randint(0, 3, (4, 8, 8))
    labels[:, 0] = 255
    masks, classes = torch.randn(4, 3, 4, 4, requires_grad=True), torch.randn(4, 3, 4)

    def output(part: slice) -> SegmentationOutput:
        return SegmentationOutput(classes[part], masks[part], (), (8, 8), (8, 8))

    whole = loss(output(slice(None)), labels)
    [gradient] = torch.autograd.grad(whole[name], masks)
    assert gradient.abs().sum() > 0
    normalizer = type(loss.normalizer(labels))(*(value / 2 for value in loss.normalizer(labels)))
    halves = [loss(output(part), labels[part], normalizer)[name] for part in (slice(0, 2), slice(2, 4))]
    assert float(sum(halves)) / 2 == pytest.approx(float(whole[name]), rel=1e-5)


def test_label_smoothing__of_classes_and_cross_entropies() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0]]])
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    output = SegmentationOutput(logits.expand(1, 2, 3), torch.zeros(1, 2, 2, 2), (), (2, 2), (2, 2))
    plain, smoothed = (
        SegmentationLoss(2, {"class": 1.0}, label_smoothing=share)(output, labels) for share in (0.0, 0.3)
    )
    logs = logits.log_softmax(2)[0, 0].tolist()
    # The second class is not there: its target is the last column, at a tenth of the weight.
    hard = [-logs[0], -0.1 * logs[2]]
    assert float(plain["class"]) == pytest.approx(sum(hard) / 1.1)
    spread = -sum(logs) / 3
    expected = (0.7 * hard[0] + 0.3 * spread) + (0.7 * hard[1] + 0.1 * 0.3 * spread)
    assert float(smoothed["class"]) == pytest.approx(expected / 1.1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        SegmentationLoss(2, {"class": 1.0}, label_smoothing=1.0)
    assert math.isfinite(float(smoothed["total"]))
