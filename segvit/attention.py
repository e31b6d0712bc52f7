"""Multi-head attention on the fused kernel, and the post-norm decoder layer around a cross-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, xavier_uniform_, zeros_

# B batch, Q queries, L key tokens, C channels


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) to (B, heads, L, C / heads)."""
    return torch.unflatten(tokens, 2, (num_heads, -1)).transpose(1, 2)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, num_heads: int, dropout: float, scale: float | None = None
) -> Tensor:
    """Multi-head attention (B, Q, C) of projected queries (B, Q, C) over keys and values (B, L, C).

    `scale` is the factor of the similarity; None: head width ** -0.5.
    """
    q, k, v = (split_heads(tokens, num_heads) for tokens in (queries, keys, values))
    if dropout and queries.device.type == "cpu":
        attended = attend_with_dropout(q, k, v, dropout, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


def attend_with_dropout(queries: Tensor, keys: Tensor, values: Tensor, dropout: float, scale: float) -> Tensor:
    """Attention (B, heads, Q, C) whose weights are dropped at random, on a CPU.

    The fused kernel knows no dropout there, and torch's own spends most of its time on drawing a number a weight.
    """
    weights = torch.matmul(queries * scale, keys.transpose(2, 3)).softmax(-1)
    weights = weights.masked_fill(draw_dropped(weights.shape, dropout), 0.0)
    return torch.matmul(weights, values) / (1 - dropout)


def draw_dropped(shape: Sequence[int], dropout: float) -> Tensor:
    """Booleans, each True with probability `dropout` rounded to a multiple of 2 ** -16; four for a random number."""
    count = math.prod(shape)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return (numbers.view(torch.int16)[:count] < round(dropout * 2**16) - 2**15).view(shape)


def initialize_linear(module: nn.Module) -> None:
    """The decoder's initialisation of a Linear layer: truncated normal of deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            zeros_(module.bias)


class MultiheadAttention(nn.Module):
    """Multi-head attention with one stacked in-projection, Xavier-uniform initialised."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj = nn.Parameter(xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, Q, C) attend to tokens (B, L, C); (B, Q, C)."""
        weights, biases = self.in_proj.chunk(3), self.in_proj_bias.chunk(3)
        sources = (queries, tokens, tokens)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True))
        attended = attend(q, k, v, self.num_heads, self.dropout if self.training else 0.0)
        output: Tensor = self.out_proj(attended)
        return output


class FeedForward(nn.Sequential):
    """Two-layer ReLU MLP of four times the width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


class DecoderLayer(nn.Module):
    """Post-norm transformer decoder layer: self-attention, cross-attention, MLP."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(width, num_heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = MultiheadAttention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, Q, C) attend to tokens (B, L, C); the updated queries (B, Q, C)."""
        queries = self.norm1(queries + self.drop(self.self_attention(queries, queries)))
        queries = self.norm2(queries + self.drop(self.cross_attention(queries, tokens)))
        updated: Tensor = self.norm3(queries + self.drop(self.mlp(queries)))
        return updated
