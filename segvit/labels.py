"""What label maps may hold: class ids from 0, and the ignore index of pixels without a class."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_NAMED = 5


def check_ignore_index(num_classes: int, ignore_index: int) -> None:
    """Raise ValueError where the ignore index is a class of its own: that class would be lost without a word."""
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore index {ignore_index} is one of the {num_classes} classes 0 to {num_classes - 1}, which would "
            "never count; use an ignore_index that is no class, such as -1 or 65535"
        )


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError unless every label is a class or the ignore index.

    On CUDA, and in a compiled graph, nothing waits for the answer: an assertion fails soon after. Other ids would
    index past the classes, or be taken for ignored pixels.
    """
    if not labels.numel() or labels.is_meta:
        return
    low, high = torch.where(labels == ignore_index, 0, labels).aminmax()
    valid = (low >= 0) & (high < num_classes)
    if labels.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(valid, f"a label is neither a class (0 to {num_classes - 1}) nor {ignore_index} (ignored)")
    elif not valid:
        outside = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
        found = torch.unique(labels[outside]).tolist()
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise ValueError(
            f"labels hold {', '.join(map(str, found[:MOST_NAMED]))}{more}; allowed are the classes 0 to "
            f"{num_classes - 1} and {ignore_index} for ignored pixels; correct the label maps (do ids start at 1?)"
        )
