"""SegViT's loss (arXiv 2210.05844, section 3.4): class cross-entropy, focal and dice of present classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.losses.mask_terms import MaskTerms
from segvit.output import SegmentationOutput, at_least_float32, full_precision

# B batch, N classes

NO_OBJECT_WEIGHT = 0.1


class LossNormalizer(NamedTuple):
    """What the loss terms are divided by; scalars that can be summed over processes and micro-batches."""

    class_weight_sum: Tensor
    """Sum of the class targets' weights over all queries of all images."""
    num_masks: Tensor
    """Number of present (image, class) pairs."""


class SegmentationLoss(nn.Module):
    """Weighted class, focal and dice terms of the final prediction and of every auxiliary one.

    Query n is matched to class n. Its class target is n where the image shows class n, else "no object"
    (weight 0.1). Masks are compared for present classes only, at the label's resolution.

    Args:
        num_classes: Number of classes N.
        class_weight: Weight of the cross-entropy.
        focal_weight: Weight of the sigmoid focal loss (alpha 0.25, gamma 2; mean over pixels).
        dice_weight: Weight of the dice loss.
        ignore_index: Label of pixels without a class.
        count_ignored_as_background: Whether ignored pixels count as "not this class" in the mask terms, as in
            the published formulation, or are left out of them.

    Raises:
        ValueError: A negative weight.
    """

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 1.0,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        ignore_index: int = 255,
        count_ignored_as_background: bool = True,
    ) -> None:
        super().__init__()
        self.weights = {"class": class_weight, "focal": focal_weight, "dice": dice_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"{name}_weight must be >= 0, got {weight}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.count_ignored_as_background = count_ignored_as_background

    def forward(
        self, output: SegmentationOutput, labels: Tensor, normalizer: LossNormalizer | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms and their sum.

        For a batch in W equal shares, processes or accumulated micro-batches, pass the sum of all shares'
        normalizers divided by W: the mean of the shares' losses is then exactly the loss of the whole batch.

        Args:
            output: The model's output for B images.
            labels: (B, H, W) class indices or the ignore index, of the images' size.
            normalizer: What to divide by; this batch's own by default.

        Returns:
            ``class``, ``focal``, ``dice``, ``auxiliary.0.class``, ... and ``total``: scalars in float32 up.

        Raises:
            ValueError: Labels of another size than the images.
        """
        check_label_size(output, labels)
        present = self.present_classes(labels)
        normalizer = self._normalizer(present) if normalizer is None else normalizer
        terms: dict[str, Tensor] = {}
        with full_precision(output.mask_logits):
            for prefix, prediction in named_predictions(output):
                values = self._terms(prediction, labels, present, normalizer)
                terms |= {prefix + name: self.weights[name] * value for name, value in values.items()}
        return terms | {"total": torch.stack(list(terms.values())).sum()}

    def normalizer(self, labels: Tensor) -> LossNormalizer:
        """The normalizer of labels (B, H, W), without any prediction."""
        return self._normalizer(self.present_classes(labels))

    def present_classes(self, labels: Tensor) -> Tensor:
        """(B, N) booleans: which classes the labels (B, H, W) show."""
        flat = labels.flatten(1)
        seen = torch.zeros(len(flat), self.num_classes + 1, dtype=torch.bool, device=labels.device)
        index = torch.where(flat == self.ignore_index, self.num_classes, flat).long()
        return seen.scatter_(1, index, True)[:, : self.num_classes]

    def _normalizer(self, present: Tensor) -> LossNormalizer:
        # Float64, so that sums over shares of a batch in any order are the whole batch's sum.
        return LossNormalizer(query_weights(present, torch.float64).sum(), present.sum(dtype=torch.float64))

    def _terms(
        self, prediction: SegmentationOutput, labels: Tensor, present: Tensor, normalizer: LossNormalizer
    ) -> dict[str, Tensor]:
        if prediction.class_logits is None:
            raise ValueError("a linear head has no class logits and masks to compare; use SemanticCrossEntropy")
        class_logits = at_least_float32(prediction.class_logits)
        targets = torch.where(present, torch.arange(self.num_classes, device=present.device), self.num_classes)
        entropy = F.cross_entropy(class_logits.transpose(1, 2), targets, reduction="none")
        class_sum = (entropy * query_weights(present, entropy.dtype)).sum()
        focal_sum, dice_sum = self._mask_sums(prediction, labels, present)
        # The sums are zero when the count is; shares of a batch may have a count below one.
        num_masks = torch.where(normalizer.num_masks > 0, normalizer.num_masks, 1).to(entropy.dtype)
        return {
            "class": class_sum / normalizer.class_weight_sum.to(entropy.dtype),
            "focal": focal_sum / num_masks,
            "dice": dice_sum / num_masks,
        }

    def _mask_sums(self, prediction: SegmentationOutput, labels: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        image, class_index = present.nonzero(as_tuple=True)
        mask_logits = at_least_float32(prediction.mask_logits)
        if not len(image):
            nothing = mask_logits.sum() * 0
            return nothing, nothing
        ignore_index = None if self.count_ignored_as_background else self.ignore_index
        focal, dice = MaskTerms.apply(
            mask_logits[image, class_index], labels, image, class_index, prediction.padded_size, ignore_index
        )
        return focal.sum(), dice.sum()


def query_weights(present: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each query's class target, (B, N): 1 for a present class, 0.1 for "no object"."""
    weights = torch.full(present.shape, NO_OBJECT_WEIGHT, dtype=dtype, device=present.device)
    return weights.masked_fill_(present, 1.0)


def check_label_size(output: SegmentationOutput, labels: Tensor) -> None:
    """Raise ValueError unless the labels have the images' size."""
    if tuple(labels.shape[-2:]) != tuple(output.image_size):
        raise ValueError(f"labels are {tuple(labels.shape[-2:])} pixels, the images {output.image_size}")


def named_predictions(output: SegmentationOutput) -> list[tuple[str, SegmentationOutput]]:
    """The final prediction under an empty prefix, then ``auxiliary.0.``, ``auxiliary.1.``, ..."""
    return [("", output), *((f"auxiliary.{index}.", item) for index, item in enumerate(output.auxiliary))]
