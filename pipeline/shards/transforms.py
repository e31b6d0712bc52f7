"""Training augmentation (SegViT section 6): resize, crop, flip, photometric distortion, padding.

The order of work is turned around where that changes next to nothing but the time: sizes and the crop's position are
drawn on the label map, the image is decoded no larger than needed, cut, and only then resized. Boxes begin and end
on whole pixels, so that image and label are cut at the same position.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.config import AugmentationConfig
from pipeline.fast_decode import decode_ids, decode_reduced, use_one_thread
from segvit.image_files import IGNORE_INDEX, DecodeError

# ImageNet's mean colour; close to 0 after the normalisation of every backbone we know.
MEAN_PIXEL = (124, 116, 104)

Pixels = NDArray[np.uint8]


class Span(NamedTuple):
    """One axis of a view: `length` pixels from `start` on become `resized` pixels.

    `start` and `length` count pixels of the image as decoded, `reduction` times smaller than in its file.
    """

    start: int
    length: int
    resized: int
    reduction: int

    def nearest(self, extent: int) -> NDArray[np.intp]:
        """The pixel of the file, of `extent` pixels, under the centre of each resized pixel."""
        # In whole numbers, as a centre may fall on the border of two pixels: (x + 1/2) * length / resized.
        odd = np.arange(1, 2 * self.resized, 2, dtype=np.intp)
        indices = self.start * self.reduction + odd * (self.length * self.reduction) // (2 * self.resized)
        # An incomplete block of reduced pixels reaches over the end.
        return np.minimum(indices, extent - 1)

    def within(self) -> slice:
        """The span in the image as decoded."""
        return slice(self.start, self.start + self.length)

    def within_file(self) -> slice:
        """The span in the image as it lies in its file."""
        return slice(self.start * self.reduction, (self.start + self.length) * self.reduction)


class View(NamedTuple):
    """Which part of an image is seen, how large, and whether mirrored."""

    rows: Span
    columns: Span
    flip: bool


class AugmentedPair(NamedTuple):
    """What training sees of one sample."""

    image: Pixels  # (H, W, 3); each channel is one block of memory, as batches (B, 3, H, W) want it
    label: Pixels  # (H, W)


def training_view(
    image: bytes,
    label: bytes,
    crop: tuple[int, int],
    config: AugmentationConfig,
    rng: np.random.Generator,
    pad_pixel: tuple[int, int, int] = MEAN_PIXEL,
    out: AugmentedPair | None = None,
) -> AugmentedPair:
    """One random view, `crop` (height, width) in size, of the `image` and `label` files' bytes.

    Where the resized image is smaller than the crop, the rest is `pad_pixel` and ignored. The same bytes, settings
    and state of `rng` give the same view. Written to `out` where that is given. Raises DecodeError.
    """
    use_one_thread()
    classes = decode_ids(label)
    view = draw_view(classes, crop, config, rng)
    pixels = decode_reduced(image, view.rows.reduction)
    expected = tuple(-(-extent // view.rows.reduction) for extent in classes.shape)
    if pixels.shape[:2] != expected:
        raise DecodeError(f"has an image and a label of different size, {classes.shape} pixels the label")
    cut = pixels[view.rows.within(), view.columns.within()]
    size = (view.rows.resized, view.columns.resized)
    # Of cutting out and changing colours, what leaves fewer pixels goes first; that moves a value by 0.2 on average.
    if cut.size < 3 * size[0] * size[1]:
        resized = resize(distort(cut, config, rng), size, view.flip)
    else:
        resized = distort(resize(cut, size, view.flip), config, rng)
    return pad(resized, cut_label(classes, view), crop, pad_pixel, out)


def draw_view(label: Pixels, crop: tuple[int, int], config: AugmentationConfig, rng: np.random.Generator) -> View:
    """A random scale, a random window at it, and a mirror or none, for an image with this `label` (H, W).

    The window is drawn again while one class covers more of its labelled pixels than the config allows; after
    `crop_tries` draws the last one stands, so an image of one class still gives a view.
    """
    scale = draw_scale(label.shape, config, rng)
    reduction = 1
    while scale * reduction * 2 <= 1.0:
        reduction *= 2
    for _ in range(config.crop_tries):
        rows, columns = (
            draw_span(extent, scale, reduction, limit, rng) for extent, limit in zip(label.shape, crop, strict=True)
        )
        part = label[rows.within_file(), columns.within_file()]
        if config.max_class_fraction >= 1.0 or largest_fraction(part) <= config.max_class_fraction:
            break
    return View(rows, columns, bool(rng.random() < config.flip_probability))


def draw_scale(shape: tuple[int, ...], config: AugmentationConfig, rng: np.random.Generator) -> float:
    """How many times larger than in its file an image of `shape` (height, width) is to be seen."""
    fit = 1.0
    if config.resize_long is not None and config.resize_short is not None:
        fit = min(config.resize_long / max(shape), config.resize_short / min(shape))
    return float(fit * rng.uniform(*config.scale_range))


def draw_span(extent: int, scale: float, reduction: int, limit: int, rng: np.random.Generator) -> Span:
    """A random part of an axis of `extent` pixels that gives `limit` pixels at `scale`, or all where it is shorter."""
    reduced = -(-extent // reduction)
    whole = max(1, round(extent * scale))
    if whole <= limit:
        return Span(0, reduced, whole, reduction)
    length = min(max(1, round(limit / (scale * reduction))), reduced)
    return Span(int(rng.integers(reduced - length + 1)), length, limit, reduction)


def largest_fraction(label: Pixels) -> float:
    """The share of the most frequent class in the labelled pixels of `label` (h, w); 1 where nothing is labelled."""
    counts = cv2.calcHist([label], [0], None, [256], [0, 256])[:IGNORE_INDEX]
    total = float(counts.sum())
    return float(counts.max()) / total if total else 1.0


def resize(cut: Pixels, size: tuple[int, int], flip: bool) -> Pixels:
    """`cut` (h, w, 3) at `size` (height, width), bilinearly, and mirrored where `flip`. May overwrite `cut`."""
    if cut.shape[:2] != size:
        cut = np.asarray(cv2.resize(cut, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    if flip:
        cv2.flip(cut, 1, dst=cut)
    return cut


def cut_label(label: Pixels, view: View) -> Pixels:
    """The `view` of `label` (H, W) as in its file; nearest, as class ids do not average."""
    rows, columns = (span.nearest(extent) for span, extent in zip(view[:2], label.shape, strict=True))
    if view.flip:
        columns = columns[::-1]
    # The cheap step, whole rows, last where rows are repeated and first where they are left out.
    if view.rows.resized > view.rows.length * view.rows.reduction:
        first = view.rows.within_file()
        cut: Pixels = label[first].take(columns, axis=1)[rows - first.start]
    else:
        cut = label[rows].take(columns, axis=1)
    return cut


def distort(image: Pixels, config: AugmentationConfig, rng: np.random.Generator) -> Pixels:
    """Photometric distortion of `image` (H, W, 3): brightness, contrast (or at the end), saturation and hue.

    Each is applied with probability 0.5. The published units: brightness in levels, hue in OpenCV's half degrees of
    the colour circle; both in whole steps, as images of 8 bits have them. May overwrite `image`.
    """
    steps = rng.random(4) < 0.5
    contrast_first = rng.random() < 0.5
    shift = round(rng.uniform(-config.brightness, config.brightness)) if steps[0] else 0
    contrast = rng.uniform(*config.contrast) if steps[1] else 1.0
    saturation = rng.uniform(*config.saturation) if steps[2] else 1.0
    hue = round(rng.uniform(-config.hue, config.hue)) if steps[3] else 0
    if shift:
        cv2.add(image, np.array([shift, shift, shift, 0], np.float64), dst=image)
    if contrast != 1.0 and contrast_first:
        cv2.convertScaleAbs(image, dst=image, alpha=contrast)
    if saturation != 1.0 or hue:
        image = _shift_colours(image, saturation, hue)
    if contrast != 1.0 and not contrast_first:
        cv2.convertScaleAbs(image, dst=image, alpha=contrast)
    return image


def pad(
    image: Pixels,
    label: Pixels,
    crop: tuple[int, int],
    pad_pixel: tuple[int, int, int] = MEAN_PIXEL,
    out: AugmentedPair | None = None,
) -> AugmentedPair:
    """`image` (h, w, 3) and `label` (h, w) grown to `crop` at the right and the bottom."""
    if out is None:
        out = AugmentedPair(np.empty((3, *crop), np.uint8).transpose(1, 2, 0), np.empty(crop, np.uint8))
    height, width = label.shape
    planes = out.image.transpose(2, 0, 1)
    cv2.split(image, [plane[:height, :width] for plane in planes])
    for plane, value in zip((*planes, out.label), (*pad_pixel, IGNORE_INDEX), strict=True):
        plane[height:] = value
        plane[:height, width:] = value
    out.label[:height, :width] = label
    return out


def _shift_colours(image: Pixels, saturation: float, hue: int) -> Pixels:
    """Saturation times `saturation` and hue plus `hue` half degrees, in HSV. Overwrites `image`."""
    # With red and blue exchanged the colour circle runs backwards: no hue falls below 0, where 8 bits would cut it.
    # Above 180 the way back starts again by itself.
    forward = hue >= 0
    change = np.array([[1, 0, 0, abs(hue)], [0, saturation, 0, 0], [0, 0, 1, 0]], np.float32)
    # To and fro between two blocks of memory, which stay in the processor's cache.
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV if forward else cv2.COLOR_BGR2HSV)
    cv2.transform(hsv, change, dst=image)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_HSV2RGB if forward else cv2.COLOR_HSV2BGR, dst=hsv), np.uint8)
