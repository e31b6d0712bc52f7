"""Attention-to-Mask (SegViT, arXiv 2210.05844, section 3.2): class queries whose attention is the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segvit.attention import FeedForward, MultiheadAttention, attend, initialize_linear
from segvit.backbone import FeatureMap
from segvit.output import at_least_float32, full_precision

# B batch, N classes (one query each), L patch tokens on an (h, w) grid, C decoder channels


class Prediction(NamedTuple):
    """Classes and masks of one ATM stage or layer."""

    class_logits: Tensor
    """(B, N, N + 1); the last column is "no object"."""
    mask_logits: Tensor
    """(B, N, h, w), before the sigmoid."""


class DecoderOutput(NamedTuple):
    """All predictions of a decoder, the final one last, and the pixels a mask cell covers on each side."""

    predictions: list[Prediction]
    stride: int


class AttentionToMask(nn.Module):
    """Cross-attention of class queries whose head-averaged similarity, before the softmax, is the mask."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.scale = (width // num_heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
        """Queries (B, N, C) attend to tokens (B, L, C).

        Returns:
            The attended values (B, N, C) and, if asked for, the mask logits (B, N, L).
        """
        q, k, v = self.q(queries), self.k(tokens), self.v(tokens)
        attended = attend(q, k, v, self.num_heads, self.dropout if self.training else 0.0)
        return self.proj(attended), self.mask_logits(q, k) if with_mask else None

    def mask_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Head mean of the scaled similarity of projected queries and keys: (B, N, L), float32 or more."""
        # The sum over heads of per-head products is the full-width product: no map per head is needed.
        with full_precision(q):
            q, k = at_least_float32(q), at_least_float32(k)
            return torch.matmul(q * (self.scale / self.num_heads), k.transpose(1, 2))


class ATMLayer(nn.Module):
    """Post-norm decoder layer with Attention-to-Mask as its cross-attention."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(width, num_heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.attention_to_mask = AttentionToMask(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The updated queries (B, N, C) and, if asked for, the layer's mask logits (B, N, L)."""
        queries = self.norm1(queries + self.drop(self.self_attention(queries, queries)))
        attended, mask = self.attention_to_mask(queries, tokens, with_mask=with_mask)
        queries = self.norm2(queries + self.drop(attended))
        return self.norm3(queries + self.drop(self.mlp(queries))), mask


class ATMStage(nn.Module):
    """A projection of backbone features and a stack of ATM layers over them.

    With `input_width` None the features are taken as they are, without projection or norm (Shrunk).
    """

    def __init__(self, input_width: int | None, width: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.input = InputProjection(input_width, width) if input_width is not None else nn.Identity()
        self.layers = nn.ModuleList(ATMLayer(width, num_heads, dropout) for _ in range(num_layers))

    def forward(self, queries: Tensor, features: FeatureMap, *, inner_masks: bool) -> list[tuple[Tensor, Tensor]]:
        """Queries (B, N, C) and mask logits (B, N, h, w) of the last layer, or of every one if asked for."""
        tokens = self.input(features.tokens)
        steps = []
        for index, layer in enumerate(self.layers):
            queries, mask = layer(queries, tokens, with_mask=inner_masks or index == len(self.layers) - 1)
            if mask is not None:
                steps.append((queries, mask.unflatten(2, features.grid)))
        return steps


class InputProjection(nn.Sequential):
    """Linear layer to the decoder's width, then LayerNorm."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__(nn.Linear(input_width, width), nn.LayerNorm(width))


class ATMCascade(nn.Module):
    """ATM stages over several backbone layers, the last layer first, masks accumulated (SegViT, figure 2)."""

    def __init__(
        self,
        num_stages: int,
        num_classes: int,
        input_width: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.class_queries = nn.Embedding(num_classes, width)
        self.stages = nn.ModuleList(
            ATMStage(input_width, width, num_heads, num_layers, dropout) for _ in range(num_stages)
        )
        self.class_head = nn.Linear(width, num_classes + 1)
        self.apply(initialize_linear)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a stage, from features in the backbone's order on one grid."""
        queries = self.class_queries.weight.expand(len(features[0].tokens), -1, -1)
        predictions: list[Prediction] = []
        for stage, feature in zip(self.stages, reversed(features), strict=True):
            [(queries, mask)] = stage(queries, feature, inner_masks=False)
            if predictions:
                mask = mask + predictions[-1].mask_logits
            predictions.append(Prediction(at_least_float32(self.class_head(queries)), mask))
        return DecoderOutput(predictions, features[-1].stride)


class SingleATM(nn.Module):
    """One ATM stage, each of whose layers makes a prediction of its own (baseline, and end of Shrunk)."""

    def __init__(
        self,
        num_classes: int,
        input_width: int | None,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.class_queries = nn.Embedding(num_classes, width)
        self.stage = ATMStage(input_width, width, num_heads, num_layers, dropout)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.apply(initialize_linear)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a layer, from the last of the features."""
        feature = features[-1]
        queries = self.class_queries.weight.expand(len(feature.tokens), -1, -1)
        predictions = [
            Prediction(at_least_float32(self.class_head(queries)), mask)
            for queries, mask in self.stage(queries, feature, inner_masks=True)
        ]
        return DecoderOutput(predictions, feature.stride)
