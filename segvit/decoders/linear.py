"""The baseline of the paper's ablations: one linear layer on backbone features, class scores per cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.attention import initialize_linear
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.decoder import Decoder, DecoderOutput, DecoderSpec, Prediction
from segvit.output import at_least_float32

# B batch, L tokens on an (h, w) grid, N classes


@dataclass(frozen=True, kw_only=True)
class Linear(Decoder):
    """One linear layer on the features of all `out_layers`; the decoder's sizes have no meaning for it."""

    has_masks: ClassVar[bool] = False

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return LinearHead(spec.feature_widths, spec.num_classes)


class LinearHead(nn.Module):
    """Class logits of every cell from the concatenated, normalised features (SegViT, ablation of ATM).

    Args:
        input_widths: Channels of the features, in the backbone's order.
        num_classes: Number of classes N.
    """

    def __init__(self, input_widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in input_widths)
        self.linear = nn.Linear(sum(input_widths), num_classes)
        self.apply(initialize_linear)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction without class logits, on the grid of the first feature."""
        grid = features[0].grid
        maps = [
            as_map(norm(feature.tokens), feature.grid, grid) for norm, feature in zip(self.norms, features, strict=True)
        ]
        logits = self.linear(torch.cat(maps, dim=1).flatten(2).transpose(1, 2))
        masks = torch.unflatten(at_least_float32(logits).transpose(1, 2), 2, grid)
        return DecoderOutput([Prediction(None, masks)], features[0].stride)


def as_map(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens (B, L, C) of a grid as a map (B, C, h, w), bilinearly resized to `size`."""
    cells = torch.unflatten(tokens.transpose(1, 2), 2, grid)
    return cells if grid == size else F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
