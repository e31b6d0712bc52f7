"""Label maps of images: whole, by sliding window, over scales and flips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segvit.inference.precision import Precision, in_precision
from segvit.inference.scores import class_probabilities, semantic_labels, semantic_scores
from segvit.inference.sliding import label_views, scan_image
from segvit.model import SegViT

__all__ = [
    "PUBLISHED_SCALES",
    "class_probabilities",
    "evaluating",
    "image_tensor",
    "predict",
    "predict_batch",
    "semantic_labels",
    "semantic_scores",
    "shares_batches",
]

PUBLISHED_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of the published multi-scale results, which add the flip of each."""


def predict_batch(model: SegViT, images: Tensor, *, precision: Precision = None) -> Tensor:
    """Label maps (B, H, W) int64 of uint8 RGB images (B, 3, H, W) on any device.

    Runs in evaluation mode, without gradients; the model's mode is as before afterwards. `precision` is that of
    `predict`.
    """
    with evaluating(model), torch.no_grad(), in_precision(model, precision):
        return semantic_labels(model(model.normalize(images.to(model.mean.device))))


def predict(
    model: SegViT,
    image: NDArray[np.uint8] | Tensor,
    mode: Literal["whole", "slide"] = "whole",
    *,
    crop: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    resize: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 4,
    precision: Precision = None,
) -> Tensor:
    """Label map (H, W) int64 of one image, on the model's device.

    Every view of the image (a scale, flipped or not) gives class scores, which are resized bilinearly to the
    image's size and averaged; the label is the highest. Where windows overlap their scores are averaged first.
    The result is that of full score maps, which are never held: memory grows with the pixels, not with pixels
    times classes. The published test of ADE20K is ``mode="slide", resize=(2048, 640), scales=PUBLISHED_SCALES,
    flip=True``.

    Args:
        model: The model, in either mode, any precision, on any device; may be compiled, may run under autocast.
        image: RGB, uint8: an (H, W, 3) array or a (3, H, W) tensor.
        mode: ``whole``: a view goes through the model in one piece. ``slide``: window by window.
        crop: Side, or (height, width), of the windows in pixels; by default the model's `image_size`. A view
            smaller than that gets smaller windows.
        stride: Step, or (vertical, horizontal) step, of the windows in pixels; by default two thirds of the crop.
        resize: (long, short) in pixels: the image is first enlarged or reduced as a whole so that its longer side is at
            most the one and its shorter side at most the other. None: it is taken at its own size.
        scales: Factors of that size. The image is resized bilinearly, without antialiasing, to uint8.
        flip: Add every scale's mirror image.
        batch_size: Windows (in whole mode: views of one scale) that go through the model at once.
        precision: ``bf16``: the model runs under autocast to bf16 where its device has instructions for that, else as
            it is; the scores are computed in float32 all the same. None: as the model and the
            context are.

    Raises:
        ValueError: Another type or layout of image, an unknown mode or precision, or a setting that breaks a rule.
    """
    check_views(scales, batch_size)
    window, step = window_geometry(model, mode, crop, stride)
    pixels = image_tensor(image).to(model.mean.device)
    if resize is not None:
        factor = resize_factor((pixels.shape[1], pixels.shape[2]), resize)
        scales = tuple(factor * scale for scale in scales)
    if mode == "whole" and tuple(scales) == (1.0,) and not flip:
        return predict_batch(model, pixels[None], precision=precision)[0]
    with evaluating(model), torch.no_grad(), in_precision(model, precision):
        views = [
            view
            for scale in scales
            for view in scan_image(
                model, pixels, scale=scale, flip=flip, crop=window, stride=step, batch_size=batch_size
            )
        ]
        return label_views(views, (pixels.shape[1], pixels.shape[2]))


def shares_batches(options: Mapping[str, Any]) -> bool:
    """Whether images of one size can share a `predict_batch`, given these keyword arguments of `predict`."""
    return not options.keys() - {"precision"}


def resize_factor(size: tuple[int, int], resize: tuple[int, int]) -> float:
    """The factor that brings an image of (height, width) to a longer and a shorter side of at most those given."""
    longer, shorter = resize
    if not 1 <= shorter <= longer:
        raise ValueError(f"resize must be (long, short) with 1 <= short <= long, got {resize}; use (2048, 640)")
    return min(longer / max(size), shorter / min(size))


def check_views(scales: Sequence[float], batch_size: int) -> None:
    """Raise ValueError unless there are scales, all positive, and a batch holds something."""
    if not scales:
        raise ValueError("scales must name at least one factor, got none; use (1.0,) for the image as it is")
    for scale in scales:
        if not 0 < scale < inf:
            raise ValueError(f"scales must be positive factors of the image's size, got {scale}; leave it out")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}; use 1 for the least memory")


def window_geometry(
    model: SegViT, mode: str, crop: int | tuple[int, int] | None, stride: int | tuple[int, int] | None
) -> tuple[tuple[int, int] | None, tuple[int, int]]:
    """(height, width) of the windows, None in whole mode, and their (vertical, horizontal) step in pixels.

    Raises:
        ValueError: An unknown mode, windows in whole mode, or a crop or stride out of range.
    """
    if mode == "whole":
        for name, value in (("crop", crop), ("stride", stride)):
            if value is not None:
                raise ValueError(f"{name} {value} has no meaning in mode 'whole'; use mode 'slide', or leave it out")
        return None, (1, 1)
    if mode != "slide":
        raise ValueError(f"unknown inference mode {mode!r}; choose from whole, slide")
    window = model.config.image_size if crop is None else pair(crop)
    if min(window) < 1:
        raise ValueError(f"crop must be >= 1 pixel, got {crop}; use the training crop {model.config.image_size}")
    height, width = window
    step = (max(1, height * 2 // 3), max(1, width * 2 // 3)) if stride is None else pair(stride)
    if min(step) < 1 or step[0] > height or step[1] > width:
        raise ValueError(
            f"stride {stride} must be from 1 to the crop {window}, or pixels would be left out; "
            f"use two thirds of the crop, {height * 2 // 3, width * 2 // 3}"
        )
    return window, step


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """One value for both directions, or a value for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def image_tensor(image: NDArray[np.uint8] | Tensor) -> Tensor:
    """A uint8 (3, H, W) tensor of an image given as (H, W, 3) array or (3, H, W) tensor."""
    layout: Any = "(H, W, 3)" if isinstance(image, np.ndarray) else "(3, H, W)"
    # An array of PIL's is read-only, which PyTorch warns of.
    own = np.require(image, requirements=("C", "W")) if isinstance(image, np.ndarray) else image
    tensor = torch.from_numpy(own).permute(2, 0, 1) if isinstance(own, np.ndarray) else own
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"image must be uint8 {layout}, got {image.dtype} {tuple(image.shape)}")
    return tensor


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within, the former mode after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
