"""Augmentation: geometry agrees between image and label, limits are kept, distortion does what it says."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentationConfig
from pipeline.transforms import (
    MEAN_PIXEL,
    Window,
    augment,
    cut_image,
    cut_label,
    distort,
    draw_size,
    draw_window,
    pad,
)

PLAIN = AugmentationConfig(
    scale_range=(1.0, 1.0),
    flip_probability=0.0,
    brightness=0.0,
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue=0.0,
)


class Draws:
    """A stand-in for a Generator that gives prescribed values of `random` and `uniform`."""

    def __init__(self, coins: list[float], uniforms: list[float]) -> None:
        self.coins, self.uniforms = coins, uniforms

    def random(self, size: int | None = None) -> object:
        taken = [self.coins.pop(0) for _ in range(size or 1)]
        return np.array(taken) if size else taken[0]

    def uniform(self, low: float, high: float) -> float:
        return self.uniforms.pop(0)


def blocks(height: int, width: int, side: int) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Blocks of classes, each class with its own grey value, 20 times its id."""
    rows, columns = np.mgrid[0:height, 0:width] // side
    label = ((rows * 3 + columns) % 11).astype(np.uint8)
    return Image.fromarray(np.repeat(label[..., None] * 20, 3, axis=2).astype(np.uint8)), label


def test_augment__image_and_label_stay_together() -> None:
    image, label = blocks(120, 160, 40)
    config = PLAIN.model_copy(update={"scale_range": (0.5, 2.0), "flip_probability": 0.5})
    for seed in range(30):
        view = augment(image, label, (64, 96), config, np.random.default_rng(seed))
        assert view.image.shape == (64, 96, 3)
        assert view.label.shape == (64, 96)
        inside = view.label != 255
        same = view.image[..., 0] == view.label * 20
        # All but the pixels on the blocks' edges, where bilinear values mix.
        assert np.mean(same[inside]) > 0.85
        assert np.abs(view.image[..., 0].astype(int) - view.label * 20.0)[inside].mean() < 6


