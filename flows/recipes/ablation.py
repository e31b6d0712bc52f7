"""An ablation: every variant trained once a seed and scored, and one table of all of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from flows.recipes import parts
from flows.recipes.recipe import Recipe
from pipeline import steps
from pipeline.config import ExperimentConfig, TuneConfig
from pipeline.records import Checkpoint
from pipeline.workflow.execution import StepRef
from pipeline.workflow.graph import Graph


class AblationConfig(ExperimentConfig):
    """An experiment whose variants are the rows of a table. `seeds`: each trains every row, in place of train.seed."""

    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1)
    tune: TuneConfig = TuneConfig(num_trials=0)

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {list(seeds)} must differ; the same seed trains the same model")
        return seeds


def ablation(flow: Graph, config: AblationConfig) -> None:
    """prepare -> per variant and seed: train -> evaluate; then the table. Cells that are finished stay as they are."""
    shards = parts.prepare(flow, config)
    backbones = parts.fetch_backbones(flow, config)
    cells = []
    for seed in config.seeds:
        trained: dict[str, StepRef[Checkpoint]] = {}
        for name in config.training_order():
            settings, start = config.variant_settings(name), parts.start_of(flow, config, name, trained)
            settings = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": seed})})
            trained[name] = flow.step(
                steps.train,
                name,
                shards,
                backbones[name],
                None,
                settings,
                start,
                parts.validation_inference(config),
                label=f"train/{name}-{seed}",
            )
            scored = flow.step(steps.evaluate, trained[name], shards, config.evaluate, label=f"evaluate/{name}-{seed}")
            cells.append((name, seed, trained[name], scored, backbones[name]))
    order = list(config.variants)
    cells.sort(key=lambda cell: (order.index(cell[0]), config.seeds.index(cell[1])))
    flow.step(steps.study, config.name, *([list(column) for column in zip(*cells, strict=True)]))


def problems(config: AblationConfig) -> list[str]:
    """All rows train with the settings that the file gives them."""
    problems = []
    if config.tune.num_trials:
        problems.append(
            f"tune.num_trials is {config.tune.num_trials}, and recipe ablation searches nothing; set it to 0"
        )
    if config.evaluate.also:
        names = ", ".join(config.evaluate.also)
        problems.append(f"evaluate.also {names} has no column in the table of recipe ablation; use evaluate.inference")
    return problems


RECIPE = Recipe(ablation, AblationConfig, problems)
