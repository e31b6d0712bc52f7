from __future__ import annotations

import torch
import torch.nn.functional as F

from segvit import attention
from segvit.attention import attend, draw_dropped


def test_draw_dropped__rate_and_independence() -> None:
    drawn = draw_dropped((64, 1000, 7), 0.1)
    assert drawn.shape == (64, 1000, 7)
    rate = drawn.double().mean().item()
    assert abs(rate - 0.1) < 4 * (0.09 / drawn.numel()) ** 0.5 + 2**-17
    # The four booleans of one random number are as independent as those of others.
    dropped = drawn.flatten()[: drawn.numel() // 4 * 4].view(-1, 4).double()
    covariance = torch.cov(dropped.T)
    assert (covariance - covariance.diag().diag()).abs().max() < 5 * 0.09 / len(dropped) ** 0.5


def test_draw_dropped__follows_the_seed() -> None:
    torch.manual_seed(3)
    first = draw_dropped((5, 7), 0.5)
    torch.manual_seed(3)
    assert torch.equal(draw_dropped((5, 7), 0.5), first)


def test_attend__dropout_drops_weights_and_keeps_the_mean() -> None:
    queries, keys, values = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    torch.manual_seed(1)
    kept = ~draw_dropped((1, 2, 3, 5), 0.25)
    torch.manual_seed(1)
    dropped = attend(queries, keys, values, 2, dropout=0.25, scale=0.7)
    q, k, v = (attention.split_heads(x, 2) for x in (queries, keys, values))
    weights = (0.7 * q @ k.transpose(2, 3)).softmax(-1) * kept / 0.75
    torch.testing.assert_close(dropped, (weights @ v).transpose(1, 2).flatten(2))
    many = torch.stack([attend(queries, keys, values, 2, dropout=0.25) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(many, attend(queries, keys, values, 2, dropout=0.0), atol=0.05, rtol=0)


def test_attend__without_dropout_is_the_fused_kernel() -> None:
    queries, tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    q, k = attention.split_heads(queries, 2), attention.split_heads(tokens, 2)
    expected = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(queries, tokens, tokens, 2, 0.0), expected)
