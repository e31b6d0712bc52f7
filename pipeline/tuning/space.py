"""What a search varies: settings by dotted path, their ranges as Optuna's distributions, names and values as text.

Optuna's categories are scalars, so that lists and mappings among the choices are JSON text there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config import SearchRange, VariantSettings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Space = Mapping[str, SearchRange]
# Settings that are the same in all trials, and why.
NOT_SEARCHED = {
    "train.steps": "a trial is tune.steps long",
    "train.validate_every_steps": "trials are validated every tune.report_every_steps",
    "train.checkpoint_every_steps": "trials are saved every tune.report_every_steps",
    "model.backbone": "trials start from the weights of the variant's own backbone",
}


def default_space(settings: VariantSettings) -> dict[str, SearchRange]:
    """The weights of the loss terms that `settings` trains with, each over the range that its term names."""
    from segvit.losses import LOSS_TERMS

    terms = [name for name, weight in settings.loss.resolved().items() if weight > 0]
    return {f"loss.{name}": SearchRange(log_uniform=LOSS_TERMS.get(name).search_range) for name in terms}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Optuna's distribution of each range."""
    return {path: _distribution(one) for path, one in space.items()}


def _distribution(one: SearchRange) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.log_uniform is not None:
        return FloatDistribution(*one.log_uniform, log=True)
    if one.uniform is not None:
        return FloatDistribution(*one.uniform)
    if one.int_uniform is not None:
        return IntDistribution(*one.int_uniform)
    return CategoricalDistribution([_category(choice) for choice in one.choice or ()])


def to_params(values: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Values as Optuna knows them."""
    return {path: value if space[path].choice is None else _category(value) for path, value in values.items()}


def from_params(params: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The values that Optuna's parameters stand for, in the order of `space`."""
    return {
        path: params[path] if one.choice is None else {_category(choice): choice for choice in one.choice}[params[path]]
        for path, one in space.items()
    }


def within(value: Any, one: SearchRange) -> bool:
    """Whether a search over the range can try `value`."""
    if one.choice is not None:
        return _category(value) in [_category(choice) for choice in one.choice]
    low, high = one.log_uniform or one.uniform or one.int_uniform or (0, 0)
    kinds = int if one.int_uniform is not None else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last part of each path, or the whole path where others end alike."""
    lasts = {path: path.rpartition(".")[2] for path in paths}
    counts = Counter(lasts.values())
    return {path: last if counts[last] == 1 else path for path, last in lasts.items()}


def value_text(value: Any) -> str:
    """A value in a table; text as it is, other things than numbers as JSON."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def values_text(values: Mapping[str, Any]) -> str:
    """All values of a trial in a line."""
    names = short_names(values)
    return ", ".join(f"{names[path]} {value_text(value)}" for path, value in values.items())


def _category(choice: Any) -> Any:
    # A whole number may be written either way: 2 and 2.0 are one setting, in lists too.
    return json.dumps(_plain(choice), sort_keys=True) if isinstance(choice, list | tuple | dict) else choice


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
