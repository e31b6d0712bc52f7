from __future__ import annotations

import pytest
import torch

from segvit import attention
from segvit.attention import attend, attention_of_heads, faster_in_steps, split_heads


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


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_heads__in_steps_is_the_fused_kernels(
    scale: float | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.bfloat16) for length in (5, 7, 7))
    mask = torch.randn(3, 5, 7, dtype=torch.bfloat16) if masked else None
    assert faster_in_steps(q, 7)
    in_steps = attention_of_heads(q, k, v, mask=mask, scale=scale)
    monkeypatch.setattr(attention, "MAX_SIMILARITY_ELEMENTS", 2 * 3 * 5 * 7 - 1)
    assert not faster_in_steps(q, 7)
    fused = attention_of_heads(q, k, v, mask=mask, scale=scale)
    assert in_steps.dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(in_steps, fused, atol=0.03, rtol=0.03)
    assert not torch.equal(in_steps, fused)  # they are two ways
    exact = attention_of_heads(
        *(one.double() for one in (q, k, v)), mask=None if mask is None else mask.double(), scale=scale
    )
    torch.testing.assert_close(in_steps.double(), exact, atol=0.03, rtol=0.03)


def test_attention_of_heads__in_steps_drops_weights_and_keeps_the_mean() -> None:
    q, k, v = (torch.randn(1, 2, length, 8).expand(4000, -1, -1, -1).bfloat16() for length in (3, 5, 5))
    plain, dropped = (attention_of_heads(q, k, v, dropout=dropout) for dropout in (0.0, 0.25))
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.float().mean(0), plain[0].float(), atol=0.05, rtol=0)


def test_faster_in_steps__in_bf16_on_a_cpu_alone() -> None:
    assert faster_in_steps(torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16), 3)
    assert not faster_in_steps(torch.zeros(1, 1, 2, 4), 3)
    assert not faster_in_steps(torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16, device="meta"), 3)
