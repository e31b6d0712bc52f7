from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from segvit.atm_decoder import ATMCascade, AttentionToMask, SingleATM
from segvit.attention import MultiheadAttention
from segvit.backbone import FeatureMap


def per_head(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


def test_attention_to_mask__mask_is_head_mean_and_its_softmax_the_attention() -> None:
    atm = AttentionToMask(width=24, num_heads=3, dropout=0.1).double().eval()
    queries, tokens = torch.randn(2, 5, 24).double(), torch.randn(2, 12, 24).double()
    attended, mask = atm(queries, tokens, with_mask=True)
    q, k, v = (per_head(x, 3) for x in (atm.q(queries), atm.k(tokens), atm.v(tokens)))
    similarity = q @ k.transpose(2, 3) / 8**0.5
    torch.testing.assert_close(mask, similarity.mean(1))
    torch.testing.assert_close(attended, atm.proj((similarity.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    assert atm(queries, tokens, with_mask=False)[1] is None


def test_attention_to_mask__mask_is_float32_under_autocast() -> None:
    atm = AttentionToMask(width=24, num_heads=3, dropout=0.0)
    queries, tokens = torch.randn(2, 5, 24), torch.randn(2, 12, 24)
    with torch.autocast("cpu", torch.bfloat16):
        attended, mask = atm(queries, tokens, with_mask=True)
        product = atm.mask_logits(queries, tokens)
    assert (attended.dtype, mask.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(product, (queries @ tokens.transpose(1, 2)) / (3 * 8**0.5))


def test_multihead_attention__equals_torch() -> None:
    ours = MultiheadAttention(24, 3, dropout=0.1).eval()
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True).eval()
    torch.nn.init.normal_(ours.in_proj_bias)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.in_proj)
        theirs.in_proj_bias.copy_(ours.in_proj_bias)
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    queries, tokens = torch.randn(2, 5, 24), torch.randn(2, 12, 24)
    torch.testing.assert_close(ours(queries, tokens), theirs(queries, tokens, tokens)[0])


def test_cascade__visits_the_last_features_first_and_accumulates_masks() -> None:
    decoder = ATMCascade(2, 5, input_width=16, width=24, num_heads=3, num_layers=2, dropout=0.1).eval()
    first, last = (FeatureMap(torch.randn(2, 6, 16), (2, 3), 16) for _ in range(2))
    output = decoder([first, last])

    queries = decoder.class_queries.weight.expand(2, -1, -1)
    total = torch.zeros(2, 5, 2, 3)
    for stage, feature, prediction in zip(decoder.stages, (last, first), output.predictions, strict=True):
        tokens = stage.input(feature.tokens)  # type: ignore[operator]
        for layer in stage.layers:  # type: ignore[union-attr]
            queries, mask = layer(queries, tokens, with_mask=True)
        total = total + mask.view(2, 5, 2, 3)
        torch.testing.assert_close(prediction.mask_logits, total)
        torch.testing.assert_close(prediction.class_logits, decoder.class_head(queries))
    assert output.stride == 16


def test_single__every_layer_predicts_its_own_mask() -> None:
    decoder = SingleATM(5, input_width=None, width=24, num_heads=3, num_layers=2, dropout=0.1).eval()
    feature = FeatureMap(torch.randn(2, 6, 24), (2, 3), 16)
    output = decoder([feature])

    queries = decoder.class_queries.weight.expand(2, -1, -1)
    for layer, prediction in zip(decoder.stage.layers, output.predictions, strict=True):
        queries, mask = layer(queries, feature.tokens, with_mask=True)
        torch.testing.assert_close(prediction.mask_logits, mask.view(2, 5, 2, 3))
        torch.testing.assert_close(prediction.class_logits, decoder.class_head(queries))


def test_decoder__initialisation() -> None:
    decoder = SingleATM(150, input_width=192, width=96, num_heads=3, num_layers=1, dropout=0.1)
    assert abs(decoder.class_queries.weight.std().item() - 1) < 0.05
    assert abs(decoder.class_head.weight.std().item() - 0.02) < 0.002
    assert not decoder.class_head.bias.any()
    layer: Any = decoder.stage.layers[0]
    in_proj = layer.self_attention.in_proj
    bound = (6 / (96 + 3 * 96)) ** 0.5
    assert 0.95 * bound < in_proj.abs().max().item() <= bound
