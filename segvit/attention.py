"""Multi-head attention on the fused kernel, and the post-norm decoder layer around a cross-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    attended: Tensor
    if dropout and draws_here(queries):
        attended = AttentionWithDropout.apply(q, k, v, dropout, q.shape[-1] ** -0.5 if scale is None else scale)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


class AttentionWithDropout(torch.autograd.Function):
    """Attention whose weights are dropped at random, for CPUs.

    The fused kernel knows no dropout there, and torch's own spends most of its time on drawing a number a weight
    and on copies of the weights. Here one map is kept: the weights, those that are dropped with a minus sign.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, dropout: float, scale: float) -> Tensor:
        """Attended values (B, heads, Q, d) of queries (B, heads, Q, d) over keys and values (B, heads, L, d)."""
        weights = torch.matmul(queries * scale, keys.transpose(2, 3))
        torch.softmax(weights, -1, out=weights)
        signed = weights.mul_(draw_kept(weights.shape, dropout).to(weights.dtype).mul_(2.0).sub_(1.0))
        ctx.save_for_backward(queries, keys, values, signed)
        ctx.dropout, ctx.scale = dropout, scale
        return torch.matmul(signed.clamp(min=0.0), values).div_(1 - dropout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The gradients with respect to queries, keys and values."""
        queries, keys, values, signed = ctx.saved_tensors
        grad = grad / (1 - ctx.dropout)
        kept = signed.clamp(min=0.0)
        values_grad = torch.matmul(kept.transpose(2, 3), grad)
        # Where a weight is zero its sign is lost, and its logit's gradient zero either way.
        weights_grad = torch.matmul(grad, values.transpose(2, 3)).mul_(torch.gt(signed, 0.0, out=kept))
        logits_grad = torch._softmax_backward_data(weights_grad, signed.abs(), -1, signed.dtype)
        queries_grad = torch.matmul(logits_grad, keys).mul_(ctx.scale)
        keys_grad = torch.matmul(logits_grad.transpose(2, 3), queries).mul_(ctx.scale)
        return queries_grad, keys_grad, values_grad, None, None


class Dropout(nn.Module):
    """Dropout of activations, on CPUs by `draw_kept`."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of any shape; in training some elements are zero and the others scaled up."""
        if not (self.training and self.dropout):
            return tokens
        if not draws_here(tokens):
            return F.dropout(tokens, self.dropout)
        return tokens * draw_kept(tokens.shape, self.dropout).div_(1 - self.dropout).to(tokens.dtype)


def draws_here(tokens: Tensor) -> bool:
    """Whether dropout goes through `draw_kept`: on CPUs, unless a compiler fuses torch's own."""
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()


def draw_kept(shape: Sequence[int], dropout: float) -> Tensor:
    """Float32 zeros and ones on the CPU, zero with probability `dropout` rounded to a multiple of 2 ** -16.

    Follows torch's seed. Four elements share one random number, sixteen bits each.
    """
    count = math.prod(shape)
    seed = int(torch.randint(2**63 - 1, ()))
    numbers = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count])
    threshold = round(dropout * 2**16) - 2**15
    return torch.ge(numbers, threshold, out=torch.empty(count)).view(shape)


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
        super().__init__(nn.Linear(width, 4 * width), nn.ReLU(), Dropout(dropout), nn.Linear(4 * width, width))


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
        self.drop = Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Queries (B, Q, C) attend to tokens (B, L, C); the updated queries (B, Q, C)."""
        queries = self.norm1(queries + self.drop(self.self_attention(queries, queries)))
        queries = self.norm2(queries + self.drop(self.cross_attention(queries, tokens)))
        updated: Tensor = self.norm3(queries + self.drop(self.mlp(queries)))
        return updated
