"""Tokens on a grid: what backbones hand to decoders, and how what is learned for a grid is brought to another."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.output import at_least_float32

# B batch, C channels, h w patch grid


class KeptPatches(NamedTuple):
    """The patches that a backbone kept in the sequence, and all of them as they were before it left the others out."""

    places: Tensor
    """(B, M) index into h*w of each token."""
    left_out: Tensor
    """(B, h*w - M) index into h*w of the others, in no order."""
    before: Tensor
    """(B, h*w, C)."""
    stand_ins: Tensor
    """(B, h*w - M, M), float32 or more: how much each token stands for a patch that was left out; 1 in sum over M."""


class FeatureMap(NamedTuple):
    """Patch tokens of one block or stage and where they lie."""

    tokens: Tensor
    """(B, h*w, C), row by row, without prefix tokens and without the final norm; with `kept`, (B, M, C)."""
    grid: tuple[int, int]
    """(h, w)."""
    stride: int
    """Pixels a token covers on each side."""
    patch_grid: tuple[int, int]
    """(h, w) of the backbone's patches, before any downsampling."""
    kept: KeptPatches | None = None
    """Which of the grid's patches have a token, where not all have."""


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Position embedding (1, prefix + h*w, C) of the old grid resized bicubically to the new one."""
    if old == new:
        return positions
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    grid = torch.unflatten(at_least_float32(patches).transpose(1, 2), 2, old)  # (1, C, h, w)
    resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat((prefix, resized.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)
