"""Images and label maps from their files' bytes.

An image is taken upright, as its EXIF orientation says, and its label map likewise (see `orient_label`). One of more
than 8 bits a channel is scaled to 8 by a range that must be known (see `segvit.grey_range`), and never guessed.

Pillow decodes: on 480x360 PNG and 683x512 JPEG files it measured as fast as torchvision's decoders up to
pixels in an array, it resizes a window on its own, and it reads every colour mode.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile as PillowFile

from segvit.grey_range import GreyRange, scale_values

# In every label map of class ids, on disk and in memory: the pixel belongs to no class.
IGNORE_INDEX = 255
# Of the formats that shards hold. MPO is what many cameras write: a JPEG file with further pictures after the first.
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
FORMATS = "JPEG, PNG, TIFF, WebP and BMP"
# Those of them that shards hold as PNG.
_CONVERTED = ("TIFF", "WEBP", "BMP")
_MOST_PAGES = 100  # are counted
# Those, and some whose name is worth saying; Pillow has readers of forty more, and none of them sees a file.
_OPENED = ("JPEG", "PNG", *_CONVERTED, "GIF", "JPEG2000", "PPM")
# By the brand in an ISO media file, for those that Pillow may not know.
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF"}
# Lossless formats.
LABEL_FORMATS = ("PNG", "TIFF", "BMP")
_NO_LABEL_FORMATS = {
    "JPEG": "is JPEG, which changes ids where they meet; export it as PNG",
    "GIF": "is GIF, whose writers sort the palette anew for every file; export it as PNG",
}
# A picture of more is taken for damage: Pillow needs a quarter of a gigabyte for it, several times over to convert.
MAX_PIXELS = 1 << 26
# PNG, JPEG and BMP pack no more into a byte: one-bit palettes at deflate's best ratio.
MAX_PIXELS_PER_BYTE = 8 * 1032
_PACKED_TIGHTER = ("TIFF", "WEBP")
_SMALL_PIXELS = 1 << 22
_EXIF_ORIENTATION = 0x0112
_PNG_DEPTH, _PNG_COLOUR = 24, 25  # bytes of the header
_TIFF_DEPTHS, _TIFF_PLANES = 258, 284  # tags: bits of each channel; 1: the channels of a pixel lie together
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # of bytes: big, little, native
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that turn by 90 degrees


class DecodeError(ValueError):
    """Bytes that are no picture we can use; the message says why in a few words."""


class ImageFile(NamedTuple):
    """An image as its file holds it.

    Attributes:
        suffix: of the format that keeps its pixels in a shard, `jpg` or `png`.
        image: upright, RGB or grey of 8 bits; None where the channels have more.
        values: upright (H, W) or (H, W, 3) values of channels of more than 8 bits; None where they have 8.
        as_is: whether a shard holds the file's own bytes, rather than a PNG made of its pixels.
    """

    suffix: str
    image: Image.Image | None
    values: NDArray[Any] | None
    as_is: bool


def open_image(data: bytes, grey_range: GreyRange | None = None) -> tuple[Image.Image, str]:
    """The RGB image in `data`, upright and of 8 bits, and the suffix that it has in a shard (`jpg` or `png`).

    Palette, greyscale, RGBA and CMYK images become RGB; more than 8 bits a channel are scaled by `grey_range`. Raises
    DecodeError, also where such a range is needed and None.
    """
    file = read_image_file(data)
    image = file.image
    if image is None:
        assert file.values is not None
        if grey_range is None:
            raise DecodeError(
                "has more than 8 bits a channel, and no grey range says which values are black and white: none was "
                "measured, as the training images have 8; convert it to 8 bits as they were"
            )
        image = Image.fromarray(scale_values(file.values, grey_range))
    return image if image.mode == "RGB" else image.convert("RGB"), file.suffix


def read_image_file(data: bytes) -> ImageFile:
    """The image in `data`, JPEG, PNG, TIFF, WebP or BMP, with all bits of its channels; raises DecodeError."""
    image = _open(data)
    _check_format(image)
    suffix = SUFFIXES.get(image.format or "", SUFFIXES["PNG"])
    try:
        values = _deep_values(image, data)
        if values is not None:
            return ImageFile(suffix, None, values, as_is=False)
        image, as_is = stand_upright(image), image.format in SUFFIXES
        return ImageFile(suffix, image if image.mode in ("RGB", "L") else image.convert("RGB"), None, as_is)
    except Exception as error:
        raise damage_of(error) from error


def _check_format(image: Image.Image) -> None:
    """Raise DecodeError for formats that are not read, and for files of several pictures."""
    if image.format not in (*SUFFIXES, *_CONVERTED):
        raise _unread_format(image.format or "of no format")
    if image.format in _CONVERTED:
        try:
            num_pictures = _count_pictures(image)
        except Exception as error:
            raise damage_of(error) from error
        if num_pictures > 1:
            number = str(num_pictures) if num_pictures <= _MOST_PAGES else f"more than {_MOST_PAGES}"
            what = "pages, and which of them is labelled" if image.format == "TIFF" else "pictures, and which is meant"
            raise DecodeError(f"holds {number} {what} cannot be told; save one alone")


def _count_pictures(image: Image.Image) -> int:
    """Those in the file; of a TIFF's pages no more than tell that they are too many, as each has to be looked at."""
    if image.format != "TIFF":
        return int(getattr(image, "n_frames", 1))
    pages = 1
    while image.is_animated and pages <= _MOST_PAGES:  # type: ignore[attr-defined]
        try:
            image.seek(pages)
        except EOFError:
            break
        pages += 1
    return pages


