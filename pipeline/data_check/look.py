"""One sample, looked at: what its files are, what its label map holds, and whether it can be used."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data_check.near_duplicates import perceptual_hash
from pipeline.datasets import RawDataset, RawPair, RawSample, RejectedSampleError
from pipeline.datasets.raw import Colour
from pipeline.large_files import large_size
from pipeline.shards.sample_check import CheckedSample, check_pair, read_pair
from segvit.grey_range import GreyRange

_PNG_DEPTH = 24  # byte of the header
_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}


@dataclass(frozen=True, slots=True)
class Look:
    """A sample that was looked at.

    Attributes:
        rejected: why it cannot be used; None for a good one.
        kind: of the image file, such as "JPEG RGB 8 bit"; empty where it cannot be read.
        size: (height, width) of the image, pixels; (0, 0) where it cannot be read.
        num_pixels: of the label map; 0 for a rejected one.
        class_pixels: by class id; empty for a rejected one.
        unknown: ids or colours of the label map that no class has, with their pixels.
        frequencies: (8, 8), see `perceptual_hash`.
        grey_range: of an image of more than 8 bits a channel, the values that it holds or is scaled by.
    """

    sample: RawSample
    rejected: RejectedSampleError | None = None
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    num_pixels: int = 0
    class_pixels: tuple[int, ...] = ()
    unknown: Mapping[str, int] = field(default_factory=dict)
    index_colours: Mapping[int, Colour] = field(default_factory=dict)
    image_sha256: bytes = b""
    frequencies: NDArray[np.float32] | None = None
    grey_range: GreyRange | None = None


def look_at(dataset: RawDataset, sample: RawSample, config: DataConfig) -> Look:
    """Read and judge `sample`; whatever is wrong with it is in the result."""
    try:
        pair = read_pair(dataset, sample, config.max_long_side)
    except RejectedSampleError as error:
        return Look(sample, error, unknown=error.unknown)
    image_sha256 = hashlib.sha256(pair.image).digest()
    kind, size = _describe(pair.image)
    try:
        checked = check_visibly(dataset, sample, pair, config)
    except RejectedSampleError as error:
        return Look(sample, error, kind, size, image_sha256=image_sha256)
    with Image.open(io.BytesIO(checked.image)) as image:
        frequencies = perceptual_hash(image)
    return Look(
        sample,
        kind=kind,
        size=size,
        num_pixels=pair.label.size,
        class_pixels=tuple(checked.row["class_pixels"]),
        index_colours=pair.index_colours,
        image_sha256=image_sha256,
        frequencies=frequencies,
        grey_range=checked.grey_range,
    )


def check_visibly(dataset: RawDataset, sample: RawSample, pair: RawPair, config: DataConfig) -> CheckedSample:
    """`check_pair`, and an image of more than 8 bits a channel by its own range where no other is stated."""
    checked = check_pair(dataset, sample, pair, config.max_long_side, config.grey_range)
    if checked.image:
        return checked
    assert checked.grey_range is not None
    low, high = checked.grey_range
    return check_pair(dataset, sample, pair, config.max_long_side, (low, max(high, low + 1)))


def _describe(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format, mode and bits, and (height, width); nothing for what is no picture."""
    large = large_size(data)
    if large is not None:
        return "large PNG" if data.startswith(b"\x89PNG") else "large JPEG", large[::-1]
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Pillow gives 16-bit colours of PNG as RGB.
            is_deep = image.format == "PNG" and data[_PNG_DEPTH] == 16
            bits = 16 if is_deep else _BITS.get(image.mode, 8)
            mode = "L" if image.mode in _BITS else image.mode
            return f"{image.format} {mode} {bits} bit", (image.height, image.width)
    # Damaged files raise nearly anything; the sample's own check says what is wrong.
    except Exception:
        return "", (0, 0)
