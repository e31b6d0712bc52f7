"""Multi-head attention, and the post-norm decoder layer around a cross-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_, xavier_uniform_, zeros_

# B batch, Q queries, L key tokens, C channels, D head width

# Of the similarity that attention in steps holds: 128 MB in bf16.
MAX_SIMILARITY_ELEMENTS = 64_000_000


def attention_of_heads(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attention (B, heads, Q, D) of queries (B, heads, Q, D) over keys and values (B, heads, L, D).

    On PyTorch's fused kernel, but in steps where those are faster, see `faster_in_steps`.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Added to the similarity, any shape that broadcasts to (B, heads, Q, L).
        dropout: Of the attention's weights.
        scale: Factor of the similarity; None: head width ** -0.5.
    """
    if not faster_in_steps(q, k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    flat_q, flat_k, flat_v = (heads.flatten(0, 1) for heads in (q, k.contiguous(), v))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    similarity = torch.baddbmm(q.new_empty(1, 1, 1), flat_q, flat_k.transpose(1, 2), beta=0, alpha=factor)
    similarity = torch.unflatten(similarity, 0, q.shape[:2])
    weights = (similarity if mask is None else similarity + mask).softmax(3)
    weights = F.dropout(weights, dropout) if dropout else weights
    return torch.unflatten(torch.bmm(weights.flatten(0, 1), flat_v), 0, q.shape[:2])


def faster_in_steps(q: Tensor, num_keys: int) -> bool:
    """Whether products and softmax one by one beat the fused kernel, as in bf16 on a CPU; compiled code is not asked.

    A ViT-S block's attention takes two thirds of the fused kernel's time there (docs/benchmarks.md). The similarity is
    held for it: where that is too large, it is not done.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    return q.shape[0] * q.shape[1] * q.shape[2] * num_keys <= MAX_SIMILARITY_ELEMENTS


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
    attended = attention_of_heads(q, k, v, dropout=dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


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
        if queries is tokens:
            q, k, v = F.linear(queries, self.in_proj, self.in_proj_bias).chunk(3, dim=2)
        else:
            width = queries.shape[2]
            q = F.linear(queries, self.in_proj[:width], self.in_proj_bias[:width])
            k, v = F.linear(tokens, self.in_proj[width:], self.in_proj_bias[width:]).chunk(2, dim=2)
        attended = attend(q, k, v, self.num_heads, self.dropout if self.training else 0.0)
        output: Tensor = self.out_proj(attended)
        return output


class FeedForward(nn.Sequential):
    """Two-layer ReLU MLP of four times the width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


class LayerStack(nn.Module):
    """A module whose layers run through `run_layer`, which may be compiled."""

    @staticmethod
    def run_layer(layer: nn.Module, *inputs: Any, **options: Any) -> Any:
        """The layer's output."""
        return layer(*inputs, **options)


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
