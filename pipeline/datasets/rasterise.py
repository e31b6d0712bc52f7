"""Masks from outlines and run-length codes, as annotations in JSON hold them.

A pixel belongs to a polygon where its centre is inside by the even-odd rule: the rectangle (x0, y0)-(x1, y1) of whole
numbers covers exactly the columns x0 to x1 - 1 and the rows y0 to y1 - 1, and neighbours share no pixel. Everything is
bounded before memory is taken for it: an object by the image's size, all objects of an image by MAX_WORK.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.image_files import MAX_PIXELS, DecodeError

# Far above any outline that was drawn by hand; each row of pixels looks at all of them.
MAX_CORNERS = 1 << 16
MAX_POSITION = 1e9
# Of the rows that the sides of one polygon cross, all together.
MAX_CROSSINGS = 1 << 23
# Pixels that the objects of one image cover together, each its own rectangle: half a minute.
MAX_WORK = 1 << 31
# What the smallest object, a packed run, a sign of a code, a run and a crossing take, in such pixels.
_OBJECT_WORK, _PACKED_WORK, _SIGN_WORK, _RUN_WORK, _CROSSING_WORK = 1 << 14, 1 << 10, 1 << 6, 1 << 6, 1 << 5
_CIRCLE_PIXELS = 1 << 20  # at once


class Patch(NamedTuple):
    """An object: `mask` (h, w) of the rectangle whose upper left pixel is (top, left); `work` as MAX_WORK counts."""

    top: int
    left: int
    mask: NDArray[np.bool_]
    work: int = 0


class Canvas:
    """The label map (H, W) that objects are drawn on, later ones over earlier ones."""

    def __init__(self, label: NDArray[Any]) -> None:
        self.label = label
        self._work = 0

    def paint(self, patches: Iterable[Patch], value: int) -> None:
        """Give `value` to the pixels of `patches`; raises DecodeError once there are more than anyone annotates."""
        for top, left, mask, work in patches:
            self._spend(mask, work)
            self.label[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = value

    def area(self, patches: Iterable[Patch]) -> int:
        """The pixels that `patches` cover together; raises DecodeError as `paint` does."""
        kept: list[Patch] = []
        for patch in patches:
            self._spend(patch.mask, patch.work)
            kept.append(patch)
        if len(kept) < 2:
            return sum(int(patch.mask.sum()) for patch in kept)
        top, left = min(patch.top for patch in kept), min(patch.left for patch in kept)
        bottom = max(patch.top + patch.mask.shape[0] for patch in kept)
        right = max(patch.left + patch.mask.shape[1] for patch in kept)
        union = np.zeros((bottom - top, right - left), dtype=bool)
        for patch in kept:
            height, width = patch.mask.shape
            union[patch.top - top :, patch.left - left :][:height, :width] |= patch.mask
        return int(union.sum())

    def _spend(self, mask: NDArray[np.bool_], work: int) -> None:
        self._work += max(mask.size + work, _OBJECT_WORK)
        if self._work > MAX_WORK:
            raise DecodeError(
                f"holds objects of {self._work} pixels together, more than the {MAX_WORK} that are drawn; scale the "
                "image down or merge objects"
            )


def draw_segmentation(segmentation: Any, height: int, width: int) -> Iterator[Patch]:
    """COCO's `segmentation`: a list of polygons, or {"size": [H, W], "counts": run lengths}.

    Raises DecodeError, and TypeError, ValueError or LookupError for what is of another form.
    """
    if isinstance(segmentation, list):
        for polygon in segmentation:
            yield draw_polygon(polygon, height, width)
        return
    size, counts = tuple(segmentation["size"]), segmentation["counts"]
    if size != (height, width):
        raise DecodeError(f"holds a mask of size {size} for an image of {height}x{width} (height x width)")
    signs = len(counts) if isinstance(counts, str) else 0
    patch = draw_runs(decode_counts(counts) if isinstance(counts, str) else counts, height, width)
    yield patch._replace(work=patch.work + _SIGN_WORK * signs)


def checked_size(height: Any, width: Any) -> tuple[int, int]:
    """Height and width of an image as an annotation file says them; raises DecodeError."""
    if not isinstance(height, int) or not isinstance(width, int) or not (height > 0 and width > 0):
        raise DecodeError(f"gives the image the size {height!r:.40} x {width!r:.40} (height x width)")
    if height * width > MAX_PIXELS:
        raise DecodeError(f"gives the image {height}x{width} pixels, more than the {MAX_PIXELS} allowed")
    return height, width


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed string: base 32, six bits a sign, each less the one two before it."""
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64:
            raise DecodeError(f"holds the sign {sign!r} in a run-length code")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise DecodeError("holds a run-length code without end")
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def draw_runs(counts: Sequence[int], height: int, width: int) -> Patch:
    """Run lengths down the columns, outside first; raises DecodeError where they do not fill (height, width)."""
    num_pixels = height * width
    # Each below a bound, and not too many: their sum cannot pass the range of integers.
    is_bounded = len(counts) <= 2 * num_pixels + 1 and all(0 <= count <= num_pixels for count in counts)
    runs = np.asarray(counts if is_bounded else [], dtype=np.int64)
    if runs.ndim != 1 or runs.sum() != num_pixels:
        raise DecodeError(f"holds run lengths that do not fill {height}x{width} pixels")
    ends = np.cumsum(runs)
    inside = np.flatnonzero(runs[1::2]) * 2 + 1
    if not inside.size:
        return Patch(0, 0, np.zeros((0, 0), dtype=bool), _RUN_WORK * len(runs))
    # The columns alone that have a pixel of it.
    left, right = int(ends[inside[0] - 1] // height), int(-(-ends[inside[-1]] // height))
    borders = np.clip(ends, left * height, right * height)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, np.diff(borders, prepend=left * height))
    return Patch(0, left, pixels.reshape(right - left, height).T, _RUN_WORK * len(runs))


