"""Terms of masks that look at the pixels which the model has most wrong (online hard examples, arXiv 1604.03540)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.losses.focal import focal_pixels
from segvit.losses.term import LossTerm

# P masks, or images, H W pixels

HARD_SHARE = 0.125


def hard_focal_loss(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """The focal loss, its mean over the hardest eighth of a mask's pixels; see `LossTerm`."""
    pixels = focal_pixels(logits, target)
    chosen = hardest(pixels, counted, HARD_SHARE)
    return (pixels * chosen).sum((1, 2)) / chosen.sum((1, 2)).clamp(min=1)


def hard_dice_loss(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """The dice loss over the hardest eighth of the pixels and the whole mask beside; see `LossTerm`.

    Easy pixels off the mask, which are most, no longer blur what the total is; the mask's own all stay.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    chosen = hardest(entropy, counted, HARD_SHARE).to(logits.dtype)
    chosen = torch.maximum(chosen, target)
    mask = logits.sigmoid() * chosen
    overlap, total = (mask * target).sum((1, 2)), (mask + target).sum((1, 2))
    return 1 - (2 * overlap + 1) / (total + 1)


def hardest(losses: Tensor, counted: Tensor | None, share: float) -> Tensor:
    """Which pixels (P, H, W) are the `share` of largest loss among those counted; without gradient."""
    flat = losses.detach().flatten(1)
    if counted is not None:
        flat = flat.masked_fill(~counted.flatten(1), -1.0)
    number = max(1, int(share * flat.shape[1]))
    places = flat.topk(number, dim=1, sorted=False).indices
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, places, True)
    chosen = chosen if counted is None else chosen & counted.flatten(1)
    return chosen.view_as(losses)


HARD_FOCAL = LossTerm(
    name="focal_hard",
    compares="masks",
    function=hard_focal_loss,
    default_weight=3.0,
    search_range=(0.5, 10.0),
)
HARD_DICE = LossTerm(name="dice_hard", compares="masks", function=hard_dice_loss)
