"""The Shrunk decoder (SegViT, arXiv 2210.05844, section 3.3): query-based upsampling, then ATM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor, nn

from segvit.attention import DecoderLayer, LayerStack, initialize_linear
from segvit.backbones.feature_map import FeatureMap, resize_positions
from segvit.decoders.atm import ATMDecoder, ATMStage, DecoderSizes, InputProjection
from segvit.decoders.decoder import DecoderOutput, DecoderSpec
from segvit.decoders.shrinking import ShrinkingDecoder
from segvit.decoders.single import SingleATM

# B batch, Q = h*w grid queries at the backbone's first stride, C decoder channels


class QueryUpsampling(LayerStack):
    """Grid queries that read a feature map through standard decoder layers."""

    def __init__(self, input_width: int, sizes: DecoderSizes) -> None:
        super().__init__()
        self.input = InputProjection(input_width, sizes.width)
        self.layers = nn.ModuleList(
            DecoderLayer(sizes.width, sizes.num_heads, sizes.dropout) for _ in range(sizes.num_layers)
        )

    def forward(self, queries: Tensor, features: FeatureMap) -> Tensor:
        """Queries (B, Q, C) after reading the features; (B, Q, C)."""
        tokens = self.input(features.tokens)
        for layer in self.layers:
            queries = self.run_layer(layer, queries, tokens)
        return queries


@dataclass(frozen=True, kw_only=True)
class Shrunk(ATMDecoder, ShrinkingDecoder):
    """An upsampling layer for each of `out_layers`, one or two, in this order, then one ATM block."""

    max_out_layers: ClassVar[int | None] = 2
    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType(
        {"upsampling": QueryUpsampling, "atm_stage": ATMStage}
    )

    def default_out_layers(self, depth: int, hierarchical: bool) -> tuple[int, ...]:
        """The last block before downsampling and the last of all, as published."""
        return (self.downsampling(depth).block - 1, depth - 1)

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return ShrunkDecoder(spec.patch_grid, spec.patch_size, spec.feature_widths, self.sizes(spec))


class ShrunkDecoder(nn.Module):
    """Query-based upsampling layers beside a downsampled backbone, and one ATM block on their result.

    The learned table holds one query a patch of the training crop; other grids resize it bicubically.

    Args:
        grid: (h, w) of the training crop.
        patch_size: Pixels a grid query covers on each side.
        input_widths: Channels of the features, one upsampling layer each, visited in this order.
        sizes: Of all layers, those of the upsampling and those of ATM.
    """

    def __init__(
        self, grid: tuple[int, int], patch_size: int, input_widths: Sequence[int], sizes: DecoderSizes
    ) -> None:
        super().__init__()
        self.grid = grid
        self.patch_size = patch_size
        self.grid_queries = nn.Embedding(grid[0] * grid[1], sizes.width)
        self.upsampling = nn.ModuleList(QueryUpsampling(width, sizes) for width in input_widths)
        self.apply(initialize_linear)
        self.atm = SingleATM(None, sizes)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction an ATM layer, from the features in the backbone's order, at the first stride."""
        first = features[0]
        grid = first.patch_grid
        table = resize_positions(self.grid_queries.weight.unsqueeze(0), self.grid, grid, 0)
        queries = table.expand(len(first.tokens), -1, -1)
        for upsampling, feature in zip(self.upsampling, features, strict=True):
            queries = upsampling(queries, feature)
        output: DecoderOutput = self.atm([FeatureMap(queries, grid, self.patch_size, grid)])
        return output
