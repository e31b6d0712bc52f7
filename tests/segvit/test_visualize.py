from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from segvit.visualize import MARGIN, SWATCH, colorize, draw_legend, flow, overlay, palette_image

PALETTE = [(255, 0, 0), (0, 200, 0)]
LABELS = np.array([[0, 1], [255, 0]])


def test_colorize__palette_and_ignore() -> None:
    assert colorize(LABELS, PALETTE).tolist() == [[[255, 0, 0], [0, 200, 0]], [[0, 0, 0], [255, 0, 0]]]


def test_overlay__blends_and_leaves_ignored_pixels() -> None:
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    blended = overlay(image, LABELS, PALETTE, alpha=0.25)
    assert blended.dtype == np.uint8
    assert blended[0, 0].tolist() == [139, 75, 75]  # 100 * 0.75 + (255, 0, 0) * 0.25
    assert blended[0, 1].tolist() == [75, 125, 75]
    assert blended[1, 0].tolist() == [100, 100, 100]
    assert np.array_equal(overlay(image, LABELS, PALETTE, alpha=0.0), image)


def test_overlay__bad_input_is_refused() -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"image is \(2, 3\) pixels, the labels \(2, 2\)"):
        overlay(image, LABELS, PALETTE)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 2"):
        overlay(image[:, :2], LABELS, PALETTE, alpha=2)


def test_draw_legend__keeps_the_image_and_shows_each_colour() -> None:
    image = np.full((40, 200, 3), 77, dtype=np.uint8)
    canvas = np.asarray(draw_legend(image, ["sky", "road"], PALETTE))
    assert np.array_equal(canvas[:40, :200], image)
    band = canvas[40:]
    assert band.shape[0] == MARGIN + SWATCH + MARGIN
    assert band[MARGIN + 3, MARGIN + 3].tolist() == [255, 0, 0]
    assert (band == np.array([0, 200, 0])).all(-1).sum() == (SWATCH - 2) ** 2
    assert (band < 100).all(-1).any()  # the names' black ink


def test_draw_legend__narrow_image_wraps_and_widens() -> None:
    names = ["a rather long class name", "b"]
    canvas = draw_legend(np.zeros((10, 20, 3), dtype=np.uint8), names, PALETTE)
    assert canvas.width > 150
    assert canvas.height == 10 + 2 * SWATCH + 3 * MARGIN
    with pytest.raises(ValueError, match="1 class names for 2 colours"):
        draw_legend(np.zeros((10, 20, 3), dtype=np.uint8), ["a"], PALETTE)


def test_flow__breaks_lines() -> None:
    places, height = flow([50, 50, 50], line_width=120)
    assert places == [(MARGIN, MARGIN), (MARGIN + 50, MARGIN), (MARGIN, 2 * MARGIN + SWATCH)]
    assert height == 2 * SWATCH + 3 * MARGIN
    assert flow([], 100) == ([], 0)


def test_palette_image__png_keeps_ids_and_shows_colours() -> None:
    file = io.BytesIO()
    palette_image(LABELS, PALETTE).save(file, "PNG")
    picture = Image.open(file)
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), LABELS)
    assert picture.convert("RGB").getpixel((1, 0)) == (0, 200, 0)
    with pytest.raises(ValueError, match="label ids run from 0 to 256"):
        palette_image(np.array([[0, 256]]), PALETTE)
