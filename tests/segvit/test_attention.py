from __future__ import annotations

import torch

from segvit.attention import attend, split_heads


def test_attend__is_the_softmax_of_scaled_similarity() -> None:
    queries, keys, values = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    q, k, v = (split_heads(tokens, 2) for tokens in (queries, keys, values))
    weights = (0.7 * q @ k.transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(attend(queries, keys, values, 2, 0.0, 0.7), (weights @ v).transpose(1, 2).flatten(2))


def test_attend__drops_weights_and_keeps_the_mean() -> None:
    queries, keys, values = (torch.randn(1, length, 8).expand(4000, -1, -1) for length in (3, 5, 5))
    plain, dropped = (attend(queries, keys, values, 2, dropout) for dropout in (0.0, 0.25))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain[0], atol=0.05, rtol=0)
