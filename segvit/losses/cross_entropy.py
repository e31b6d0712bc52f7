"""Per-pixel cross-entropy, which the paper's ablations train with instead of the mask losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.inference.scores import semantic_scores
from segvit.losses.segmentation_loss import check_label_size, named_predictions
from segvit.output import SegmentationOutput, at_least_float32, full_precision, resize_to_image

# B batch, N classes, H W pixels


class PixelNormalizer(NamedTuple):
    """What the loss is divided by; a scalar that can be summed over processes and micro-batches."""

    num_pixels: Tensor
    """Number of labelled pixels."""


class SemanticCrossEntropy(nn.Module):
    """Mean cross-entropy over labelled pixels (SegViT, arXiv 2210.05844, ablation of ATM).

    A linear head's logits are taken as they are. Of ATM the semantic scores stand in for logits, as in the
    paper's comparison; they need a float for every class and pixel, which the mask losses do not.

    Args:
        num_classes: Number of classes N.
        ignore_index: Label of pixels without a class.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(
        self, output: SegmentationOutput, labels: Tensor, normalizer: PixelNormalizer | None = None
    ) -> dict[str, Tensor]:
        """The term of every prediction and their sum.

        Args:
            output: The model's output for B images.
            labels: (B, H, W) class indices or the ignore index, of the images' size.
            normalizer: What to divide by; this batch's own by default. Shares as in `SegmentationLoss`.

        Returns:
            ``cross_entropy``, ``auxiliary.0.cross_entropy``, ... and ``total``: scalars in float32 up.

        Raises:
            ValueError: Labels of another size than the images.
        """
        check_label_size(output, labels)
        normalizer = self.normalizer(labels) if normalizer is None else normalizer
        terms: dict[str, Tensor] = {}
        with full_precision(output.mask_logits):
            for prefix, prediction in named_predictions(output):
                logits = pixel_logits(prediction)
                total = F.cross_entropy(logits, labels.long(), ignore_index=self.ignore_index, reduction="sum")
                terms[f"{prefix}cross_entropy"] = total / normalizer.num_pixels.clamp(min=1).to(total.dtype)
        return terms | {"total": torch.stack(list(terms.values())).sum()}

    def normalizer(self, labels: Tensor) -> PixelNormalizer:
        """The normalizer of labels (B, H, W), without any prediction."""
        return PixelNormalizer((labels != self.ignore_index).sum(dtype=torch.float64))


def pixel_logits(output: SegmentationOutput) -> Tensor:
    """(B, N, H, W): a linear head's class logits, or ATM's semantic scores, at the image's size."""
    if output.class_logits is None:
        return resize_to_image(at_least_float32(output.mask_logits), output)
    return semantic_scores(output, output.image_size)
