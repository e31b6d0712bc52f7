"""Damaged and hostile files for fuzz_inputs.py: each mutation turns a good file's bytes, or a path, into a bad one."""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

Bytes = Callable[[bytes, random.Random], bytes]


def truncate(data: bytes, rng: random.Random) -> bytes:
    """The first part of it."""
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """A few bits turned over."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A stretch of noise inside."""
    start = rng.randrange(len(data))
    noise = rng.randbytes(rng.randint(1, 64))
    return data[:start] + noise + data[start + len(noise) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A stretch taken out, put in once more elsewhere, or repeated many times."""
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 200)]
    rest = data[:start] + data[start + len(part) :]
    place = rng.randrange(len(rest) + 1)
    return rest[:place] + part * rng.choice([0, 1, 2, 2, 100]) + rest[place:]


def numbers(data: bytes, rng: random.Random) -> bytes:
    """A few stretches of 1 to 8 bytes that are read as numbers become extreme ones, in either order of bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = rng.choice([1, 2, 4, 4, 4, 8, 8])
        extremes = (
            0,
            1,
            (1 << 8 * size) - 1,
            (1 << 8 * size - 1) - 1,
            1 << 8 * size - 1,
            1 << 8 * size - 2,
            65535,
            255,
        )
        number = rng.choice(extremes) & ((1 << 8 * size) - 1)
        start = rng.randrange(max(1, len(changed) - size))
        # Headers lie at the beginning or at the end.
        start = min(start, rng.choice([start, 64, 512])) if rng.random() < 0.5 else max(start, len(changed) - 600)
        changed[start : start + size] = number.to_bytes(size, rng.choice(["little", "big"]))
    return bytes(changed)


def other_type(_data: bytes, rng: random.Random) -> bytes:
    """Something else: no picture, or one of another format."""
    kind = rng.choice(["empty", "text", "GIF", "BMP", "TIFF", "WEBP", "zip", "noise", "html"])
    if kind in ("GIF", "BMP", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (24, 16), (9, 9, 9)).save(buffer, kind)
        return buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../x.png", b"x")
    choices = {"empty": b"", "text": b"no image\n", "zip": packed.getvalue(), "html": b"<html>404</html>"}
    return choices.get(kind) or (rng.randbytes(500) if kind == "noise" else b"")


def odd_picture(_data: bytes, rng: random.Random) -> bytes:
    """A valid picture that is the wrong one: another size, other channels, ids that no class has."""
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    pictures = [
        Image.fromarray(pixels[:9, :, :3]),
        Image.fromarray(pixels),
        Image.fromarray(pixels[..., 0]),
        Image.fromarray(np.full((16, 24), 11, dtype=np.uint8)),
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        Image.fromarray(pixels[..., 0] > 99),
        Image.fromarray(pixels[..., :3]).convert("P"),
        Image.new("L", (1, 1)),
        Image.new("L", (24, 16)).convert("LA"),
    ]
    buffer = io.BytesIO()
    rng.choice(pictures).save(buffer, "PNG")
    return buffer.getvalue()


def absurd_size(data: bytes, rng: random.Random) -> bytes:
    """A header that claims billions of pixels, or none; the checksum is right."""
    width, height = (rng.choice([0, 1, 24, 65535, 1 << 20, (1 << 31) - 1, (1 << 32) - 1]) for _ in range(2))
    if data[:4] != b"\x89PNG":
        start = data.find(b"\xff\xc0") + 5
        return data[:start] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + data[start + 4 :]
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def bomb(_data: bytes, rng: random.Random) -> bytes:
    """Kilobytes that become gigabytes: pixels, or a compressed text chunk."""
    buffer = io.BytesIO()
    if rng.random() < 0.3:
        info = PngImagePlugin.PngInfo()
        info.add_text("x", "y" * (1 << 26), zip=True)
        Image.new("L", (24, 16)).save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    side = rng.choice([9_600, 16_000, 30_000, 60_000])
    kind = rng.choice([(1, 0), (8, 0), (8, 2), (16, 2), (8, 6)])
    row = side * kind[0] * {0: 1, 2: 3, 6: 4}[kind[1]] // 8 + 1
    packer, packed = zlib.compressobj(9), []
    # Fewer rows than the header says are enough for a reader that trusts it to take the memory.
    for _ in range(min(side, (1 << 26) // row)):
        packed.append(packer.compress(bytes(row)))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, *kind, 0, 0, 0))]
    chunks += [(b"IDAT", b"".join(packed) + packer.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


BYTES: dict[str, tuple[int, Bytes]] = {
    "truncated": (6, truncate),
    "bits flipped": (8, flip_bits),
    "overwritten": (4, overwrite),
    "spliced": (3, splice),
    "numbers": (4, numbers),
    "wrong type": (4, other_type),
    "odd picture": (4, odd_picture),
    "absurd size": (3, absurd_size),
    "bomb": (1, bomb),
}


def replace_by_special(path: Path, rng: random.Random) -> None:
    """A folder, a pipe, a link to nowhere, to itself, to a device or to a file outside; a huge empty file."""
    path.unlink()
    kind = rng.choice(["folder", "pipe", "nowhere", "itself", "device", "outside", "sparse", "locked"])
    links = {"nowhere": "/nowhere/x.png", "itself": path.name, "device": "/dev/zero", "outside": "/etc/passwd"}
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in links:
        path.symlink_to(links[kind])
    else:
        path.touch(mode=0o000 if kind == "locked" else 0o644)
        os.truncate(path, 20 << 30 if kind == "sparse" else 10)


def hostile_name(rng: random.Random) -> str:
    """A file name without suffix that means more than it says to some program."""
    fixed = [
        "..",
        "...",
        "%2e%2e%2fx",
        "-rf",
        "a\nb",
        "a\\..\\b",
        "ä" * 60,
        "x" * 200,
        " ",
        "a.label",
        "nul",
        "~",
        "$HOME",
    ]
    return rng.choice([*fixed, "".join(rng.choices("ab.%'\"*?;|&\t\u202e\U0001f4a3", k=rng.randint(1, 12)))])


def hostile_member(rng: random.Random) -> str:
    """A path that leads out of the folder where an archive would be unpacked, or confuses its reader."""
    up = "../" * rng.randint(1, 6)
    odd = ["/escaped.png", f"{up}escaped.png", f"train/{up}escaped.png", "C:\\escaped.png", "..\\..\\escaped.png"]
    return rng.choice(
        [*odd, "train/../val/0.png", "./train/./0.png", "train//0.png", "train/0.png/1.png", "train/\0.png"]
    )


def pack(folder: Path, archive: Path, rng: random.Random) -> None:
    """All of `folder` as .tar or .zip, with one member too many that should not be there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    name = hostile_member(rng)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as packed:
            for path in files:
                packed.write(path, str(path.relative_to(folder)))
            packed.writestr(rng.choice([name, "train/bomb.png"]), bytes(1 << 26) if rng.random() < 0.1 else b"x")
        return
    with tarfile.open(archive, "w") as tar:
        for path in files:
            tar.add(path, str(path.relative_to(folder)))
        member = tarfile.TarInfo(rng.choice([name, "train/9.png"]))
        member.type = rng.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
        member.linkname = rng.choice(["/etc/passwd", "../../escaped.png", "train/0.png"])
        tar.addfile(member)
