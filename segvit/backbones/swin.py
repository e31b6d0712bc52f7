"""A hierarchical backbone: Swin through timm, whose stages have feature maps of strides 4 to 32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from segvit.backbones.families import SWIN_STAGES, create_swin, num_heads_of
from segvit.backbones.feature_map import FeatureMap
from segvit.backbones.plain import Backbone, drop_path_problems, pad_to_multiple, set_drop_path
from segvit.config import ModelConfig

# B batch, C channels, H W pixels, h w tokens of a stage


class HierarchicalBackbone(Backbone):
    """timm's Swin, cut after the last stage that is read.

    Any height and width: images are padded with zeros on the right and at the bottom to the last stage's stride,
    and each stage to whole windows. Windows are those of the size the network was created for.

    Args:
        swin: A network of `create_swin`; taken over and cut.
        out_layers: 0-based stages to return, ascending; their features have strides 4, 8, 16 and 32.
        drop_path_rate: Stochastic depth of the last block's MLP branch, linear from 0 over all blocks.

    Raises:
        ValueError: Stage index out of range.
    """

    def __init__(self, swin: SwinTransformer, out_layers: Sequence[int], drop_path_rate: float = 0.0) -> None:
        super().__init__(swin, out_layers)
        if problems := stage_problems(self.name, swin, self.out_layers, drop_path_rate):
            raise ValueError("; ".join(problems))
        self.widths = tuple(swin.feature_info[stage]["num_chs"] for stage in out_layers)
        self.num_heads = num_heads_of(swin.layers[max(out_layers)])
        self.last_stride = self.patch_size * 2 ** (SWIN_STAGES - 1)
        set_drop_path(blocks_of(swin), drop_path_rate)
        # Parameters that no output depends on would stall distributed training and decay for nothing.
        swin.layers = swin.layers[: max(out_layers) + 1]
        self.vit.norm, self.vit.head = nn.Identity(), nn.Identity()
        self.freeze_blocks(0)

    def forward(self, images: Tensor) -> list[FeatureMap]:
        """Features of `out_layers`, in their order, of normalised images (B, 3, H, W)."""
        # One rule for gradients per stage keeps frozen stages free of autograd's memory and time.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.num_frozen_blocks):
            cells = self.vit.patch_embed(pad_to_multiple(images, self.last_stride))  # (B, h, w, C)
        patch_grid = (cells.shape[1], cells.shape[2])
        features = []
        for index, stage in enumerate(self.vit.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.num_frozen_blocks):
                cells = stage(cells)
            if index in self.out_layers:
                grid = (cells.shape[1], cells.shape[2])
                features.append(FeatureMap(cells.flatten(1, 2), grid, self.patch_size * 2**index, patch_grid))
        return features

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in the order they run."""
        return blocks_of(self.vit)

    def frozen_modules(self) -> Iterator[nn.Module]:
        """The patch embedding and the frozen stages."""
        yield self.vit.patch_embed
        yield from self.vit.layers[: self.num_frozen_blocks]

    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the patch embedding and the first stages; see `SegViT.freeze_blocks`."""
        if not 0 <= num_blocks <= len(self.vit.layers):
            raise ValueError(f"cannot freeze {num_blocks} stages of {self.name}; use 0 to {len(self.vit.layers)}")
        self.requires_grad_(True)
        self.num_frozen_blocks = num_blocks
        for module in self.frozen_modules() if num_blocks else ():
            module.requires_grad_(False)
        self.train(self.training)
        self.set_grad_checkpointing(self.grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks of unfrozen stages again in the backward pass; see `SegViT.set_grad_checkpointing`."""
        self.grad_checkpointing = enable
        for index, stage in enumerate(self.vit.layers):
            stage.grad_checkpointing = enable and index >= self.num_frozen_blocks


def build_hierarchical(config: ModelConfig) -> HierarchicalBackbone:
    """The backbone of a configuration that names a Swin.

    Raises:
        ValueError: A setting that only a plain ViT has a use for, or one that does not fit the network.
    """
    if problems := hierarchical_problems(config):
        raise ValueError("; ".join(problems))
    out_layers = config.out_layers or config.decoder.default_out_layers(SWIN_STAGES, hierarchical=True)
    swin = create_swin(config.backbone, config.image_size, config.backbone_options)
    return HierarchicalBackbone(swin, out_layers, config.drop_path_rate)


def hierarchical_problems(config: ModelConfig) -> list[str]:
    """Settings of a configuration that names a Swin which only a plain ViT has a use for."""
    problems = []
    if config.decoder.shrinks:
        problems.append(
            f"structure {config.structure!r} downsamples inside a plain ViT, and {config.backbone} is hierarchical; "
            "use cascade, single or linear"
        )
    if not config.class_token:
        problems.append(f"class_token False has no meaning for {config.backbone}, which has none; leave it out")
    return problems


def stage_problems(name: str, swin: SwinTransformer, out_layers: tuple[int, ...], drop_path_rate: float) -> list[str]:
    """Why these stages of the (uncut) network cannot be read; empty where they can."""
    outside = max(out_layers) >= SWIN_STAGES
    problem = f"out_layers {out_layers} do not fit {name}; its stages are 0 to {SWIN_STAGES - 1}"
    return [problem] * outside + drop_path_problems(blocks_of(swin), drop_path_rate)


def blocks_of(swin: SwinTransformer) -> list[nn.Module]:
    """The blocks of all stages, in the order they run."""
    return [block for stage in swin.layers for block in stage.blocks]  # type: ignore[union-attr]
