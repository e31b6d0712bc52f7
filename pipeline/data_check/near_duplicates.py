"""Images that look alike across splits: frames of one video, copies of one augmentation.

A perceptual hash: the signs of an image's lowest cosine frequencies but for its mean brightness. Mirroring and turning
an image by 90 degrees only changes signs of frequencies and swaps axes, so turned copies are found, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FREQUENCIES = 8
THUMBNAIL = 32  # pixels
MAX_DIFFERENT_BITS = 8
"""Of 63. Unrelated images differ in about half of them."""
_FLAT = 2.0  # grey levels: what varies less shows nothing to compare
_CHUNK = 256


class Match(NamedTuple):
    """An image, by its index among the first ones, and its nearest among the others."""

    first: int
    second: int
    different_bits: int


def perceptual_hash(image: Image.Image) -> NDArray[np.float32] | None:
    """(8, 8) lowest cosine frequencies of `image` in grey; None for an image without structure."""
    grey = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    if grey.std() < _FLAT:
        return None
    return np.asarray(_COSINES @ grey.astype(np.float32) @ _COSINES.T, np.float32)


def find_matches(first: NDArray[np.float32], second: NDArray[np.float32]) -> Iterator[Match]:
    """Each of `first` (n, 8, 8) with its nearest of `second` (m, 8, 8), where they look alike in some orientation."""
    if not len(first) or not len(second):
        return
    codes = _codes(second)
    for start in range(0, len(first), _CHUNK):
        part = first[start : start + _CHUNK]
        distances = np.full((len(part), len(second)), 64, np.uint8)
        for oriented in _orientations(part):
            np.minimum(distances, np.bitwise_count(_codes(oriented)[:, None] ^ codes), out=distances)
        nearest = distances.argmin(axis=1)
        for row in np.flatnonzero(distances.min(axis=1) <= MAX_DIFFERENT_BITS).tolist():
            yield Match(start + row, int(nearest[row]), int(distances[row, nearest[row]]))


def stack(hashes: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """(n, 8, 8) of n hashes, also of none."""
    return np.stack(hashes) if hashes else np.empty((0, FREQUENCIES, FREQUENCIES), np.float32)


def _orientations(frequencies: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    odd = np.where(np.arange(FREQUENCIES) % 2, -1, 1).astype(np.float32)
    for one in (frequencies, frequencies.swapaxes(1, 2)):
        yield from (one, one * odd, one * odd[:, None], one * odd * odd[:, None])


def _codes(frequencies: NDArray[np.float32]) -> NDArray[np.uint64]:
    """(n,) of (n, 8, 8): a bit a frequency; the mean brightness has none."""
    bits = (frequencies > 0).reshape(len(frequencies), -1)
    bits[:, 0] = False
    packed = np.packbits(bits, axis=1)
    return np.ascontiguousarray(packed).view(np.uint64)[:, 0]


def _cosines() -> NDArray[np.float32]:
    """(8, 32): the first rows of a discrete cosine transform."""
    places = np.arange(THUMBNAIL) + 0.5
    return np.cos(np.pi / THUMBNAIL * np.arange(FREQUENCIES)[:, None] * places).astype(np.float32)


_COSINES = _cosines()
