"""Optimizers by name.

A package adds one by an entry point of group ``segvit.optimizers`` whose value is a function of the groups that
`segvit.optim.parameter_groups` makes and of options with defaults; it returns a `torch.optim.Optimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from segvit.registry import Registry, nearest_first

if TYPE_CHECKING:
    import torch

OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry(
    "optimizer",
    "segvit.optimizers",
    {"adamw": "segvit.optim:adamw", "lion": "segvit.optim:lion", "muon": "segvit.optim:muon"},
)


def build_optimizer(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The named optimizer over these groups.

    Args:
        name: Of an optimizer in `OPTIMIZERS`.
        groups: Those of `segvit.optim.parameter_groups`.
        options: Of the optimizer, such as `betas`.

    Raises:
        ValueError: Unknown optimizer or option, or one that breaks a rule.
    """
    make = OPTIMIZERS.get(name)
    known = list(inspect.signature(make).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        choices = f"choose from {', '.join(nearest_first(unknown[0], known))}" if known else "it has none"
        raise ValueError(f"unknown option {', '.join(unknown)} of optimizer {name}; {choices}")
    try:
        return make(groups, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {name} takes no {options}: {error}") from None


def optimizer_problem(name: str, options: Mapping[str, Any]) -> str | None:
    """Why there is no such optimizer with these options; None where there is."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1, 1))
    group = {"name": "backbone", "params": [weight], "lr": 1e-3, "weight_decay": 0.0, "linear": [True]}
    try:
        build_optimizer(name, [group], **options)
    except ValueError as error:
        return str(error)
    return None
