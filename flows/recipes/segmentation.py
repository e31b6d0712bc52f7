"""The main recipe: raw images to a promoted model."""

from __future__ import annotations

from flows.recipes import parts
from flows.recipes.recipe import Recipe
from pipeline import steps
from pipeline.config import ExperimentConfig
from pipeline.workflow.graph import Graph


def segmentation(flow: Graph, config: ExperimentConfig) -> None:
    """prepare -> tune -> per variant: train -> evaluate -> register; then promote the best that passes, and report.

    Before that, a champion that was scored on other data, or in another way, is scored again as they were.
    """
    shards = parts.prepare(flow, config)
    backbones = parts.fetch_backbones(flow, config)
    search = parts.tune(flow, config, shards, backbones)
    checkpoints, evaluations = parts.train_and_evaluate(flow, config, shards, backbones, search)
    versions = [
        flow.step(steps.register, config.name, checkpoints[name], evaluations[name], shards, label=f"register/{name}")
        for name in config.variants
    ]
    rescored = flow.step(steps.rescore_champion, versions, shards, config.evaluate, label="rescore/champion")
    decision = flow.step(steps.promote, versions, config.promote, rescored)
    trained, scored = list(checkpoints.values()), list(evaluations.values())
    parts.report(flow, config, shards, backbones, search, trained, scored, versions, decision)


RECIPE = Recipe(segmentation)
