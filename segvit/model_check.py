"""Whether a configuration can be built and trained: everything that is wrong with it at once, before it is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer

from segvit.backbones.families import (
    SWIN_STAGES,
    PlainViT,
    image_size_problems,
    num_heads_of,
    outline_backbone,
)
from segvit.backbones.plain import block_problems
from segvit.backbones.swin import hierarchical_problems, stage_problems
from segvit.config import ModelConfig
from segvit.flops import WithoutInitialization
from segvit.losses.segmentation_loss import loss_problems
from segvit.model import build_model, decoder_spec


def model_problems(
    config: ModelConfig,
    num_classes: int,
    *,
    freeze_blocks: int = 0,
    loss: Mapping[str, float] | None = None,
) -> list[str]:
    """Everything that does not fit, each with value, rule and remedy; empty where the model can be trained.

    Allocates no weights and reads no file.

    Args:
        config: The model.
        num_classes: Number of its classes.
        freeze_blocks: Backbone blocks to be frozen, see `SegViT.freeze_blocks`.
        loss: Weights of `SegmentationLoss` by term; None: not judged.
    """
    problems = [f"num_classes must be >= 1, got {num_classes}"] if num_classes < 1 else []
    if loss is not None:
        problems += loss_problems(loss, config.structure)
    try:
        outline = outline_backbone(config.backbone, config.backbone_options)
    except ValueError as error:
        return [*problems, str(error)]
    problems += image_size_problems(outline, config.image_size)
    problems += fit_problems(config, outline, max(num_classes, 1), freeze_blocks)
    return problems or build_problems(config, num_classes)


def fit_problems(
    config: ModelConfig, outline: PlainViT | SwinTransformer, num_classes: int, freeze_blocks: int
) -> list[str]:
    """What of the configuration does not fit the backbone's blocks and widths."""
    name = config.backbone.partition(".")[0]
    hierarchical = isinstance(outline, SwinTransformer)
    depth = SWIN_STAGES if isinstance(outline, SwinTransformer) else len(outline.blocks)
    out_layers = config.out_layers or config.decoder.default_out_layers(depth, hierarchical)
    if isinstance(outline, SwinTransformer):
        problems = hierarchical_problems(config) + stage_problems(name, outline, out_layers, config.drop_path_rate)
        widths = tuple(outline.feature_info[min(stage, depth - 1)]["num_chs"] for stage in out_layers)
        num_shrunk = 0
        heads = num_heads_of(outline.layers[min(max(out_layers), depth - 1)])
    else:
        downsampling = config.decoder.downsampling(depth)
        shrink_at = downsampling.block if downsampling else None
        problems = block_problems(name, outline, out_layers, shrink_at, config.drop_path_rate)
        widths, heads = (outline.embed_dim,) * len(out_layers), num_heads_of(outline.blocks[0])
        num_shrunk = 0 if shrink_at is None else sum(layer >= shrink_at for layer in out_layers)
    embedding: Any = outline.patch_embed
    spec = decoder_spec(config, num_classes, widths, num_shrunk, heads, embedding.patch_size[0])
    problems += config.decoder.spec_problems(spec)
    most = min(max(out_layers) + 1, depth)
    if not 0 <= freeze_blocks <= most:
        part = "stages" if hierarchical else "blocks"
        problems.append(f"freeze_blocks {freeze_blocks} does not fit {name}, which runs {most} {part}; use 0 to {most}")
    return problems


def build_problems(config: ModelConfig, num_classes: int) -> list[str]:
    """What building the model on the meta device finds besides; a decoder of another package may have rules there."""
    try:
        with torch.device("meta"), WithoutInitialization():
            build_model(config, num_classes)
    except ValueError as error:
        return [str(error)]
    return []
