"""The main recipe: raw images to a promoted model."""

from __future__ import annotations

from flows.recipes import parts
from flows.recipes.recipe import Recipe
from pipeline import steps
from pipeline.config import ExperimentConfig
from pipeline.workflow.graph import Graph


def segmentation(flow: Graph, config: ExperimentConfig) -> None:
    """prepare -> tune -> per variant: train -> evaluate -> register; then promote the best that passes, and report."""
    shards = parts.prepare(flow, config)
    backbones = parts.fetch_backbones(flow, config)
    search = parts.tune(flow, config, shards, backbones)
    checkpoints, evaluations = parts.train_and_evaluate(flow, config, shards, backbones, search)
    versions = [
        flow.step(steps.register, config.name, checkpoints[name], evaluations[name], shards, label=f"register/{name}")
        for name in config.variants
    ]
    decision = flow.step(steps.promote, versions, config.promote)
    trained, scored = list(checkpoints.values()), list(evaluations.values())
    parts.report(flow, config, shards, backbones, search, trained, scored, versions, decision)


RECIPE = Recipe(segmentation)
