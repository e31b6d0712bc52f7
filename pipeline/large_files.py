"""Image files of more pixels than are decoded whole, read at a smaller size within a bounded memory.

JPEG is reduced by its decoder in the DCT domain; PNG is inflated and decoded strip by strip. A side is divided by a
power of two, each pixel the mean of a square; label maps keep the pixel in the middle.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from zlib_ng import zlib_ng

from segvit.image_files import (
    MAX_PIXELS,
    MAX_PIXELS_PER_BYTE,
    SIDEWAYS,
    DecodeError,
    damage_of,
    exif_orientation,
    stand_upright,
)

# More is taken for damage or malice: a minute's work for a PNG.
MAX_LARGE_PIXELS = 1 << 30
_STRIP_PIXELS = 1 << 22
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = struct.Struct(">IIBBBBB")  # width, height, depth, colour, compression, filter, interlace
_GREY, _PALETTE = 0, 3
_CHANNELS = {_GREY: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # JPEG markers among those of frames
_BASELINE = (0xC0, 0xC1)


class LargeImage(NamedTuple):
    """A large image, reduced.

    Attributes:
        image: upright, RGB or grey.
        size: whole (width, height), upright.
        stored_size: the same before EXIF turns it.
        orientation: as EXIF has it.
    """

    image: Image.Image
    size: tuple[int, int]
    stored_size: tuple[int, int]
    orientation: int


class _Jpeg(NamedTuple):
    """What the head of a JPEG file says; `size` is (width, height)."""

    size: tuple[int, int]
    exif: bytes
    sequential: bool
    num_channels: int


class _Png(NamedTuple):
    """The head of a PNG file, and where its compressed parts lie: (start, end)."""

    size: tuple[int, int]
    exif: bytes
    depth: int
    colour: int
    interlaced: bool
    palette: bytes
    parts: list[tuple[int, int]]

    @property
    def line_bytes(self) -> int:
        """Of a row with the number of its filter."""
        return 1 + (self.size[0] * self.depth * _CHANNELS[self.colour] + 7) // 8


def is_large(data: bytes) -> bool:
    """Whether `data` is a JPEG or PNG file of more than MAX_PIXELS pixels."""
    return large_size(data) is not None


def large_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) as stored, pixels, of a JPEG or PNG file of more than MAX_PIXELS pixels; None for others."""
    head = _head(data)
    return head.size if head is not None and head.size[0] * head.size[1] > MAX_PIXELS else None


