"""Query-based downsampling (SegViT, arXiv 2210.05844, section 3.3) inside a ViT block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# B batch, L tokens with prefix tokens first, C channels, h w patch grid


def halved_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns left when every second one is kept, from the first; an odd count rounds up."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def every_second(tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Prefix tokens and the top-left token of each 2 x 2 patches.

    Args:
        tokens: (B, prefix + h*w, C).
        grid: (h, w); an odd last row or column is kept.
        num_prefix_tokens: Class and register tokens in front of the patches.

    Returns:
        (B, prefix + ceil(h/2)*ceil(w/2), C).
    """
    patches = torch.unflatten(tokens[:, num_prefix_tokens:], 1, grid)[:, ::2, ::2].flatten(1, 2)
    return torch.cat((tokens[:, :num_prefix_tokens], patches), dim=1)


def check_downsampling(block: nn.Module) -> None:
    """Raise ValueError unless `downsample_block` knows everything the block computes."""
    attention = getattr(block, "attn", None)
    # Exact types: a subclass may rotate, bias or gate what is written out below.
    if type(block) is not Block or type(attention) is not Attention or attention.gate is not None:
        raise ValueError(
            f"query-based downsampling does not know {type(block).__name__} with {type(attention).__name__}; "
            "use a plain ViT backbone such as vit_base_patch16_384, or structure 'cascade' or 'single'"
        )


def downsample_block(block: Block, tokens: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
    """Run a timm ViT block whose queries and residual are every second row and column.

    Keys and values come from all tokens; prefix tokens stay queries.

    Args:
        block: A block that `check_downsampling` accepts.
        tokens: (B, prefix + h*w, C).
        grid: (h, w).
        num_prefix_tokens: Class and register tokens in front of the patches.

    Returns:
        (B, prefix + ceil(h/2)*ceil(w/2), C).
    """
    kept = every_second(tokens, grid, num_prefix_tokens)
    normed = block.norm1(tokens)
    queries = every_second(normed, grid, num_prefix_tokens)
    assert isinstance(block.attn, Attention)
    attended = _cross_attention(block.attn, queries, normed)
    kept = kept + block.drop_path1(block.ls1(attended))
    output: Tensor = kept + block.drop_path2(block.ls2(block.mlp(block.norm2(kept))))
    return output


def _cross_attention(attention: Attention, queries: Tensor, tokens: Tensor) -> Tensor:
    width = attention.attn_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    heads = (attention.num_heads, attention.head_dim)
    q = torch.unflatten(F.linear(queries, weight[:width], q_bias), 2, heads).transpose(1, 2)
    kv = torch.unflatten(F.linear(tokens, weight[width:], kv_bias), 2, (2, *heads))
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    dropout = attention.attn_drop.p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=attention.scale)
    output: Tensor = attention.proj_drop(attention.proj(attention.norm(attended.transpose(1, 2).flatten(2))))
    return output
