"""A search alone: what it finds is for a person, or for another experiment, to use."""

from __future__ import annotations

from flows.recipes import parts
from flows.recipes.recipe import Recipe
from pipeline.config import ExperimentConfig
from pipeline.workflow.graph import Graph


def search(flow: Graph, config: ExperimentConfig) -> None:
    """prepare -> tune -> report; nothing is trained to its end."""
    shards = parts.prepare(flow, config)
    backbones = parts.fetch_backbones(flow, config)
    found = parts.tune(flow, config, shards, backbones)
    parts.report(flow, config, shards, backbones, found)


def problems(config: ExperimentConfig) -> list[str]:
    """A search without a trial finds nothing."""
    if config.tune.num_trials:
        return []
    return ["tune.num_trials is 0, and recipe search does nothing but search; set it to 1 or more"]


RECIPE = Recipe(search, problems=problems)