def test_augment__same_generator_same_view() -> None:
    image, label = blocks(60, 80, 10)
    first, again, other = (
        augment(image, label, (32, 32), AugmentationConfig(), np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert not np.array_equal(first.image, other.image)


def test_augment__flip_flips_both() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    label = rng.integers(0, 11, (20, 30)).astype(np.uint8)
    image = Image.fromarray(pixels)
    kept = augment(image, label, (20, 30), PLAIN, np.random.default_rng(0))
    np.testing.assert_array_equal(kept.image, pixels)
    np.testing.assert_array_equal(kept.label, label)
    always = PLAIN.model_copy(update={"flip_probability": 1.0})
    flipped = augment(image, label, (20, 30), always, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped.image, pixels[:, ::-1])
    np.testing.assert_array_equal(flipped.label, label[:, ::-1])


def test_draw_size__native_and_fitted_scales() -> None:
    rng = np.random.default_rng(0)
    assert draw_size((360, 480), PLAIN, rng) == (360, 480)
    double = PLAIN.model_copy(update={"scale_range": (2.0, 2.0)})
    assert draw_size((360, 480), double, rng) == (720, 960)
    # The published (2048, 512): the short side becomes 512, unless the long one would pass 2048.
    fitted = PLAIN.model_copy(update={"resize_long": 2048, "resize_short": 512})
    assert draw_size((256, 400), fitted, rng) == (512, 800)
    assert draw_size((800, 200), fitted, rng) == (2048, 512)
    assert draw_size((200, 1600), fitted, rng) == (256, 2048)
    heights = [draw_size((100, 100), AugmentationConfig(), rng)[0] for _ in range(500)]
    assert min(heights) >= 50
    assert max(heights) <= 200
    assert np.mean(heights) == pytest.approx(125, abs=6)


def test_draw_window__class_cap_is_honoured() -> None:
    # The left three quarters hold one class; windows on the seam are needed.
    label = np.zeros((40, 80), dtype=np.uint8)
    label[:, 60:] = 1
    config = PLAIN.model_copy(update={"crop_tries": 200})
    for seed in range(20):
        window = draw_window(label, (40, 80), (40, 40), config, np.random.default_rng(seed))
        counts = np.bincount(cut_label(label, (40, 80), window).ravel())
        assert counts.max() / counts.sum() <= 0.75
    free = PLAIN.model_copy(update={"max_class_fraction": 1.0})
    lefts = [draw_window(label, (40, 80), (40, 40), free, np.random.default_rng(s)).left for s in range(50)]
    assert min(lefts) < 10


def test_draw_window__ignored_pixels_do_not_count_and_hopeless_images_end() -> None:
    label = np.full((40, 40), 255, dtype=np.uint8)
    label[:2, :20], label[:2, 20:] = 0, 1
    rng = np.random.default_rng(0)
    assert draw_window(label, (40, 40), (40, 40), PLAIN, rng) == Window(0, 0, 40, 40)
    hopeless = np.zeros((40, 40), dtype=np.uint8)
    assert draw_window(hopeless, (40, 40), (20, 50), PLAIN, rng)[2:] == (20, 40)


def test_cut_image__equals_resizing_the_whole_then_cropping() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    for size, window in [((135, 180), Window(20, 31, 64, 80)), ((60, 80), Window(7, 5, 40, 50))]:
        whole = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
        top, left, height, width = window
        part = np.asarray(cut_image(image, size, window)).astype(int)
        assert np.abs(part - whole[top : top + height, left : left + width]).max() <= 2


def test_cut_label__nearest() -> None:
    label = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    np.testing.assert_array_equal(cut_label(label, (4, 4), Window(1, 0, 2, 4)), [[0, 0, 1, 1], [2, 2, 3, 3]])
    np.testing.assert_array_equal(cut_label(label, (1, 2), Window(0, 0, 1, 2)), [[2, 3]])


def test_pad__mean_pixel_and_ignored() -> None:
    view = pad(np.full((2, 3, 3), 9, np.uint8), np.full((2, 3), 4, np.uint8), (3, 5))
    np.testing.assert_array_equal(view.label, [[4, 4, 4, 255, 255], [4, 4, 4, 255, 255], [255] * 5])
    assert (view.image[:2, :3] == 9).all()
    assert (view.image[2] == MEAN_PIXEL).all()
    assert (view.image[:, 3:] == MEAN_PIXEL).all()


def _pixel(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (1, 1), colour)


def test_distort__brightness_then_contrast() -> None:
    config = AugmentationConfig()
    # Coins: brightness, contrast, saturation, hue, then contrast first (< 0.5) or last.
    draws = Draws([0.1, 0.1, 0.9, 0.9, 0.1], [20.0, 1.5])
    out = distort(_pixel((10, 100, 200)), config, draws)  # type: ignore[arg-type]
    assert out.getpixel((0, 0)) == (45, 180, 255)
    draws = Draws([0.1, 0.9, 0.9, 0.9, 0.1], [-30.0])
    out = distort(_pixel((10, 100, 200)), config, draws)  # type: ignore[arg-type]
    assert out.getpixel((0, 0)) == (0, 70, 170)


def test_distort__saturation_and_hue_in_hsv() -> None:
    colour = (200, 120, 40)
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in colour))
    draws = Draws([0.9, 0.9, 0.1, 0.1, 0.1], [0.5, 18.0])
    out = distort(_pixel(colour), AugmentationConfig(), draws)  # type: ignore[arg-type]
    expected = colorsys.hsv_to_rgb(hue + 36 / 360, saturation * 0.5, value)
    np.testing.assert_allclose(np.asarray(out)[0, 0], 255 * np.array(expected), atol=3)


def test_distort__contrast_last_comes_after_the_colours() -> None:
    colour = (250, 200, 150)
    first = distort(
        _pixel(colour),
        AugmentationConfig(),
        Draws([0.9, 0.1, 0.1, 0.9, 0.1], [1.5, 0.5]),  # type: ignore[arg-type]
    )
    last = distort(
        _pixel(colour),
        AugmentationConfig(),
        Draws([0.9, 0.1, 0.1, 0.9, 0.9], [1.5, 0.5]),  # type: ignore[arg-type]
    )
    assert first.getpixel((0, 0)) == pytest.approx((255, 255, 240), abs=2)
    assert last.getpixel((0, 0)) == pytest.approx((255, 255, 255), abs=2)


def test_distort__strengths_are_limits_and_zero_switches_off() -> None:
    grey = _pixel((100, 100, 100))
    off = PLAIN
    config = off.model_copy(update={"brightness": 32.0})
    levels = [distort(grey, config, np.random.default_rng(s)).getpixel((0, 0)) for s in range(200)]
    reds = np.array(levels)[:, 0]
    assert reds.min() >= 68
    assert reds.max() <= 132
    assert reds.max() - reds.min() > 50
    assert 0.35 < np.mean(reds == 100) < 0.65
    colour = _pixel((10, 100, 200))
    assert {distort(colour, off, np.random.default_rng(s)).getpixel((0, 0)) for s in range(50)} == {(10, 100, 200)}
