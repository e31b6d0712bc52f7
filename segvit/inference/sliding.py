"""Scores of one image from many views of it: overlapping windows, scales, flips.

Of every window only the prediction on its patch grid is kept. Pixels are scored band by band, so that no
score map of the whole image ever exists, whatever its size and the number of views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.inference.scores import ScoreMap, bands, chunk_rows, resize_rows, source_rows
from segvit.model import SegViT
from segvit.output import full_precision

# N classes, H W image pixels; score rows are (rows, W, N)

BAND_ELEMENTS = 4_000_000  # of a score map (rows, W, N): 16 MB in float32, a few of which exist at a time


@dataclass(frozen=True, slots=True)
class Window:
    """A window's scores and where its top left pixel lies in the view."""

    top: int
    left: int
    scores: ScoreMap


@dataclass(frozen=True, slots=True)
class View:
    """The image at one scale, flipped or not, covered by windows of one size."""

    size: tuple[int, int]
    """(height, width) of the scaled image in pixels."""
    flipped: bool
    windows: list[Window] = field(default_factory=list)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Scores (bottom - top, width, N) of the view's own rows, averaged where windows overlap."""
        first = self.windows[0].scores
        num_classes, device = first.mask_logits.shape[-1], first.mask_logits.device
        if len(self.windows) == 1:
            return torch.cat([first.rows(*band) for band in row_chunks(first, top, bottom)])
        shape = (bottom - top, self.size[1], num_classes)
        total = torch.zeros(shape, dtype=first.rows(0, 1).dtype, device=device)
        count = torch.zeros(*shape[:2], 1, dtype=total.dtype, device=device)
        for window in self.windows:
            height, width = window.scores.size
            columns = slice(window.left, window.left + width)
            inside = max(top - window.top, 0), min(bottom - window.top, height)
            for start, end in row_chunks(window.scores, *inside):
                rows = slice(window.top + start - top, window.top + end - top)
                total[rows, columns] += window.scores.rows(start, end)
                count[rows, columns] += 1
        return total.div_(count)

    def resized_rows(self, size: tuple[int, int], top: int, bottom: int) -> Tensor:
        """Scores (bottom - top, W, N) of rows of the image, to whose `size` the view's scores are resized."""
        start, end = source_rows(self.size[0], size[0], top, bottom)
        rows = resize_rows(self.rows(start, end), start, self.size[0], size, top, bottom)
        return rows.flip(1) if self.flipped else rows


def row_chunks(scores: ScoreMap, top: int, bottom: int) -> list[tuple[int, int]]:
    """Rows `top` to `bottom` of a window, cut so that each chunk stays in cache; none where `bottom` <= `top`."""
    num_classes, device = scores.mask_logits.shape[-1], scores.mask_logits.device
    return bands(top, bottom, chunk_rows(scores.size[1], num_classes, device))


def label_views(views: Sequence[View], size: tuple[int, int]) -> Tensor:
    """Label map (H, W) int64: the class of the highest score, averaged over the views, at each pixel of `size`."""
    mask_logits = views[0].windows[0].scores.mask_logits
    labels = torch.empty(size, dtype=torch.int64, device=mask_logits.device)
    num_rows = max(1, BAND_ELEMENTS // (size[1] * mask_logits.shape[-1]))
    with full_precision(mask_logits):
        for top, bottom in bands(0, size[0], num_rows):
            total = views[0].resized_rows(size, top, bottom)
            for view in views[1:]:
                total += view.resized_rows(size, top, bottom)
            torch.argmax(total, -1, out=labels[top:bottom])
    return labels


def scan_image(
    model: SegViT,
    image: Tensor,
    *,
    scale: float,
    flip: bool,
    crop: tuple[int, int] | None,
    stride: tuple[int, int],
    batch_size: int,
) -> list[View]:
    """The views of an image at one scale: itself and, with `flip`, its mirror image.

    Args:
        model: The model, in evaluation mode.
        image: (3, H, W) uint8 on the model's device.
        scale: Factor of the image's size.
        flip: Add the view of the mirrored image.
        crop: (height, width) of the windows in pixels; None: one window, the whole image.
        stride: (vertical, horizontal) step from window to window in pixels.
        batch_size: Windows that go through the model at once.
    """
    size = scaled_size((image.shape[1], image.shape[2]), scale)
    scaled = resize_image(image, size)
    height, width = size if crop is None else (min(crop[0], size[0]), min(crop[1], size[1]))
    tops = window_starts(size[0], height, stride[0])
    lefts = window_starts(size[1], width, stride[1])
    views = [View(size, flipped) for flipped in ((False, True) if flip else (False,))]
    places = list(product(views, tops, lefts))
    for first in range(0, len(places), batch_size):
        group = places[first : first + batch_size]
        images = torch.stack([window_pixels(scaled, view, (top, left, height, width)) for view, top, left in group])
        output = model(model.normalize(images))
        for index, (view, top, left) in enumerate(group):
            view.windows.append(Window(top, left, ScoreMap.of(output, index)))
    return views


def window_pixels(scaled: Tensor, view: View, box: tuple[int, int, int, int]) -> Tensor:
    """The pixels (3, height, width) of a view's (top, left, height, width), out of the image that is not flipped."""
    top, left, height, width = box
    if view.flipped:
        left = view.size[1] - left - width
    pixels = scaled[:, top : top + height, left : left + width]
    return pixels.flip(-1) if view.flipped else pixels


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """First pixels of windows that cover `length` pixels; the last is moved back inside. `crop` <= `length`."""
    num_windows = ceil((length - crop) / stride) + 1
    return [min(index * stride, length - crop) for index in range(num_windows)]


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times the scale, halves rounded up, at least one pixel."""
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (3, H, W) resized bilinearly and rounded to uint8.

    Without antialiasing, and rounded to whole intensities: so were the images of the published multi-scale figures.
    """
    if size == tuple(image.shape[1:]):
        return image
    # Channel by channel: a third of the float copies' memory.
    channels = [
        F.interpolate(channel[None, None].float(), size=size, mode="bilinear", align_corners=False)[0, 0]
        .round_()
        .to(torch.uint8)
        for channel in image
    ]
    return torch.stack(channels)
