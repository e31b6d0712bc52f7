"""SegViT: a plain ViT, a decoder of Attention-to-Mask, and the structures of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segvit.backbones.families import create_vit, is_hierarchical
from segvit.backbones.feature_map import FeatureMap
from segvit.backbones.plain import Backbone, PlainBackbone
from segvit.backbones.swin import build_hierarchical
from segvit.config import ModelConfig
from segvit.decoders.anchored import AnchoredCascade
from segvit.decoders.decoder import DecoderOutput, DecoderSpec, Prediction
from segvit.output import SegmentationOutput, at_least_float32
from segvit.presets import find_preset

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

    def features(self, images: Tensor) -> list[FeatureMap]:
        """What the decoder reads of normalised images: of structure ``anchored``, all of it at every patch."""
        features: list[FeatureMap] = self.backbone(images)
        return self.decoder.restore(features) if isinstance(self.decoder, AnchoredCascade) else features

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 RGB images (B, 3, H, W), normalised by the backbone's own mean and deviation, in the model's type.

        In half precision the steps between 0 and 255 would be lost before the division: it is done in float32.
        """
        mean, std = at_least_float32(self.mean), at_least_float32(self.std)
        return ((images.to(mean) / 255 - mean) / std).to(self.mean.dtype)

    def freeze_blocks(self, num_blocks: int) -> None:
        """Freeze the patch and position embeddings and the first backbone blocks; 0 unfreezes all.

        Frozen parts get no gradient, run without autograd, and stay in evaluation mode through `train()`.

        Raises:
            ValueError: More blocks than the backbone runs.
        """
        self.backbone.freeze_blocks(num_blocks)


def build_model(config: ModelConfig | str, num_classes: int) -> SegViT:
    """The model of a configuration or of a preset's name, with random weights; nothing is downloaded.

    Raises:
        ValueError: No preset of that name, or the configuration does not fit the backbone.
    """
    return SegViT(find_preset(config).model if isinstance(config, str) else config, num_classes)


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone, with the blocks or stages that the structure reads."""
    if is_hierarchical(config.backbone):
        return build_hierarchical(config)
    vit = create_vit(config.backbone, config.image_size, config.backbone_options)
    depth = len(vit.blocks)
    out_layers = config.out_layers or config.decoder.default_out_layers(depth, hierarchical=False)
    return PlainBackbone(
        vit,
        out_layers,
        config.decoder.downsampling(depth),
        class_token=config.class_token,
        drop_path_rate=config.drop_path_rate,
    )


def build_decoder(config: ModelConfig, num_classes: int, backbone: Backbone) -> nn.Module:
    """The decoder of the structure, sized for the backbone.

    Raises:
        ValueError: The sizes do not fit each other.
    """
    shrink_at = backbone.shrink_at if isinstance(backbone, PlainBackbone) else None
    num_shrunk = 0 if shrink_at is None else sum(layer >= shrink_at for layer in backbone.out_layers)
    spec = decoder_spec(config, num_classes, backbone.widths, num_shrunk, backbone.num_heads, backbone.patch_size)
    if problems := config.decoder.spec_problems(spec):
        raise ValueError("; ".join(problems))
    return config.decoder.build(spec)


def decoder_spec(
    config: ModelConfig,
    num_classes: int,
    feature_widths: tuple[int, ...],
    num_shrunk: int,
    backbone_heads: int,
    patch_size: int,
) -> DecoderSpec:
    """What the configuration's decoder is built for on a backbone of these sizes."""
    height, width = config.image_size
    return DecoderSpec(
        num_classes=num_classes,
        feature_widths=feature_widths,
        num_shrunk=num_shrunk,
        backbone_heads=backbone_heads,
        patch_size=patch_size,
        patch_grid=(height // patch_size, width // patch_size),
        num_layers=config.decoder_layers,
        width=config.decoder_width,
        num_heads=config.decoder_heads,
        dropout=config.dropout,
    )


def assemble(decoded: DecoderOutput, image_size: tuple[int, int]) -> SegmentationOutput:
    """The decoder's predictions with the geometry that ties their mask grids to the image's pixels."""

    def geometry(prediction: Prediction, auxiliary: tuple[SegmentationOutput, ...]) -> SegmentationOutput:
        rows, columns = prediction.mask_logits.shape[-2:]
        padded_size = (
            rows // decoded.upsampling * decoded.stride,
            columns // decoded.upsampling * decoded.stride,
        )
        return SegmentationOutput(*prediction, auxiliary, image_size, padded_size)

    *earlier, final = decoded.predictions
    return geometry(final, tuple(geometry(prediction, ()) for prediction in earlier))
