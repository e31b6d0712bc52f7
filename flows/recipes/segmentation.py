"""The main recipe: raw images to a promoted model."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from pipeline import steps
from pipeline.config import ExperimentConfig
from pipeline.datasets import open_dataset
from pipeline.records import (
    Checkpoint,
    Evaluation,
    LossWeights,
    ModelVersion,
    PromotionDecision,
    Report,
    ShardSet,
)
from pipeline.workflow.flow import StepRef
from pipeline.workflow.graph import Recipe


@dataclass(frozen=True, slots=True)
class SegmentationRefs:
    """References to what the recipe produces, by variant where there are several."""

    shard_set: StepRef[ShardSet]
    loss_weights: StepRef[LossWeights] | None
    checkpoints: dict[str, StepRef[Checkpoint]]
    evaluations: dict[str, StepRef[Evaluation]]
    versions: dict[str, StepRef[ModelVersion]]
    decision: StepRef[PromotionDecision]
    report: StepRef[Report]


def segmentation(flow: Recipe, config: ExperimentConfig) -> SegmentationRefs:
    """prepare -> tune -> per variant: train -> evaluate -> register; then promote the best and report.

    Raises UserError for a data root or a weights file that is not there.
    """
    model, loss, search = config.model, config.loss, config.tune
    shards = flow.step(steps.prepare, config.data, open_dataset(config.data).source_digest())
    backbone = flow.step(steps.fetch_backbone, model.backbone, model.weights, steps.backbone_sources(model.weights))
    weights: StepRef[LossWeights] | None = None
    if search.num_trials:
        searched = config.variants[search.variant]
        weights = flow.step(steps.tune, shards, backbone, model, searched, loss, config.train, search)
    checkpoints: dict[str, StepRef[Checkpoint]] = {}
    evaluations: dict[str, StepRef[Evaluation]] = {}
    versions: dict[str, StepRef[ModelVersion]] = {}
    for name, variant in config.variants.items():
        checkpoints[name] = flow.step(
            steps.train,
            name,
            shards,
            backbone,
            weights,
            model,
            variant,
            loss,
            config.train,
            label=f"train/{name}",
        )
        evaluations[name] = flow.step(
            steps.evaluate, checkpoints[name], shards, config.evaluate, label=f"evaluate/{name}"
        )
        versions[name] = flow.step(
            steps.register,
            config.name,
            checkpoints[name],
            evaluations[name],
            shards,
            label=f"register/{name}",
        )
    decision = flow.step(steps.promote, list(versions.values()), config.promote)
    report = flow.step(
        steps.report,
        config.name,
        yaml.safe_dump(config.model_dump(mode="json", exclude={"runtime"}), sort_keys=False),
        shards,
        backbone,
        weights if weights is not None else configured_weights(config),
        list(checkpoints.values()),
        list(evaluations.values()),
        list(versions.values()),
        decision,
    )
    return SegmentationRefs(shards, weights, checkpoints, evaluations, versions, decision, report)


def configured_weights(config: ExperimentConfig) -> LossWeights:
    """The loss weights of the config, as a record."""
    return LossWeights(
        class_weight=config.loss.class_weight,
        focal_weight=config.loss.focal_weight,
        dice_weight=config.loss.dice_weight,
    )
