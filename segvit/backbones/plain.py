"""The backbone: timm's network, cut, that returns tokens of chosen blocks together with their grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segvit.backbones.downsampling import (
    Downsampling,
    GridDownsampling,
    halved_grid,
    rows_at,
    stand_in_counts,
    with_prefix,
)
from segvit.backbones.families import PlainViT, num_heads_of
from segvit.backbones.feature_map import FeatureMap, resize_positions
from segvit.backbones.positions import TokenPositions, downsampled_positions, positions_at, token_positions
from segvit.backbones.timm_blocks import block_problem, query_block, run_block

# B batch, L tokens with prefix tokens first, C channels, H W pixels, h w patch grid


class Backbone(nn.Module, ABC):
    """What decoders know of a backbone, plain or hierarchical: its features' sizes and the images' normalisation."""

    name: str
    """timm's, without the weights' tag."""
    vit: Any
    """timm's network, cut after the last block or stage that is read."""
    out_layers: tuple[int, ...]
    widths: tuple[int, ...]
    """Channels of the returned features, in the order of `out_layers`."""
    num_heads: int
    """Of the last block."""
    patch_size: int
    """Pixels that a patch covers on each side, before any downsampling."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_frozen_blocks: int
    grad_checkpointing: bool

    def __init__(self, vit: nn.Module, out_layers: Sequence[int]) -> None:
        super().__init__()
        network: Any = vit
        settings: Mapping[str, Any] = network.pretrained_cfg
        self.name = settings["architecture"]
        self.out_layers = tuple(out_layers)
        self.patch_size = network.patch_embed.patch_size[0]
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        self.num_frozen_blocks = 0
        self.grad_checkpointing = False
        self.vit = vit

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the order they run."""

    @abstractmethod
    def frozen_modules(self) -> Iterator[nn.Module]:
        """The parts before the first unfrozen block or stage."""

    @abstractmethod
    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the embeddings and the first blocks; see `SegViT.freeze_blocks`."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass; see `SegViT.set_grad_checkpointing`."""

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of all but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules() if self.num_frozen_blocks else ():
            module.eval()
        return self


