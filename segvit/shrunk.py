"""The Shrunk decoder (SegViT, arXiv 2210.05844, section 3.3): query-based upsampling, then ATM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segvit.atm_decoder import DecoderOutput, InputProjection, SingleATM
from segvit.attention import DecoderLayer, initialize_linear
from segvit.backbone import FeatureMap, resize_positions

# B batch, Q = h*w grid queries at the backbone's first stride, C decoder channels


class QueryUpsampling(nn.Module):
    """Grid queries that read a feature map through standard decoder layers."""

    def __init__(self, input_width: int, width: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.input = InputProjection(input_width, width)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, dropout) for _ in range(num_layers))

    def forward(self, queries: Tensor, features: FeatureMap) -> Tensor:
        """Queries (B, Q, C) after reading the features; (B, Q, C)."""
        tokens = self.input(features.tokens)
        for layer in self.layers:
            queries = layer(queries, tokens)
        return queries


class ShrunkDecoder(nn.Module):
    """Two query-based upsampling layers beside a downsampled backbone, and one ATM block on their result.

    The learned table holds one query a patch of the training crop; other grids resize it bicubically.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_classes: int,
        input_width: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.grid_queries = nn.Embedding(grid[0] * grid[1], width)
        self.low_level = QueryUpsampling(input_width, width, num_heads, num_layers, dropout)
        self.high_level = QueryUpsampling(input_width, width, num_heads, num_layers, dropout)
        self.apply(initialize_linear)
        self.atm = SingleATM(num_classes, None, width, num_heads, num_layers, dropout)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction an ATM layer, from the last feature before downsampling and the backbone's last."""
        low, high = features
        table = resize_positions(self.grid_queries.weight.unsqueeze(0), self.grid, low.grid, 0)
        queries = self.high_level(self.low_level(table.expand(len(low.tokens), -1, -1), low), high)
        output: DecoderOutput = self.atm([low._replace(tokens=queries)])
        return output
