"""A plain ViT from timm that returns patch tokens of chosen blocks together with their grid."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.downsampling import check_downsampling, downsample_block, halved_grid
from segvit.output import at_least_float32

# B batch, L tokens with prefix tokens first, C channels, H W pixels, h w patch grid


class FeatureMap(NamedTuple):
    """Patch tokens of one block and where they lie."""

    tokens: Tensor
    """(B, h*w, C), row by row, without prefix tokens and without the final norm."""
    grid: tuple[int, int]
    """(h, w)."""
    stride: int
    """Pixels a token covers on each side."""


class Backbone(nn.Module):
    """timm's VisionTransformer, cut after the last block that is read.

    Any height and width: images are padded with zeros on the right and at the bottom to whole patches, and
    the position embedding is resized to the actual grid (bicubic, align_corners false).

    Args:
        vit: A model of `create_vit`; taken over and cut.
        out_layers: 0-based blocks to return, ascending.
        shrink_at: 0-based block at which query-based downsampling halves the grid, or None.
        drop_path_rate: Stochastic depth of the last block's MLP branch, linear from 0 over all blocks.

    Raises:
        ValueError: Block index out of range, or blocks of an unknown kind where they must be rewritten.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        out_layers: Sequence[int],
        shrink_at: int | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        settings: Mapping[str, Any] = vit.pretrained_cfg  # type: ignore[assignment]
        self.name: str = settings["architecture"]
        check_block_indices(self.name, len(vit.blocks), out_layers, shrink_at)
        self.out_layers = tuple(out_layers)
        self.shrink_at = shrink_at
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.width: int = vit.embed_dim
        attention: Any = vit.blocks[0].attn
        self.num_heads: int = attention.num_heads
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.num_frozen_blocks = 0
        self.mean: tuple[float, ...] = tuple(settings["mean"])
        self.std: tuple[float, ...] = tuple(settings["std"])
        set_drop_path(vit.blocks, drop_path_rate)
        if shrink_at is not None:
            check_downsampling(vit.blocks[shrink_at])
        # Parameters that no output depends on would stall distributed training and decay for nothing.
        vit.blocks = vit.blocks[: max(out_layers) + 1]
        vit.norm, vit.fc_norm = nn.Identity(), nn.Identity()
        vit.attn_pool = None  # type: ignore[assignment]
        self.vit = vit

    def forward(self, images: Tensor) -> list[FeatureMap]:
        """Features of `out_layers`, in their order, of normalised images (B, 3, H, W)."""
        # One rule for gradients per block keeps frozen blocks free of autograd's memory and time.
        trainable = torch.is_grad_enabled() and not self.num_frozen_blocks
        with torch.set_grad_enabled(trainable):
            tokens, grid = self.embed(pad_to_multiple(images, self.patch_size))
        features, stride = [], self.patch_size
        block: Any
        for index, block in enumerate(self.vit.blocks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.num_frozen_blocks):
                if index == self.shrink_at:
                    tokens = downsample_block(block, tokens, grid, self.num_prefix_tokens)
                    grid, stride = halved_grid(grid), 2 * stride
                else:
                    tokens = block(tokens)
            if index in self.out_layers:
                features.append(FeatureMap(tokens[:, self.num_prefix_tokens :], grid, stride))
        return features

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Prefix and patch tokens (B, L, C) with positions, and the grid (h, w), of whole-patch images."""
        vit = self.vit
        patches = vit.patch_embed(images)  # (B, h, w, C)
        grid = (patches.shape[1], patches.shape[2])
        tokens = patches.flatten(1, 2)
        prefix = [token.expand(len(tokens), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        positions = self.position_embedding(grid)
        if positions is not None and vit.no_embed_class:
            tokens = tokens + positions
        tokens = torch.cat((*prefix, tokens), dim=1)
        if positions is not None and not vit.no_embed_class:
            tokens = tokens + positions
        return vit.norm_pre(vit.pos_drop(tokens)), grid

    def position_embedding(self, grid: tuple[int, int]) -> Tensor | None:
        """The learned position embedding resized to the grid, or None for a model without one."""
        if self.vit.pos_embed is None:
            return None
        prefix = 0 if self.vit.no_embed_class else self.num_prefix_tokens
        return resize_positions(self.vit.pos_embed, self.vit.patch_embed.grid_size, grid, prefix)

    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the embeddings and the first blocks; see `SegViT.freeze_blocks`."""
        if not 0 <= num_blocks <= len(self.vit.blocks):
            raise ValueError(f"cannot freeze {num_blocks} blocks of {self.name}; use 0 to {len(self.vit.blocks)}")
        self.requires_grad_(True)
        self.num_frozen_blocks = num_blocks
        if num_blocks:
            embeddings = (self.vit.cls_token, self.vit.reg_token, self.vit.pos_embed)
            for parameter in (
                *embeddings,
                *self.vit.patch_embed.parameters(),
                *self.vit.norm_pre.parameters(),
            ):
                if parameter is not None:
                    parameter.requires_grad_(False)
            self.vit.blocks[:num_blocks].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        if self.num_frozen_blocks:
            for module in (self.vit.patch_embed, self.vit.pos_drop, self.vit.norm_pre):
                module.eval()
            self.vit.blocks[: self.num_frozen_blocks].eval()
        return self


