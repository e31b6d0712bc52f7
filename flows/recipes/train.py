"""Training and scoring without the registry."""

from __future__ import annotations

from flows.recipes import parts
from flows.recipes.recipe import Recipe
from pipeline.config import ExperimentConfig
from pipeline.workflow.graph import Graph


def train(flow: Graph, config: ExperimentConfig) -> None:
    """prepare -> tune -> per variant: train -> evaluate; then report. Nothing is registered or promoted."""
    shards = parts.prepare(flow, config)
    backbones = parts.fetch_backbones(flow, config)
    search = parts.tune(flow, config, shards, backbones)
    checkpoints, evaluations = parts.train_and_evaluate(flow, config, shards, backbones, search)
    parts.report(flow, config, shards, backbones, search, list(checkpoints.values()), list(evaluations.values()))


RECIPE = Recipe(train)
