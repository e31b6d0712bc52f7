"""Per-pixel cross-entropy, which the paper's ablations train with instead of the mask losses.

A linear head's logits are taken as they are. Of ATM, the semantic scores' share of their sum is the probability; they
need a float for every class and pixel, which the mask losses do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.losses.hard_pixels import hardest
from segvit.losses.term import LossTerm

# B batch, N classes, H W pixels

HARD_SHARE = 0.25


def pixel_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """See `LossTerm`."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def balanced_cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Each class that an image shows weighs the same in it, however few its pixels; see `LossTerm`."""
    losses = pixel_cross_entropy(logits, labels, label_smoothing)
    flat, kept = labels.flatten(1), counted.flatten(1).to(losses.dtype)
    counts = losses.new_zeros(len(flat), logits.shape[1]).scatter_add_(1, flat, kept)
    share = kept.sum(1, keepdim=True) / (counts > 0).sum(1, keepdim=True).clamp(min=1)
    weights = (share / counts.clamp(min=1)).gather(1, flat)
    return losses * weights.view_as(losses)


def hard_cross_entropy(logits: Tensor, labels: Tensor, counted: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The mean over the hardest quarter of an image's labelled pixels (arXiv 1604.03540); see `LossTerm`."""
    losses = pixel_cross_entropy(logits, labels, label_smoothing)
    hard = hardest(losses, counted, HARD_SHARE)
    labelled, chosen = (pixels.flatten(1).sum(1).to(losses.dtype) for pixels in (counted, hard))
    return losses * torch.where(hard, (labelled / chosen.clamp(min=1))[:, None, None], 0.0)


CROSS_ENTROPY = LossTerm(name="cross_entropy", compares="pixels", function=pixel_cross_entropy, smooths=True)
BALANCED_CROSS_ENTROPY = LossTerm(
    name="cross_entropy_balanced",
    compares="pixels",
    function=balanced_cross_entropy,
    smooths=True,
    counts_pixels=True,
)
HARD_CROSS_ENTROPY = LossTerm(
    name="cross_entropy_hard", compares="pixels", function=hard_cross_entropy, smooths=True, counts_pixels=True
)
