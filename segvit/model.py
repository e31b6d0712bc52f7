"""SegViT: a plain ViT, a decoder of Attention-to-Mask, and the structures of the paper."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor, nn

from segvit.atm_decoder import ATMCascade, DecoderOutput, Prediction, SingleATM
from segvit.backbone import Backbone, create_vit
from segvit.config import ModelConfig
from segvit.output import SegmentationOutput
from segvit.shrunk import ShrunkDecoder

# B batch, N classes, H W pixels


class SegViT(nn.Module):
    """SegViT and its Shrunk variant (arXiv 2210.05844).

    Args:
        config: Structure and widths.
        num_classes: Number of classes, and of class queries.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.config = config
        self.num_classes = num_classes
        self.backbone = build_backbone(config)
        self.decoder = build_decoder(config, num_classes, self.backbone)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Segment normalised images (B, 3, H, W) of any height and width."""
        features = self.backbone(images)
        decoded = self.decoder(features)
        return assemble(decoded, (images.shape[-2], images.shape[-1]))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 RGB images (B, 3, H, W), normalised by the backbone's own mean and deviation."""
        return (images.to(self.mean) / 255 - self.mean) / self.std

    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the patch and position embeddings and the first backbone blocks; 0 unfreezes all.

        Frozen parts get no gradient, run without autograd, and stay in evaluation mode through `train()`.

        Raises:
            ValueError: More blocks than the backbone runs.
        """
        self.backbone.freeze_blocks(num_blocks)


def build_model(config: ModelConfig, num_classes: int) -> SegViT:
    """The model of a configuration, with random weights; nothing is downloaded.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """
    return SegViT(config, num_classes)


def check_config(config: ModelConfig, num_classes: int = 2) -> None:
    """Raise ValueError if `build_model` would refuse the configuration; allocates no weights."""
    with torch.device("meta"):
        build_model(config, num_classes)


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone, with the blocks that the structure reads."""
    vit = create_vit(config.backbone, config.image_size)
    last = len(vit.blocks) - 1
    shrink_at = (last + 1) // 3 if config.shrink_at is None else config.shrink_at
    match config.structure:
        case "cascade":
            return Backbone(vit, config.out_layers, drop_path_rate=config.drop_path_rate)
        case "single":
            return Backbone(vit, (last,), drop_path_rate=config.drop_path_rate)
        case "naive_qd":
            return Backbone(vit, (last,), shrink_at, config.drop_path_rate)
        case "shrunk":
            return Backbone(vit, (shrink_at - 1, last), shrink_at, config.drop_path_rate)
        case _:
            assert_never(config.structure)


def build_decoder(config: ModelConfig, num_classes: int, backbone: Backbone) -> nn.Module:
    """The decoder of the structure, sized for the backbone.

    Raises:
        ValueError: The width does not divide into the heads.
    """
    width = config.decoder_width or backbone.width // 2
    num_heads = config.decoder_heads or backbone.num_heads
    if width % num_heads:
        raise ValueError(f"decoder_width {width} is not a multiple of decoder_heads {num_heads}")
    sizes = (backbone.width, width, num_heads, config.decoder_layers, config.dropout)
    match config.structure:
        case "cascade":
            return ATMCascade(len(config.out_layers), num_classes, *sizes)
        case "single" | "naive_qd":
            return SingleATM(num_classes, *sizes)
        case "shrunk":
            height, width = config.image_size
            grid = (height // backbone.patch_size, width // backbone.patch_size)
            return ShrunkDecoder(grid, num_classes, *sizes)
        case _:
            assert_never(config.structure)


def assemble(decoded: DecoderOutput, image_size: tuple[int, int]) -> SegmentationOutput:
    """The decoder's predictions with the geometry that ties their mask grids to the image's pixels."""

    def geometry(prediction: Prediction, auxiliary: tuple[SegmentationOutput, ...]) -> SegmentationOutput:
        rows, columns = prediction.mask_logits.shape[-2:]
        padded_size = (rows * decoded.stride, columns * decoded.stride)
        return SegmentationOutput(*prediction, auxiliary, image_size, padded_size)

    *earlier, final = decoded.predictions
    return geometry(final, tuple(geometry(prediction, ()) for prediction in earlier))
