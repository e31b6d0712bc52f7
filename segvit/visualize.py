"""Label maps as pictures: colours, overlays, legends, indexed PNG."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Palette = Sequence[Sequence[int]]  # RGB, 0 to 255, one entry a class

SWATCH = 14  # pixels on each side
MARGIN = 6  # pixels
FONT_SIZE = 13  # pixels
ROWS_AT_ONCE = 256  # of an overlay: its sums in floating point take sixteen times the image's memory

# H W pixels


def colorize(labels: NDArray[np.integer], palette: Palette) -> NDArray[np.uint8]:
    """Label map (H, W) as RGB (H, W, 3); ids outside the palette, such as the ignore index, are black."""
    table = np.zeros((len(palette) + 1, 3), dtype=np.uint8)
    table[:-1] = np.asarray(palette, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    return table[np.where(known, labels, len(palette))]


def overlay(
    image: NDArray[np.uint8], labels: NDArray[np.integer], palette: Palette, alpha: float = 0.5
) -> NDArray[np.uint8]:
    """Class colours blended over an image; pixels with an id outside the palette show the image alone.

    Args:
        image: RGB (H, W, 3).
        labels: (H, W).
        palette: RGB, one entry a class.
        alpha: Share of the class colour, 0 to 1.

    Raises:
        ValueError: Image and labels of different sizes, or alpha out of range.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"image is {image.shape[:2]} pixels, the labels {labels.shape}; they must be the same")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    shown = image.copy()
    for top in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        blended = np.rint(image[rows] * (1 - alpha) + colorize(labels[rows], palette) * alpha).astype(np.uint8)
        known = (labels[rows] >= 0) & (labels[rows] < len(palette))
        np.copyto(shown[rows], blended, where=known[..., None])
    return shown


def draw_legend(image: NDArray[np.uint8], class_names: Sequence[str], palette: Palette) -> Image.Image:
    """The image with a white band below it that names the classes beside their colours.

    Args:
        image: RGB (H, W, 3).
        class_names: The names to show, in order.
        palette: The colour of each name.

    Raises:
        ValueError: Names and colours of different number.
    """
    if len(class_names) != len(palette):
        raise ValueError(f"{len(class_names)} class names for {len(palette)} colours; give one colour a name")
    font = ImageFont.load_default(FONT_SIZE)
    height, width = image.shape[:2]
    widths = [SWATCH + MARGIN + int(np.ceil(font.getlength(name))) + 2 * MARGIN for name in class_names]
    canvas_width = max([width, *(entry + MARGIN for entry in widths)])
    places, band_height = flow(widths, canvas_width)
    canvas = Image.new("RGB", (canvas_width, height + band_height), "white")
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (x, y), name, color in zip(places, class_names, palette, strict=True):
        y += height
        box = (x, y, x + SWATCH - 1, y + SWATCH - 1)
        draw.rectangle(box, fill=(color[0], color[1], color[2]), outline="black")
        draw.text((x + SWATCH + MARGIN, y + SWATCH // 2), name, fill="black", font=font, anchor="lm")
    return canvas


def flow(widths: Sequence[int], line_width: int) -> tuple[list[tuple[int, int]], int]:
    """Left-to-right, line-by-line places (x, y) of entries, and the height they take."""
    places: list[tuple[int, int]] = []
    x, y = MARGIN, MARGIN
    for width in widths:
        if x > MARGIN and x + width > line_width:
            x, y = MARGIN, y + SWATCH + MARGIN
        places.append((x, y))
        x += width
    return places, y + SWATCH + MARGIN if places else 0


def palette_image(labels: NDArray[np.integer], palette: Palette) -> Image.Image:
    """Label map (H, W) as an indexed 8-bit image: pixel values are the class ids, shown in class colours.

    Raises:
        ValueError: An id that does not fit 8 bits.
    """
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"label ids run from {labels.min()} to {labels.max()}; an 8-bit image holds 0 to 255")
    picture = Image.fromarray(labels.astype(np.uint8))
    # All 256 entries: with fewer, the PNG writer would cut ids down to the bits that the palette needs.
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    picture.putpalette(table.tobytes())
    return picture
