from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segvit.metrics import BoundaryIoU, ConfusionMatrix, near_contour, segmentation_metrics

PREDICTED = np.array([[0, 0, 1], [1, 1, 2], [2, 2, 0]])
LABELS = np.array([[0, 0, 0], [1, 1, 255], [2, 1, 0]])


def test_confusion_matrix__hand_computed() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(PREDICTED, LABELS)
    assert matrix.matrix.tolist() == [[3, 1, 0, 0], [0, 2, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert matrix.matrix.dtype == np.int64


def test_segmentation_metrics__hand_computed() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(torch.from_numpy(PREDICTED), torch.from_numpy(LABELS))
    metrics = matrix.metrics()
    assert metrics.per_class_iou[:3] == pytest.approx((3 / 4, 2 / 4, 1 / 2))
    assert metrics.per_class_acc[:3] == pytest.approx((3 / 4, 2 / 3, 1))
    assert metrics.miou == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert metrics.macc == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert metrics.aacc == pytest.approx(6 / 8)
    assert math.isnan(metrics.per_class_iou[3])
    assert math.isnan(metrics.per_class_acc[3])


def test_segmentation_metrics__only_predicted_class_counts_as_zero() -> None:
    metrics = segmentation_metrics(np.array([[2, 2], [0, 0]]))
    assert metrics.per_class_iou == (0.5, 0.0)
    assert metrics.miou == 0.25
    assert metrics.macc == 0.5


def test_segmentation_metrics__nothing_counted_is_nan() -> None:
    metrics = segmentation_metrics(np.zeros((2, 2), dtype=np.int64))
    assert all(math.isnan(value) for value in (metrics.miou, metrics.macc, metrics.aacc))


@given(seed=st.integers(0, 500), absent=st.integers(0, 4))
def test_mean_iou__absent_class_changes_nothing(seed: int, absent: int) -> None:
    """Inserting a class that never occurs leaves the means as they were."""
    matrix = np.random.default_rng(seed).integers(1, 50, (4, 4))
    wider = np.insert(np.insert(matrix, absent, 0, axis=0), absent, 0, axis=1)
    before, after = segmentation_metrics(matrix), segmentation_metrics(wider)
    assert (before.miou, before.macc, before.aacc) == (after.miou, after.macc, after.aacc)


def test_merge__equals_counting_in_one_place() -> None:
    rng = np.random.default_rng(0)
    maps = [(rng.integers(0, 3, (20, 30)), rng.integers(0, 3, (20, 30))) for _ in range(4)]
    for kind in (ConfusionMatrix, BoundaryIoU):
        whole, first, second = kind(3), kind(3), kind(3)
        for index, (predicted, labels) in enumerate(maps):
            whole.update(predicted, labels)
            (first if index % 2 else second).update(predicted, labels)
        first.merge(second)  # type: ignore[arg-type]
        for name, value in vars(whole).items():
            np.testing.assert_array_equal(getattr(first, name), value)


def test_update__bad_input_is_refused() -> None:
    for accumulator in (ConfusionMatrix(3), BoundaryIoU(3)):
        with pytest.raises(ValueError, match="labels hold 7; allowed are the classes 0 to 2 and 255 for ignored"):
            accumulator.update(np.zeros((1, 2), dtype=int), np.array([[0, 7]]))
        with pytest.raises(ValueError, match="predicted ids run from 0 to 3"):
            accumulator.update(np.array([[0, 3]]), np.zeros((1, 2), dtype=int))
        with pytest.raises(ValueError, match=r"prediction \(1, 2\) and labels \(2, 1\) differ in shape"):
            accumulator.update(np.zeros((1, 2), dtype=int), np.zeros((2, 1), dtype=int))
    with pytest.raises(ValueError, match=r"one .* label map at a time"):
        BoundaryIoU(3).update(np.zeros((1, 2, 2), dtype=int), np.zeros((1, 2, 2), dtype=int))


def test_near_contour__border_and_other_ids() -> None:
    ids = torch.zeros(7, 7)
    assert near_contour(ids, 2).sum().item() == 49 - 9
    ids[3, 3] = 1
    assert near_contour(ids, 1).int().tolist()[3] == [1, 0, 1, 1, 1, 0, 1]


def eroded_rim(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """The published definition: the mask less its erosion by a 3 x 3 square, `distance` times."""
    eroded = mask
    for _ in range(distance):
        padded = np.pad(eroded, 1)
        height, width = mask.shape
        shifts = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
        eroded = np.logical_and.reduce(shifts)
    return mask & ~eroded


def test_boundary_iou__equals_erosion_of_each_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (9, 12)).repeat(10, 0).repeat(10, 1)
    predicted = np.roll(labels, (2, 3), (0, 1))
    labels[20:30, 40:70] = 255
    accumulator = BoundaryIoU(4)
    accumulator.update(predicted, labels)
    distance = round(0.02 * math.hypot(90, 120))
    assert distance == 3
    expected = []
    for index in range(3):
        rims = [eroded_rim((ids == index) & (labels != 255), distance) for ids in (predicted, labels)]
        expected.append((rims[0] & rims[1]).sum() / (rims[0] | rims[1]).sum())
    assert accumulator.per_class()[:3] == pytest.approx(expected)
    assert math.isnan(accumulator.per_class()[3])
    assert accumulator.mean() == pytest.approx(np.mean(expected))


def test_boundary_iou__perfect_prediction_is_one() -> None:
    labels = np.eye(30, dtype=int)
    accumulator = BoundaryIoU(2)
    accumulator.update(labels, labels)
    assert accumulator.per_class() == (1.0, 1.0)
