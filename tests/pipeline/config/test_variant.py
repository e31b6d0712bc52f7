from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import LossConfig, TrainConfig, VariantSettings
from pipeline.config.file import parse_config

TRAIN: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "warmup_steps": 1,
    "validate_every_steps": 2,
    "checkpoint_every_steps": 2,
}


def experiment(**sections: Any) -> Any:
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"dataset": "digits"},
        "model": {"backbone": "vit_tiny_patch16_224", "image_size": [48, 64], "decoder_layers": 2},
        "variants": {"full": {"out_layers": [1, 3]}},
        "train": TRAIN,
    }
    return parse_config({**tree, **sections})


def settings() -> VariantSettings:
    found: VariantSettings = experiment().variant_settings("full")
    return found


def test_variant_settings__a_variant_overrides_any_field_and_says_which() -> None:
    config = experiment(
        variants={"a": {"decoder_layers": 1, "learning_rate": 3e-5, "loss": {"dice": 2.0}}, "b": {}},
        loss={"focal": 10.0},
    )
    a, b = config.variant_settings("a"), config.variant_settings("b")
    assert (a.model["decoder_layers"], b.model["decoder_layers"]) == (1, 2)
    assert (a.train.learning_rate, b.train.learning_rate) == (3e-5, 1e-4)
    # A variant's own loss is all of it; the experiment's changes the published one.
    assert (a.loss.weights, b.loss.weights) == ({"dice": 2.0}, {"focal": 10.0})
    assert (a.loss.resolved(), b.loss.resolved()) == ({"dice": 2.0}, {"class": 1.0, "focal": 10.0, "dice": 1.0})
    assert a.own == ("model.decoder_layers", "loss.dice", "train.learning_rate")
    assert b.own == ()


def test_variant_settings__a_preset_and_what_is_written_over_it() -> None:
    config = experiment(
        model={"image_size": [64, 96]},
        variants={
            "large": {"preset": "ade20k_vit_large"},
            "linear": {"preset": "ablation_linear_cross_entropy", "out_layers": [3]},
        },
    )
    large, linear = config.variant_settings("large"), config.variant_settings("linear")
    assert large.model["backbone"].startswith("vit_large_patch16_384")
    assert large.model["out_layers"] == [7, 15, 23]
    assert large.model["image_size"] == [64, 96]
    assert large.loss.weights == {}
    assert (linear.model["structure"], linear.model["out_layers"]) == ("linear", [3])
    assert {term for term, weight in linear.loss.resolved().items() if weight} == {"cross_entropy"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("loss.dice", 1.0),
        ("loss.count_ignored_as_background", True),
        ("train.learning_rate", 1e-4),
        ("train.augmentation.scale_range", [0.5, 2.0]),
        ("model.decoder_layers", 2),
        ("model.dropout", 0.1),
    ],
)
def test_value__by_dotted_path_defaults_included(path: str, value: Any) -> None:
    assert settings().value(path) == value


def test_with_values__are_validated_and_leave_the_rest() -> None:
    changed = settings().with_values(
        {"loss.dice": 2.5, "train.learning_rate": 1e-3, "model.decoder_layers": 3, "train.augmentation.hue": 0.0}
    )
    assert changed.loss.weights["dice"] == 2.5
    assert (
        changed.train.model_dump()
        == settings()
        .train.model_copy(update={"learning_rate": 1e-3, "augmentation": changed.train.augmentation})
        .model_dump()
    )
    assert changed.train.augmentation.hue == 0.0
    assert changed.model["decoder_layers"] == 3
    with pytest.raises(ValueError, match=r"loss.dise is no setting of a training run; did you mean loss.dice"):
        settings().with_values({"loss.dise": 1.0})
    with pytest.raises(ValueError, match=r"train.batch_size: Input should be greater than 0"):
        settings().with_values({"train.batch_size": 0})
    with pytest.raises(ValueError, match="decoder_layers must be >= 1"):
        settings().with_values({"model.decoder_layers": 0})


def test_for_search_of__a_variants_own_settings_stay_its_own() -> None:
    mine = VariantSettings(
        model={"backbone": "vit_tiny_patch16_224", "image_size": [48, 64], "structure": "single"},
        loss=LossConfig(),
        train=TrainConfig(**TRAIN),
        own=("train.learning_rate",),
    )
    found = {"loss.dice": 2.0, "train.learning_rate": 1e-2, "model.chain_stages": False}
    other = mine.for_search_of("full", "single", found)
    # The rate is its own, and chain_stages an option that its structure does not have.
    assert other.loss.weights["dice"] == 2.0
    assert other.train.learning_rate == 1e-4
    same = mine.for_search_of("single", "single", {"train.learning_rate": 1e-2})
    assert same.train.learning_rate == 1e-2