class PlainBackbone(Backbone):
    """A plain ViT of timm, cut after the last block that is read.

    Any height and width: images are padded with zeros on the right and at the bottom to whole patches, and
    the position embedding is resized to the actual grid (bicubic, align_corners false); rotary positions and
    relative position bias follow it, see `positions`.

    Args:
        vit: A model of `create_vit`; taken over and cut.
        out_layers: 0-based blocks to return, ascending.
        downsampling: Where and how tokens are left out, or None.
        class_token: Whether the class token stays in the sequence. Without it the position embedding's entry for
            it is unused, as in the published models.
        drop_path_rate: Stochastic depth of the last block's MLP branch, linear from 0 over all blocks.

    Raises:
        ValueError: Block index out of range, or blocks of an unknown kind where they must be rewritten.
    """

    def __init__(
        self,
        vit: PlainViT,
        out_layers: Sequence[int],
        downsampling: Downsampling | None = None,
        class_token: bool = True,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(vit, out_layers)
        self.compiled: Mapping[Callable[..., Tensor], Callable[..., Tensor]] = {}
        self.shrink_at = downsampling.block if downsampling else None
        if problems := block_problems(self.name, vit, self.out_layers, self.shrink_at, drop_path_rate):
            raise ValueError("; ".join(problems))
        self.patch_choice = downsampling.patches if downsampling else None
        self.num_heads = num_heads_of(vit.blocks[0])
        self.widths = (vit.embed_dim,) * len(out_layers)
        set_drop_path(list(vit.blocks), drop_path_rate)
        if downsampling is not None and downsampling.patches is None:
            self.downsampling = GridDownsampling(downsampling.queries, vit.embed_dim)
            self.shrink_keys = downsampling.keys
        self.num_unused_tokens = 1 if vit.cls_token is not None and not class_token else 0
        self.num_prefix_tokens: int = vit.num_prefix_tokens - self.num_unused_tokens
        self._cut(max(out_layers) + 1)
        self.freeze_blocks(0)

    def _cut(self, depth: int) -> None:
        # Parameters that no output depends on would stall distributed training and decay for nothing.
        self.vit.blocks = self.vit.blocks[:depth]
        self.vit.norm, self.vit.fc_norm, self.vit.attn_pool = nn.Identity(), nn.Identity(), None
        rope: Any = getattr(self.vit, "rope", None)
        if getattr(self.vit, "rope_mixed", False):
            rope.freqs = nn.Parameter(rope.freqs.detach()[:, :depth].clone())
            rope.depth = depth
        for block in self.vit.blocks if rope is not None else ():
            block.attn.num_prefix_tokens = self.num_prefix_tokens

    def forward(self, images: Tensor) -> list[FeatureMap]:
        """Features of `out_layers`, in their order, of normalised images (B, 3, H, W)."""
        # One rule for gradients per block keeps frozen blocks free of autograd's memory and time.
        trainable = torch.is_grad_enabled() and not self.num_frozen_blocks
        with torch.set_grad_enabled(trainable):
            tokens, patch_grid = self.embed(pad_to_multiple(images, self.patch_size))
            positions = token_positions(self.vit, patch_grid, self.num_prefix_tokens)
        grid, kept = patch_grid, None
        features, stride = [], self.patch_size
        for index, block in enumerate(self.vit.blocks):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.num_frozen_blocks):
                if index == self.shrink_at:
                    if self.patch_choice is None:
                        tokens, positions = self.downsample(tokens, positions, grid)
                        grid, stride = halved_grid(grid), 2 * stride
                    else:
                        kept = self.patch_choice.keep(tokens[:, self.num_prefix_tokens :], grid)
                        tokens, positions = self.leave_out(tokens, positions, kept.places)
                        if self.patch_choice.proportional:
                            counts = stand_in_counts(kept)
                            # A prefix token stands for itself.
                            log_counts = F.pad(counts.log(), (self.num_prefix_tokens, 0)).to(tokens.dtype)
                            positions = positions._replace(log_counts=log_counts)
                else:
                    tokens = self._run(run_block, block, tokens, positions.of_block(index), self.num_prefix_tokens)
            if index in self.out_layers:
                features.append(FeatureMap(tokens[:, self.num_prefix_tokens :], grid, stride, patch_grid, kept))
        return features

    def _run(self, block_function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        block_function = self.compiled.get(block_function, block_function) if self.compiled else block_function
        if self.grad_checkpointing and torch.is_grad_enabled():
            tokens: Tensor = checkpoint(block_function, *inputs, use_reentrant=False)
            return tokens
        return block_function(*inputs)

    def downsample(
        self, tokens: Tensor, positions: TokenPositions, grid: tuple[int, int]
    ) -> tuple[Tensor, TokenPositions]:
        """Tokens (B, prefix + h*w, C) after the downsampling block, (B, prefix + h/2*w/2, C), and their positions."""
        assert self.shrink_at is not None
        prefix, block = self.num_prefix_tokens, self.vit.blocks[self.shrink_at]
        queries, halved = self.downsampling(tokens, grid, prefix), positions.halved(grid)
        if self.shrink_keys:
            return self._run(run_block, block, queries, halved.of_block(self.shrink_at), prefix), halved
        block_positions = downsampled_positions(positions.of_block(self.shrink_at), grid, prefix, self.downsampling)
        return self._run(query_block, block, queries, tokens, block_positions, prefix), halved

    def leave_out(self, tokens: Tensor, positions: TokenPositions, places: Tensor) -> tuple[Tensor, TokenPositions]:
        """As `downsample`, but the patches `places` (B, M) stay: (B, prefix + M, C), and their positions."""
        assert self.shrink_at is not None
        prefix = self.num_prefix_tokens
        block_positions = positions_at(positions.of_block(self.shrink_at), places, prefix)
        queries = rows_at(tokens, with_prefix(places, prefix))
        block = self.vit.blocks[self.shrink_at]
        tokens = self._run(query_block, block, queries, tokens, block_positions, prefix)
        return tokens, positions.at(places)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Prefix and patch tokens (B, L, C) with learned positions, and the grid (h, w), of whole-patch images."""
        vit = self.vit
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        project = project_patches if images.is_cuda else convolve_patches
        tokens = vit.patch_embed.norm(project(vit.patch_embed.proj, images))
        prefix = [vit.cls_token, getattr(vit, "reg_token", None)][self.num_unused_tokens :]
        prefix = [token.expand(len(tokens), -1, -1) for token in prefix if token is not None]
        positions = self.position_embedding(grid)
        if positions is None:
            tokens = torch.cat((*prefix, tokens), dim=1)
        elif self.num_embedded_prefix_tokens:
            tokens = torch.cat((*prefix, tokens), dim=1) + positions[:, self.num_unused_tokens :]
        else:
            tokens = torch.cat((*prefix, tokens + positions), dim=1)
        tokens = vit.pos_drop(tokens)
        return getattr(vit, "norm_pre", nn.Identity())(tokens), grid

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Prefix tokens that the position embedding has entries for."""
        return 0 if getattr(self.vit, "no_embed_class", False) else self.vit.num_prefix_tokens

    def position_embedding(self, grid: tuple[int, int]) -> Tensor | None:
        """The learned position embedding resized to the grid, or None for a model without one."""
        if self.vit.pos_embed is None:
            return None
        return resize_positions(
            self.vit.pos_embed, self.vit.patch_embed.grid_size, grid, self.num_embedded_prefix_tokens
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the order they run."""
        return list(self.vit.blocks)

    def frozen_modules(self) -> Iterator[nn.Module]:
        """Patch embedding, norm and positions of all blocks, and the frozen blocks."""
        for name in ("patch_embed", "pos_drop", "norm_pre", "rope", "rel_pos_bias"):
            module = getattr(self.vit, name, None)
            if module is not None:
                yield module
        yield from self.vit.blocks[: self.num_frozen_blocks]

    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the embeddings and the first blocks; see `SegViT.freeze_blocks`."""
        if not 0 <= num_blocks <= len(self.vit.blocks):
            raise ValueError(f"cannot freeze {num_blocks} blocks of {self.name}; use 0 to {len(self.vit.blocks)}")
        self.requires_grad_(True)
        self.num_frozen_blocks = num_blocks
        tokens = [self.vit.cls_token, getattr(self.vit, "reg_token", None), self.vit.pos_embed]
        # An unused class token is kept for the file format only: left trainable it would stall distributed training.
        for parameter in tokens if num_blocks else tokens[: self.num_unused_tokens]:
            if parameter is not None:
                parameter.requires_grad_(False)
        for module in self.frozen_modules() if num_blocks else ():
            module.requires_grad_(False)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass; see `SegViT.set_grad_checkpointing`."""
        self.grad_checkpointing = enable


def convolve_patches(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """The patch embedding (B, h*w, C) of whole-patch images."""
    cells: Tensor = convolution(images)
    return cells.flatten(2).transpose(1, 2)


def project_patches(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """`convolve_patches` as one matrix product, for cuDNN's gradient of such a convolution is slow."""
    pixels = F.pixel_unshuffle(images, convolution.kernel_size[0]).flatten(2).transpose(1, 2)
    return F.linear(pixels, convolution.weight.flatten(1), convolution.bias)


def block_problems(
    name: str, vit: PlainViT, out_layers: tuple[int, ...], shrink_at: int | None, drop_path_rate: float
) -> list[str]:
    """Why these blocks of the (uncut) network cannot be read and downsampled; empty where they can."""
    depth, problems = len(vit.blocks), []
    if max(out_layers) >= depth:
        problems.append(f"out_layers {out_layers} do not fit {name}; its blocks are 0 to {depth - 1}")
    if shrink_at is not None:
        if not 1 <= shrink_at < depth:
            problems.append(f"shrink_at {shrink_at} does not fit {name}; use a block from 1 to {depth - 1}")
        elif max(out_layers) < shrink_at:
            problems.append(
                f"shrink_at {shrink_at} lies after the last of out_layers {out_layers}, so that nothing would be "
                f"downsampled; read block {shrink_at} or a later one"
            )
        else:
            # Proportional attention rewrites the later blocks, too; they are of one kind in every known backbone.
            problems += [problem for block in vit.blocks[shrink_at:] if (problem := block_problem(block))][:1]
    return problems + drop_path_problems(vit.blocks, drop_path_rate)


def drop_path_problems(blocks: Iterable[nn.Module], rate: float) -> list[str]:
    """Why the blocks take no stochastic depth; empty where they do, or where there is none."""
    without = {type(block).__name__ for block in blocks if not hasattr(block, "drop_path2")} if rate else set()
    return [f"{kind} has no MLP branch of its own; set drop_path_rate to 0" for kind in sorted(without)]


def set_drop_path(blocks: Sequence[nn.Module], rate: float) -> None:
    """Stochastic depth on the MLP branches only, its rate linear from 0 to `rate` over the blocks."""
    for index, block in enumerate(blocks if rate else ()):
        block.drop_path2 = StochasticDepth(rate * index / max(len(blocks) - 1, 1))


class StochasticDepth(DropPath):
    """timm's with the rate in a buffer, so that blocks of different rates can share compiled code.

    Args:
        rate: Share of the images for which the branch is left out, below 1.
    """

    kept_share: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        self.register_buffer("kept_share", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, branch: Tensor) -> Tensor:
        """The branch (B, ...) with some images' values zero and the others' made up for it, in training."""
        if not self.training:
            return branch
        shares = self.kept_share.expand(branch.shape[0])
        factors = (torch.bernoulli(shares) / shares).to(branch.dtype)
        return branch * factors.view(-1, *[1] * (branch.ndim - 1))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, 3, H, W) with zeros added on the right and at the bottom up to the next multiple."""
    height, width = images.shape[-2:]
    bottom = math.ceil(height / multiple) * multiple - height
    right = math.ceil(width / multiple) * multiple - width
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images
