"""Image files and label maps of each format, whole and larger than are decoded whole."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.fast_decode import decode_ids, decode_reduced, encode_ids
from pipeline.large_files import is_large, read_large, shrink_label
from segvit.image_files import orient_label, read_image_file, read_label_picture
from tests.faults.fuzz.case import Case
from tests.faults.mutations import BYTES, absurd_size, numbers

_SETTINGS: dict[str, tuple[dict[str, object], ...]] = {
    "JPEG": ({}, {"progressive": True}, {"quality": 20, "subsampling": 2}),
    "PNG": ({}, {"optimize": True}, {"dpi": (9, 9), "icc_profile": b"x" * 500}),
    "TIFF": tuple({"compression": name} for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
    "WEBP": ({}, {"lossless": True}),
    "BMP": ({},),
}
_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "P", "I;16", "1"),
    "TIFF": ("RGB", "L", "I;16", "F", "P"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "P"),
}


def _make(image_format: str, rng: random.Random) -> bytes:
    mode = rng.choice(_MODES[image_format])
    pixels = np.random.default_rng(rng.randrange(1 << 20)).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != "RGB":
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    settings = dict(rng.choice(_SETTINGS[image_format]))
    if image_format in ("JPEG", "PNG", "WEBP"):
        settings["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, image_format, **settings)
    return buffer.getvalue()


def _mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    kinds = [kind for kind in BYTES if kind not in ("bomb", "wrong type", "odd picture", "absurd size")]
    kind = rng.choices(kinds, [BYTES[kind][0] for kind in kinds])[0]
    return kind, BYTES[kind][1](data, rng)


def _read(data: bytes) -> None:
    for read in (read_image_file, read_label_picture, decode_reduced, decode_ids):
        _refused(lambda read=read: read(data))  # type: ignore[misc]
    orient_label(data, np.zeros((24, 16), np.uint8))


def _refused(read: Callable[[], object]) -> None:
    from segvit.image_files import DecodeError
    from tests.faults.fuzz.case import require_one_line

    try:
        read()
    except DecodeError as error:
        require_one_line(error)


def _picture(image_format: str, rng: random.Random) -> Case:
    kind, data = _mutate(_make(image_format, rng), rng)
    return Case(kind, lambda: _read(data))


def jpeg(_folder: Path, rng: random.Random) -> Case:
    """JPEG, baseline and progressive, with EXIF; its size may be absurd."""
    if rng.random() < 0.1:
        data = absurd_size(_make("JPEG", rng), rng)
        return Case("absurd size", lambda: _read(data))
    return _picture("JPEG", rng)


def png(_folder: Path, rng: random.Random) -> Case:
    """PNG of each mode; bombs of pixels, text and profiles."""
    odd = rng.choice(["absurd size", "bomb", "chunk", "", "", "", "", "", "", "", "", ""])
    if odd == "chunk":
        data = _with_chunk(_make("PNG", rng), rng)
        return Case("packed chunk", lambda: _read(data))
    if odd:
        data = BYTES[odd][1](_make("PNG", rng), rng)
        return Case(odd, lambda: _read(data))
    return _picture("PNG", rng)


def _with_chunk(data: bytes, rng: random.Random) -> bytes:
    """A chunk of a megabyte or more, packed, behind the header."""
    packed = zlib.compress(bytes(rng.choice([1 << 20, 1 << 26])), 9)
    name, body = rng.choice(
        [(b"iCCP", b"x\0\0" + packed), (b"zTXt", b"x\0\0" + packed), (b"iTXt", b"x\0\1\0\0\0" + packed)]
    )
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:33] + chunk * rng.choice([1, 1, 100]) + data[33:]


def tiff(_folder: Path, rng: random.Random) -> Case:
    """TIFF of each compression; directories that lead to themselves, absurd strips, sizes and numbers of tags."""
    if rng.random() < 0.5:
        data = _absurd_tags(_make("TIFF", rng), rng)
        return Case("absurd tags", lambda: _read(data))
    return _picture("TIFF", rng)


def _absurd_tags(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return data
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for _ in range(rng.randint(1, 3)):
        entry = start + 2 + 12 * rng.randrange(max(1, count))
        offset = rng.choice([entry + 4, entry + 8, start + 2 + 12 * count, start])
        value = rng.choice([start, 0, 8, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 28])
        if offset + 4 <= len(changed):
            struct.pack_into(f"{order}I", changed, offset, value)
    return bytes(changed)


def webp(_folder: Path, rng: random.Random) -> Case:
    """WebP, with and without loss."""
    return _picture("WEBP", rng)


def bmp(_folder: Path, rng: random.Random) -> Case:
    """BMP; its header has extreme numbers half of the time."""
    if rng.random() < 0.5:
        data = _make("BMP", rng)
        data = numbers(data[:60], rng)[:60] + data[60:]
        return Case("header", lambda: _read(data))
    return _picture("BMP", rng)


def shard_label(_folder: Path, rng: random.Random) -> Case:
    """A label map as shards hold it, which a reader of its own inflates."""
    pixels = np.random.default_rng(rng.randrange(99)).integers(0, 12, (16, 24), dtype=np.uint8)
    kind, data = _mutate(encode_ids(pixels), rng)
    return Case(kind, lambda: decode_ids(data))


def large_file(_folder: Path, rng: random.Random) -> Case:
    """A file that says more pixels than are decoded whole, read at a smaller size in strips."""
    side = rng.choice([8200, 9000, 12_000])
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        Image.new("L", (24, 16)).save(buffer, "JPEG")
        data = buffer.getvalue()
        start = data.find(b"\xff\xc0") + 5
        data = data[:start] + struct.pack(">HH", side, side) + data[start + 4 :] + bytes(side * side // 8000)
    else:
        rows = side if rng.random() < 0.2 else 100
        packed = zlib.compress(bytes(rows * (side + 1)), 1)
        head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in chunks
        )
    kind, data = _mutate(data, rng) if rng.random() < 0.7 else ("as it is", data)
    long_side = rng.choice([512, 4096])

    def read() -> None:
        if is_large(data):
            _refused(lambda: read_large(data, long_side))
            _refused(lambda: shrink_label(data, long_side))

    return Case(kind, read)
