"""How sure a difference of two mIoUs is, from the images that both were measured on (paired bootstrap, Efron 1979).

A resample draws as many images as there are, with replacement, the same for both models; its mIoU comes from sums
of the images' pixel counts, exactly as that of the whole split does. So a resample is a row of weights, and many
are one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from pipeline.evaluation.per_image import CountTable
from pipeline.records import Record

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
# Weights held at once: 128 MB.
_BATCH_WEIGHTS = 1 << 24

# n images, K classes, R resamples


class Interval(Record):
    """Bounds of a difference, the share of resamples in which it is above zero, and how they were drawn."""

    low: float
    high: float
    share_above_zero: float
    confidence: float
    resamples: int


def difference_interval(
    first: CountTable,
    second: CountTable,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> Interval:
    """The percentile interval of the second mIoU minus the first; the tables' rows are the same images.

    Raises ValueError where they are not, or where there is none.
    """
    differences = resampled_differences(first, second, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(differences, [tail, 1 - tail])
    return Interval(
        low=float(low),
        high=float(high),
        share_above_zero=float((differences > 0).mean()),
        confidence=confidence,
        resamples=resamples,
    )


def mean_interval(
    tables: Sequence[CountTable],
    against: Sequence[CountTable] = (),
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> tuple[float, float]:
    """The percentile interval of the mean mIoU of models that were trained alike but for their seeds.

    A resample draws as many images and as many models as there are, both with replacement; so with one model it tells
    how sure the images make its mIoU, with several also how much another training would change it. `against`: as
    many models of another kind, trained with the same seeds in the same order, whose mean mIoU in the same resample is
    subtracted.

    Raises ValueError where the tables' rows are not the same images, or where there is none.
    """
    whole = [*tables, *against]
    if not tables or any(table.keys != whole[0].keys for table in whole) or not whole[0].keys:
        raise ValueError("the tables of an interval must hold the same images, at least one")
    if against and len(against) != len(tables):
        raise ValueError(f"{len(tables)} models against {len(against)}; each needs the other of its seed")
    rng = np.random.default_rng(seed)
    num_images, num_models = len(tables[0].keys), len(tables)
    means = []
    for start in range(0, resamples, batch := max(1, _BATCH_WEIGHTS // num_images)):
        size = min(batch, resamples - start)
        images = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=size).astype(np.float64)
        models = rng.multinomial(num_models, np.full(num_models, 1 / num_models), size=size) / num_models
        means.append(_weighted_mean_iou(tables, images, models))
        if against:
            means[-1] -= _weighted_mean_iou(against, images, models)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _weighted_mean_iou(
    tables: Sequence[CountTable], images: NDArray[np.float64], models: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(R,): mIoU under the weights of the images (R, n), averaged over the models by theirs (R, models)."""
    mious = [_mean_iou(images @ one.intersection, images @ one.union) for one in tables]
    mean: NDArray[np.float64] = (np.stack(mious, axis=1) * models).sum(1)
    return mean


def resampled_differences(first: CountTable, second: CountTable, *, resamples: int, seed: int) -> NDArray[np.float64]:
    """mIoU of the second minus that of the first in each resample (R,); nan where one has no labelled pixel."""
    if first.keys != second.keys or not first.keys:
        raise ValueError(f"the tables hold {len(first.keys)} and {len(second.keys)} images; they must be the same ones")
    occurs = (first.union.sum(0) > 0) | (second.union.sum(0) > 0)
    parts = [counts[:, occurs] for table in (first, second) for counts in (table.intersection, table.union)]
    # Whole numbers below 2**53 are exact as doubles, and products of them run on BLAS.
    counts = np.concatenate(parts, axis=1).astype(np.float64)
    num_images = len(counts)

    def differences(drawn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        drawn = np.atleast_2d(drawn)
        rows = np.arange(len(drawn))[:, None] * num_images
        weights = np.bincount((rows + drawn).ravel(), minlength=len(drawn) * num_images).reshape(-1, num_images)
        sums = weights.astype(np.float64) @ counts
        first_iou, first_union, second_iou, second_union = np.split(sums, 4, axis=1)
        return _mean_iou(second_iou, second_union) - _mean_iou(first_iou, first_union)

    # It draws from two or more; a single image counted twice has the same IoU.
    images = np.arange(max(2, num_images)) % num_images
    found: NDArray[np.float64] = scipy.stats.bootstrap(
        (images,),
        differences,
        n_resamples=resamples,
        batch=max(1, _BATCH_WEIGHTS // num_images),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    return found


def _mean_iou(intersection: NDArray[np.float64], union: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU (R,) over the classes that occur in a resample; nan where none does."""
    occurs = union > 0
    total = np.where(occurs, intersection / np.maximum(union, 1.0), 0.0).sum(1)
    number = occurs.sum(1)
    mean: NDArray[np.float64] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean
