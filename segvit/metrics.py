"""Segmentation quality: confusion matrix, IoU and accuracy, and Boundary IoU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segvit.labels import check_ignore_index, check_labels

Labels = Tensor | NDArray[np.generic]
BOUNDARY_FRACTION = 0.02  # of the image diagonal, as in Boundary IoU (Cheng et al. 2021)

# N classes, H W pixels


@dataclass(frozen=True, slots=True)
class SegmentationMetrics:
    """Figures of a confusion matrix, as fractions; nan where a class does not occur."""

    miou: float
    """Mean IoU over classes that occur in labels or predictions."""
    macc: float
    """Mean accuracy over classes that occur in labels."""
    aacc: float
    """Share of labelled pixels predicted right."""
    per_class_iou: tuple[float, ...]
    per_class_acc: tuple[float, ...]


class ConfusionMatrix:
    """Integer counts of labelled pixels, rows by true class, columns by predicted class.

    Args:
        num_classes: Number of classes N.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: The ignore index is one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        check_ignore_index(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix: NDArray[np.int64] = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, predicted: Labels, labels: Labels) -> None:
        """Count predictions against labels of the same shape.

        Raises:
            ValueError: Shapes differ, or an id lies outside the classes.
        """
        predicted, labels = matching_tensors(predicted, labels)
        check_labels(labels, self.num_classes, self.ignore_index)
        counted = labels != self.ignore_index
        pairs = labels[counted] * self.num_classes + check_ids(predicted[counted], self.num_classes)
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.matrix += counts.view(self.num_classes, self.num_classes).cpu().numpy()

    def merge(self, other: ConfusionMatrix) -> Self:
        """Add another matrix's counts; returns self."""
        self.matrix += other.matrix
        return self

    def metrics(self) -> SegmentationMetrics:
        """`segmentation_metrics` of the counts."""
        return segmentation_metrics(self.matrix)


class BoundaryIoU:
    """Boundary IoU (Cheng et al. 2021): IoU of each class's pixels near its own contour, summed over images.

    Pixels within 2 % of the image diagonal of the contour count, at least one pixel; the image border is a
    contour, as in the authors' code. Ignored pixels are cut out of labels and prediction alike.

    Args:
        num_classes: Number of classes N.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: The ignore index is one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        check_ignore_index(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.intersection: NDArray[np.int64] = np.zeros(num_classes, dtype=np.int64)
        self.union: NDArray[np.int64] = np.zeros(num_classes, dtype=np.int64)

    def update(self, predicted: Labels, labels: Labels) -> None:
        """Count one image: predicted and true label maps (H, W).

        Raises:
            ValueError: Shapes differ, a batch instead of one image, or an id outside the classes.
        """
        predicted, labels = matching_tensors(predicted, labels)
        if labels.ndim != 2:
            raise ValueError(f"BoundaryIoU takes one (H, W) label map at a time, got shape {tuple(labels.shape)}")
        check_labels(labels, self.num_classes, self.ignore_index)
        counted = labels != self.ignore_index
        check_ids(predicted[counted], self.num_classes)
        # One id past the classes stands for ignored pixels on both sides.
        true = torch.where(counted, labels, self.num_classes)
        guess = torch.where(counted, predicted, self.num_classes)
        distance = max(1, round(BOUNDARY_FRACTION * (labels.shape[0] ** 2 + labels.shape[1] ** 2) ** 0.5))
        true_rim, guess_rim = near_contour(true, distance), near_contour(guess, distance)
        both = self._count(true[true_rim & guess_rim & (true == guess)])
        self.intersection += both
        self.union += self._count(true[true_rim]) + self._count(guess[guess_rim]) - both

    def _count(self, ids: Tensor) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = torch.bincount(ids, minlength=self.num_classes + 1).cpu().numpy()
        return counts[: self.num_classes]

    def merge(self, other: BoundaryIoU) -> Self:
        """Add another accumulator's counts; returns self."""
        self.intersection += other.intersection
        self.union += other.union
        return self

    def per_class(self) -> tuple[float, ...]:
        """Boundary IoU of each class; nan where a class does not occur."""
        return tuple(ratio(self.intersection, self.union).tolist())

    def mean(self) -> float:
        """Mean over the classes that occur; nan if none does."""
        return mean_present(ratio(self.intersection, self.union))


def segmentation_metrics(matrix: NDArray[np.int64]) -> SegmentationMetrics:
    """IoU and accuracy from a confusion matrix (N, N), rows by true class.

    A class that occurs neither in labels nor in predictions has IoU nan and is left out of the mean; one that
    is only predicted has IoU 0 and accuracy nan.
    """
    correct = np.diag(matrix)
    true, predicted = matrix.sum(1), matrix.sum(0)
    iou, acc = ratio(correct, true + predicted - correct), ratio(correct, true)
    overall = ratio(correct.sum(keepdims=True), true.sum(keepdims=True))
    return SegmentationMetrics(
        mean_present(iou), mean_present(acc), float(overall[0]), tuple(iou.tolist()), tuple(acc.tolist())
    )


def near_contour(ids: Tensor, distance: int) -> Tensor:
    """Pixels of a label map (H, W) with another id or the outside within `distance` rows and columns."""
    outside = F.pad(ids.float()[None, None], (distance,) * 4, value=-1.0)
    lowest, highest = -window_max(-outside, distance), window_max(outside, distance)
    return (lowest != highest)[0, 0]


def window_max(values: Tensor, distance: int) -> Tensor:
    """Maximum over a square window of 2 * distance + 1 pixels, one axis after the other."""
    width = 2 * distance + 1
    return F.max_pool2d(F.max_pool2d(values, (width, 1), stride=1), (1, width), stride=1)


def matching_tensors(predicted: Labels, labels: Labels) -> tuple[Tensor, Tensor]:
    """Both as int64 tensors on the prediction's device."""
    first = torch.as_tensor(predicted).long()
    second = torch.as_tensor(labels).long().to(first.device)
    if first.shape != second.shape:
        raise ValueError(f"prediction {tuple(first.shape)} and labels {tuple(second.shape)} differ in shape")
    return first, second


def check_ids(predicted: Tensor, num_classes: int) -> Tensor:
    """The predicted ids, or ValueError if one lies outside the classes."""
    if predicted.numel() and not 0 <= int(predicted.min()) <= int(predicted.max()) < num_classes:
        raise ValueError(
            f"predicted ids run from {int(predicted.min())} to {int(predicted.max())}; "
            f"allowed are 0 to {num_classes - 1}; score a model of these {num_classes} classes"
        )
    return predicted


def ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """Element-wise quotient; nan where the whole is 0."""
    quotient: NDArray[np.float64] = np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
    return quotient


def mean_present(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not nan; nan if none is."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
