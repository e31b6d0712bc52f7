"""An experiment file with the recipe that it names, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flows.recipes import RECIPES, Recipe
from pipeline.config import ExperimentConfig
from pipeline.config.file import parse_as, read_tree
from pipeline.errors import UserError
from pipeline.workflow.graph import Graph, Plan
from pipeline.workflow.tracking import Tracking


class Experiment(NamedTuple):
    """What is to run; `source` is the file's name, for messages."""

    source: str
    recipe: Recipe
    config: ExperimentConfig

    def build(self, flow: Graph) -> None:
        """Call the recipe."""
        self.recipe.build(flow, self.config)

    def check(self, workspace: str | None) -> None:
        """Raise UserError listing every misfit of configuration, data set, models and machine.

        Without a `workspace` the experiment runs elsewhere, and only its configuration and models are judged.
        """
        from pipeline.preflight import find_problems

        problems = [*find_problems(self.config, workspace), *self.recipe.problems(self.config)]
        if problems:
            lines = [f"{self.source}: {len(problems)} problem(s), found before anything started", *problems]
            raise UserError("\n  ".join(lines))

    def warnings(self) -> list[str]:
        """What of the experiment runs but may not be worth it."""
        from pipeline.preflight import find_warnings

        return find_warnings(self.config)

    def plan(self, workspace: str, tracking: Tracking) -> Plan:
        """The steps looked up; nothing is executed."""
        planned = Plan(workspace, tracking)
        with planned:
            self.build(planned)
        return planned


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and look up its recipe; raises UserError with every problem of the file's own."""
    return parse_experiment(read_tree(path, overrides), str(path))


def parse_experiment(tree: dict[str, Any], source: str) -> Experiment:
    """An experiment file that was read, checked as a whole; raises UserError as `load_experiment` does."""
    try:
        recipe = RECIPES.get(str(tree.get("recipe", "segmentation")))
    except ValueError as error:
        raise UserError(f"{source}: recipe: {error}") from error
    return Experiment(source, recipe, parse_as(recipe.config, tree, source))
