from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.config import LossConfig, SearchRange, TrainConfig, VariantSettings
from pipeline.tuning.space import (
    default_space,
    distributions,
    from_params,
    short_names,
    to_params,
    value_text,
    values_text,
    within,
)
from segvit.losses import LOSS_TERMS

CHOICES = [[1, 2], {"a": [0.5]}, "nearest", None, 3]


def test_default_space__is_the_terms_that_the_variant_is_trained_with() -> None:
    train = TrainConfig(steps=9, batch_size=1, warmup_steps=0, validate_every_steps=9, checkpoint_every_steps=9)
    settings = VariantSettings(model={}, loss=LossConfig(), train=train)
    ranges = {name: SearchRange(log_uniform=LOSS_TERMS.get(name).search_range) for name in ("class", "focal", "dice")}
    assert default_space(settings) == {f"loss.{name}": one for name, one in ranges.items()}
    loss = LossConfig(weights={"dice": 0.0, "cross_entropy": 2.0})
    changed = default_space(settings.model_copy(update={"loss": loss}))
    assert list(changed) == ["loss.class", "loss.focal", "loss.cross_entropy"]


def test_distributions__one_for_each_kind_of_range() -> None:
    found = distributions(
        {
            "a": SearchRange(log_uniform=(0.1, 10.0)),
            "b": SearchRange(uniform=(-1.0, 1.0)),
            "c": SearchRange(int_uniform=(1, 4)),
            "d": SearchRange(choice=CHOICES),
        }
    )
    assert found == {
        "a": FloatDistribution(0.1, 10.0, log=True),
        "b": FloatDistribution(-1.0, 1.0),
        "c": IntDistribution(1, 4),
        "d": CategoricalDistribution(["[1, 2]", '{"a": [0.5]}', "nearest", None, 3]),
    }


@pytest.mark.parametrize("choice", CHOICES)
def test_choices__come_back_from_optuna_as_they_were(choice: object) -> None:
    space = {"x.y": SearchRange(choice=CHOICES)}
    params = to_params({"x.y": choice}, space)
    assert isinstance(params["x.y"], str | int | None)
    assert from_params(params, space) == {"x.y": choice}


@pytest.mark.parametrize(
    ("value", "one", "inside"),
    [
        (1.0, SearchRange(log_uniform=(0.3, 3.0)), True),
        (3.1, SearchRange(log_uniform=(0.3, 3.0)), False),
        (0, SearchRange(uniform=(0.0, 1.0)), True),
        (None, SearchRange(uniform=(0.0, 1.0)), False),
        (2.0, SearchRange(int_uniform=(1, 3)), False),
        (True, SearchRange(int_uniform=(1, 3)), False),
        ((1.0, 2.0), SearchRange(choice=CHOICES), True),
        ([2, 1], SearchRange(choice=CHOICES), False),
    ],
)
def test_within__what_a_search_can_try(value: object, one: SearchRange, inside: bool) -> None:
    assert within(value, one) == inside


def test_names_and_values__are_short_where_that_is_clear() -> None:
    paths = ["loss.dice", "train.steps", "other.steps"]
    assert short_names(paths) == {"loss.dice": "dice", "train.steps": "train.steps", "other.steps": "other.steps"}
    assert [value_text(value) for value in (0.123456, 2e-5, 20, [0.5, 2], "near", None)] == [
        "0.123",
        "2e-05",
        "20",
        "[0.5, 2]",
        "near",
        "null",
    ]
    assert values_text({"loss.dice": 0.5, "model.decoder_layers": 2}) == "dice 0.5, decoder_layers 2"
