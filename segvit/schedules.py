"""Learning-rate schedules by name, each with a linear warm-up in front.

A package adds one by an entry point of group ``segvit.schedules`` whose value is a function of the share of training
that is done, from 0 to 1, and of options with defaults; it returns the factor of the learning rate.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from segvit.registry import Registry, nearest_first

SCHEDULES: Registry[Callable[..., float]] = Registry(
    "schedule",
    "segvit.schedules",
    {
        "poly": "segvit.schedules:poly",
        "cosine": "segvit.schedules:cosine",
        "constant": "segvit.schedules:constant",
    },
)
WARMUP_RATIO = 1e-6  # the warm-up's factor of step 0


def poly(done: float, power: float = 1.0) -> float:
    """Polynomial decay to 0, the published schedule (SegViT, arXiv 2210.05844)."""
    factor: float = (1.0 - done) ** power
    return factor


def cosine(done: float, final: float = 0.0) -> float:
    """Half a cosine from 1 to `final`."""
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * done)) / 2


def constant(done: float) -> float:
    """No decay."""
    return 1.0


def build_schedule(name: str, steps: int, warmup_steps: int = 0, **options: Any) -> Callable[[int], float]:
    """Learning-rate factor by step, for LambdaLR: linear warm-up times the named schedule.

    Args:
        name: Of a schedule in `SCHEDULES`.
        steps: Steps until training ends; later ones keep the last factor.
        warmup_steps: Steps until the warm-up factor reaches 1.
        options: Of the schedule, such as `power` of ``poly``.

    Raises:
        ValueError: Unknown schedule or option, one that breaks a rule, no steps, or a warm-up longer than them.
    """
    decay = SCHEDULES.get(name)
    if not 0 <= warmup_steps <= steps or steps < 1:
        raise ValueError(f"warmup_steps {warmup_steps} must be between 0 and steps {steps}, which must be >= 1")
    known = list(inspect.signature(decay).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        choices = f"choose from {', '.join(nearest_first(unknown[0], known))}" if known else "it has none"
        raise ValueError(f"unknown option {', '.join(unknown)} of schedule {name}; {choices}")
    try:
        ends = [decay(done, **options) for done in (0.0, 0.5, 1.0)]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"schedule {name} takes no {options}: {error}") from None
    if not all(isinstance(end, int | float) and 0.0 <= end < math.inf for end in ends):
        raise ValueError(f"schedule {name} with {options} gives factors {ends}; they must be numbers >= 0")

    def factor(step: int) -> float:
        decayed = decay(min(step / steps, 1.0), **options)
        if step >= warmup_steps:
            return decayed
        return decayed * (1.0 - (1.0 - step / warmup_steps) * (1.0 - WARMUP_RATIO))

    return factor
