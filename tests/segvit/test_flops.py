from __future__ import annotations

from collections.abc import Callable

import pytest

from segvit.config import ModelConfig
from segvit.flops import model_cost
from segvit.latency import measure_latency
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]


def attention(queries: int, keys: int, width: int) -> int:
    """Projections in and out, similarity and weighted sum."""
    return 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width


def test_model_cost__equals_a_hand_count() -> None:
    """One ATM stage of two layers on the first block of ViT-Tiny, 4 classes, 32 x 48 pixels."""
    config = ModelConfig(backbone="vit_tiny_patch16_224", image_size=(32, 48), out_layers=(0,), decoder_layers=2)
    cost = model_cost(config, num_classes=4, size=(32, 48))
    patches, width, classes, inner = 6, 192, 4, 96
    tokens = patches + 1  # the class token
    block = attention(tokens, tokens, width) + 8 * tokens * width**2 + 2 * 5 * tokens * width
    embedding = patches * 3 * 16 * 16 * width
    projection = patches * width * inner + 5 * patches * inner
    layer = (
        attention(classes, classes, inner)
        + attention(classes, patches, inner)
        + 8 * classes * inner**2
        + 3 * 5 * classes * inner
    )
    mask = classes * patches * inner
    head = classes * inner * (classes + 1)
    scores = 32 * 48 * classes * (classes + 4)
    assert cost.parts["backbone"] * 1e9 == pytest.approx(embedding + block)
    assert cost.parts["decoder"] * 1e9 == pytest.approx(projection + 2 * layer + mask + head)
    assert cost.parts["scores"] * 1e9 == pytest.approx(scores)
    assert cost.gflops == pytest.approx(sum(cost.parts.values()))


@pytest.mark.parametrize(
    ("settings", "size", "gflops", "parameters"),
    [
        ({"backbone": "vit_base_patch16_384"}, 512, 120.9, 108.74e6),
        ({"backbone": "vit_large_patch16_384", "out_layers": (7, 15, 23)}, 640, 637.9, 344.31e6),
        ({"backbone": "vit_large_patch16_384", "structure": "shrunk", "shrink_at": 8}, 640, 373.5, 344.60e6),
    ],
)
def test_model_cost__published_figures(
    settings: dict[str, object], size: int, gflops: float, parameters: float
) -> None:
    cost = model_cost(ModelConfig(image_size=(size, size), **settings), 150, (size, size))  # type: ignore[arg-type]
    assert cost.gflops == pytest.approx(gflops, rel=0.005)
    assert cost.parameters == pytest.approx(parameters, rel=1e-4)


def test_measure_latency__is_positive_and_keeps_the_mode(make_model: MakeModel) -> None:
    model = make_model("cascade").train()
    assert measure_latency(model, (32, 32), repeats=1) > 0
    assert model.training
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        measure_latency(model, (32, 32), repeats=0)
