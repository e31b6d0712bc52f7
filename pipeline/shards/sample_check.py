"""The checks that every sample passes before it enters a shard, and its scaling down."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets import RawDataset, RawPair, RawSample, RejectedSampleError
from pipeline.datasets.raw import Colour
from pipeline.fast_decode import encode_ids
from pipeline.large_files import is_large, read_large, reduced_size
from segvit.grey_range import GreyRange, measure_range, scale_values
from segvit.image_files import IGNORE_INDEX, SUFFIXES, DecodeError, ImageFile, encode_png, read_image_file, turn_label

JPEG_QUALITY = 95
_PNG_START = b"\x89PNG"


class CheckedSample(NamedTuple):
    """A sample as it goes into a shard; `row` is its row of the index but for its offsets in the tar.

    `image` is empty where its more than 8 bits a channel wait for a grey range.
    `index_colours`: as in RawPair.
    `grey_range`: of an image of more than 8 bits a channel, what it was scaled by, or what it was measured to hold.
    """

    row: dict[str, Any]
    image: bytes
    label_png: bytes
    index_colours: Mapping[int, Colour] = MappingProxyType({})
    grey_range: GreyRange | None = None

    @property
    def suffix(self) -> str:
        """Of the image's file name, by its content."""
        return SUFFIXES["PNG" if self.image.startswith(_PNG_START) else "JPEG"]


def check_sample(
    dataset: RawDataset, sample: RawSample, max_long_side: int | None = None, grey_range: GreyRange | None = None
) -> CheckedSample:
    """Read and decode `sample` once; raises RejectedSampleError.

    Where the image is longer than `max_long_side` pixels, it and its label map are scaled down to that, and may be of
    more pixels than are decoded whole. More than 8
    bits a channel are scaled by `grey_range` to 8, and measured where that is None. Otherwise the original bytes of
    JPEG and PNG stay, and other formats become PNG.
    """
    return check_pair(dataset, sample, read_pair(dataset, sample, max_long_side), max_long_side, grey_range)


def read_pair(dataset: RawDataset, sample: RawSample, max_long_side: int | None) -> RawPair:
    """What `check_pair` takes: the content of `sample`, a large label map as it is scaled down."""
    return dataset.read(replace(sample, max_long_side=max_long_side))


def check_pair(
    dataset: RawDataset,
    sample: RawSample,
    pair: RawPair,
    max_long_side: int | None = None,
    grey_range: GreyRange | None = None,
) -> CheckedSample:
    """`check_sample` of a sample whose content `read_pair` has read."""
    content, label, index_colours = pair
    image_sha256 = hashlib.sha256(content).digest()
    try:
        opened = _open_large(content, max_long_side) if is_large(content) else _open_whole(content, grey_range)
    except DecodeError as error:
        remedy = "replace the file or remove the sample"
        raise RejectedSampleError(sample.image, str(error), remedy) from error
    image, greys = opened.image, opened.grey_range
    if opened.label_turn is not None:
        label = turn_label(label, *opened.label_turn)
    height, width = label.shape
    if opened.label_size != (width, height):
        raise RejectedSampleError(
            sample.image,
            f"is {opened.size[1]}x{opened.size[0]} (height x width) but its label map {sample.label} is "
            f"{height}x{width}",
            "give both the same size or remove the sample",
        )
    if max_long_side is not None and max(opened.size) > max_long_side:
        content, label = _shrink(image, opened.suffix, label, reduced_size(opened.size, max_long_side))
        height, width = label.shape
    elif not opened.as_is:
        content = encode_png(np.asarray(image))
    if greys is not None and grey_range is None:
        content = b""
    counts = np.bincount(label.ravel(), minlength=IGNORE_INDEX + 1)
    class_pixels = counts[: len(dataset.class_names)]
    assert class_pixels.sum() + counts[IGNORE_INDEX] == label.size, "a data set let an unknown class id pass"
    if not class_pixels.any():
        reason = "contains only ignored pixels"
        raise RejectedSampleError(sample.label, reason, "label the image or remove the sample")
    label_png = encode_ids(label)
    row = {
        "key": sample.key,
        "image_size": len(content),
        "label_size": len(label_png),
        "height": height,
        "width": width,
        "class_pixels": class_pixels.tolist(),
        "image_sha256": image_sha256,
    }
    return CheckedSample(row, content, label_png, index_colours, greys)


class _Opened(NamedTuple):
    """An image of 8 bits, and what its label map has to be; sizes are (width, height).

    `size` is the whole one, `label_size` the label map's as the data set reads it. `label_turn`: of an image that the
    data set could not look at, what `turn_label` takes. `grey_range`: as in CheckedSample.
    """

    image: Image.Image
    suffix: str
    as_is: bool
    size: tuple[int, int]
    label_size: tuple[int, int]
    grey_range: GreyRange | None = None
    label_turn: tuple[tuple[int, int], int] | None = None


def _open_whole(content: bytes, grey_range: GreyRange | None) -> _Opened:
    file = read_image_file(content)
    image, greys = _to_eight_bits(file, grey_range)
    return _Opened(image, file.suffix, file.as_is, image.size, image.size, greys)


def _open_large(content: bytes, max_long_side: int | None) -> _Opened:
    large = read_large(content, max_long_side)
    assert max_long_side is not None, "read_large refuses None"
    suffix = SUFFIXES["PNG" if content.startswith(_PNG_START) else "JPEG"]
    turn = reduced_size(large.stored_size, max_long_side), large.orientation
    size = reduced_size(large.size, max_long_side)
    return _Opened(large.image, suffix, False, large.size, size, label_turn=turn)


def _to_eight_bits(file: ImageFile, grey_range: GreyRange | None) -> tuple[Image.Image, GreyRange | None]:
    """The image, and the range by which more than 8 bits were scaled: its own where none is given."""
    if file.image is not None:
        return file.image, None
    assert file.values is not None
    grey_range = grey_range or measure_range(file.values)
    if grey_range is None:
        raise DecodeError("holds no finite value")
    low, high = grey_range
    # An image of one value is scaled once others have been measured.
    return Image.fromarray(scale_values(file.values, (low, high if high > low else low + 1))), grey_range


def _shrink(
    image: Image.Image, suffix: str, label: NDArray[np.uint8], size: tuple[int, int]
) -> tuple[bytes, NDArray[np.uint8]]:
    """Image file and label map of `size`, (width, height)."""
    # Hamming averages over the area that a new pixel covers, and keeps edges sharper than a plain mean.
    smaller = image.resize(size, Image.Resampling.HAMMING)
    # Nearest, not an average: class ids do not average.
    smaller_label = Image.fromarray(label).resize(size, Image.Resampling.NEAREST)
    if suffix == SUFFIXES["PNG"]:
        return encode_png(np.asarray(smaller)), np.asarray(smaller_label)
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue(), np.asarray(smaller_label)
