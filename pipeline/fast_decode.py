"""Images and label maps for training: the same pixels as `segvit.image_files`, decoded faster or smaller.

simplejpeg is libjpeg-turbo straight into an array, half again as fast as Pillow, and scales in the DCT domain. Label
maps are written without PNG's filters, which help nothing in class ids, so that reading them is inflating them. What
is read differently from Pillow (CMYK, palettes, 16 bits, images that are no JPEG) is left to `segvit.image_files`.
"""

from __future__ import annotations

import functools
import io
import struct

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from zlib_ng import zlib_ng

from segvit.image_files import MAX_PIXELS, DecodeError, decode_label, exif_orientation, open_image

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_HEADER = struct.Struct(">II5s")  # width, height; depth, colour, compression, filter, interlace
_GREY_8_BIT = b"\x08\0\0\0\0"
_PNG_CHUNK = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_UNFILTERED = (
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT),
    *(cv2.IMWRITE_PNG_COMPRESSION, 6),
)


def decode_reduced(data: bytes, reduction: int = 1) -> NDArray[np.uint8]:
    """The RGB image in `data`, each pixel the mean of `reduction` x `reduction`: (ceil(H / r), ceil(W / r), 3).

    `reduction` is a power of two; JPEG files are reduced in the DCT domain, up to 8, whose mean is near the box's.
    The array may be written to. Raises DecodeError.
    """
    use_one_thread()
    pixels = _decode_jpeg(data, min(reduction, 8)) if _is_plain_jpeg(data) else None
    if pixels is None:
        return _reduce(open_image(data)[0], reduction)
    return pixels if reduction <= 8 else _reduce(Image.fromarray(pixels), reduction // 8)


def decode_ids(data: bytes) -> NDArray[np.uint8]:
    """The label map in `data` as (H, W) class ids of 8 bits; raises DecodeError."""
    ids = _inflate_ids(data)
    if ids is not None:
        return ids
    label = decode_label(data)
    if label.dtype != np.uint8 and label.size and (label.min() < 0 or label.max() > 255):
        raise DecodeError(f"holds class id {label.max()}, above 255")
    return label.astype(np.uint8)


def encode_ids(label: NDArray[np.uint8]) -> bytes:
    """`label` (H, W) as a grey PNG of 8 bits; the same ids always give the same bytes."""
    use_one_thread()
    return cv2.imencode(".png", label, _UNFILTERED)[1].tobytes()


@functools.cache
def use_one_thread() -> None:
    """Keep OpenCV to the calling thread: loader processes share the cores, and its pool does not survive a fork."""
    cv2.setNumThreads(0)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether both decoders give the same: a whole JPEG of grey or three channels."""
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        # Reads the header only.
        image = Image.open(io.BytesIO(data))
    except Exception:
        return False
    # Turning after the reduction would begin with the incomplete pixel at the other end.
    return image.format == "JPEG" and image.mode in ("RGB", "L") and exif_orientation(image) == 1


def _decode_jpeg(data: bytes, reduction: int) -> NDArray[np.uint8] | None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        # The smallest size that is not below these: exactly the reduction.
        least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction), "min_factor": reduction}
        return np.asarray(simplejpeg.decode_jpeg(data, **least), np.uint8)
    except ValueError:
        # Damaged: Pillow says how.
        return None


def _inflate_ids(data: bytes) -> NDArray[np.uint8] | None:
    """The ids in a plain unfiltered PNG of 8-bit grey, as `encode_ids` writes it; None for every other file."""
    if not data.startswith(_PNG_START) or len(data) < len(_PNG_START) + _PNG_HEADER.size:
        return None
    width, height, kind = _PNG_HEADER.unpack_from(data, len(_PNG_START))
    num_bytes = height * (width + 1)
    if kind != _GREY_8_BIT or not 0 < width * height <= MAX_PIXELS:
        return None
    position, inflate, rows = len(_PNG_START) + _PNG_HEADER.size + _CHECKSUM_BYTES, zlib_ng.decompressobj(), b""
    try:
        while not inflate.eof and len(rows) <= num_bytes:
            length, name = _PNG_CHUNK.unpack_from(data, position)
            position += _PNG_CHUNK.size
            if name == b"IDAT":
                # One byte more than there should be shows a stream that does not fit its header.
                rows += inflate.decompress(data[position : position + length], num_bytes + 1 - len(rows))
            position += length + _CHECKSUM_BYTES
    except (zlib_ng.error, struct.error):  # type: ignore[misc]  # the stub takes the class for an instance
        return None
    if len(rows) != num_bytes or not inflate.eof:
        return None
    filtered = np.frombuffer(rows, np.uint8).reshape(height, width + 1)
    return None if filtered[:, 0].any() else filtered[:, 1:].copy()


def _reduce(image: Image.Image, reduction: int) -> NDArray[np.uint8]:
    # A copy, as Pillow's own memory cannot be written to.
    return np.array(image if reduction == 1 else image.reduce(reduction))
