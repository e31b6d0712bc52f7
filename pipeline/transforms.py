"""Training augmentation (SegViT section 6): resize, crop, flip, photometric distortion, padding.

Sizes are (height, width) in pixels. The crop's window is chosen on the label map alone; then only the part of
the image below it is resized, so that the rest of a large image costs nothing after decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import AugmentationConfig
from pipeline.decode import IGNORE_INDEX

# ImageNet's mean colour; close to 0 after the normalisation of every backbone we know.
MEAN_PIXEL = (124, 116, 104)

Pixels = NDArray[np.uint8]


class Window(NamedTuple):
    """A rectangle of the resized image."""

    top: int
    left: int
    height: int
    width: int


class AugmentedPair(NamedTuple):
    """What training sees of one sample."""

    image: Pixels  # (H, W, 3)
    label: Pixels  # (H, W)


def augment(
    image: Image.Image,
    label: Pixels,
    crop: tuple[int, int],
    config: AugmentationConfig,
    rng: np.random.Generator,
    pad_pixel: tuple[int, int, int] = MEAN_PIXEL,
) -> AugmentedPair:
    """One random view of an RGB `image` and its `label` (H, W), `crop` in size.

    Where the resized image is smaller than the crop, the rest is `pad_pixel` and ignored.
    """
    size = draw_size(label.shape, config, rng)
    window = draw_window(label, size, crop, config, rng)
    flip = bool(rng.random() < config.flip_probability)
    view = distort(cut_image(image, size, window), config, rng)
    pixels, classes = np.asarray(view), cut_label(label, size, window)
    if flip:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    return pad(pixels, classes, crop, pad_pixel)


def draw_size(shape: tuple[int, ...], config: AugmentationConfig, rng: np.random.Generator) -> tuple[int, int]:
    """The size to resize an image of `shape` (height, width) to; its aspect ratio is kept."""
    height, width = shape
    fit = 1.0
    if config.resize_long is not None and config.resize_short is not None:
        fit = min(config.resize_long / max(height, width), config.resize_short / min(height, width))
    scale = fit * rng.uniform(*config.scale_range)
    return max(1, round(height * scale)), max(1, round(width * scale))


def draw_window(
    label: Pixels,
    size: tuple[int, int],
    crop: tuple[int, int],
    config: AugmentationConfig,
    rng: np.random.Generator,
) -> Window:
    """A random window, drawn again while one class covers more of its labelled pixels than the config allows.

    After `crop_tries` draws the last one stands, so an image of one class still gives a view.
    """
    height, width = min(crop[0], size[0]), min(crop[1], size[1])
    for _ in range(config.crop_tries):
        top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
        window = Window(top, left, height, width)
        if config.max_class_fraction >= 1.0:
            break
        counts = np.bincount(cut_label(label, size, window).ravel(), minlength=IGNORE_INDEX + 1)
        counts[IGNORE_INDEX] = 0
        if 0 < counts.max() <= config.max_class_fraction * counts.sum():
            break
    return window


def cut_image(image: Image.Image, size: tuple[int, int], window: Window) -> Image.Image:
    """The `window` of `image` as it is after resizing to `size`, bilinear."""
    if size == (image.height, image.width):
        return image.crop((window.left, window.top, window.left + window.width, window.top + window.height))
    down, right = image.height / size[0], image.width / size[1]
    box = (
        window.left * right,
        window.top * down,
        min((window.left + window.width) * right, image.width),
        min((window.top + window.height) * down, image.height),
    )
    return image.resize((window.width, window.height), Image.Resampling.BILINEAR, box=box)


def cut_label(label: Pixels, size: tuple[int, int], window: Window) -> Pixels:
    """The `window` of `label` as it is after resizing to `size`; nearest, as class ids do not average."""
    rows = _nearest(window.top, window.height, size[0], label.shape[0])
    columns = _nearest(window.left, window.width, size[1], label.shape[1])
    cut: Pixels = label[rows].take(columns, axis=1)
    return cut


def distort(image: Image.Image, config: AugmentationConfig, rng: np.random.Generator) -> Image.Image:
    """Photometric distortion: brightness, contrast (before or after the colours), saturation and hue.

    Each is applied with probability 0.5. Hue is in OpenCV's units, half degrees of the colour circle.
    """
    steps = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    shift = rng.uniform(-config.brightness, config.brightness) if steps[0] else 0.0
    contrast = rng.uniform(*config.contrast) if steps[1] else 1.0
    saturation = rng.uniform(*config.saturation) if steps[2] else 1.0
    hue = rng.uniform(-config.hue, config.hue) if steps[3] else 0.0
    image = _scale_levels(image, contrast if contrast_first else 1.0, shift)
    if saturation != 1.0 or hue != 0.0:
        image = _shift_colours(image, saturation, hue)
    return image if contrast_first else _scale_levels(image, contrast, 0.0)


def pad(
    image: Pixels, label: Pixels, crop: tuple[int, int], pad_pixel: tuple[int, int, int] = MEAN_PIXEL
) -> AugmentedPair:
    """`image` (h, w, 3) and `label` (h, w) grown to `crop` at the right and the bottom."""
    height, width = label.shape
    if (height, width) == crop:
        return AugmentedPair(image, label)
    padded = np.empty((*crop, 3), dtype=np.uint8)
    padded[:] = pad_pixel
    padded[:height, :width] = image
    ignored = np.full(crop, IGNORE_INDEX, dtype=np.uint8)
    ignored[:height, :width] = label
    return AugmentedPair(padded, ignored)


def _nearest(start: int, length: int, resized: int, original: int) -> NDArray[np.intp]:
    centres = (np.arange(start, start + length) + 0.5) * (original / resized)
    return np.minimum(centres.astype(np.intp), original - 1)


def _scale_levels(image: Image.Image, gain: float, shift: float) -> Image.Image:
    """Every level plus `shift`, then times `gain`; cut to 0-255 after each, as 8-bit images are."""
    if gain == 1.0 and shift == 0.0:
        return image
    levels = np.clip(np.clip(np.arange(256) + shift, 0, 255).round() * gain, 0, 255).round()
    return image.point(levels.astype(int).tolist() * 3)


def _shift_colours(image: Image.Image, saturation: float, hue: float) -> Image.Image:
    """Saturation times `saturation` and hue plus `hue` half degrees, in HSV."""
    levels = np.arange(256)
    hues = (levels + round(hue * 256 / 180)) % 256
    saturations = np.clip(levels * saturation, 0, 255).round()
    table = np.concatenate([hues, saturations, levels]).astype(int).tolist()
    return image.convert("HSV").point(table).convert("RGB")