def _unread_format(name: str) -> DecodeError:
    return DecodeError(f"is {name}, none of {FORMATS}; convert it to PNG")


def _deep_values(image: Image.Image, data: bytes) -> NDArray[Any] | None:
    """The values of an image of more than 8 bits a channel, upright; None for others, which are not decoded."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(stand_upright(image))
        # Files may be of the other byte order.
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    depths = image.tag_v2.get(_TIFF_DEPTHS, (1,)) if image.format == "TIFF" else (1,)  # type: ignore[attr-defined]
    if max(depths) > 8 or (image.format == "PNG" and data[_PNG_DEPTH] > 8):
        return _sixteen_bit_colours(image, data)
    return None


def _sixteen_bit_colours(image: Image.Image, data: bytes) -> NDArray[np.uint16]:
    """(H, W, 3) values of the colour picture `image` in `data`, upright.

    Pillow keeps one byte of two, the upper one; told the other byte order, it takes the lower one for that.
    """
    # Only files have tiles, and a file is what _open gives.
    swapped = cast(PillowFile, _open(data))
    planes = image.tag_v2.get(_TIFF_PLANES, 1) if image.format == "TIFF" else 1  # type: ignore[attr-defined]
    tiles = []
    for tile in swapped.tile:
        first, *others = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
        layout, _, order = str(first).partition(";16")
        if layout not in ("RGB", "RGBA", "RGBX") or order not in _OTHER_ORDER or planes != 1:
            raise DecodeError("has 16 bits a channel, but is neither grey nor RGB; save it as RGB or with 8 bits")
        tiles.append(tile._replace(args=(f"{layout};16{_OTHER_ORDER[order]}", *others)))
    swapped.tile = tiles
    upper, lower = (np.asarray(stand_upright(half))[..., :3] for half in (image, swapped))
    return np.asarray(upper.astype(np.uint16) << 8 | lower, np.uint16)


def stand_upright(image: Image.Image) -> Image.Image:
    """`image` turned and mirrored as its EXIF orientation says; unreadable EXIF says nothing."""
    turn = _UPRIGHT.get(exif_orientation(image))
    image.load()
    return image if turn is None else image.transpose(turn)


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of `image`, 1 to 8; 1, upright, where it has none or one that cannot be read."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    # Damaged EXIF raises nearly anything; the pixels are good without it.
    except Exception:
        return 1


def orient_label(image: bytes, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`label` (H, W) as it lies on the upright image in the file `image`.

    A label map that fits the upright image stays as it is. One that fits only the pixels as the file stores them,
    before EXIF turns them by 90 degrees, was drawn on those and is turned with them. Where both fit (square
    images, turns by 180 degrees and mirror images) the size cannot tell, and the upright image is what label
    tools show.
    """
    try:
        picture = _open(image)
    except DecodeError:
        return label  # whoever decodes the image says what is wrong with it
    stored_size, orientation = picture.size, exif_orientation(picture)
    if picture.format == "TIFF":
        orientation = picture.tag_v2.get(_EXIF_ORIENTATION, 1)  # type: ignore[attr-defined]
        # Pillow turns TIFF files on its own, and their size from the beginning.
        stored_size = picture.size[::-1] if orientation in SIDEWAYS else picture.size
    return turn_label(label, stored_size, orientation)


