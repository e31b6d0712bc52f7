from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.attention import DecoderLayer, MultiheadAttention
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.atm import AttentionToMask, DecoderSizes
from segvit.decoders.cascade import ATMCascade
from segvit.decoders.single import SingleATM


def sizes(**settings: Any) -> DecoderSizes:
    defaults: dict[str, Any] = {"num_classes": 5, "width": 24, "num_heads": 3, "num_layers": 2, "dropout": 0.1}
    return DecoderSizes(**defaults | settings)


def feature_map(rows: int, columns: int, stride: int, width: int = 16) -> FeatureMap:
    return FeatureMap(torch.randn(2, rows * columns, width), (rows, columns), stride, (rows, columns))


def per_head(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.unflatten(2, (num_heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


def test_attention_to_mask__mask_is_head_mean_and_its_softmax_the_attention() -> None:
    atm = AttentionToMask(sizes()).double().eval()
    queries, tokens = torch.randn(2, 5, 24).double(), torch.randn(2, 12, 24).double()
    attended, mask = atm(queries, tokens, with_mask=True)
    q, k, v = (per_head(x, 3) for x in (atm.q(queries), atm.k(tokens), atm.v(tokens)))
    similarity = q @ k.transpose(2, 3) / 8**0.5
    torch.testing.assert_close(mask, similarity.mean(1))
    torch.testing.assert_close(attended, atm.proj((similarity.softmax(-1) @ v).transpose(1, 2).flatten(2)))
    assert atm(queries, tokens, with_mask=False)[1] is None


def test_attention_to_mask__mask_is_float32_under_autocast() -> None:
    atm = AttentionToMask(sizes(dropout=0.0))
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
    decoder = ATMCascade((16, 16), sizes()).eval()
    first, last = (feature_map(2, 3, 16) for _ in range(2))
    output = decoder([first, last])

    queries = decoder.class_queries[0].weight.expand(2, -1, -1)  # type: ignore[operator]
    total = torch.zeros(2, 5, 2, 3)
    for stage, feature, prediction in zip(decoder.stages, (last, first), output.predictions, strict=True):
        tokens = stage.input(feature.tokens)  # type: ignore[operator]
        for layer in stage.layers:  # type: ignore[union-attr]
            queries, mask = layer(queries, tokens, with_mask=True)
        total = total + mask.view(2, 5, 2, 3)
        torch.testing.assert_close(prediction.mask_logits, total)
        torch.testing.assert_close(prediction.class_logits, decoder.class_head(queries))
    assert output.stride == 16


def stage_alone(decoder: ATMCascade, index: int, queries: Tensor, feature: FeatureMap) -> tuple[Tensor, Tensor]:
    stage: Any = decoder.stages[index]
    [(queries, mask)] = stage(queries, feature, inner_masks=False)
    return queries, mask


@pytest.mark.parametrize("share", [True, False])
def test_cascade__parallel_stages_start_from_their_table(share: bool) -> None:
    decoder = ATMCascade((16, 16), sizes(), chain=False, share_queries=share).eval()
    features = [feature_map(2, 3, 16) for _ in range(2)]
    tables: list[Any] = list(decoder.class_queries)
    assert len(tables) == (1 if share else 2)
    first, last = decoder(features).predictions
    queries, mask = stage_alone(decoder, 0, tables[0].weight.expand(2, -1, -1), features[1])
    torch.testing.assert_close(first.class_logits, decoder.class_head(queries))
    torch.testing.assert_close(first.mask_logits, mask)
    queries, own_mask = stage_alone(decoder, 1, tables[-1].weight.expand(2, -1, -1), features[0])
    torch.testing.assert_close(last.class_logits, decoder.class_head(queries))
    torch.testing.assert_close(last.mask_logits, mask + own_mask)


def test_cascade__masks_not_accumulated() -> None:
    decoder = ATMCascade((16, 16), sizes(), accumulate=False).eval()
    features = [feature_map(2, 3, 16) for _ in range(2)]
    table: Any = decoder.class_queries[0]
    queries, _ = stage_alone(decoder, 0, table.weight.expand(2, -1, -1), features[1])
    _, mask = stage_alone(decoder, 1, queries, features[0])
    torch.testing.assert_close(decoder(features).predictions[-1].mask_logits, mask)


def test_cascade__coarser_masks_are_resized_to_the_last_stages_grid() -> None:
    decoder = ATMCascade((8, 16), sizes()).eval()
    features = [feature_map(4, 6, 4, width=8), feature_map(2, 3, 8)]
    table: Any = decoder.class_queries[0]
    queries, coarse = stage_alone(decoder, 0, table.weight.expand(2, -1, -1), features[1])
    _, fine = stage_alone(decoder, 1, queries, features[0])
    output = decoder(features)
    resized = F.interpolate(coarse, size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(output.predictions[0].mask_logits, resized)
    torch.testing.assert_close(output.predictions[1].mask_logits, resized + fine)
    assert output.stride == 4


def test_attention_to_mask__scale_is_of_mask_and_attention() -> None:
    scaled, plain = AttentionToMask(sizes(attention_scale=0.5)).eval(), AttentionToMask(sizes()).eval()
    plain.load_state_dict(scaled.state_dict())
    queries, tokens = torch.randn(2, 5, 24), torch.randn(2, 12, 24)
    attended, mask = scaled(queries, tokens, with_mask=True)
    torch.testing.assert_close(mask, plain(queries, tokens, with_mask=True)[1] * (0.5 * 8**0.5))
    q, k, v = (per_head(x, 3) for x in (scaled.q(queries), scaled.k(tokens), scaled.v(tokens)))
    weights = (0.5 * q @ k.transpose(2, 3)).softmax(-1)
    torch.testing.assert_close(attended, scaled.proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kind", ["cascade", "layer"])
def test_decoder__gradient_check(kind: str) -> None:
    """Analytic gradients of ATM, and of the upsampling layers' attention, against finite differences."""
    small = sizes(num_classes=2, width=6, num_layers=1, dropout=0.0)
    tokens = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    if kind == "layer":
        layer = DecoderLayer(4, 2, 0.0).double()
        queries = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (queries, tokens))
        return
    decoder = ATMCascade((4, 4), small).double()

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        feature = FeatureMap(tokens, (2, 3), 16, (2, 3))
        final = decoder([feature, feature._replace(tokens=tokens.flip(1))]).predictions[-1]
        assert final.class_logits is not None
        return final.mask_logits, final.class_logits

    assert torch.autograd.gradcheck(run, (tokens,))


def test_single__every_layer_predicts_its_own_mask() -> None:
    decoder = SingleATM(None, sizes()).eval()
    feature = feature_map(2, 3, 16, width=24)
    output = decoder([feature])

    queries = decoder.class_queries.weight.expand(2, -1, -1)
    for layer, prediction in zip(decoder.stage.layers, output.predictions, strict=True):
        queries, mask = layer(queries, feature.tokens, with_mask=True)
        torch.testing.assert_close(prediction.mask_logits, mask.view(2, 5, 2, 3))
        torch.testing.assert_close(prediction.class_logits, decoder.class_head(queries))


def test_decoder__initialisation() -> None:
    decoder = SingleATM(192, sizes(num_classes=150, width=96, num_layers=1))
    assert abs(decoder.class_queries.weight.std().item() - 1) < 0.05
    assert abs(decoder.class_head.weight.std().item() - 0.02) < 0.002
    assert not decoder.class_head.bias.any()
    layer: Any = decoder.stage.layers[0]
    in_proj = layer.self_attention.in_proj
    bound = (6 / (96 + 3 * 96)) ** 0.5
    assert 0.95 * bound < in_proj.abs().max().item() <= bound
