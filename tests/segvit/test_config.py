from __future__ import annotations

import json
from typing import Any

import pytest

from segvit.config import ModelConfig, Structure, default_out_layers
from segvit.model import check_config

SMALL: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "image_size": (64, 96)}


def test_config__survives_json() -> None:
    config = ModelConfig(**SMALL, structure="shrunk", shrink_at=3, decoder_width=96, out_layers=(2, 5))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("structure", "depth", "shrink_at", "layers"),
    [
        ("cascade", 12, None, (5, 7, 11)),
        ("cascade", 24, None, (7, 15, 23)),
        ("cascade", 40, None, (12, 25, 39)),
        ("cascade", 2, None, (0, 1)),
        ("single", 12, None, (11,)),
        ("shrunk", 24, None, (7, 23)),
        ("shrunk", 24, 4, (3, 23)),
    ],
)
def test_default_out_layers(structure: Structure, depth: int, shrink_at: int | None, layers: tuple[int, ...]) -> None:
    assert default_out_layers(structure, depth, shrink_at) == layers


def test_from_dict__unknown_key_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown model setting depth; choose from backbone, image_size"):
        ModelConfig.from_dict({**SMALL, "depth": 3})


def test_from_dict__missing_key() -> None:
    with pytest.raises(ValueError, match="model setting image_size is missing"):
        ModelConfig.from_dict({"backbone": "vit_tiny_patch16_224"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structure": "parallel"}, "unknown structure 'parallel'; choose from cascade, single"),
        ({"out_layers": (5, 3)}, r"out_layers must be ascending block indices from 0, got \(5, 3\)"),
        ({"out_layers": ()}, "out_layers must be ascending"),
        ({"decoder_layers": 0}, "decoder_layers must be >= 1, got 0"),
        ({"decoder_heads": 0}, "decoder_heads must be >= 1, got 0"),
        ({"shrink_at": 3}, "shrink_at 3 has no meaning for structure 'cascade'"),
        ({"shrink_queries": "average"}, "shrink_queries average has no meaning for structure 'cascade'; use naive_qd"),
        ({"structure": "single", "accumulate_masks": False}, "accumulate_masks False has no meaning .* use cascade"),
        ({"share_queries": False}, "share_queries False needs chain_stages False"),
        ({"structure": "single", "out_layers": (1, 2)}, r"single reads at most 1 of out_layers, got \(1, 2\)"),
        ({"shrink_queries": "max"}, "unknown shrink_queries 'max'; choose from nearest, average, convolution"),
        ({"attention_scale": 0.0}, "attention_scale must be > 0, got 0.0"),
        ({"backbone_options": {"width": 3}}, "unknown backbone option width; choose from embed_dim, depth"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"image_size": (64, 0)}, "image_size must be"),
    ],
)
def test_config__bad_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (64, 100)}, "crop 100 is not a multiple of .* patch size 16; use 96 or 112"),
        ({"image_size": (8, 64)}, "crop 8 is not a multiple of .* patch size 16; use 16"),
        ({"out_layers": (5, 12)}, r"out_layers \(5, 12\) do not fit .* blocks are 0 to 11"),
        ({"structure": "shrunk", "shrink_at": 12}, "shrink_at 12 does not fit .* from 1 to 11"),
        ({"decoder_width": 100}, "decoder_width 100 is not a multiple of decoder_heads 3"),
        ({"backbone": "vit_tiny_patch61_224"}, "unknown backbone .*; did you mean vit_tiny_patch16_224"),
        ({"backbone": "resnet18"}, "resnet18 is a ResNet, not a plain VisionTransformer"),
    ],
)
def test_check_config__what_does_not_fit_the_backbone(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(ModelConfig(**SMALL | settings))


def test_check_config__no_classes() -> None:
    with pytest.raises(ValueError, match="num_classes must be >= 1, got 0"):
        check_config(ModelConfig(**SMALL), num_classes=0)
