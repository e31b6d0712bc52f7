from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import DistillConfig, LossConfig, TrainConfig, VariantSettings
from pipeline.config.file import parse_config
from pipeline.errors import UserError

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
        variants={"a": {"decoder_layers": 1, "train": {"learning_rate": 3e-5}, "loss": {"dice": 2.0}}, "b": {}},
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


def test_variant_settings__its_own_train_settings_over_the_experiments() -> None:
    own = {"steps": 9, "augmentation": {"hue": 0.0}, "schedule": "constant"}
    config = experiment(
        train={**TRAIN, "augmentation": {"strength": "strong", "brightness": 1.0}},
        variants={"full": {}, "small": {"train": own}},
    )
    full, small = (config.variant_settings(name) for name in ("full", "small"))
    assert (full.train.steps, small.train.steps) == (4, 9)
    assert full.train.augmentation.model_copy(update={"hue": 0.0}) == small.train.augmentation
    assert small.train.augmentation.scale_range == (0.1, 2.0)
    assert (full.train.schedule.name, small.train.schedule.name) == ("poly", "constant")
    assert small.train.batch_size == 4
    assert small.own == ("train.steps", "train.augmentation", "train.augmentation.hue", "train.schedule")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"step": 3}, r"variants.small.train: step: Extra inputs are not permitted"),
        ({"steps": -1}, r"variants.small.train: steps: Input should be greater than or equal to 0"),
        ({"steps": 1}, r"variants.small.train: warmup_steps 1 must be below steps 1; lower it"),
        (
            {"batch_size": 1},
            r"variants.small.train.batch_size 1 / variants.small.train.accumulation_steps 1 = 1 leaves",
        ),
    ],
)
def test_variant_settings__its_own_train_settings_that_break_a_rule(own: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment(variants={"full": {}, "small": {"train": own}}, runtime={"num_workers": 2})


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"a": {}, "b": {"start_from": "c"}},
            r"b.start_from 'c' is no variant; choose from a, or name a registered version",
        ),
        ({"a": {"start_from": "models"}}, r"a.start_from 'models' is no variant; choose from no other, or name a"),
        ({"a": {"start_from": "a"}}, r"start_from goes in a circle: a from a; one of them must start anew"),
        (
            {"a": {"start_from": "b"}, "b": {"start_from": "c"}, "c": {"start_from": "b"}},
            r"start_from goes in a circle: a from b from c from b",
        ),
    ],
)
def test_start_from__names_another_variant_or_a_version(variants: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment(variants=variants)


def test_start_from__of_all_variants_and_of_their_own() -> None:
    model = {"backbone": "vit_tiny_patch16_224", "image_size": [48, 64], "start_from": "./champion"}
    variants = {"a": {}, "b": {"start_from": None}, "c": {"start_from": "a"}, "d": {"start_from": "runs/x.pth"}}
    config = experiment(model=model, variants=variants)
    assert [config.start_from(name) for name in variants] == ["./champion", None, "a", "runs/x.pth"]
    with pytest.raises(UserError, match=r"model.start_from 'a' is for all variants, and is a registered version"):
        experiment(model={**model, "start_from": "a"}, variants={"a": {}})


@pytest.mark.parametrize(
    ("small", "message"),
    [
        ({"train": {"steps": 0}}, r"small has no steps and starts from no other: give it train.steps or start_from"),
        ({"train": {"steps": -1}, "start_from": "full"}, r"steps: .*greater than or equal to 0"),
    ],
)
def test_no_steps__need_a_start(small: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        experiment(variants={"full": {}, "small": small})


def test_no_steps__of_a_variant_that_starts_from_another() -> None:
    config = experiment(variants={"full": {}, "small": {"train": {"steps": 0}, "start_from": "full"}})
    assert config.variant_settings("small").train.steps == 0
    with pytest.raises(UserError, match=r"full has no steps and starts from no other"):
        experiment(train={**TRAIN, "steps": 0}, variants={"full": {}})


def test_distill__its_images_and_its_teacher() -> None:
    small = {"start_from": "full", "train": {"steps": 0}}
    config = experiment(variants={"full": {}, "small": {**small, "distill": {"images": 7}}})
    assert config.variant_settings("small").distill == DistillConfig(images=7)
    assert config.variant_settings("full").distill is None
    assert config.variant_settings("small").value("distill.images") == 7
    for own, message in (
        ({"distill": {"images": 0}, **small}, r"distill.images: 0: Input should be greater than or equal to 1"),
        ({"distill": {"image": 7}, **small}, r"distill.image: unknown key"),
        ({"distill": {}}, r"small.distill needs a teacher: name it with small.start_from"),
    ):
        with pytest.raises(UserError, match=message):
            experiment(variants={"full": {}, "small": own})


def test_training_order__each_after_the_one_that_it_starts_from() -> None:
    variants = {"a": {"start_from": "c"}, "b": {}, "c": {"start_from": "d"}, "d": {"start_from": "models:/x@champion"}}
    assert experiment(variants=variants).training_order() == ("d", "c", "a", "b")


def test_start_from__is_not_searched() -> None:
    with pytest.raises(UserError, match=r"tune.variant small starts from full, whose training waits for the search"):
        experiment(variants={"full": {}, "small": {"start_from": "full"}}, tune={"num_trials": 2, "variant": "small"})


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
