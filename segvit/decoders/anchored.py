"""An anchored Shrunk decoder: the cascade over a downsampled backbone, each feature brought back to its place first.

The paper's Shrunk (`segvit.decoders.shrunk`) asks grid queries that know nothing of the image, which take tens of
thousands of steps to find out where they are. Here each fine patch is anchored: it reads the 3 x 3 coarse tokens
around it, by weights that start as those of bilinear interpolation, and the feature of its own place from before the
downsampling, by a branch that starts at zero. So at the start the cascade sees upsampled features, and learns the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.attention import initialize_linear
from segvit.backbones.downsampling import ShrinkQueries, fill_windows, halved_grid
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.atm import ATMOnFeatures, ATMStage, DecoderSizes
from segvit.decoders.cascade import ATMCascade, cascade_layers
from segvit.decoders.decoder import DecoderOutput, DecoderSpec
from segvit.decoders.shrinking import ShrinkingDecoder

# B batch, C channels of a feature, h w fine grid, L cells of the coarse grid, each 2 x 2 fine patches

NEIGHBOURS = 9  # coarse tokens around a cell, its own in the middle
PLACES = 4  # fine patches in a cell, row by row
# Of a coarse token that bilinear interpolation would not read: little, so that reading it can be learned.
LEAST_WEIGHT = 1e-3
# Weights of the coarse token before, at and after a cell for its first and its second patch, along one axis. A token
# of nearest sampling stands at the first patch; one that pools stands in the middle of both.
AXIS_WEIGHTS: Mapping[ShrinkQueries, tuple[tuple[float, float, float], tuple[float, float, float]]] = MappingProxyType(
    {
        "nearest": ((0.0, 1.0, 0.0), (0.0, 0.5, 0.5)),
        "average": ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25)),
        "convolution": ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25)),
    }
)


class AnchoredUpsampling(nn.Module):
    """Coarse tokens at every fine patch, by attention to the 3 x 3 around it, and that patch's own low-level feature.

    Args:
        low_width: Channels of the feature from before the downsampling.
        width: Channels C of the coarse feature, and of the result.
        sizes: Its width and heads are those of the attention's queries and keys.
        sampling: How the coarse tokens were made, which says where they stand.
    """

    def __init__(self, low_width: int, width: int, sizes: DecoderSizes, sampling: ShrinkQueries) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.scale = (sizes.width // sizes.num_heads) ** -0.5
        self.norm_low, self.norm_coarse = nn.LayerNorm(low_width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(low_width, sizes.width), nn.Linear(width, sizes.width)
        self.detail = nn.Linear(low_width, width)
        start = bilinear_weights(sampling).clamp_min(LEAST_WEIGHT).log()
        self.bias = nn.Parameter(start.expand(sizes.num_heads, -1, -1).clone())  # (heads, places, neighbours)
        self.apply(initialize_linear)
        for branch in (self.q, self.detail):
            nn.init.zeros_(branch.weight)

    def forward(self, coarse: FeatureMap, low: FeatureMap) -> FeatureMap:
        """The coarse feature on the grid of the low-level one."""
        detail = self.norm_low(low.tokens)
        queries = self._heads(cells_of(self.q(detail), low.grid))  # (B, L, heads, places, D)
        keys = self._heads(neighbours_of(self.k(self.norm_coarse(coarse.tokens)), coarse.grid))
        values = self._heads(neighbours_of(coarse.tokens, coarse.grid))
        weights = (queries @ keys.transpose(-1, -2) * self.scale + self.bias).softmax(dim=-1)
        upsampled = (weights.to(values.dtype) @ values).transpose(2, 3).flatten(3)  # (B, L, places, C)
        tokens = patches_of(upsampled, coarse.grid, low.grid) + self.detail(detail)
        return FeatureMap(tokens, low.grid, low.stride, low.patch_grid)

    def _heads(self, groups: Tensor) -> Tensor:
        """(B, L, tokens, C) to (B, L, heads, tokens, C / heads)."""
        return torch.unflatten(groups, 3, (self.num_heads, -1)).transpose(2, 3)


class AnchoredDecoder(nn.Module):
    """An anchored upsampling for each coarse feature, and the cascade over what they give.

    Args:
        feature_widths: Channels of the features in the backbone's order; the first is the low-level one.
        input_widths: Those of the cascade's stages; None: taken without projection.
        sizes: Of all parts.
        sampling: How the backbone downsamples.
    """

    def __init__(
        self,
        feature_widths: Sequence[int],
        input_widths: Sequence[int | None],
        sizes: DecoderSizes,
        sampling: ShrinkQueries,
    ) -> None:
        super().__init__()
        low_width, *widths = feature_widths
        self.upsampling = nn.ModuleList(AnchoredUpsampling(low_width, width, sizes, sampling) for width in widths)
        self.cascade = ATMCascade(input_widths, sizes)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a stage, from the features in the backbone's order, at the first one's stride."""
        low, *coarse = features
        output: DecoderOutput = self.cascade(
            [upsampling(feature, low) for upsampling, feature in zip(self.upsampling, coarse, strict=True)]
        )
        return output


