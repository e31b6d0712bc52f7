"""The label map in a MATLAB 5 file, bounded by the file's size before scipy reads it.

A file is a header of 128 bytes and elements: type and size in 4 bytes each, then the content. An element may be a zlib
stream of another one, whose content can be a thousand times as long; and what an array says of its own size is taken
at its word by whoever makes room for it.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from segvit.image_files import MAX_PIXELS, DecodeError, one_line

# An inflated array has at most so many bytes a byte of the file: label maps have 30, one of a single id up to 1000.
MAX_RATIO = 64
# Below this it may have any: 16 million pixels of one id.
SMALL_BYTES = 1 << 24
_HEADER_BYTES, _TAG_BYTES = 128, 8
_ORDERS = {b"IM": "<", b"MI": ">"}
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
# Classes of arrays: of whole numbers, 8 to 64 bits; others are cells, objects, text, sparse or of fractions.
_WHOLE_NUMBERS = range(8, 16)
_HEAD_BYTES = 1 << 10  # enough for the flags, two dimensions and a name
_MAX_ELEMENTS = 1 << 10


class _Head(NamedTuple):
    """What an array says of itself."""

    kind: int
    shape: tuple[int, ...]
    name: str


def decode_mat(data: bytes, name: str = "S") -> NDArray[np.integer]:
    """The map (H, W) called `name` of a MATLAB 5 file; raises DecodeError.

    Takes at most four times the larger of SMALL_BYTES and MAX_RATIO times the file's size.
    """
    # Slow to import, and of use for one data set alone.
    from scipy import io as scipy_io

    try:
        array = _find_array(data, name)
        label = scipy_io.loadmat(io.BytesIO(data[:_HEADER_BYTES] + array), variable_names=[name])[name]
    except DecodeError:
        raise
    # Damaged files raise nearly anything from inside the reader; each means the same to the user.
    except Exception as error:
        raise DecodeError(f"is no MATLAB 5 file that can be read ({one_line(error)})") from error
    if not isinstance(label, np.ndarray) or not np.issubdtype(label.dtype, np.integer) or label.ndim != 2:
        raise DecodeError(f"holds a map {name} of something else than whole numbers")
    return label


def _find_array(data: bytes, name: str) -> bytes:
    """The array `name` as an element that is not compressed; raises DecodeError."""
    order = _ORDERS.get(data[126:128])
    if order is None:
        raise DecodeError("is no MATLAB 5 file that can be read (its header names no order of bytes)")
    names = []
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            head = _read_head(_inflate(content, _HEAD_BYTES), order)
        else:
            head = _read_head(struct.pack(f"{order}II", kind, len(content)) + content[:_HEAD_BYTES], order)
        if head is None:
            continue
        names.append(head.name)
        if head.name == name:
            _refuse_other_shapes(head)
            return _inflate_whole(content, len(data)) if kind == _COMPRESSED else _as_element(order, kind, content)
    raise DecodeError(f"holds no label map {name}, only {', '.join(sorted(names)[:5]) or 'nothing'}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element; raises DecodeError where one is cut off."""
    position, view = _HEADER_BYTES, memoryview(data)
    for _ in range(_MAX_ELEMENTS):
        if position >= len(data):
            return
        kind, size = struct.unpack_from(f"{order}II", data, position)
        position += _TAG_BYTES
        if size > len(data) - position:
            raise DecodeError(f"is no MATLAB 5 file that can be read (an array of {size} bytes is cut off)")
        yield kind, view[position : position + size]
        # Arrays end at a multiple of 8 bytes, streams where they end.
        position += size if kind == _COMPRESSED else size + -size % 8


def _as_element(order: str, kind: int, content: memoryview) -> bytes:
    return struct.pack(f"{order}II", kind, len(content)) + bytes(content)


def _read_head(start: bytes, order: str) -> _Head | None:
    """Of the element that begins with `start`; None for what is no array, or has a head that is none."""
    try:
        kind, _, flags_kind, flags_size, flags, _, shape_kind, shape_size = struct.unpack_from(f"{order}8I", start)
        if (kind, flags_kind, flags_size, shape_kind) != (_MATRIX, _UINT32, 8, _INT32) or shape_size > 64:
            return None
        shape = struct.unpack_from(f"{order}{shape_size // 4}i", start, 32)
        place = 32 + shape_size + -shape_size % 8
        name_kind, name_size = struct.unpack_from(f"{order}II", start, place)
    except struct.error:
        return None
    place += _TAG_BYTES
    if name_kind >> 16:
        # Up to four bytes stand in the tag itself.
        name_kind, name_size, place = name_kind & 0xFFFF, name_kind >> 16, place - 4
    if name_kind != _INT8:
        return None
    return _Head(flags & 0xFF, shape, start[place : place + name_size].decode("latin-1"))


def _refuse_other_shapes(head: _Head) -> None:
    if len(head.shape) != 2 or min(head.shape) < 1 or head.shape[0] * head.shape[1] > MAX_PIXELS:
        raise DecodeError(f"holds a map {head.name} of {'x'.join(map(str, head.shape))}, not of an image")
    if head.kind not in _WHOLE_NUMBERS:
        raise DecodeError(f"holds a map {head.name} of something else than whole numbers")


def _inflate(content: memoryview, size: int) -> bytes:
    return zlib.decompressobj().decompress(content, size)


def _inflate_whole(content: memoryview, file_bytes: int) -> bytes:
    limit = max(SMALL_BYTES, MAX_RATIO * file_bytes)
    inflated = _inflate(content, limit + 1)
    if len(inflated) > limit:
        raise DecodeError(f"holds an array of more than {limit} bytes in a file of {file_bytes}; save it again")
    return inflated
