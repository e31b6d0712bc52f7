"""Label maps of MATLAB 5 files, sound, wrong, damaged and hostile."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray

from pipeline.datasets.mat_file import MAX_RATIO, SMALL_BYTES, decode_mat
from segvit.image_files import DecodeError

MAP: NDArray[np.uint16] = np.arange(180, dtype=np.uint16).reshape(12, 15)


def mat(content: dict[str, Any], compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, content, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int64])
def test_decode_mat__as_saved(compressed: bool, kind: type) -> None:
    data = mat({"name": "a text", "other": np.zeros((3, 3)), "S": MAP.astype(kind)}, compressed)
    np.testing.assert_array_equal(decode_mat(data), MAP.astype(kind))
    np.testing.assert_array_equal(decode_mat(mat({"a_long_name": MAP}, compressed), "a_long_name"), MAP)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"T": np.zeros((2, 2))}, "holds no label map S, only T"),
        ({"S": np.zeros((2, 2, 2), np.uint16)}, "holds a map S of 2x2x2, not of an image"),
        ({"S": np.zeros((2, 2), np.float64)}, "something else than whole numbers"),
        ({"S": {"a": MAP}}, "something else than whole numbers"),
        ({"S": np.zeros((2, 2), np.complex64)}, "something else than whole numbers"),
    ],
)
def test_decode_mat__wrong_content(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode_mat(mat(content))


def test_decode_mat__any_damage_is_one_error() -> None:
    good = mat({"S": MAP})
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(200):
        data = bytearray(good[: rng.integers(len(good))] if number % 2 else good)
        for place in rng.integers(len(data), size=3) if data else ():
            data[place] ^= int(rng.integers(1, 256))
        try:
            decode_mat(bytes(data))
        except DecodeError:
            refused += 1
    assert refused > 150


def bomb(shape: tuple[int, int], num_bytes: int, name: bytes = b"S") -> bytes:
    """A file whose one array says to have `shape` and inflates to `num_bytes` zeros."""
    head = struct.pack("<8I2i", 14, num_bytes, 6, 8, 9, 0, 5, 8, *shape)
    head += struct.pack("<HH4s", 1, len(name), name) + struct.pack("<II", 2, num_bytes)
    packer = zlib.compressobj(9)
    packed = [packer.compress(head)]
    packed += [packer.compress(bytes(1 << 20)) for _ in range(num_bytes >> 20)]
    stream = b"".join([*packed, packer.flush()])
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(stream)) + stream


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((40_000, 40_000), b"S", "holds a map S of 40000x40000, not of an image"),
        ((8_000, 8_000), b"S", "holds an array of more than .* bytes in a file of"),
        ((12, 15), b"S", "holds an array of more than .* bytes in a file of"),
        ((8_000, 8_000), b"T", "holds no label map S, only T"),
    ],
)
def test_decode_mat__memory_is_a_multiple_of_the_files_size(shape: tuple[int, int], name: bytes, message: str) -> None:
    data = bomb(shape, 1 << 26, name)
    tracemalloc.start()
    with pytest.raises(DecodeError, match=message):
        decode_mat(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * max(SMALL_BYTES, MAX_RATIO * len(data))
