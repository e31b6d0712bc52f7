"""Images and label maps for training: the same pixels as `pipeline.decode`, decoded faster or smaller.

OpenCV decodes JPEG a fifth faster into an array than Pillow and scales in the DCT domain; what it reads
differently from Pillow (CMYK, palettes, 16 bits, and images that are no JPEG) is left to `pipeline.decode`.
"""

from __future__ import annotations

import functools
import io

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.decode import DecodeError, decode_label, exif_orientation, open_image

# The bits that reduce; those of OpenCV's "reduced colour" modes ask for BGR besides.
_REDUCTION_FLAGS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_PLAIN_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_DEPTH_AND_COLOUR = slice(24, 26)
_GREY_8_BIT = b"\x08\x00"


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
    # 8-bit grey, as shards hold it: every other kind OpenCV would turn into colours.
    if data.startswith(_PLAIN_PNG) and data[_PNG_DEPTH_AND_COLOUR] == _GREY_8_BIT:
        use_one_thread()
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is not None and pixels.ndim == 2 and pixels.dtype == np.uint8:
            return np.asarray(pixels, np.uint8)
    label = decode_label(data)
    if label.dtype != np.uint8 and label.size and (label.min() < 0 or label.max() > 255):
        raise DecodeError(f"holds class id {label.max()}, above 255")
    return label.astype(np.uint8)


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
    # Of cut-off files OpenCV leaves the rest grey, where Pillow raises.
    whole = image.format == "JPEG" and image.mode in ("RGB", "L") and b"\xff\xd9" in data[-64:]
    # Turning after the reduction would begin with the incomplete pixel at the other end.
    return whole and exif_orientation(image) == 1


def _decode_jpeg(data: bytes, reduction: int) -> NDArray[np.uint8] | None:
    flags = cv2.IMREAD_COLOR_RGB | _REDUCTION_FLAGS[reduction]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return None if pixels is None else np.asarray(pixels, np.uint8)


def _reduce(image: Image.Image, reduction: int) -> NDArray[np.uint8]:
    # A copy, as Pillow's own memory cannot be written to.
    return np.array(image if reduction == 1 else image.reduce(reduction))
