"""The cross-entropy of class queries (SegViT, arXiv 2210.05844, section 3.4): which classes an image shows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from segvit.losses.term import LossTerm


def class_entropy(class_logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """See `LossTerm`."""
    return F.cross_entropy(class_logits.transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing)


CLASS_ENTROPY = LossTerm(name="class", compares="classes", function=class_entropy, smooths=True)
