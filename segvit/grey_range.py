"""Images of more than 8 bits a channel: the range of values that 0 to 255 stand for.

Cameras of 12 bits, thermal imagers and detectors use a part of 16 bits that only the data tells: microscopes 0 to 4095,
thermal imagers a few thousand values around 29000. A model therefore keeps the range that its training images were
scaled by, and every later image is scaled by the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GreyRange = tuple[float, float]  # values that become 0 and 255
# Of an image's values: a few hot or dead pixels must not say what is white or black.
PERCENTILES = (0.1, 99.9)
# In 16 bits: what writers put where nothing was measured, and where the detector was saturated.
_MARKS = (0, 65535)
_ROWS_AT_ONCE = 256


def measure_range(values: NDArray[Any]) -> GreyRange | None:
    """The 0.1 and 99.9 percentiles of an image's `values`, both of them values of the image.

    Left out are values that are not finite and, of 16-bit images with others, 0 and 65535. None where nothing is left.
    """
    if values.dtype == np.uint16:
        counts = np.bincount(values.ravel(), minlength=1 << 16)
        inner = counts.copy()
        inner[list(_MARKS)] = 0
        counts = inner if inner.any() else counts
        found, sums = np.flatnonzero(counts), np.cumsum(counts[counts > 0])
    else:
        found, numbers = np.unique(values[np.isfinite(values)], return_counts=True)
        sums = np.cumsum(numbers)
    if not len(found):
        return None
    low, high = (found[np.searchsorted(sums, sums[-1] * percent / 100)] for percent in PERCENTILES)
    return float(low), float(high)


def join_ranges(first: GreyRange | None, second: GreyRange | None) -> GreyRange | None:
    """The smallest range that holds both; None holds nothing."""
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), max(first[1], second[1])


def scale_values(values: NDArray[Any], grey_range: GreyRange) -> NDArray[np.uint8]:
    """`values` as 8 bits: the ends of the range become 0 and 255, between them in proportion, rounded half up.

    What lies outside the range becomes the nearer end, what is no number 0.
    """
    if values.dtype == np.uint16:
        return np.asarray(_scale(np.arange(1 << 16), grey_range)[values], np.uint8)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        scaled[rows] = _scale(values[rows], grey_range)
    return scaled


def _scale(values: NDArray[Any], grey_range: GreyRange) -> NDArray[np.uint8]:
    low, high = grey_range
    levels = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.nan_to_num(np.clip(levels, 0, 255), nan=0.0) + 0.5).astype(np.uint8)
