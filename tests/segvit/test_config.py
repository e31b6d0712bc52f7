from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from segvit.config import ModelConfig
from segvit.decoders import DECODERS

SMALL: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "image_size": (64, 96)}
# The model of a checkpoint that was written before structures had options of their own.
EARLIER: dict[str, Any] = {
    "backbone": "vit_small_patch14_dinov2",
    "image_size": [448, 448],
    "structure": "cascade",
    "out_layers": [5, 7, 11],
    "decoder_layers": 1,
    "decoder_width": None,
    "decoder_heads": None,
    "input_projection": True,
    "chain_stages": True,
    "share_queries": True,
    "accumulate_masks": True,
    "attention_scale": None,
    "shrink_at": None,
    "shrink_queries": "nearest",
    "class_token": True,
    "dropout": 0.1,
    "drop_path_rate": 0.1,
    "backbone_options": {},
}


def test_config__survives_json() -> None:
    config = ModelConfig(**SMALL, structure="shrunk", shrink_at=3, decoder_width=96, out_layers=(2, 5))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert len({config, copy.deepcopy(config), config.replace(shrink_at=4)}) == 2


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, {"chain_stages": True, "accumulate_masks": True}),
        ({"structure": "single", "out_layers": [11]}, {"input_projection": True}),
        ({"structure": "naive_qd", "out_layers": None, "shrink_at": 4}, {"shrink_at": 4, "shrink_queries": "nearest"}),
        ({"structure": "shrunk", "out_layers": [3, 11], "shrink_at": 4}, {"shrink_at": 4, "attention_scale": None}),
        ({"structure": "linear", "out_layers": None}, {"decoder_layers": 1}),
    ],
)
def test_from_dict__earlier_checkpoints(changes: dict[str, Any], own: dict[str, Any]) -> None:
    values = EARLIER | changes
    config = ModelConfig.from_dict(values)
    since = {"shrink_keys": False, "mask_upsampling": 1}
    assert config.to_dict() == {name: (values | since)[name] for name in config.to_dict()}
    assert {name: getattr(config, name) for name in own} == own
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_field_names__shared_and_own() -> None:
    shared = ModelConfig.field_names()
    assert shared == tuple(ModelConfig(**SMALL, structure="linear").to_dict())
    own = {"attention_scale", "shrink_at", "shrink_queries", "shrink_keys"}
    assert set(ModelConfig.field_names("shrunk")) - set(shared) == own
    with pytest.raises(ValueError, match="unknown structure 'shrank'; choose from shrunk"):
        ModelConfig.field_names("shrank")


def test_replace__other_structure_leaves_out_what_it_has_not() -> None:
    config = ModelConfig(**SMALL, chain_stages=False, decoder_layers=2, out_layers=(3, 7))
    linear = config.replace(structure="linear")
    assert (linear.structure, linear.decoder_layers, linear.out_layers) == ("linear", 2, (3, 7))
    assert not hasattr(linear, "chain_stages")
    with pytest.raises(ValueError, match="chain_stages False has no meaning for structure 'linear'"):
        config.replace(structure="linear", chain_stages=False)


def test_config__is_frozen() -> None:
    with pytest.raises(AttributeError):
        ModelConfig(**SMALL).dropout = 0.2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("structure", "depth", "options", "layers"),
    [
        ("cascade", 12, {}, (5, 7, 11)),
        ("cascade", 24, {}, (7, 15, 23)),
        ("cascade", 40, {}, (12, 25, 39)),
        ("cascade", 2, {}, (0, 1)),
        ("single", 12, {}, (11,)),
        ("naive_qd", 12, {}, (11,)),
        ("shrunk", 24, {}, (7, 23)),
        ("shrunk", 24, {"shrink_at": 4}, (3, 23)),
        ("linear", 12, {}, (11,)),
    ],
)
def test_default_out_layers(structure: str, depth: int, options: dict[str, int], layers: tuple[int, ...]) -> None:
    assert DECODERS.get(structure)(**options).default_out_layers(depth, hierarchical=False) == layers


def test_default_out_layers__of_stages() -> None:
    assert DECODERS.get("cascade")().default_out_layers(4, hierarchical=True) == (0, 1, 2, 3)
    assert DECODERS.get("single")().default_out_layers(4, hierarchical=True) == (3,)


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
        (
            {"structure": "shrunk", "shrink_queries": "max"},
            "unknown shrink_queries 'max'; choose from nearest, average, convolution",
        ),
        ({"attention_scale": 0.0}, "attention_scale must be > 0, got 0.0"),
        ({"backbone_options": {"width": 3}}, "unknown backbone option width; choose from"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"image_size": (64, 0)}, "image_size must be"),
        ({"image_size": 64}, "image_size must be a list of 2 whole numbers, got 64"),
        ({"decoder_layers": "3"}, "decoder_layers must be a whole number, got '3'"),
        ({"decoder_width": True}, "decoder_width must be a whole number or null, got True"),
        ({"chain_stages": 1}, "chain_stages must be true or false, got 1"),
        ({"out_layers": (1.0, 2.0)}, "out_layers must be a list of whole numbers or null"),
        ({"backbone_options": {"depth": 2.5}}, "backbone option depth must be a whole number > 0, got 2.5"),
        ({"backbone_options": {"mlp_ratio": 0.0}}, "backbone option mlp_ratio must be a number > 0, got 0.0"),
        ({"decoder_layer": 2}, "unknown model setting decoder_layer; choose from decoder_layers"),
    ],
)
def test_config__bad_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | settings)


def test_config__all_problems_at_once() -> None:
    with pytest.raises(ValueError, match=r"decoder_layers must be >= 1, got 0; dropout must be .*; shrink_at must be"):
        ModelConfig(**SMALL, structure="shrunk", decoder_layers=0, dropout=1.5, shrink_at=0)
