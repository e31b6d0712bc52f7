"""The dice loss of masks (SegViT, arXiv 2210.05844, section 3.4), smoothed by one pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from segvit.losses.mask_maps import MaskMaps
from segvit.losses.term import LossTerm

# P masks, H W pixels


def dice_loss(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """See `LossTerm`."""
    mask = logits.sigmoid() if counted is None else logits.sigmoid() * counted
    overlap, total = (mask * target).sum((1, 2)), (mask + target).sum((1, 2))
    return 1 - (2 * overlap + 1) / (total + 1)


def fused_dice_loss(maps: MaskMaps, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See `LossTerm`."""
    first, second = maps.scratch
    # Foreground probability is 1 - e on the mask and e off it.
    signed_wrong = torch.mul(maps.wrong, maps.sign, out=first).sum((1, 2))
    overlap = maps.area - (maps.wrong.sum((1, 2)) - signed_wrong) / 2
    inverse = 1 / (signed_wrong + 2 * maps.area + 1)
    dice = 1 - (2 * overlap + 1) * inverse
    if not with_gradient:
        return dice, None
    # d dice / dx = e (1 - e) (a - 2 t / (total + 1)), t = (1 - s) / 2.
    slope = torch.sub(maps.wrong, maps.wrong_squared, out=first)
    everywhere = (2 * overlap + 1) * inverse.square() - inverse
    factor = torch.mul(maps.sign, inverse[:, None, None], out=second).add_(everywhere[:, None, None])
    return dice, slope.mul_(factor)


DICE = LossTerm(name="dice", compares="masks", function=dice_loss, fused=fused_dice_loss)
