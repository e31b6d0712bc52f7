from __future__ import annotations

import time

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.evaluation.bootstrap import difference_interval, resampled_differences
from pipeline.evaluation.per_image import CountTable
from segvit.metrics import segmentation_metrics


def measured(matrices: NDArray[np.int64]) -> CountTable:
    """The counts in confusion matrices (n, K, K)."""
    keys = tuple(f"{image:05d}" for image in range(len(matrices)))
    intersection = np.diagonal(matrices, axis1=1, axis2=2).copy()
    return CountTable(keys, intersection, matrices.sum(1), matrices.sum(2))


def two_models(rng: np.random.Generator, num_images: int, num_classes: int) -> tuple[CountTable, CountTable]:
    """Random matrices; the second model is better, both better on easy images; a class is rare, one never occurs."""
    easy = rng.uniform(0.3, 1.0, num_images)
    occurs = rng.random((num_images, num_classes)) < np.linspace(0.9, 0.15, num_classes)
    occurs[:, -1] = False
    pixels = np.where(occurs, rng.integers(200, 4000, (num_images, num_classes)), 0)
    tables = []
    for skill in (0.75, 0.8):
        right = rng.binomial(pixels, np.clip(skill * easy, 0, 1)[:, None])
        matrices = np.zeros((num_images, num_classes, num_classes), np.int64)
        for true in range(num_classes):
            wrong = rng.integers(0, num_classes - 1, num_images)
            matrices[np.arange(num_images), true, wrong] += pixels[:, true] - right[:, true]
            matrices[:, true, true] += right[:, true]
        tables.append(measured(matrices))
    return tables[0], tables[1]


def slow_miou(table: CountTable, images: list[int]) -> float:
    """mIoU of some images, some more than once, class by class and image by image."""
    ious = []
    for label in range(table.intersection.shape[1]):
        both = either = 0
        for image in images:
            both += int(table.intersection[image, label])
            either += int(table.predicted[image, label] + table.labelled[image, label])
        if either:
            ious.append(both / (either - both))
    return sum(ious) / len(ious)


def test_resampled_differences__equal_an_image_by_image_count() -> None:
    first, second = two_models(np.random.default_rng(1), 9, 5)
    fast = resampled_differences(first, second, resamples=40, seed=7)
    # The same draws: all of them come from one generator, row by row.
    rng = np.random.default_rng(7)
    slow = []
    for _ in range(40):
        images = rng.integers(0, 9, 9).tolist()
        slow.append(slow_miou(second, images) - slow_miou(first, images))
    assert fast == pytest.approx(slow, abs=1e-12)
    assert len(set(slow)) > 30


def test_resampled_differences__do_not_depend_on_how_many_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two_models(np.random.default_rng(2), 13, 6)
    whole = resampled_differences(first, second, resamples=50, seed=3)
    monkeypatch.setattr("pipeline.evaluation.bootstrap._BATCH_WEIGHTS", 40)
    assert resampled_differences(first, second, resamples=50, seed=3) == pytest.approx(whole, abs=1e-15)


def test_count_table__whole_split_gives_the_reported_miou() -> None:
    first, _ = two_models(np.random.default_rng(3), 20, 5)
    assert slow_miou(first, list(range(20))) == pytest.approx(np.nanmean(first.class_ious()), abs=1e-12)
    assert np.isnan(first.class_ious()[-1])


def test_difference_interval__same_model_twice_is_exactly_zero() -> None:
    first, _ = two_models(np.random.default_rng(4), 30, 5)
    interval = difference_interval(first, first, resamples=200)
    assert (interval.low, interval.high, interval.share_above_zero) == (0.0, 0.0, 0.0)


def test_difference_interval__of_a_single_image_is_its_difference() -> None:
    first, second = two_models(np.random.default_rng(11), 1, 4)
    interval = difference_interval(first, second, resamples=20)
    true = slow_miou(second, [0]) - slow_miou(first, [0])
    assert (interval.low, interval.high) == pytest.approx((true, true), abs=1e-12)


def test_difference_interval__is_seeded_and_ordered() -> None:
    first, second = two_models(np.random.default_rng(5), 60, 5)
    one, again = (difference_interval(first, second, resamples=500) for _ in range(2))
    assert one == again
    reverse = difference_interval(second, first, resamples=500)
    assert (reverse.low, reverse.high) == pytest.approx((-one.high, -one.low))
    assert one.low < np.nanmean(second.class_ious()) - np.nanmean(first.class_ious()) < one.high


def test_difference_interval__covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    everything = two_models(rng, 20_000, 4)
    true = float(np.nanmean(everything[1].class_ious()) - np.nanmean(everything[0].class_ious()))
    hits = 0
    for _ in range(120):
        drawn = rng.integers(0, 20_000, 100)
        some = [
            CountTable(
                tuple(map(str, range(100))), table.intersection[drawn], table.predicted[drawn], table.labelled[drawn]
            )
            for table in everything
        ]
        interval = difference_interval(some[0], some[1], resamples=400, seed=0)
        hits += interval.low <= true <= interval.high
    # 95 % of 120 is 114; below 107 has a chance of 0.2 %.
    assert 107 <= hits <= 120


def test_difference_interval__ten_thousand_resamples_take_seconds() -> None:
    first, second = two_models(np.random.default_rng(8), 500, 20)
    started = time.process_time()
    assert difference_interval(first, second).resamples == 10_000
    assert time.process_time() - started < 20


def test_resampled_differences__other_images_are_refused() -> None:
    first, second = two_models(np.random.default_rng(9), 5, 4)
    other = CountTable(("a", "b", "c", "d", "e"), second.intersection, second.predicted, second.labelled)
    with pytest.raises(ValueError, match="the tables hold 5 and 5 images; they must be the same ones"):
        resampled_differences(first, other, resamples=2, seed=0)


def test_image_mious__agree_with_confusion_matrices() -> None:
    rng = np.random.default_rng(10)
    matrices = rng.integers(0, 50, (4, 3, 3))
    matrices[1, 2, :] = 0
    matrices[1, :, 2] = 0
    expected = [segmentation_metrics(matrix).miou for matrix in matrices]
    assert measured(matrices).image_mious() == pytest.approx(expected)