def reduced_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(width, height) of `size` scaled so that the longer one is `long_side`."""
    scale = long_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def read_large(data: bytes, long_side: int | None) -> LargeImage:
    """The image in a large file, reduced, its longer side at least `long_side`.

    Raises DecodeError, also for the kinds that cannot be read in a bounded memory, and without a `long_side`.
    """
    head, long_side = _checked_head(data, long_side)
    reduction = 1
    while max(head.size) // (2 * reduction) >= long_side:
        reduction *= 2
    if isinstance(head, _Jpeg):
        reduction = min(reduction, 8)
    if head.size[0] * head.size[1] > MAX_PIXELS * reduction**2:
        raise _still_large(head, long_side)
    try:
        image = _read_jpeg(data, head, reduction) if isinstance(head, _Jpeg) else _read_png(data, head, reduction)
    except Exception as error:
        raise damage_of(error) from error
    image.info["exif"] = head.exif
    orientation = exif_orientation(image)
    size = head.size[::-1] if orientation in SIDEWAYS else head.size
    return LargeImage(stand_upright(image), size, head.size, orientation)


def shrink_label(data: bytes, long_side: int | None) -> bytes:
    """A large label map's PNG file at the size of `long_side`, the pixel in the middle kept; raises DecodeError."""
    head, long_side = _checked_head(data, long_side)
    if not isinstance(head, _Png):
        raise DecodeError("is JPEG, which changes ids where they meet; export it as PNG")
    width, height = reduced_size(head.size, long_side)
    columns = (2 * np.arange(width) + 1) * head.size[0] // (2 * width)
    wanted = (2 * np.arange(height) + 1) * head.size[1] // (2 * height)
    kept, top = [], 0
    try:
        for strip in _strips(data, head, max(1, _STRIP_PIXELS // head.size[0])):
            values = np.asarray(strip)
            chosen = wanted[(wanted >= top) & (wanted < top + len(values))] - top
            kept.append(values[chosen][:, columns])
            top += len(values)
    except Exception as error:
        raise damage_of(error) from error
    pixels = np.concatenate(kept)
    lines = np.ascontiguousarray(pixels.astype(">u2") if pixels.dtype.itemsize > 1 else pixels).view(np.uint8)
    lines = np.insert(lines.reshape(height, -1), 0, 0, axis=1)
    return _png_file(head._replace(size=(width, height), depth=max(8, head.depth)), zlib.compress(lines.tobytes(), 1))


def _head(data: bytes) -> _Jpeg | _Png | None:
    """None for other formats, and for what is damaged: whoever decodes it says how."""
    try:
        if data.startswith(_PNG_START):
            return _png_head(data)
        return _jpeg_head(data) if data.startswith(b"\xff\xd8") else None
    except (struct.error, IndexError, KeyError):
        return None


def _checked_head(data: bytes, long_side: int | None) -> tuple[_Jpeg | _Png, int]:
    head = _head(data)
    assert head is not None, "whoever asks has called is_large"
    num_pixels = head.size[0] * head.size[1]
    what = f"has {head.size[0]}x{head.size[1]} pixels"
    if num_pixels > MAX_LARGE_PIXELS:
        raise DecodeError(f"{what}, more than the {MAX_LARGE_PIXELS} allowed")
    if num_pixels > MAX_PIXELS_PER_BYTE * len(data):
        raise DecodeError(f"says {head.size[0]}x{head.size[1]} pixels, which {len(data)} bytes cannot hold")
    if isinstance(head, _Jpeg):
        if not head.sequential or head.num_channels not in (1, 3):
            kind = "CMYK" if head.sequential else "progressive"
            raise DecodeError(f"{what} and is {kind}, which takes memory for all of them; save it as baseline RGB JPEG")
    elif head.interlaced or (head.depth < 8 and head.colour != _PALETTE) or (head.depth > 8 and head.colour != _GREY):
        kind = "interlaced" if head.interlaced else f"of {head.depth} bits a channel"
        raise DecodeError(f"{what} and is {kind}, which is not read at that size; save it with 8 bits, not interlaced")
    if long_side is None:
        raise DecodeError(f"{what}, more than the {MAX_PIXELS} that are decoded whole; set data.max_long_side")
    width, height = reduced_size(head.size, long_side)
    if width * height > MAX_PIXELS:
        raise _still_large(head, long_side)
    return head, long_side


def _still_large(head: _Jpeg | _Png, long_side: int) -> DecodeError:
    return DecodeError(
        f"has {head.size[0]}x{head.size[1]} pixels, and data.max_long_side {long_side} leaves too many; lower it"
    )


def _jpeg_head(data: bytes) -> _Jpeg:
    position, exif = 2, b""
    while True:
        while data[position + 1] == 0xFF:
            position += 1
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if data[position + 4 : position + 10] == b"Exif\0\0" and marker == 0xE1:
            exif = data[position + 4 : position + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            _, height, width, num_channels = struct.unpack_from(">BHHB", data, position + 4)
            return _Jpeg((width, height), exif, marker in _BASELINE, num_channels)
        if data[position] != 0xFF or length < 2:
            raise IndexError
        position += 2 + length


def _png_head(data: bytes) -> _Png:
    width, height, depth, colour, _, _, interlace = _PNG_HEADER.unpack_from(data, 16)
    palette, exif, parts, position = b"", b"", [], 8
    while position + 8 <= len(data):
        length, start = int.from_bytes(data[position : position + 4]), position + 8
        match data[position + 4 : start]:
            case b"IDAT":
                parts.append((start, start + length))
            case b"PLTE":
                palette = data[start : start + length]
            case b"eXIf":
                exif = b"Exif\0\0" + data[start : start + length]
        position = start + length + 4
    assert _CHANNELS[colour]
    return _Png((width, height), exif, depth, colour, bool(interlace), palette, parts)


def _read_jpeg(data: bytes, head: _Jpeg, reduction: int) -> Image.Image:
    width, height = head.size
    pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="GRAY" if head.num_channels == 1 else "RGB",
        min_height=-(-height // reduction),
        min_width=-(-width // reduction),
        min_factor=reduction,
    )
    return Image.fromarray(pixels[..., 0] if head.num_channels == 1 else pixels)


def _read_png(data: bytes, head: _Png, reduction: int) -> Image.Image:
    if head.depth > 8:
        raise DecodeError(f"has {head.size[0]}x{head.size[1]} pixels of 16 bits; save it with 8 bits or in parts")
    rows = reduction * max(1, _STRIP_PIXELS // (head.size[0] * reduction))
    reduced = []
    for strip in _strips(data, head, rows):
        eight_bits = strip if strip.mode == "L" else strip.convert("RGB")
        reduced.append(np.asarray(eight_bits.reduce(reduction)))
    return Image.fromarray(np.concatenate(reduced))


def _strips(data: bytes, head: _Png, rows: int) -> Iterator[Image.Image]:
    """The picture in strips of `rows` rows, the last one of what is left.

    Each is decoded by Pillow as a PNG of its own, whose first row is the one above it, as filters refer to that.
    """
    inflate, parts = zlib_ng.decompressobj(), iter(head.parts)
    width, height = head.size
    above, content = b"", b""
    for top in range(0, height, rows):
        count = min(rows, height - top)
        wanted = count * head.line_bytes
        pieces, held = [content], len(content)
        while held < wanted:
            piece = inflate.decompress(inflate.unconsumed_tail or _next_part(data, parts), wanted - held)
            pieces.append(piece)
            held += len(piece)
        content = b"".join(pieces)
        extra = int(bool(above))
        file = _png_file(head._replace(size=(width, count + extra)), zlib.compress(above + content[:wanted], 0))
        content = content[wanted:]
        with Image.open(io.BytesIO(file)) as picture:
            picture.load()
        above = b"\0" + _raw_row(picture, head)
        yield picture.crop((0, extra, width, count + extra)) if extra else picture


def _next_part(data: bytes, parts: Iterator[tuple[int, int]]) -> bytes:
    part = next(parts, None)
    if part is None or part[1] > len(data):
        raise DecodeError("cannot be decoded (the file ends early)")
    return data[slice(*part)]


def _raw_row(picture: Image.Image, head: _Png) -> bytes:
    """The last row of a decoded strip as the file's format has it."""
    row = np.asarray(picture.crop((0, picture.height - 1, picture.width, picture.height)))[0]
    if head.depth > 8:
        row = row.astype(">u2")
    elif head.depth < 8:
        bits = row[:, None] >> np.arange(head.depth - 1, -1, -1, dtype=np.uint8) & 1
        row = np.packbits(bits.astype(np.uint8).ravel())
    return bytes(row.tobytes())


def _png_file(head: _Png, compressed: bytes) -> bytes:
    header = _PNG_HEADER.pack(*head.size, head.depth, head.colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", head.palette), (b"IDAT", compressed), (b"IEND", b"")]
    parts = [_PNG_START]
    for name, content in chunks:
        if content or name != b"PLTE":
            crc = zlib.crc32(content, zlib.crc32(name))
            parts += [struct.pack(">I", len(content)), name, content, struct.pack(">I", crc)]
    return b"".join(parts)
