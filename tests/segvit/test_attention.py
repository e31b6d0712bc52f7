from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvit import attention
from segvit.attention import Dropout, attend, draw_kept


def test_draw_kept__rate_and_independence() -> None:
    drawn = 1 - draw_kept((64, 1000, 7), 0.1).double()
    assert drawn.shape == (64, 1000, 7)
    assert set(torch.unique(drawn).tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.1) < 4 * (0.09 / drawn.numel()) ** 0.5 + 2**-17
    # The four elements of one random number are as independent as those of others.
    covariance = torch.cov(drawn.flatten().view(-1, 4).T)
    assert (covariance - covariance.diag().diag()).abs().max() < 5 * 0.09 / (drawn.numel() / 4) ** 0.5


def test_draw_kept__follows_the_seed() -> None:
    torch.manual_seed(3)
    first, second = draw_kept((5, 7), 0.5), draw_kept((5, 7), 0.5)
    torch.manual_seed(3)
    assert torch.equal(draw_kept((5, 7), 0.5), first)
    assert not torch.equal(first, second)


def test_attend__drops_weights_and_keeps_the_mean() -> None:
    queries, keys, values = torch.randn(1, 3, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    torch.manual_seed(1)
    kept = draw_kept((1, 2, 3, 5), 0.25)
    torch.manual_seed(1)
    dropped = attend(queries, keys, values, 2, dropout=0.25, scale=0.7)
    q, k, v = (attention.split_heads(x, 2) for x in (queries, keys, values))
    weights = (0.7 * q @ k.transpose(2, 3)).softmax(-1) * kept / 0.75
    torch.testing.assert_close(dropped, (weights @ v).transpose(1, 2).flatten(2))
    many = torch.stack([attend(queries, keys, values, 2, dropout=0.25) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(many, attend(queries, keys, values, 2, dropout=0.0), atol=0.05, rtol=0)


def test_attend__gradient_check_with_dropout() -> None:
    inputs = [torch.randn(1, length, 4, dtype=torch.float64, requires_grad=True) for length in (3, 5, 5)]

    def run(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        torch.manual_seed(2)  # the same weights are dropped at every evaluation
        return attend(queries, keys, values, num_heads=2, dropout=0.4, scale=0.9)

    assert torch.autograd.gradcheck(run, inputs)


def test_attend__bf16_keeps_its_type() -> None:
    queries = torch.randn(1, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    attended = attend(queries, queries, queries, 2, dropout=0.5)
    attended.sum().backward()  # type: ignore[no-untyped-call]
    assert attended.dtype == torch.bfloat16
    assert queries.grad is not None
    assert queries.grad.isfinite().all()


def test_dropout__zeroes_and_scales_in_training_only() -> None:
    dropout = Dropout(0.2)
    tokens = torch.ones(50, 1000, requires_grad=True)
    dropped = dropout(tokens)
    assert set(torch.unique(dropped).tolist()) == {0.0, 1.25}
    assert abs(dropped.mean().item() - 1) < 0.01
    dropped.sum().backward()
    torch.testing.assert_close(tokens.grad, dropped)
    assert dropout.eval()(tokens) is tokens


def test_attend__without_dropout_is_the_fused_kernel() -> None:
    queries, tokens = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    q, k = attention.split_heads(queries, 2), attention.split_heads(tokens, 2)
    expected = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(queries, tokens, tokens, 2, 0.0), expected)
