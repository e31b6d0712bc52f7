"""Fast decoding gives what `segvit.image_files` gives; reduced decoding gives means of blocks."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.fast_decode import decode_ids, decode_reduced, encode_ids
from segvit.image_files import DecodeError, decode_image, decode_label, encode_png


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with a few hard edges, as photographs have them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 40, 90)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def blocks_mean(pixels: NDArray[np.uint8], reduction: int) -> NDArray[np.uint8]:
    return np.array(Image.fromarray(pixels).reduce(reduction))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    grey=st.booleans(),
)
def test_decode_reduced__full_size_is_what_pillow_decodes(
    height: int, width: int, subsampling: int, progressive: bool, grey: bool
) -> None:
    image = scene(height, width)
    options: dict[str, Any] = {} if grey else {"subsampling": subsampling}
    data = encoded(image.convert("L") if grey else image, progressive=progressive, quality=90, **options)
    # Both are libjpeg-turbo; its versions may round differently.
    assert np.abs(decode_reduced(data).astype(int) - decode_image(data)).max() <= 2


@pytest.mark.parametrize("reduction", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(96, 128), (101, 67), (5, 3)])
def test_decode_reduced__is_near_the_mean_of_blocks(reduction: int, size: tuple[int, int]) -> None:
    image = scene(*size)
    data = encoded(image, quality=95, subsampling=0)
    expected = blocks_mean(decode_image(data), reduction).astype(int)
    reduced = decode_reduced(data, reduction)
    assert reduced.shape == (-(-size[0] // reduction), -(-size[1] // reduction), 3)
    whole = np.abs(reduced.astype(int) - expected)[: size[0] // reduction, : size[1] // reduction]
    if whole.size:
        assert whole.mean() < 1.5
        assert np.percentile(whole, 95) <= 6
    png = encoded(image, "PNG")
    np.testing.assert_array_equal(decode_reduced(png, reduction), blocks_mean(np.array(image), reduction))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [1, 4])
def test_decode_reduced__turned_by_exif(orientation: int, reduction: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(53, 71), exif=exif, quality=95, subsampling=0)
    expected = decode_image(data)
    assert expected.shape[:2] == ((53, 71) if orientation < 5 else (71, 53))
    expected = expected if reduction == 1 else blocks_mean(expected, reduction)
    reduced = decode_reduced(data, reduction)
    assert reduced.shape == expected.shape
    assert np.abs(reduced.astype(int) - expected).mean() < 1.5


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L"])
def test_decode_reduced__other_kinds_are_left_to_pillow(mode: str) -> None:
    data = encoded(scene(20, 30).convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    pixels = decode_reduced(data)
    np.testing.assert_array_equal(pixels, decode_image(data))
    pixels[:] = 0  # writable


def test_decode_reduced__damage_is_an_error() -> None:
    data = encoded(scene(200, 200), quality=95)
    for damaged in (data[: len(data) // 2], data[:40], b"", b"\xff\xd8" + b"\xff\xd9" * 50, b"no picture"):
        for reduction in (1, 4):
            with pytest.raises(DecodeError, match="cannot be decoded"):
                decode_reduced(damaged, reduction)
    with pytest.raises(DecodeError, match="is GIF, none of JPEG, PNG"):
        decode_reduced(encoded(scene(9, 9), "GIF"))


def test_decode_ids__every_label_kind() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (33, 47)).astype(np.uint8)
    np.testing.assert_array_equal(decode_ids(encode_png(ids)), ids)
    palette = Image.fromarray(ids % 8).convert("P")
    palette.putpalette([7 * level % 256 for level in range(768)])
    np.testing.assert_array_equal(decode_ids(encoded(palette, "PNG")), np.asarray(palette))
    wide = ids.astype(np.uint16)
    np.testing.assert_array_equal(decode_ids(encoded(Image.fromarray(wide), "PNG")), ids)
    with pytest.raises(DecodeError, match="holds class id 300, above 255"):
        decode_ids(encoded(Image.fromarray(np.full((4, 4), 300, np.uint16)), "PNG"))
    with pytest.raises(DecodeError, match="is a colour picture"):
        decode_ids(encoded(scene(4, 4), "PNG"))
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode_ids(encode_png(ids)[:60])


def test_decode__keeps_opencv_to_one_thread() -> None:
    decode_reduced(encoded(scene(8, 8)))
    assert cv2.getNumThreads() <= 1


def grey_png(shape: tuple[int, int], *content: bytes, kind: bytes = b"\x08\0\0\0\0") -> bytes:
    """A PNG that says `shape` and holds one IDAT chunk for each `content`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">II", shape[1], shape[0]) + kind
    chunks = [chunk(b"IHDR", header), *(chunk(b"IDAT", data) for data in content), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 70), width=st.integers(1, 70), classes=st.integers(1, 256))
def test_encode_ids__comes_back_from_every_decoder(height: int, width: int, classes: int) -> None:
    ids = np.random.default_rng(0).integers(0, classes, (height, width)).astype(np.uint8)
    data = encode_ids(ids)
    assert data == encode_ids(ids.copy())
    np.testing.assert_array_equal(decode_ids(data), ids)
    np.testing.assert_array_equal(decode_label(data), ids)
    assert decode_ids(data).flags.writeable


def test_decode_ids__any_cut_into_chunks_and_any_filter() -> None:
    ids = np.random.default_rng(1).integers(0, 9, (20, 30)).astype(np.uint8)
    rows = np.insert(ids, 0, 0, axis=1)
    stream = zlib.compress(rows.tobytes())
    for cut in (0, 1, 7, len(stream)):
        np.testing.assert_array_equal(decode_ids(grey_png((20, 30), stream[:cut], stream[cut:])), ids)
    # Filter 1, differences to the left neighbour.
    rows[:, 2:] = ids[:, 1:] - ids[:, :-1]
    rows[:, 0] = 1
    np.testing.assert_array_equal(decode_ids(grey_png((20, 30), zlib.compress(rows.tobytes()))), ids)


def test_decode_ids__a_bomb_is_an_error() -> None:
    million = zlib.compress(bytes(1_000_000))
    for shape, content in (
        ((60_000, 60_000), million),
        ((3, 4), zlib.compress(bytes(14))),
        ((3, 4), b"no stream"),
        ((0, 4), b""),
    ):
        with pytest.raises(DecodeError):
            decode_ids(grey_png(shape, content))
    # Many chunks do not add up to more than the header says.
    parts = [million[i : i + 10] for i in range(0, len(million), 10)]
    np.testing.assert_array_equal(decode_ids(grey_png((3, 4), *parts)), np.zeros((3, 4)))