@dataclass(frozen=True, kw_only=True)
class Anchored(ATMOnFeatures, ShrinkingDecoder):
    """ATM stages over all of `out_layers` but the first, which is read at full resolution before the downsampling."""

    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType(
        {"upsampling": AnchoredUpsampling, "atm_stage": ATMStage}
    )

    def default_out_layers(self, depth: int, hierarchical: bool) -> tuple[int, ...]:
        """The last block before the downsampling, and the cascade's that follow it."""
        block = self.downsampling(depth).block
        return (block - 1, *(layer for layer in cascade_layers(depth) if layer >= block))

    def out_layer_problems(self, out_layers: tuple[int, ...], depth: int) -> list[str]:
        """The first feature must be one before the downsampling, and all others after it."""
        block = self.downsampling(depth).block
        if len(out_layers) > 1 and out_layers[0] < block <= out_layers[1]:
            return []
        return [
            f"out_layers {out_layers} do not fit shrink_at {block}; name one block before it, read for detail, "
            "and then one or more from it on"
        ]

    def spec_problems(self, spec: DecoderSpec) -> list[str]:
        """The features' width must divide into the heads, too: each head weighs channels of its own."""
        heads = self.sizes(spec).num_heads
        unfit = [width for width in spec.feature_widths[1:] if width % heads]
        rule = (
            [f"the features' width {unfit[0]} is not a multiple of decoder_heads {heads}; change it"] if unfit else []
        )
        return [*super().spec_problems(spec), *rule]

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return AnchoredDecoder(spec.feature_widths, self.input_widths(spec)[1:], self.sizes(spec), self.shrink_queries)


def bilinear_weights(sampling: ShrinkQueries) -> Tensor:
    """(places, neighbours): what bilinear interpolation gives each of the 3 x 3 coarse tokens around a cell."""
    axis = torch.tensor(AXIS_WEIGHTS[sampling])  # (2, 3)
    return torch.einsum("ir,jc->ijrc", axis, axis).reshape(PLACES, NEIGHBOURS)


def neighbours_of(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, neighbours, C) of tokens (B, L, C); beyond the border the nearest token stands again."""
    rows, columns = grid
    cells = F.pad(torch.unflatten(tokens.transpose(1, 2), 2, grid), (1, 1, 1, 1), mode="replicate")
    shifted = [cells[:, :, row : row + rows, column : column + columns] for row in range(3) for column in range(3)]
    return torch.stack(shifted, dim=1).flatten(3).permute(0, 3, 1, 2)


def cells_of(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, places, C) of tokens (B, h*w, C); a lone last row or column is doubled."""
    patches = fill_windows(torch.unflatten(tokens.transpose(1, 2), 2, grid))  # (B, C, h, w)
    windows = torch.unflatten(torch.unflatten(patches, 3, (-1, 2)), 2, (-1, 2))  # (B, C, rows, 2, columns, 2)
    return windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def patches_of(cells: Tensor, coarse: tuple[int, int], fine: tuple[int, int]) -> Tensor:
    """(B, h*w, C) of cells (B, L, places, C), without what doubling had added."""
    assert coarse == halved_grid(fine), f"{coarse} is not half of {fine}"
    windows = torch.unflatten(torch.unflatten(cells, 2, (2, 2)), 1, coarse)  # (B, rows, columns, 2, 2, C)
    patches = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return patches[:, : fine[0], : fine[1]].flatten(1, 2)
