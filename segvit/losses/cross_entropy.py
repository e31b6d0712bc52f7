"""Per-pixel cross-entropy, which the paper's ablations train with instead of the mask losses.

A linear head's logits are taken as they are. Of ATM, the semantic scores' share of their sum is the probability; they
need a float for every class and pixel, which the mask losses do not.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from segvit.losses.term import LossTerm


def pixel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """See `LossTerm`."""
    return F.cross_entropy(logits, labels, reduction="none")


CROSS_ENTROPY = LossTerm(name="cross_entropy", compares="pixels", function=pixel_cross_entropy)