def outline_vit(name: str) -> VisionTransformer:
    """timm's plain ViT of that name on the meta device: names and shapes without weights.

    Raises:
        ValueError: Unknown name, or not a plain ViT with square patches.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models("*vit*"), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models('vit_*')"
        raise ValueError(f"unknown backbone {name!r}; {hint}")
    with torch.device("meta"):
        vit: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    if type(vit) is not VisionTransformer:
        raise ValueError(
            f"backbone {name} is a {type(vit).__name__}, not a plain VisionTransformer; "
            "choose a name such as vit_base_patch16_384 or vit_small_patch14_dinov2"
        )
    rows, columns = vit.patch_embed.patch_size
    if rows != columns:
        raise ValueError(f"backbone {name} has {rows} x {columns} patches; choose one with square patches")
    return vit


def create_vit(name: str, image_size: tuple[int, int]) -> VisionTransformer:
    """timm's plain ViT of that name with random weights, sized for (height, width) pixels.

    Raises:
        ValueError: Unknown or unsupported model, or a size that is no multiple of the patch size.
    """
    rows = outline_vit(name).patch_embed.patch_size[0]
    for size in image_size:
        if size % rows:
            lower, upper = size // rows * rows, (size // rows + 1) * rows
            remedy = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(f"crop {size} is not a multiple of {name}'s patch size {rows}; use {remedy}")
    vit = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True)
    assert isinstance(vit, VisionTransformer)
    return vit


def check_block_indices(name: str, depth: int, out_layers: Sequence[int], shrink_at: int | None) -> None:
    """Raise ValueError unless every block index lies in the backbone."""
    if max(out_layers) >= depth:
        raise ValueError(f"out_layers {tuple(out_layers)} do not fit {name}; its blocks are 0 to {depth - 1}")
    if shrink_at is not None and not 1 <= shrink_at < depth:
        raise ValueError(f"shrink_at {shrink_at} does not fit {name}; use a block from 1 to {depth - 1}")


def set_drop_path(blocks: nn.Sequential, rate: float) -> None:
    """Stochastic depth on the MLP branches only, its rate linear from 0 to `rate` over the blocks."""
    if not rate:
        return
    for index, block in enumerate(blocks):
        if not hasattr(block, "drop_path2"):
            raise ValueError(f"{type(block).__name__} has no MLP branch of its own; set drop_path_rate to 0")
        block.drop_path2 = DropPath(rate * index / max(len(blocks) - 1, 1))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Position embedding (1, prefix + h*w, C) of the old grid resized bicubically to the new one."""
    if old == new:
        return positions
    prefix, patches = positions[:, :num_prefix_tokens], positions[:, num_prefix_tokens:]
    grid = torch.unflatten(at_least_float32(patches).transpose(1, 2), 2, old)  # (1, C, h, w)
    resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat((prefix, resized.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, 3, H, W) with zeros added on the right and at the bottom up to the next multiple."""
    height, width = images.shape[-2:]
    bottom = math.ceil(height / multiple) * multiple - height
    right = math.ceil(width / multiple) * multiple - width
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images
