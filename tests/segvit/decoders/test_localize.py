from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from segvit.attention import DecoderLayer, split_heads
from segvit.decoders.localize import least_squares, localize_upsampling, position_codes
from segvit.decoders.shrunk import QueryUpsampling, ShrunkDecoder
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]


def test_position_codes__are_nearest_to_themselves_and_have_squared_length_of_half_the_width() -> None:
    codes = position_codes((6, 9), (6, 9), 32)
    torch.testing.assert_close(codes.square().sum(1), torch.full((54,), 16.0))
    assert ((codes @ codes.T).argmax(1) == torch.arange(54)).all()
    coarse = position_codes((3, 3), (6, 9), 32)
    # Cell (0, 0) of the coarse grid is centred between cells 0 and 1 of each fine axis, (1, 1.5) in fine cells.
    expected = position_codes((3, 3), (6, 9), 32)[0]
    torch.testing.assert_close(coarse[0], expected)


def test_least_squares__recovers_a_linear_map() -> None:
    inputs, true_map, true_intercept = torch.randn(2, 200, 5) + 2, torch.randn(5, 3), torch.randn(3)
    solution, intercept, explained = least_squares(inputs, inputs @ true_map + true_intercept)
    torch.testing.assert_close(solution, true_map, atol=0.01, rtol=0.01)
    torch.testing.assert_close(intercept, true_intercept, atol=0.05, rtol=0.05)
    assert explained > 0.999


def test_localize_upsampling__queries_attend_near_their_own_place(make_model: MakeModel) -> None:
    model = make_model("shrunk", image_size=(96, 128), decoder_layers=1)
    images = torch.randn(12, 3, 96, 128)
    # As in a pretrained model, tokens tell where they are.
    torch.nn.init.normal_(model.get_parameter("backbone.vit.pos_embed"))

    def mass_nearby() -> float:
        decoder = model.decoder
        assert isinstance(decoder, ShrunkDecoder)
        with torch.no_grad():
            low = model.backbone(images)[0]
            upsampling = decoder.upsampling[0]
            assert isinstance(upsampling, QueryUpsampling)
            tokens = upsampling.input(low.tokens)
            layer = upsampling.layers[0]
            assert isinstance(layer, DecoderLayer)
            queries = decoder.grid_queries.weight.expand(len(images), -1, -1)
            asking = layer.norm1(queries + layer.self_attention(queries, queries))
            attention = layer.cross_attention
            width = tokens.shape[-1]
            q_part, k_part = slice(width), slice(width, 2 * width)
            q = F.linear(asking, attention.in_proj[q_part], attention.in_proj_bias[q_part])
            k = F.linear(tokens, attention.in_proj[k_part], attention.in_proj_bias[k_part])
            q, k = split_heads(q, attention.num_heads), split_heads(k, attention.num_heads)
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        rows, columns = torch.arange(48) // 8, torch.arange(48) % 8
        near = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()) <= 1
        return float((weights * near).sum(-1).mean())

    before = mass_nearby()
    explained = localize_upsampling(model, images)
    assert 0.5 < explained <= 1.0
    assert before < 0.25
    assert mass_nearby() > 2 * before


def test_localize_upsampling__refuses_other_structures_and_sizes(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="structure 'cascade' has no upsampling layers; use 'shrunk'"):
        localize_upsampling(make_model(), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"images of \(32, 64\) do not fit image_size"):
        localize_upsampling(make_model("shrunk"), torch.zeros(1, 3, 32, 64))