def draw_polygon(points: Sequence[float], height: int, width: int) -> Patch:
    """The pixels whose centres are inside the closed polygon [x0, y0, x1, y1, ...], by the even-odd rule."""
    if len(points) > 2 * MAX_CORNERS:
        raise DecodeError(f"holds a polygon of {len(points) // 2} points, more than the {MAX_CORNERS} allowed")
    corners = np.asarray(points, dtype=np.float64)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not (np.abs(corners) < MAX_POSITION).all():
        raise DecodeError("holds a polygon that is not a list of at least three points")
    x0, y0 = corners[0::2], corners[1::2]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    # The rows whose centre is between the ends of each side: the upper end counts, the lower one does not.
    first, last = (np.clip(np.ceil(end - 0.5), 0, height).astype(np.int64) for end in _ends(y0, y1))
    counts = last - first
    num_crossings = int(counts.sum())
    if num_crossings > MAX_CROSSINGS:
        raise DecodeError(
            f"holds a polygon whose sides cross {num_crossings} rows of pixels, more than the {MAX_CROSSINGS} allowed"
        )
    if not num_crossings:
        return Patch(0, 0, np.zeros((0, 0), dtype=bool))
    side = np.repeat(np.arange(len(x0)), counts)
    rows = np.arange(num_crossings) - np.repeat(np.cumsum(counts) - counts - first, counts)
    x = x0[side] + (rows + 0.5 - y0[side]) * (x1[side] - x0[side]) / (y1[side] - y0[side])
    # From this column on a pixel has one side more to its left.
    columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    top, left = int(rows.min()), int(columns.min())
    sides = np.zeros((int(rows.max()) + 1 - top, int(columns.max()) + 1 - left), np.uint8)
    # Modulo 256, which leaves odd numbers odd.
    np.add.at(sides, (rows - top, columns - left), 1)
    inside = np.bitwise_xor.accumulate(sides & 1, axis=1)[:, :-1]
    return Patch(top, left, inside.view(np.bool_), _CROSSING_WORK * num_crossings)


def _ends(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.minimum(one, other), np.maximum(one, other)


def draw_circle(x: float, y: float, radius: float, height: int, width: int) -> Patch:
    """The pixels whose centres are at most `radius` from (x, y)."""
    if not all(abs(value) < MAX_POSITION for value in (x, y, radius)):
        raise DecodeError("holds a circle that is not a point and a radius")
    (top, bottom), (left, right) = (
        (min(max(0, int(centre - radius - 1)), size), min(size, max(0, int(centre + radius + 2))))
        for centre, size in ((y, height), (x, width))
    )
    columns = np.arange(left, right) + 0.5 - x
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    at_once = max(1, _CIRCLE_PIXELS // max(1, len(columns)))
    for start in range(0, len(mask), at_once):
        rows = np.arange(top + start, min(bottom, top + start + at_once)) + 0.5 - y
        mask[start : start + at_once] = columns**2 + rows[:, None] ** 2 <= radius**2
    return Patch(top, left, mask)


def draw_packed_runs(data: bytes, height: int, width: int) -> Patch:
    """The pixels that are not fully transparent in RGBA pixels, row by row, as Label Studio packs them.

    The format is that of the package rle-pack of thi.ng/umbrella. In bits, upper ones first: 32 for the number of
    words; 5 for the bits of a word less 1; 4 times 4 for the bits of a run's length less 1, of which a run chooses one.
    Then runs: 1 bit, whether one word is repeated; 2 for the choice; the length less 1; the word, or as many words as
    the run is long. Raises DecodeError.
    """
    bits = _Bits(data)
    num_words, word_bits = bits.read(32), bits.read(5) + 1
    length_bits = [bits.read(4) + 1 for _ in range(4)]
    if word_bits != 8 or num_words != 4 * height * width:
        raise DecodeError(f"holds a brush mask of {num_words} words of {word_bits} bits for {height}x{width} pixels")
    words = np.zeros(num_words, np.uint8)
    start = num_runs = 0
    while start < num_words:
        num_runs += 1
        if num_runs > MAX_WORK // _PACKED_WORK:
            raise DecodeError(f"holds a brush mask of more than the {MAX_WORK // _PACKED_WORK} runs allowed")
        is_repeated = bits.read(1)
        end = start + 1 + bits.read(length_bits[bits.read(2)])
        if end > num_words:
            raise DecodeError(f"holds a brush mask that does not end with its {height}x{width} pixels")
        if is_repeated:
            words[start:end] = bits.read(8)
        else:
            values = bits.read(8 * (end - start)).to_bytes(end - start)
            words[start:end] = np.frombuffer(values, np.uint8)
        start = end
    return Patch(0, 0, words[3::4].reshape(height, width) > 0, _PACKED_WORK * num_runs)


class _Bits:
    """Numbers read one after the other from `data`, upper bits first."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def read(self, num_bits: int) -> int:
        """The next number; raises DecodeError behind the end."""
        end = self._position + num_bits
        if end > 8 * len(self._data):
            raise DecodeError("holds a brush mask that is cut off")
        whole = int.from_bytes(self._data[self._position // 8 : (end + 7) // 8])
        self._position = end
        return whole >> (-end % 8) & ((1 << num_bits) - 1)
