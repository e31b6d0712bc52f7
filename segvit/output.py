"""What the model returns, and how its masks are brought to pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, N classes, H W image pixels, h w mask grid


class SegmentationOutput(NamedTuple):
    """A prediction before upsampling, the earlier ones, and the geometry that ties masks to pixels."""

    class_logits: Tensor | None
    """(B, N, N + 1); the last column is "no object". None: a linear head's, whose masks are class logits."""
    mask_logits: Tensor
    """(B, N, h, w), before the sigmoid (of a linear head: before the softmax over classes)."""
    auxiliary: tuple[SegmentationOutput, ...]
    """Earlier predictions, in the order they were made; each has no auxiliary of its own."""
    image_size: tuple[int, int]
    """(H, W) of the images given to the model."""
    padded_size: tuple[int, int]
    """(height, width) in pixels that the mask grid covers: H and W rounded up to whole grid cells."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast is off for the tensor's device."""
    # The meta device has no autocast; any other device's switch is as good there.
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


def resize_to_image(masks: Tensor, output: SegmentationOutput) -> Tensor:
    """Mask logits (M, K, h, w) bilinearly resized to the pixels they cover, then cropped to (M, K, H, W)."""
    height, width = output.image_size
    resized = F.interpolate(masks, size=output.padded_size, mode="bilinear", align_corners=False)
    return resized[..., :height, :width]
