"""Masks from outlines and run-length codes, as annotations in JSON hold them.

A pixel belongs to a polygon where its centre is inside by the even-odd rule: the rectangle (x0, y0)-(x1, y1) of whole
numbers covers exactly the columns x0 to x1 - 1 and the rows y0 to y1 - 1, and neighbours share no pixel. Everything is
bounded by the image's size before memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segvit.image_files import MAX_PIXELS, DecodeError

# Far above any outline that was drawn by hand; each row of pixels looks at all of them.
MAX_CORNERS = 1 << 16
MAX_POSITION = 1e9


def draw_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W) of COCO's `segmentation`: a list of polygons, or {"size": [H, W], "counts": run lengths}.

    Raises DecodeError, and TypeError, ValueError or LookupError for what is of another form.
    """
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        for polygon in segmentation:
            mask |= draw_polygon(polygon, height, width)
        return mask
    size, counts = tuple(segmentation["size"]), segmentation["counts"]
    if size != (height, width):
        raise DecodeError(f"holds a mask of size {size} for an image of {height}x{width} (height x width)")
    return draw_runs(decode_counts(counts) if isinstance(counts, str) else counts, height, width)


def checked_size(height: Any, width: Any) -> tuple[int, int]:
    """Height and width of an image as an annotation file says them; raises DecodeError."""
    if not isinstance(height, int) or not isinstance(width, int) or not (height > 0 and width > 0):
        raise DecodeError(f"gives the image the size {height!r} x {width!r} (height x width)")
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


def draw_runs(counts: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """(H, W) from run lengths down the columns, outside first; raises DecodeError where they do not fill it."""
    num_pixels = height * width
    # Each below a bound, and not too many: their sum cannot pass the range of integers.
    is_bounded = len(counts) <= 2 * num_pixels + 1 and all(0 <= count <= num_pixels for count in counts)
    runs = np.asarray(counts if is_bounded else [], dtype=np.int64)
    if runs.ndim != 1 or runs.sum() != num_pixels:
        raise DecodeError(f"holds run lengths that do not fill {height}x{width} pixels")
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return mask.reshape(width, height).T


def draw_polygon(points: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """(H, W): the pixels whose centres are inside the closed polygon [x0, y0, x1, y1, ...], by the even-odd rule."""
    if len(points) > 2 * MAX_CORNERS:
        raise DecodeError(f"holds a polygon of {len(points) // 2} points, more than the {MAX_CORNERS} allowed")
    corners = np.asarray(points, dtype=np.float64)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not (np.abs(corners) < MAX_POSITION).all():
        raise DecodeError("holds a polygon that is not a list of at least three points")
    x0, y0 = corners[0::2], corners[1::2]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    mask = np.zeros((height, width), dtype=bool)
    columns = np.arange(width) + 0.5
    for row in range(max(0, int(y0.min() - 1)), min(height, int(y0.max() + 1))):
        y = row + 0.5
        crosses = (y0 <= y) != (y1 <= y)
        x = np.sort(x0[crosses] + (y - y0[crosses]) * (x1[crosses] - x0[crosses]) / (y1[crosses] - y0[crosses]))
        mask[row] = np.searchsorted(x, columns, side="right") % 2 == 1
    return mask


def draw_circle(x: float, y: float, radius: float, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W): the pixels whose centres are at most `radius` from (x, y)."""
    if not all(abs(value) < MAX_POSITION for value in (x, y, radius)):
        raise DecodeError("holds a circle that is not a point and a radius")
    columns, rows = np.arange(width) + 0.5 - x, np.arange(height) + 0.5 - y
    return np.asarray(columns**2 + rows[:, None] ** 2 <= radius**2)


def draw_packed_runs(data: bytes, height: int, width: int) -> NDArray[np.bool_]:
    """(H, W): the pixels that are not fully transparent in RGBA pixels, row by row, as Label Studio packs them.

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
    start = 0
    while start < num_words:
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
    return words[3::4].reshape(height, width) > 0


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
