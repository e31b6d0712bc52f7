"""The sigmoid focal loss of masks (SegViT, arXiv 2210.05844, section 3.4): alpha 0.25, gamma 2, mean over pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.losses.mask_maps import MaskMaps
from segvit.losses.term import LossTerm

# P masks, H W pixels

FOCAL_ALPHA = 0.25
# alpha on the mask and 1 - alpha off it is 1/2 + s TILT, with s = -1 on the mask and 1 off it.
TILT = 0.5 - FOCAL_ALPHA


def focal_loss(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """See `LossTerm`."""
    pixels = focal_pixels(logits, target)
    if counted is None:
        return pixels.mean((1, 2))
    return (pixels * counted).sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)


def balanced_focal_loss(logits: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
    """The focal loss whose pixels on the mask and off it weigh a half each, however few one are; see `LossTerm`."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    pixels = (logits.sigmoid() - target).square() * entropy
    off = 1 - target if counted is None else (1 - target) * counted
    means = [(pixels * part).sum((1, 2)) / part.sum((1, 2)).clamp(min=1) for part in (target, off)]
    return (means[0] + means[1]) / 2


def focal_pixels(logits: Tensor, target: Tensor) -> Tensor:
    """The focal loss of every pixel (P, H, W)."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = (logits.sigmoid() - target).abs()
    return (FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)) * wrong.square() * entropy


def fused_focal_loss(maps: MaskMaps, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """See `LossTerm`."""
    first, second = maps.scratch
    weighted = torch.mul(maps.wrong_squared, maps.entropy, out=first)
    focal = (0.5 * weighted.sum((1, 2)) + TILT * weighted.mul_(maps.sign).sum((1, 2))) / maps.count
    if not with_gradient:
        return focal, None
    # d focal / dx = alpha s e^2 (2 (1 - e) softplus + e); alpha s is TILT + s / 2.
    gradient = torch.addcmul(maps.entropy, maps.entropy, maps.wrong, value=-1.0, out=first)
    gradient.mul_(2.0).add_(maps.wrong).mul_(maps.wrong_squared)
    share = (1 / maps.count)[:, None, None]
    return focal, gradient.mul_(torch.mul(maps.sign, 0.5 * share, out=second).add_(TILT * share))


FOCAL = LossTerm(
    name="focal",
    compares="masks",
    function=focal_loss,
    fused=fused_focal_loss,
    default_weight=20.0,
    search_range=(5.0, 80.0),
)
BALANCED_FOCAL = LossTerm(
    name="focal_balanced",
    compares="masks",
    function=balanced_focal_loss,
    default_weight=3.0,
    search_range=(0.5, 10.0),
)
