"""Semantic scores and whole-image prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segvit.model import SegViT
from segvit.output import SegmentationOutput, at_least_float32, full_precision, resize_to_image

# B batch, N classes, H W image pixels, h w mask grid

BAND_MAX_ELEMENTS = 8_000_000  # of one float map (N, rows, W): 32 MB in float32


def semantic_scores(output: SegmentationOutput, size: tuple[int, int]) -> Tensor:
    """Class scores of every pixel: sum over queries of class probability times mask probability.

    Masks are brought to the image's own size first; scores are resized bilinearly to another `size`.

    Args:
        output: The model's output for B images.
        size: (H, W) of the scores in pixels.

    Returns:
        (B, N, H, W) in float32 or more.
    """
    with full_precision(output.mask_logits):
        masks = resize_to_image(at_least_float32(output.mask_logits), output).sigmoid()
        scores = torch.einsum("bqc,bqhw->bchw", class_probabilities(output), masks)
        if size == output.image_size:
            return scores
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def semantic_labels(output: SegmentationOutput) -> Tensor:
    """The argmax of `semantic_scores` at the image's own size, (B, H, W) int64, in bands of rows.

    Never holds scores of all pixels at once, so memory stays bounded for many classes on large images.
    """
    height, width = output.image_size
    num_classes = output.mask_logits.shape[1]
    rows = max(1, BAND_MAX_ELEMENTS // (num_classes * output.padded_size[1]))
    labels = torch.empty(len(output.mask_logits), height, width, dtype=torch.int64, device=output.mask_logits.device)
    with full_precision(output.mask_logits):
        probabilities = class_probabilities(output)
        for image, classes in enumerate(probabilities):
            mask_logits = at_least_float32(output.mask_logits[image])
            for top in range(0, height, rows):
                bottom = min(top + rows, height)
                band = resize_band(mask_logits, output.padded_size, top, bottom)[..., :width].sigmoid()
                torch.argmax((classes.T @ band.flatten(1)).unflatten(1, (-1, width)), 0, out=labels[image, top:bottom])
    return labels


def class_probabilities(output: SegmentationOutput) -> Tensor:
    """(B, N, N): each query's probabilities of the classes, "no object" left out."""
    return at_least_float32(output.class_logits).softmax(-1)[..., :-1]


def resize_band(masks: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows `top` to `bottom` of masks (N, h, w) bilinearly resized to `size`: (N, bottom - top, width)."""
    grid_height = masks.shape[-2]
    centre = torch.arange(top, bottom, device=masks.device, dtype=masks.dtype) + 0.5
    position = (centre * (grid_height / size[0]) - 0.5).clamp_(min=0)
    above = position.long()
    below = (above + 1).clamp_(max=grid_height - 1)
    rows = torch.lerp(masks[:, above], masks[:, below], (position - above)[:, None])
    return F.interpolate(rows[None], size=(bottom - top, size[1]), mode="bilinear", align_corners=False)[0]


def predict_batch(model: SegViT, images: Tensor) -> Tensor:
    """Label maps (B, H, W) int64 of uint8 RGB images (B, 3, H, W) on any device.

    Runs in evaluation mode, without gradients; the model's mode is as before afterwards.
    """
    with evaluating(model), torch.no_grad():
        return semantic_labels(model(model.normalize(images.to(model.mean.device))))


def predict(model: SegViT, image: NDArray[np.uint8] | Tensor, mode: Literal["whole"] = "whole") -> Tensor:
    """Label map (H, W) int64 of one image.

    Args:
        model: The model, in either mode, on any device.
        image: RGB, uint8: an (H, W, 3) array or a (3, H, W) tensor.
        mode: ``whole``: the image goes through the model in one piece.

    Raises:
        ValueError: Another type or layout of image, or an unknown mode.
    """
    if mode != "whole":
        raise ValueError(f"unknown inference mode {mode!r}; choose whole")
    return predict_batch(model, image_tensor(image).unsqueeze(0))[0]


def image_tensor(image: NDArray[np.uint8] | Tensor) -> Tensor:
    """A uint8 (3, H, W) tensor of an image given as (H, W, 3) array or (3, H, W) tensor."""
    layout: Any = "(H, W, 3)" if isinstance(image, np.ndarray) else "(3, H, W)"
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
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
