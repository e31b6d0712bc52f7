from __future__ import annotations

from collections.abc import Callable

import pytest

from segvit.config import ModelConfig
from segvit.flops import activation_bytes, model_cost, preset_cost, training_gflops
from segvit.inference.latency import measure_latency
from segvit.model import SegViT, build_model
from segvit.presets import published_names

MakeModel = Callable[..., SegViT]

PATCHES, WIDTH, CLASSES, INNER = 6, 192, 4, 96
TINY = ModelConfig(
    backbone="vit_tiny_patch16_224",
    image_size=(32, 48),
    out_layers=(0,),
    decoder_layers=2,
    decoder_heads=3,
    dropout=0.0,
    drop_path_rate=0.0,
)


def attention(queries: int, keys: int, width: int) -> int:
    """Projections in and out, similarity and weighted sum."""
    return 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width


def test_model_cost__equals_a_hand_count() -> None:
    """One ATM stage of two layers on the first block of ViT-Tiny, 4 classes, 32 x 48 pixels."""
    cost = model_cost(TINY, CLASSES, size=(32, 48))
    tokens = PATCHES + 1  # the class token
    block = attention(tokens, tokens, WIDTH) + 8 * tokens * WIDTH**2 + 2 * 5 * tokens * WIDTH
    projection = PATCHES * WIDTH * INNER + 5 * PATCHES * INNER
    layer = (
        attention(CLASSES, CLASSES, INNER)
        + attention(CLASSES, PATCHES, INNER)
        + 8 * CLASSES * INNER**2
        + 3 * 5 * CLASSES * INNER
    )
    expected = {
        "patch_embedding": PATCHES * 3 * 16 * 16 * WIDTH,
        "blocks": block,
        "atm_stage_1": projection + 2 * layer + CLASSES * PATCHES * INNER,
        "heads": CLASSES * INNER * (CLASSES + 1),
        "scores": 32 * 48 * CLASSES * (CLASSES + 4),
    }
    assert list(cost.parts) == list(expected)
    assert {name: part * 1e9 for name, part in cost.parts.items()} == pytest.approx(expected)
    assert cost.gflops == pytest.approx(sum(expected.values()) / 1e9)


def block_elements(tokens: int, width: int, num_heads: int) -> int:
    """Numbers that a pre-norm block keeps: both inputs of the residual sums, normed twice with mean and deviation;
    the stacked projections, what attention keeps besides; the MLP's hidden layer before and after its activation."""
    norms = 2 * (2 * tokens * width + 2 * tokens)
    fused = 3 * tokens * width + tokens * width + tokens * num_heads
    return norms + fused + 2 * 4 * tokens * width


def test_activation_bytes__of_blocks_equal_a_hand_count() -> None:
    """The difference of models that differ by one block is that block."""

    def kept(last: int) -> int:
        config = ModelConfig(
            backbone="vit_tiny_patch16_224",
            image_size=(32, 48),
            structure="linear",
            out_layers=(last,),
            drop_path_rate=0.0,
        )
        return model_cost(config, CLASSES, (32, 48)).activation_bytes

    assert kept(3) - kept(2) == 4 * block_elements(PATCHES + 1, WIDTH, 3)


def test_activation_bytes__on_the_meta_device_as_on_the_cpu() -> None:
    model = build_model(TINY, CLASSES)
    real = activation_bytes(model.eval(), (32, 48))
    assert model.training is False
    assert real == model_cost(TINY, CLASSES, (32, 48)).activation_bytes


def test_activation_bytes__attention_is_linear_in_the_tokens() -> None:
    """A kernel that kept the similarity of all pairs would need 16 times as much for 4 times the tokens."""
    small, large = (model_cost(TINY, CLASSES, (side, side)).activation_bytes for side in (256, 512))
    assert 3.5 < large / small < 4.2


def test_model_cost__parts_of_shrunk() -> None:
    config = ModelConfig(
        backbone="vit_tiny_patch16_224", image_size=(64, 64), structure="shrunk", shrink_at=4, decoder_layers=1
    )
    cost = model_cost(config, CLASSES, (64, 64))
    assert list(cost.parts) == [
        "patch_embedding",
        "blocks",
        "upsampling_1",
        "upsampling_2",
        "atm_stage_1",
        "heads",
        "scores",
    ]

    def upsampling(tokens: int) -> float:
        projection = tokens * WIDTH * INNER + 5 * tokens * INNER
        mlp = 8 * 16 * INNER**2 + 3 * 5 * 16 * INNER
        return (projection + attention(16, 16, INNER) + attention(16, tokens, INNER) + mlp) / 1e9

    assert cost.parts["upsampling_1"] == pytest.approx(upsampling(16))
    assert cost.parts["upsampling_2"] == pytest.approx(upsampling(4))
    assert cost.parts["heads"] == pytest.approx(CLASSES * INNER * (CLASSES + 1) / 1e9)


@pytest.mark.parametrize("name", published_names())
def test_preset_cost__published_figures(name: str) -> None:
    cost = preset_cost(name)
    assert cost.published_gflops is not None
    assert cost.gflops == pytest.approx(cost.published_gflops, rel=0.005)
    assert cost.gflops == pytest.approx(sum(cost.parts.values()))
    parameters = {"ade20k_vit_base": 108.74e6, "ade20k_vit_large": 344.31e6, "ade20k_vit_large_shrunk": 344.60e6}
    if name in parameters:
        assert cost.parameters == pytest.approx(parameters[name], abs=0.005e6)


def test_preset_cost__other_size_has_no_published_figure() -> None:
    half, whole = preset_cost("ade20k_vit_base", (256, 512)), preset_cost("ade20k_vit_base")
    assert half.size == (256, 512)
    assert half.published_gflops is None
    assert half.parameters == whole.parameters
    assert half.parts["patch_embedding"] == pytest.approx(whole.parts["patch_embedding"] / 2)
    assert half.parts["scores"] == pytest.approx(whole.parts["scores"] / 2)


def test_measure_latency__is_positive_and_keeps_the_mode(make_model: MakeModel) -> None:
    model = make_model("cascade").train()
    assert measure_latency(model, (32, 32), repeats=1) > 0
    assert model.training
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        measure_latency(model, (32, 32), repeats=0)


def test_training_gflops__forward_and_backward_of_what_learns() -> None:
    cost = model_cost(TINY, CLASSES, size=(32, 48))
    norms = 5 * (2 * (PATCHES + 1) * WIDTH + PATCHES * INNER + 2 * 3 * CLASSES * INNER) / 1e9
    products = cost.gflops - cost.parts["scores"] - norms
    embedding = cost.parts["patch_embedding"]
    # Images take no gradient.
    assert training_gflops(TINY, CLASSES, (32, 48)) == pytest.approx(3 * products - embedding)


def test_training_gflops__frozen_blocks_run_forward_alone() -> None:
    cost = model_cost(TINY, CLASSES, size=(32, 48))
    frozen = cost.parts["patch_embedding"] + cost.parts["blocks"] - 2 * 5 * (PATCHES + 1) * WIDTH / 1e9
    decoder = cost.parts["atm_stage_1"] + cost.parts["heads"]
    decoder -= 5 * (PATCHES * INNER + 2 * 3 * CLASSES * INNER) / 1e9
    # Neither does what is frozen; the decoder's first layer is a projection of its features.
    projection = PATCHES * WIDTH * INNER / 1e9
    assert training_gflops(TINY, CLASSES, (32, 48), 1) == pytest.approx(frozen + 3 * decoder - projection)
