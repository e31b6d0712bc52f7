"""Attention-to-Mask (SegViT, arXiv 2210.05844, section 3.2): class queries whose attention is the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.attention import Dropout, FeedForward, MultiheadAttention, attend, initialize_linear
from segvit.backbones.plain import FeatureMap
from segvit.output import at_least_float32, full_precision

# B batch, N classes (one query each), L patch tokens on an (h, w) grid, C decoder channels


class Prediction(NamedTuple):
    """Classes and masks of one ATM stage or layer, or of a linear head."""

    class_logits: Tensor | None
    """(B, N, N + 1); the last column is "no object". None for a linear head."""
    mask_logits: Tensor
    """(B, N, h, w), before the sigmoid."""


class DecoderOutput(NamedTuple):
    """All predictions of a decoder, the final one last, and the pixels a mask cell covers on each side."""

    predictions: list[Prediction]
    stride: int


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What all decoders share.

    `attention_scale`: factor of ATM's similarity; None: head width ** -0.5.
    """

    num_classes: int
    width: int
    num_heads: int
    num_layers: int
    dropout: float
    attention_scale: float | None = None


class AttentionToMask(nn.Module):
    """Cross-attention of class queries whose head-averaged similarity, before the softmax, is the mask."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.dropout
        scale = sizes.attention_scale
        self.scale: float = (sizes.width // sizes.num_heads) ** -0.5 if scale is None else scale
        self.q = nn.Linear(sizes.width, sizes.width)
        self.k = nn.Linear(sizes.width, sizes.width)
        self.v = nn.Linear(sizes.width, sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, queries: Tensor, tokens: Tensor, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
        """Queries (B, N, C) attend to tokens (B, L, C).

        Returns:
            The attended values (B, N, C) and, if asked for, the mask logits (B, N, L).
        """
        q = self.q(queries)
        # One product for both is faster than two.
        weight, bias = torch.cat((self.k.weight, self.v.weight)), torch.cat((self.k.bias, self.v.bias))
        k, v = F.linear(tokens, weight, bias).chunk(2, dim=2)
        dropout = self.dropout if self.training else 0.0
        attended = attend(q, k, v, self.num_heads, dropout, self.scale)
        return self.proj(attended), self.mask_logits(q, k) if with_mask else None

    def mask_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Head mean of the scaled similarity of projected queries and keys: (B, N, L), float32 or more."""
        # The sum over heads of per-head products is the full-width product: no map per head is needed.
        with full_precision(q):
            q, k = at_least_float32(q), at_least_float32(k)
            return torch.matmul(q * (self.scale / self.num_heads), k.transpose(1, 2))


class ATMLayer(nn.Module):
    """Post-norm decoder layer with Attention-to-Mask as its cross-attention."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(sizes.width, sizes.num_heads, sizes.dropout)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attention_to_mask = AttentionToMask(sizes)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.mlp = FeedForward(sizes.width, sizes.dropout)
        self.norm3 = nn.LayerNorm(sizes.width)
        self.drop = Dropout(sizes.dropout)

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

    def __init__(self, input_width: int | None, sizes: DecoderSizes) -> None:
        super().__init__()
        self.input = InputProjection(input_width, sizes.width) if input_width is not None else nn.Identity()
        self.layers = nn.ModuleList(ATMLayer(sizes) for _ in range(sizes.num_layers))

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
    """ATM stages over several backbone layers, the last layer first (SegViT, figure 2).

    Args:
        input_widths: Channels of the features, in the backbone's order; None: taken without projection.
        sizes: What all stages share.
        chain: Whether a stage starts from the queries of the stage before, or from the table (parallel).
        share_queries: Whether there is one table of class queries, or one a stage.
        accumulate: Whether a prediction adds the masks of the stages before.
    """

    def __init__(
        self,
        input_widths: Sequence[int | None],
        sizes: DecoderSizes,
        *,
        chain: bool = True,
        share_queries: bool = True,
        accumulate: bool = True,
    ) -> None:
        super().__init__()
        self.chain = chain
        self.accumulate = accumulate
        num_tables = 1 if share_queries else len(input_widths)
        self.class_queries = nn.ModuleList(nn.Embedding(sizes.num_classes, sizes.width) for _ in range(num_tables))
        self.stages = nn.ModuleList(ATMStage(width, sizes) for width in reversed(input_widths))
        self.class_head = nn.Linear(sizes.width, sizes.num_classes + 1)
        self.apply(initialize_linear)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a stage, from features in the backbone's order, on the first feature's grid."""
        batch, grid = len(features[0].tokens), features[0].grid
        # Through parameters(): the type of a module list's members is not known to be a table.
        tables = [table.expand(batch, -1, -1) for table in self.class_queries.parameters()]
        queries = tables[0]
        predictions: list[Prediction] = []
        for index, (stage, feature) in enumerate(zip(self.stages, reversed(features), strict=True)):
            start = queries if self.chain else tables[index % len(tables)]
            [(queries, mask)] = stage(start, feature, inner_masks=False)
            if feature.grid != grid:
                mask = F.interpolate(mask, size=grid, mode="bilinear", align_corners=False)
            if predictions and self.accumulate:
                mask = mask + predictions[-1].mask_logits
            predictions.append(Prediction(at_least_float32(self.class_head(queries)), mask))
        return DecoderOutput(predictions, features[0].stride)


class SingleATM(nn.Module):
    """One ATM stage, each of whose layers makes a prediction of its own (baseline, and end of Shrunk).

    With `input_width` None the features are taken without projection.
    """

    def __init__(self, input_width: int | None, sizes: DecoderSizes) -> None:
        super().__init__()
        self.class_queries = nn.Embedding(sizes.num_classes, sizes.width)
        self.stage = ATMStage(input_width, sizes)
        self.class_head = nn.Linear(sizes.width, sizes.num_classes + 1)
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
