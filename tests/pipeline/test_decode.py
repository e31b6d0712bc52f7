"""Decoding: every colour mode to RGB, label maps as they are, and damage named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import DecodeError, decode_image, decode_label, encode_png, open_image


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
    deep = Image.fromarray(np.full((2, 3), 0x80FF, dtype=np.uint16))
    assert (decode_image(encoded(deep)) == 0x80).all()
    cmyk = decode_image(encoded(colour.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(cmyk[0, 0], (10, 200, 30), atol=6)


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"cannot be decoded \(unknown format\)"),
        (b"GIF87a nonsense", "cannot be decoded"),
        (encode_png(np.zeros((64, 64), np.uint8))[:60], "cannot be decoded"),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), "is BMP, neither JPEG nor PNG"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "is TIFF, neither"),
    ],
)
def test_open_image__damage(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        open_image(data)


def test_decode_label__colour_is_refused() -> None:
    with pytest.raises(DecodeError, match="is a RGB picture, not a map of class ids with one channel"):
        decode_label(encoded(Image.new("RGB", (2, 2))))