def turn_label(label: NDArray[np.uint8], stored_size: tuple[int, int], orientation: int) -> NDArray[np.uint8]:
    """See `orient_label`, of an image of (width, height) as stored, and its EXIF orientation."""
    if orientation not in SIDEWAYS or label.shape != stored_size[::-1] or stored_size[0] == stored_size[1]:
        return label
    return np.array(Image.fromarray(label).transpose(_UPRIGHT[orientation]))


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the image in `data`, as its head says; nothing is decoded. Raises DecodeError."""
    return _open(data).size


def decode_image(data: bytes, grey_range: GreyRange | None = None) -> NDArray[np.uint8]:
    """The image in `data` as (H, W, 3) RGB of 8 bits, see `open_image`; raises DecodeError."""
    return np.array(open_image(data, grey_range)[0])


class LabelPicture(NamedTuple):
    """A label map as its file holds it.

    Attributes:
        kind: what `values` are.
        values: (H, W) integers: grey values, indices into the file's palette, or colours, see `colour_code`.
        index_colours: the RGB colour of each index that is used; empty unless `kind` is ``indices``.
    """

    kind: Literal["grey", "indices", "colours"]
    values: NDArray[np.integer]
    index_colours: Mapping[int, tuple[int, int, int]] = {}


def decode_label(data: bytes) -> NDArray[np.integer]:
    """The label map in `data` as (H, W) integers: grey values, or indices where the file has a palette.

    Raises DecodeError, also for colour pictures, whose ids would be guesses.
    """
    picture = read_label_picture(data)
    if picture.kind == "colours":
        raise DecodeError("is a colour picture, not a map of class ids with one channel")
    return picture.values


def read_label_picture(data: bytes) -> LabelPicture:
    """The label map in `data`, a colour picture too; raises DecodeError."""
    image = _open(data)
    if image.format not in LABEL_FORMATS:
        why = _NO_LABEL_FORMATS.get(
            image.format or "", f"is {image.format}, which cannot hold class ids; save it as PNG"
        )
        raise DecodeError(why)
    colour = image.mode in ("RGB", "RGBA")
    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I") and not colour:
        raise DecodeError(f"is a {image.mode} picture, not a map of class ids with one channel")
    if image.format == "PNG" and data[_PNG_COLOUR] == 0 and data[_PNG_DEPTH] < 8:
        # The format scales such values to the full range, most writers do not: 1 may mean id 1 or id 255.
        depth = data[_PNG_DEPTH]
        raise DecodeError(f"is greyscale of {depth} bits, which may mean two ids; save it with 8 bits or a palette")
    try:
        image.load()
        if colour:
            return LabelPicture("colours", colour_code(np.asarray(image)[..., :3]))
        values = np.asarray(image, dtype=np.uint8) if image.mode == "1" else np.asarray(image)
        if image.mode != "P":
            return LabelPicture("grey", values)
        table = np.frombuffer(image.palette.getdata()[1] if image.palette else b"", np.uint8)
        size = 4 if image.palette is not None and image.palette.mode == "RGBA" else 3
        rows = table[: len(table) // size * size].reshape(-1, size)[:, :3]
        used = [index for index in np.unique(values).tolist() if index < len(rows)]
        colours = {index: (int(rows[index][0]), int(rows[index][1]), int(rows[index][2])) for index in used}
        return LabelPicture("indices", values, colours)
    except Exception as error:
        raise damage_of(error) from error


def colour_code(colours: NDArray[np.uint8]) -> NDArray[np.int32]:
    """One number, 0xRRGGBB, a colour: (...) of (..., 3)."""
    wide = colours.astype(np.int32)
    return np.asarray(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], np.int32)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of (H, W) or (H, W, 3) pixels; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _open(data: bytes) -> Image.Image:
    """The picture in `data`, its head read and its pixels not yet; raises DecodeError."""
    try:
        # Pillow warns of large pictures on its own; MAX_PIXELS is what counts here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_OPENED)
    except Exception as error:
        if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
            raise _unread_format(_BRANDS[data[8:12]]) from error
        raise damage_of(error) from error
    num_pixels = image.width * image.height
    if num_pixels > MAX_PIXELS:
        raise DecodeError(f"has {image.width}x{image.height} pixels, more than the {MAX_PIXELS} allowed")
    packed = image.format not in _PACKED_TIGHTER
    if packed and num_pixels > max(_SMALL_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
        raise DecodeError(f"says {image.width}x{image.height} pixels, which {len(data)} bytes cannot hold")
    return image


def damage_of(error: Exception) -> DecodeError:
    """Damaged files raise nearly anything from inside the codecs; each means the same to the user."""
    if isinstance(error, DecodeError):
        return error
    text = "unknown format" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return DecodeError(f"cannot be decoded ({text})")


def one_line(error: Exception) -> str:
    """What `error` says, without line breaks; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
