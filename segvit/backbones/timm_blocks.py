"""timm's plain ViT blocks with queries of their own: what downsampling, and BEiT at any grid, need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segvit.attention import attention_of_heads

# B batch, Q queries and L tokens with prefix tokens first, C channels, D head width

KNOWN_BLOCKS = (
    (Block, Attention),
    (EvaBlock, EvaAttention),
    (EvaBlock, AttentionRope),
    (BeitBlock, BeitAttention),
)


class AttentionPositions(NamedTuple):
    """What one block's attention knows of where its queries and keys lie; None where it is not told."""

    query_rotary: Tensor | None
    """Sine and cosine (patches, 2D) or (heads, patches, 2D), without rows for prefix tokens; (B, heads or 1, patches,
    2D) where images differ."""
    key_rotary: Tensor | None
    bias: Tensor | None
    """(heads, Q, L) or (B, heads or 1, Q or 1, L), added to the similarity."""


def block_problem(block: nn.Module) -> str | None:
    """Why `query_block` does not know everything the block computes, or None."""
    attention = getattr(block, "attn", None)
    # Exact types: a subclass may compute what is not written out below.
    if (type(block), type(attention)) in KNOWN_BLOCKS:
        return None
    return (
        f"query-based downsampling does not know {type(block).__name__} with {type(attention).__name__}; "
        "use a plain ViT backbone such as vit_base_patch16_384, or a structure that does not downsample"
    )


def run_block(block: nn.Module, tokens: Tensor, positions: AttentionPositions, num_prefix_tokens: int) -> Tensor:
    """A timm block of any kind on tokens (B, L, C)."""
    output: Tensor
    if isinstance(block, BeitBlock) or positions.bias is not None or runs_in_steps(block, tokens):
        # timm's forward of BEiT knows only the bias of the one grid it was built for; others know of none.
        return query_block(block, tokens, tokens, positions, num_prefix_tokens)
    if isinstance(block, EvaBlock | EvaBlockPostNorm):
        output = block(tokens, rope=positions.key_rotary)
    else:
        output = block(tokens)
    return output


def runs_in_steps(block: nn.Module, tokens: Tensor) -> bool:
    """Whether the block's attention may be `faster_in_steps`, which timm's forward knows nothing of."""
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or block_problem(block) is not None:
        return False
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else tokens.dtype
    return autocast == torch.bfloat16


def query_block(
    block: nn.Module, queries: Tensor, tokens: Tensor, positions: AttentionPositions, num_prefix_tokens: int
) -> Tensor:
    """A timm block whose queries and residual are others than the tokens it reads.

    Args:
        block: A block that `block_problem` has nothing against.
        queries: (B, Q, C), before the block's first norm.
        tokens: (B, L, C), likewise.
        positions: Where both lie.
        num_prefix_tokens: Class and register tokens in front of both.

    Returns:
        (B, Q, C).
    """
    # What shards parameters gathers a block's only for the block's own calls.
    forward: Callable[..., Tensor] = getattr(block, "query_forward", partial(compute_query_block, block))
    return forward(queries, None if queries is tokens else tokens, positions, num_prefix_tokens)


def compute_query_block(
    block: nn.Module, queries: Tensor, tokens: Tensor | None, positions: AttentionPositions, num_prefix_tokens: int
) -> Tensor:
    """What `query_block` computes; tokens None: they are the queries."""
    tokens = queries if tokens is None else tokens
    parts: Any = block
    normed = parts.norm1(tokens)
    normed_queries = normed if queries is tokens else parts.norm1(queries)
    attended = query_attention(parts.attn, normed_queries, normed, positions, num_prefix_tokens)
    queries = queries + parts.drop_path1(scale_branch(block, 1, attended))
    output: Tensor = queries + parts.drop_path2(scale_branch(block, 2, parts.mlp(parts.norm2(queries))))
    return output


def scale_branch(block: nn.Module, branch: int, values: Tensor) -> Tensor:
    """LayerScale of the attention (1) or MLP (2) branch, where the block has one."""
    parts: Any = block
    if isinstance(block, Block):
        scaled: Tensor = (parts.ls1, parts.ls2)[branch - 1](values)
        return scaled
    gamma: Tensor | None = (parts.gamma_1, parts.gamma_2)[branch - 1]
    return values if gamma is None else gamma * values


def query_attention(
    attention: Any, queries: Tensor, tokens: Tensor, positions: AttentionPositions, num_prefix_tokens: int
) -> Tensor:
    """timm's self-attention (B, Q, C) with other queries (B, Q, C) than the tokens (B, L, C)."""
    q, k, v = project(attention, queries, tokens)
    if not isinstance(attention, BeitAttention):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if positions.query_rotary is not None and positions.key_rotary is not None:
        q = rotate(q, positions.query_rotary, num_prefix_tokens, attention.rotate_half).type_as(v)
        k = rotate(k, positions.key_rotary, num_prefix_tokens, attention.rotate_half).type_as(v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    attended = attention_of_heads(
        q,
        k,
        v,
        mask=None if positions.bias is None else positions.bias.to(q.dtype),
        dropout=attention.attn_drop.p if attention.training else 0.0,
        scale=attention.scale,
    )
    attended = attended.transpose(1, 2).flatten(2)
    if not isinstance(attention, BeitAttention):
        attended = attention.norm(attended)
        if attention.gate is not None:
            attended = attended * attention.gate(queries).sigmoid()
    output: Tensor = attention.proj_drop(attention.proj(attended))
    return output


def project(attention: Any, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, Q, D), keys and values (B, heads or fewer, L, D) before their norms."""
    if attention.qkv is None:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        flat = [linear(inputs) for linear, inputs in zip(projections, (queries, tokens, tokens), strict=True)]
        head_width = attention.head_dim
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        width = weight.shape[0] // 3
        if bias is None and getattr(attention, "q_bias", None) is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        if queries is tokens:
            flat = list(F.linear(tokens, weight, bias).chunk(3, dim=-1))
        else:
            flat = [
                F.linear(queries, weight[:width], q_bias),
                *F.linear(tokens, weight[width:], kv_bias).chunk(2, dim=-1),
            ]
        head_width = width // attention.num_heads
    q, k, v = (torch.unflatten(one, 2, (-1, head_width)).transpose(1, 2) for one in flat)
    return q, k, v


def rotate(heads: Tensor, rotary: Tensor, num_prefix_tokens: int, rotate_half: bool) -> Tensor:
    """Rotary positions applied to the patches of (B, heads, L, D); prefix tokens have none."""
    prefix, patches = heads[:, :, :num_prefix_tokens], heads[:, :, num_prefix_tokens:]
    return torch.cat((prefix, apply_rot_embed_cat(patches, rotary, half=rotate_half)), dim=2)
