"""Augmentation: views are the right part at the right size, image and label agree, distortion is the published one."""

from __future__ import annotations

import io
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from pipeline.config import AugmentationConfig
from pipeline.shards.transforms import (
    MEAN_PIXEL,
    AugmentedPair,
    Span,
    View,
    cut_label,
    distort,
    draw_scale,
    draw_span,
    draw_view,
    largest_fraction,
    pad,
    resize,
    training_view,
)
from segvit.image_files import DecodeError, encode_png
from tests.examples import num_examples

PLAIN = AugmentationConfig(
    scale_range=(1.0, 1.0),
    flip_probability=0.0,
    brightness=0.0,
    contrast=(1.0, 1.0),
    saturation=(1.0, 1.0),
    hue=0.0,
)

Pixels = NDArray[np.uint8]


def at_scale(scale: float, **changes: float) -> AugmentationConfig:
    return PLAIN.model_copy(update={"scale_range": (scale, scale), **changes})


def photograph() -> Pixels:
    """A real photograph, 427 x 640."""
    return np.array(load_sample_image("china.jpg"), np.uint8)


def jpeg(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def blocks(height: int, width: int, side: int) -> tuple[Pixels, Pixels]:
    """Blocks of classes, each class with its own grey value, 20 times its id."""
    rows, columns = np.mgrid[0:height, 0:width] // side
    label = ((rows * 3 + columns) % 11).astype(np.uint8)
    return np.repeat(label[..., None] * 20, 3, axis=2).astype(np.uint8), label


def view_of(
    image: Pixels, label: Pixels, crop: tuple[int, int], config: AugmentationConfig, seed: int
) -> AugmentedPair:
    return training_view(encode_png(image), encode_png(label), crop, config, np.random.default_rng(seed))


def test_view__image_and_label_stay_together() -> None:
    image, label = blocks(120, 160, 40)
    for seed in range(30):
        view = view_of(image, label, (64, 96), PLAIN.model_copy(update={"scale_range": (0.3, 2.0)}), seed)
        assert view.image.shape == (64, 96, 3)
        assert view.label.shape == (64, 96)
        inside = view.label != 255
        # All but the pixels on the blocks' edges, where bilinear values mix.
        assert np.mean((view.image[..., 0] == view.label * 20)[inside]) > 0.8
        assert np.abs(view.image[..., 0].astype(int) - view.label * 20.0)[inside].mean() < 6


def test_view__same_generator_same_view() -> None:
    image, label = blocks(60, 80, 10)
    first, again, other = (view_of(image, label, (32, 32), AugmentationConfig(), seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert not np.array_equal(first.image, other.image)


def test_view__flip_flips_both() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    label = rng.integers(0, 11, (20, 30)).astype(np.uint8)
    kept = view_of(pixels, label, (20, 30), PLAIN, 0)
    np.testing.assert_array_equal(kept.image, pixels)
    np.testing.assert_array_equal(kept.label, label)
    flipped = view_of(pixels, label, (20, 30), PLAIN.model_copy(update={"flip_probability": 1.0}), 0)
    np.testing.assert_array_equal(flipped.image, pixels[:, ::-1])
    np.testing.assert_array_equal(flipped.label, label[:, ::-1])


def test_view__channels_are_blocks_of_memory() -> None:
    image, label = blocks(40, 40, 8)
    for crop in [(40, 40), (48, 56)]:
        assert view_of(image, label, crop, PLAIN, 0).image.transpose(2, 0, 1).flags.c_contiguous


def test_view__refuses_an_image_and_a_label_of_different_size() -> None:
    image, label = blocks(40, 40, 8)
    with pytest.raises(DecodeError, match=r"image and a label of different size, \(40, 39\) pixels the label"):
        view_of(image, label[:, :39].copy(), (32, 32), PLAIN, 0)


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0])
def test_view__enlarged_photograph_equals_resizing_the_whole_then_cropping(scale: float) -> None:
    photo = photograph()
    data, label = jpeg(photo), np.arange(427 * 640).reshape(427, 640).astype(np.uint8)
    config = at_scale(scale, max_class_fraction=1.0)
    view = training_view(data, encode_png(label), (128, 160), config, np.random.default_rng(3))
    drawn = draw_view(label, (128, 160), config, np.random.default_rng(3))
    left, top = drawn.columns.start, drawn.rows.start
    box = (left, top, left + drawn.columns.length, top + drawn.rows.length)
    whole = Image.open(io.BytesIO(data)).resize((160, 128), Image.Resampling.BILINEAR, box)
    difference = np.abs(view.image.astype(int) - np.asarray(whole))
    # Two pixels at the border see beyond the crop in one and not in the other.
    assert difference[2:-2, 2:-2].max() <= 2
    assert difference.mean() < 0.6


@pytest.mark.parametrize("scale", [0.5, 0.375, 0.25, 0.125])
def test_view__photograph_decoded_smaller_is_near_decoding_the_whole_then_resizing(scale: float) -> None:
    # A height that all the reductions divide: an incomplete block at the end would shift the rest by half a pixel.
    data, label = jpeg(photograph()[:416]), np.zeros((416, 640), np.uint8)
    size = (round(416 * scale), round(640 * scale))
    view = training_view(data, encode_png(label), size, at_scale(scale), np.random.default_rng(0))
    whole = Image.open(io.BytesIO(data))
    # The mean over what each pixel covers, against which picking single pixels is more than twice as far off.
    mean = np.asarray(whole.resize(size[::-1], Image.Resampling.BOX)).astype(int)
    picked = np.asarray(whole.resize(size[::-1], Image.Resampling.NEAREST)).astype(int)
    error = np.abs(view.image - mean).mean()
    assert error < 5.0
    assert error < np.abs(picked - mean).mean() / 2


@settings(max_examples=num_examples(50), deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    scale=st.floats(0.05, 3.0),
    flip=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_view__any_size_at_any_scale(
    size: tuple[int, int], crop: tuple[int, int], scale: float, flip: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 150, size).astype(np.uint8)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    config = at_scale(scale, flip_probability=float(flip))
    drawn = draw_view(label, crop, config, np.random.default_rng(seed))
    reduction = drawn.rows.reduction
    assert reduction == drawn.columns.reduction
    assert scale * reduction > 0.5 or scale >= 1.0 or reduction == 1
    for span, extent, limit in zip(drawn[:2], size, crop, strict=True):
        assert 0 <= span.start <= span.start + span.length <= -(-extent // reduction)
        assert span.resized == min(limit, max(1, round(extent * scale)))
    view = view_of(image, label, crop, config, seed)
    height, width = drawn.rows.resized, drawn.columns.resized
    assert view.image.shape == (*crop, 3)
    assert (view.label[height:] == 255).all()
    assert (view.label[:, width:] == 255).all()
    assert (view.image[height:] == MEAN_PIXEL).all()
    assert (view.image[:, width:] == MEAN_PIXEL).all()
    # Nearest: the pixel of the file under the centre of every resized pixel.
    places = []
    for span, extent in zip(drawn[:2], size, strict=True):
        centres = [Fraction(2 * x + 1, 2) * span.length * reduction / span.resized for x in range(span.resized)]
        places.append([min(span.start * reduction + floor(centre), extent - 1) for centre in centres])
    expected = label[np.ix_(places[0], places[1])]
    np.testing.assert_array_equal(view.label[:height, :width], expected[:, ::-1] if flip else expected)


def test_resize__bilinear_of_the_cut_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    cut = pixels[20:60, 31:81]
    expected = Image.fromarray(cut).resize((80, 64), Image.Resampling.BILINEAR)
    enlarged = resize(cut.copy(), (64, 80), flip=False)
    assert np.abs(enlarged.astype(int) - np.asarray(expected)).max() <= 2
    np.testing.assert_array_equal(resize(cut.copy(), (64, 80), flip=True), enlarged[:, ::-1])


def test_view__colours_changed_before_enlarging_are_near_those_changed_after() -> None:
    photo, label = photograph(), np.arange(427 * 640).reshape(427, 640).astype(np.uint8)
    config = AugmentationConfig(scale_range=(1.9, 1.9), max_class_fraction=1.0)
    for seed in range(4):
        view = training_view(encode_png(photo), encode_png(label), (256, 256), config, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        drawn = draw_view(label, (256, 256), config, rng)
        cut = photo[drawn.rows.within(), drawn.columns.within()].copy()
        difference = np.abs(view.image.astype(int) - distort(resize(cut, (256, 256), drawn.flip), config, rng))
        assert difference.mean() < 1.5
        assert np.percentile(difference, 99) <= 16


def test_view__written_where_it_is_wanted() -> None:
    image, label = blocks(40, 40, 8)
    made = view_of(image, label, (48, 56), PLAIN, 0)
    planes = np.full((3, 48, 56), 7, np.uint8)
    out = AugmentedPair(planes.transpose(1, 2, 0), np.full((48, 56), 7, np.uint8))
    given = training_view(encode_png(image), encode_png(label), (48, 56), PLAIN, np.random.default_rng(0), out=out)
    assert given is out
    np.testing.assert_array_equal(planes.transpose(1, 2, 0), made.image)
    np.testing.assert_array_equal(out.label, made.label)


def test_cut_label__nearest() -> None:
    label = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    enlarged = View(Span(0, 2, 4, 1), Span(0, 2, 4, 1), False)
    np.testing.assert_array_equal(cut_label(label, enlarged)[1:3], [[0, 0, 1, 1], [2, 2, 3, 3]])
    np.testing.assert_array_equal(cut_label(label, enlarged._replace(flip=True))[1], [1, 1, 0, 0])
    np.testing.assert_array_equal(cut_label(label, View(Span(1, 1, 1, 1), Span(0, 2, 2, 1), False)), [[2, 3]])
    # One reduced pixel stands for 2 x 2, of which the centre is the last.
    np.testing.assert_array_equal(cut_label(label, View(Span(0, 1, 1, 2), Span(0, 1, 1, 2), False)), [[3]])


def test_draw_scale__native_and_fitted() -> None:
    rng = np.random.default_rng(0)
    assert draw_scale((360, 480), PLAIN, rng) == 1.0
    assert draw_scale((360, 480), at_scale(2.0), rng) == 2.0
    # The published (2048, 512): the short side becomes 512, unless the long one would pass 2048.
    fitted = PLAIN.model_copy(update={"resize_long": 2048, "resize_short": 512})
    assert draw_scale((256, 400), fitted, rng) == 2.0
    assert draw_scale((800, 200), fitted, rng) == 2.56
    assert draw_scale((200, 1600), fitted, rng) == 1.28
    scales = [draw_scale((100, 100), AugmentationConfig(), rng) for _ in range(500)]
    assert (min(scales) >= 0.5, max(scales) <= 2.0) == (True, True)
    assert np.mean(scales) == pytest.approx(1.25, abs=0.06)
    jitter = [draw_scale((100, 100), AugmentationConfig(strength="strong"), rng) for _ in range(500)]
    assert min(jitter) < 0.15
    assert np.mean(jitter) == pytest.approx(1.05, abs=0.08)


def test_draw_span__reaches_both_ends() -> None:
    rng = np.random.default_rng(0)
    spans = {draw_span(10, 2.0, 1, 8, rng) for _ in range(200)}
    assert spans == {Span(start, 4, 8, 1) for start in range(7)}
    assert draw_span(10, 2.0, 1, 20, rng) == Span(0, 10, 20, 1)
    assert draw_span(101, 0.25, 4, 64, rng) == Span(0, 26, 25, 4)
    assert {draw_span(101, 0.25, 4, 25, rng) for _ in range(50)} == {Span(0, 26, 25, 4)}


def test_draw_view__class_cap_is_honoured() -> None:
    # The left three quarters hold one class; windows on the seam are needed.
    label = np.zeros((40, 80), dtype=np.uint8)
    label[:, 60:] = 1
    config = PLAIN.model_copy(update={"crop_tries": 200})
    for seed in range(20):
        view = draw_view(label, (40, 40), config, np.random.default_rng(seed))
        assert largest_fraction(cut_label(label, view)) <= 0.75
    free = PLAIN.model_copy(update={"max_class_fraction": 1.0})
    starts = [draw_view(label, (40, 40), free, np.random.default_rng(seed)).columns.start for seed in range(50)]
    assert min(starts) < 10


def test_draw_view__ignored_pixels_do_not_count_and_hopeless_images_end() -> None:
    label = np.full((40, 40), 255, dtype=np.uint8)
    assert largest_fraction(label) == 1.0
    label[:2, :20], label[:2, 20:30] = 0, 1
    assert largest_fraction(label) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    hopeless = draw_view(np.zeros((40, 40), dtype=np.uint8), (20, 50), PLAIN, rng)
    assert (hopeless.rows.resized, hopeless.columns.resized) == (20, 40)


def test_pad__pixel_and_ignored() -> None:
    image, label = np.full((2, 3, 3), 9, np.uint8), np.full((2, 3), 4, np.uint8)
    view = pad(image, label, (3, 5), (1, 2, 3))
    np.testing.assert_array_equal(view.label, [[4, 4, 4, 255, 255], [4, 4, 4, 255, 255], [255] * 5])
    assert (view.image[:2, :3] == 9).all()
    assert (view.image[2] == (1, 2, 3)).all()
    assert (view.image[:, 3:] == (1, 2, 3)).all()


def test_strength__fills_in_what_is_not_given() -> None:
    published = AugmentationConfig()
    assert published == AugmentationConfig(strength="published")
    assert (published.scale_range, published.max_class_fraction, published.crop_tries) == ((0.5, 2.0), 0.75, 10)
    assert (published.brightness, published.contrast, published.saturation) == (32.0, (0.5, 1.5), (0.5, 1.5))
    assert (published.hue, published.flip_probability) == (18.0, 0.5)
    strong = AugmentationConfig(strength="strong")
    assert strong.model_dump(exclude={"strength", "scale_range"}) == published.model_dump(
        exclude={"strength", "scale_range"}
    )
    assert strong.scale_range == (0.1, 2.0)
    assert AugmentationConfig.model_validate(strong.model_dump(mode="json")) == strong
    assert AugmentationConfig(strength="strong", scale_range=(0.2, 1.0)).scale_range == (0.2, 1.0)
