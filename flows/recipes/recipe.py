"""What a recipe is: a plain function over steps, the experiment file it reads, and what it asks of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config import ExperimentConfig
from pipeline.workflow.graph import Graph


def _no_problems(_config: Any) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps in an order, for one kind of experiment file.

    Attributes:
        build: calls `flow.step(...)` for every step; what it returns is not used. It is called for a Flow, which runs
            the steps, and for a Plan, which only looks them up.
        config: the experiment file's model; a subclass of ExperimentConfig has keys of its own.
        problems: what the recipe asks of an experiment beyond its model, a line a problem.
    """

    build: Callable[[Graph, Any], object]
    config: type[ExperimentConfig] = ExperimentConfig
    problems: Callable[[Any], list[str]] = _no_problems
