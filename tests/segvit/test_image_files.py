"""Decoding: every colour mode to RGB, label maps as they are, and damage named."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from segvit import image_files
from segvit.grey_range import scale_values
from segvit.image_files import (
    DecodeError,
    decode_image,
    decode_label,
    encode_png,
    open_image,
    orient_label,
    read_image_file,
    read_label_picture,
)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def test_decode_image__every_mode_becomes_rgb() -> None:
    colour = Image.new("RGB", (3, 2), (10, 200, 30))
    palette = Image.new("P", (3, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    for image in (colour, palette, colour.convert("RGBA")):
        decoded = decode_image(encoded(image))
        assert decoded.shape == (2, 3, 3)
        assert (decoded == (10, 200, 30)).all()
    assert (decode_image(encoded(Image.new("L", (3, 2), 77))) == 77).all()
    assert (decode_image(encoded(Image.new("1", (3, 2), 1))) == 255).all()
    cmyk = decode_image(encoded(colour.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(cmyk[0, 0], (10, 200, 30), atol=6)


@pytest.mark.parametrize("image_format", ["TIFF", "WEBP", "BMP"])
def test_read_image_file__other_lossless_formats_become_png(image_format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    options = {"lossless": True} if image_format == "WEBP" else {}
    file = read_image_file(encoded(Image.fromarray(pixels), image_format, **options))
    assert (file.suffix, file.as_is, file.values) == ("png", False, None)
    np.testing.assert_array_equal(np.asarray(file.image), pixels)
    for suffix, as_is, kind in (("jpg", True, "JPEG"), ("png", True, "PNG")):
        file = read_image_file(encoded(Image.fromarray(pixels), kind))
        assert (file.suffix, file.as_is) == (suffix, as_is)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_decode_image__tiff_of_many_bits(order: str) -> None:
    values = np.array([[0, 255, 256, 510]], order)
    by_hand = [[0, 128, 128, 255]]  # of 510, halves up
    assert decode_image(encoded(Image.fromarray(values), "TIFF"), (0, 510))[..., 0].tolist() == by_hand
    for kind in (np.int32, np.float32):
        data = encoded(Image.fromarray(values.astype(kind)), "TIFF")
        assert decode_image(data, (0, 510))[..., 0].tolist() == by_hand


@pytest.mark.parametrize("compression", [1, 5, 8], ids=["raw", "lzw", "deflate"])
@pytest.mark.parametrize("channels", [3, 4])
def test_decode_image__tiff_of_sixteen_bit_colours(compression: int, channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65_536, (30, 50, channels)).astype(np.uint16)
    options = [cv2.IMWRITE_TIFF_COMPRESSION, compression]
    data = cv2.imencode(".tiff", values[..., [2, 1, 0, 3][:channels]], options)[1].tobytes()
    np.testing.assert_array_equal(read_image_file(data).values, values[..., :3])


def test_read_image_file__sixteen_bits_of_other_channels_are_refused() -> None:
    values = np.zeros((3, 4, 2), ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    data = bytearray(deep_colours(channels=1)[0])
    data[16:24], data[25] = struct.pack(">II", 4, 3), 4  # grey and alpha
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    content = b"IDAT" + zlib.compress(rows)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    with pytest.raises(DecodeError, match="has 16 bits a channel, but is neither grey nor RGB; save it as RGB or"):
        read_image_file(bytes(data[:33]) + chunk + bytes(data[-12:]))


@pytest.mark.parametrize(("image_format", "what"), [("TIFF", "2 pages, and which of them is"), ("WEBP", "2 pictures")])
def test_open_image__several_pictures_are_refused(image_format: str, what: str) -> None:
    first, second = Image.new("RGB", (16, 8), (200, 10, 10)), Image.new("RGB", (16, 8), (10, 10, 200))
    with pytest.raises(DecodeError, match=f"holds {what}"):
        open_image(encoded(first, image_format, save_all=True, append_images=[second]))


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "JPEG2000", "PPM"])
def test_open_image__other_formats_are_refused_by_name(kind: str) -> None:
    with pytest.raises(DecodeError, match=f"is {kind}, none of JPEG, PNG, TIFF, WebP and BMP; convert it to PNG"):
        open_image(encoded(Image.new("RGB", (16, 16)), kind))
    with pytest.raises(DecodeError, match="is HEIC, none of"):
        open_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["TIFF", "WEBP"])
def test_exif__other_formats_and_their_labels_are_turned_alike(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(pixels), image_format, exif=exif, **options)
    upright = np.asarray(open_image(turned_png(orientation, pixels))[0])
    np.testing.assert_array_equal(decode_image(data), upright)
    label = pixels[..., 0].copy()
    expected = label if orientation < 5 else upright[..., 0]
    np.testing.assert_array_equal(orient_label(data, label), expected)
    if orientation >= 5:
        np.testing.assert_array_equal(orient_label(data, upright[..., 0]), upright[..., 0])


def turned_png(orientation: int, pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(pixels), exif=exif)


def test_open_image__one_colour_packs_tightly_in_some_formats() -> None:
    for image_format, options in (("WEBP", {"lossless": True, "method": 0}), ("TIFF", {"compression": "group4"})):
        image = Image.new("1" if image_format == "TIFF" else "RGB", (4096, 2048))
        data = encoded(image, image_format, **options)
        assert len(data) < 4096 * 2048 / (8 * 1032)
        assert open_image(data)[0].size == (4096, 2048)


def deep_colours(orientation: int | None = None, channels: int = 3) -> tuple[bytes, np.ndarray]:
    """A PNG of 16 bits a channel, and its values (3, 5, channels) as stored."""
    values = np.random.default_rng(0).integers(0, 65_536, (3, 5, channels)).astype(np.uint16)
    data = cv2.imencode(".png", values[..., [2, 1, 0, 3][:channels]] if channels > 1 else values)[1].tobytes()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
        data = data[:33] + chunk + data[33:]
    return data, values


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decode_image__sixteen_bits_are_scaled_by_the_range(channels: int) -> None:
    data, values = deep_colours(channels=channels)
    expected = np.clip(np.floor((values[..., :3].astype(float) - 1000) * 255 / 50_000 + 0.5), 0, 255)
    np.testing.assert_array_equal(decode_image(data, (1000, 51_000)), np.broadcast_to(expected, (3, 5, 3)))
    with pytest.raises(DecodeError, match="more than 8 bits a channel, and no grey range says which values are black"):
        decode_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_decode_image__sixteen_bits_stand_upright(orientation: int, channels: int) -> None:
    data, values = deep_colours(orientation, channels)
    scaled = scale_values(values, (0, 65_535))
    marked = Image.fromarray(scaled if channels == 3 else scaled[..., 0]).convert("RGB")
    marked.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(data, (0, 65_535)), np.asarray(ImageOps.exif_transpose(marked)))


def test_decode_image__eight_bits_are_not_scaled() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(decode_image(encode_png(pixels), (0, 4095)), pixels)


def test_open_image__suffix_is_the_formats_and_exif_turns_upright() -> None:
    wide = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 16, axis=1).repeat(8, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    image, suffix = open_image(encoded(wide, "JPEG", exif=exif, quality=95))
    assert (suffix, image.size, image.mode) == ("jpg", (8, 32), "RGB")
    assert np.asarray(image)[2, 2, 0] < 30
    assert np.asarray(image)[-2, 2, 0] > 225
    assert open_image(encode_png(np.zeros((2, 2), np.uint8)))[1] == "png"


def test_decode_label__grey_palette_and_sixteen_bit() -> None:
    ids = np.array([[0, 1, 255], [7, 8, 9]], dtype=np.uint8)
    np.testing.assert_array_equal(decode_label(encode_png(ids)), ids)
    palette = Image.frombytes("P", (3, 2), ids.tobytes())
    palette.putpalette([200, 3, 9] * 256)
    np.testing.assert_array_equal(decode_label(encoded(palette)), ids)
    deep = np.array([[0, 65535, 300]], dtype=np.uint16)
    np.testing.assert_array_equal(decode_label(encoded(Image.fromarray(deep))), deep)


def turned(orientation: int, height: int = 16, width: int = 24) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    return encoded(image, "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif__image_and_stored_label_are_turned_alike(orientation: int) -> None:
    data = turned(orientation)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode_image(data), expected)
    label = np.arange(16 * 24, dtype=np.uint8).reshape(16, 24)
    moved = orient_label(data, label)
    if orientation < 5:
        # Both sizes fit: the label map is taken to lie on the upright image.
        np.testing.assert_array_equal(moved, label)
    else:
        marked = Image.fromarray(label)
        marked.getexif()[0x0112] = orientation
        np.testing.assert_array_equal(moved, np.asarray(ImageOps.exif_transpose(marked)))
        upright = np.zeros((24, 16), dtype=np.uint8)
        assert orient_label(data, upright) is upright
    assert orient_label(data, label[:3]).shape == (3, 24)


def test_exif__square_or_damaged_says_nothing_of_the_label() -> None:
    label = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert orient_label(turned(6, 16, 16), label) is label
    assert orient_label(b"no image", label) is label
    data = turned(6)
    place = data.index(b"Exif")
    damaged = data[: place + 6] + bytes(255 - value for value in data[place + 6 : place + 30]) + data[place + 30 :]
    assert decode_image(damaged).shape == (16, 24, 3)
    assert orient_label(damaged, np.zeros((16, 24), np.uint8)).shape == (16, 24)


def test_open_image__camera_files_with_several_pictures_are_jpeg() -> None:
    first, second = Image.new("RGB", (16, 8), (200, 10, 10)), Image.new("RGB", (16, 8), (10, 10, 200))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    image, suffix = open_image(data)
    assert suffix == "jpg"
    np.testing.assert_allclose(np.asarray(image)[4, 8], (200, 10, 10), atol=4)


def test_max_pixels__refused_before_the_pixels_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_png(np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(image_files, "MAX_PIXELS", 9_999)
    for read in (decode_image, decode_label):
        with pytest.raises(DecodeError, match="has 100x100 pixels, more than the 9999 allowed"):
            read(data)


def test_max_pixels__a_head_that_says_more_than_the_file_can_hold() -> None:
    bomb = bytearray(encode_png(np.zeros((10, 10), np.uint8)))
    for size, message in ((60_000, "cannot be decoded"), (8_000, r"says 8000x8000 pixels, which \d+ bytes cannot")):
        bomb[16:24] = size.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(DecodeError, match=message):
            open_image(bytes(bomb))
    # What compresses best and is honest: one bit a pixel, all the same.
    flat = Image.new("P", (4096, 4096))
    flat.putpalette([0, 0, 0, 255, 255, 255])
    assert decode_label(encoded(flat, bits=1)).shape == (4096, 4096)


def test_decode_label__other_lossless_formats_and_low_bit_palettes() -> None:
    ids = np.array([[0, 1, 2], [3, 2, 1]], dtype=np.uint8)
    for image_format in ("TIFF", "BMP"):
        np.testing.assert_array_equal(decode_label(encoded(Image.fromarray(ids), image_format)), ids)
    palette = Image.frombytes("P", (3, 2), ids.tobytes())
    palette.putpalette([9, 9, 9, 200, 3, 9, 1, 1, 1, 250, 0, 0])
    data = encoded(palette, bits=2)
    assert data[24] == 2
    np.testing.assert_array_equal(decode_label(data), ids)


def test_decode_label__ambiguous_or_lossy_files_are_refused() -> None:
    with pytest.raises(DecodeError, match="is JPEG, which changes ids where they meet; export it as PNG"):
        decode_label(encoded(Image.new("L", (8, 8)), "JPEG"))
    with pytest.raises(DecodeError, match="is GIF, whose writers sort the palette anew for every file"):
        decode_label(encoded(Image.new("L", (8, 8)), "GIF"))
    with pytest.raises(DecodeError, match="is greyscale of 1 bits, which may mean two ids; save it with 8 bits"):
        decode_label(encoded(Image.new("1", (8, 8))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cannot be decoded \(unknown format\)"),
        (b"GIF87a nonsense", "cannot be decoded"),
        (encode_png(np.zeros((64, 64), np.uint8))[:60], "cannot be decoded"),
        (encoded(Image.new("RGB", (4, 4)), "BMP")[:60], "cannot be decoded"),
        (encoded(Image.new("RGB", (40, 40)), "TIFF")[:200], "cannot be decoded"),
        (encoded(Image.new("RGB", (4, 4)), "WEBP")[:30], "cannot be decoded"),
    ],
)
def test_open_image__damage(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        open_image(data)


def test_read_label_picture__indices_with_their_colours_and_colours_as_numbers() -> None:
    ids = np.array([[0, 1, 2], [3, 2, 1]], dtype=np.uint8)
    palette = Image.frombytes("P", (3, 2), ids.tobytes())
    palette.putpalette([9, 9, 9, 200, 3, 9, 1, 1, 1, 250, 0, 0, 7, 7, 7])
    kind, values, colours = read_label_picture(encoded(palette))
    assert kind == "indices"
    np.testing.assert_array_equal(values, ids)
    assert colours == {0: (9, 9, 9), 1: (200, 3, 9), 2: (1, 1, 1), 3: (250, 0, 0)}
    for mode in ("RGB", "RGBA"):
        kind, values, colours = read_label_picture(encoded(Image.new(mode, (2, 1), (1, 2, 255))))
        assert (kind, values.tolist(), dict(colours)) == ("colours", [[0x0102FF, 0x0102FF]], {})
    assert read_label_picture(encoded(Image.fromarray(ids))).kind == "grey"


def test_decode_label__colour_is_refused() -> None:
    with pytest.raises(DecodeError, match="is a colour picture, not a map of class ids with one channel"):
        decode_label(encoded(Image.new("RGB", (2, 2))))


def test_open_image__a_chain_of_pages_is_not_followed_to_its_end() -> None:
    data = bytearray(encoded(Image.new("L", (4, 4)), "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    end = start + 2 + 12 * count
    directory = bytes(data[start:end])
    struct.pack_into("<I", data, end, len(data))
    for _ in range(300):
        data += directory + struct.pack("<I", len(data) + len(directory) + 4)
    with pytest.raises(DecodeError, match="holds more than 100 pages"):
        open_image(bytes(data))


def test_open_image__readers_that_nobody_needs_see_no_file() -> None:
    with pytest.raises(DecodeError, match="unknown format"):
        open_image(encoded(Image.new("RGB", (4, 4)), "ICO"))
