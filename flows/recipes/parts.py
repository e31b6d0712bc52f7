"""What recipes share: the same steps, called the same way, so that recipes reuse one another's results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline import steps
from pipeline.config import ExperimentConfig, InferenceConfig, TrainConfig, VariantSettings
from pipeline.config.experiment import MODEL_SCHEME
from pipeline.datasets import open_dataset
from pipeline.errors import UserError
from pipeline.records import (
    BackboneRecord,
    Checkpoint,
    Evaluation,
    ModelVersion,
    PromotionDecision,
    Report,
    SearchResult,
    ShardSet,
)
from pipeline.registry.model_source import absolute, is_published_file, source_digests
from pipeline.registry.models import resolve_model, version_config
from pipeline.registry.store import get_version
from pipeline.workflow.execution import StepRef
from pipeline.workflow.graph import Graph


def prepare(flow: Graph, config: ExperimentConfig) -> StepRef[ShardSet]:
    """The shard set; raises UserError for a data root that is not there."""
    return flow.step(steps.prepare, config.data, open_dataset(config.data).source_digest())


def fetch_backbones(flow: Graph, config: ExperimentConfig) -> dict[str, StepRef[BackboneRecord]]:
    """Backbone weights by variant, each found once; raises UserError for a weights file that is not there."""
    wanted = {
        name: (
            str(config.variant_settings(name).model.get("backbone")),
            config.backbone_weights(name),
            config.source_grid(name),
        )
        for name in config.variants
    }
    found: dict[tuple[str, str, tuple[int, int] | None], StepRef[BackboneRecord]] = {}
    for backbone, weights, grid in dict.fromkeys(wanted.values()):
        label = "fetch_backbone" if len(set(wanted.values())) == 1 else f"fetch_backbone/{len(found)}-{backbone}"
        sources = steps.backbone_sources(weights, grid)
        found[backbone, weights, grid] = flow.step(steps.fetch_backbone, backbone, weights, sources, label=label)
    return {name: found[key] for name, key in wanted.items()}


def tune(
    flow: Graph,
    config: ExperimentConfig,
    shards: StepRef[ShardSet],
    backbones: Mapping[str, StepRef[BackboneRecord]],
) -> StepRef[SearchResult] | None:
    """The search, where the experiment asks for one."""
    if not config.tune.num_trials:
        return None
    name = config.tune.variant
    start = start_of(flow, config, name, {})
    settings, inference = before_more_steps(config.variant_settings(name)), validation_inference(config)
    return flow.step(steps.tune, shards, backbones[name], settings, config.tune, start, inference)


def validation_inference(config: ExperimentConfig) -> InferenceConfig | None:
    """How validation while training predicts, as evaluation does; None where that is the default."""
    inference = config.evaluate.inference
    return inference if inference.options() else None


def start_of(
    flow: Graph, config: ExperimentConfig, name: str, trained: Mapping[str, StepRef[Checkpoint]]
) -> StepRef[Checkpoint] | None:
    """The model that a variant starts from: one of those trained before it, a registered version, or files.

    Raises UserError for what is not there, and for a version of another backbone.
    """
    from pipeline.preflight import start_problem_of

    source = config.start_from(name)
    if source is None or source in trained:
        return trained[source] if source else None
    try:
        if not source.startswith(MODEL_SCHEME):
            return _start_of_files(flow, source, config.variant_settings(name).model)
        reference = resolve_model(flow.tracking, source)
        if problem := start_problem_of(config, name, version_config(flow.tracking, reference)):
            raise UserError(problem)
    except UserError as error:
        raise UserError(f"variants.{name}.start_from: {error}") from error
    label = f"fetch_model/{reference.name}-{reference.version}"
    digest = get_version(flow.tracking, *reference).checkpoint_digest
    return flow.find(label) or flow.step(steps.fetch_model, *reference, digest, label=label)


def _start_of_files(flow: Graph, source: str, model: dict[str, Any]) -> StepRef[Checkpoint]:
    digests = source_digests(source)
    name = source.rstrip("/").rpartition("/")[2]
    if not is_published_file(source):
        label = f"import_checkpoint/{name}-{digests.weights[:8]}"
        return flow.find(label) or flow.step(steps.import_checkpoint, absolute(source), *digests, label=label)
    # What the file does not tell is the variant's to say: one conversion a kind of model.
    kind = hashlib.sha256(json.dumps(model, sort_keys=True, default=list).encode()).hexdigest()
    label = f"import_start/{name}-{digests.weights[:8]}-{kind[:4]}"
    return flow.find(label) or flow.step(steps.import_start, absolute(source), digests.weights, model, label=label)


def train_and_evaluate(
    flow: Graph,
    config: ExperimentConfig,
    shards: StepRef[ShardSet],
    backbones: Mapping[str, StepRef[BackboneRecord]],
    search: StepRef[SearchResult] | None,
) -> tuple[dict[str, StepRef[Checkpoint]], dict[str, StepRef[Evaluation]]]:
    """Every variant's checkpoint and its evaluation, by variant; a variant waits for the one that it starts from.

    Other ways of predicting that the experiment asks for are scored, too, each under a label of its own.
    """
    checkpoints: dict[str, StepRef[Checkpoint]] = {}
    evaluations: dict[str, StepRef[Evaluation]] = {}
    for name in config.training_order():
        settings, start = config.variant_settings(name), start_of(flow, config, name, checkpoints)
        arguments = (name, shards, backbones[name], search)
        common = (start, validation_inference(config))
        earlier = None
        if settings.train.continue_after is not None and settings.train.steps:
            label = f"train/{name}/first-{settings.train.continue_after}"
            earlier = flow.step(steps.train, *arguments, before_more_steps(settings), *common, label=label)
        checkpoints[name] = flow.step(steps.train, *arguments, settings, *common, earlier, label=f"train/{name}")
        evaluations[name] = flow.step(
            steps.evaluate, checkpoints[name], shards, config.evaluate, label=f"evaluate/{name}"
        )
        for other, inference in config.evaluate.also.items():
            settings_of_other = config.evaluate.model_copy(update={"inference": inference, "also": {}})
            label = also_label(name, other)
            flow.step(steps.evaluate, checkpoints[name], shards, settings_of_other, label=label)
    return checkpoints, {name: evaluations[name] for name in config.variants}


def before_more_steps(settings: VariantSettings) -> VariantSettings:
    """The settings of the training that this one goes on from, as an experiment has them that asks for it alone."""
    if settings.train.continue_after is None or not settings.train.steps:
        return settings
    given = settings.train.model_dump(exclude_unset=True) | {"steps": settings.train.continue_after}
    train = TrainConfig.model_validate({name: value for name, value in given.items() if name != "continue_after"})
    return settings.model_copy(update={"train": train})


def also_label(variant: str, name: str) -> str:
    """Of the step that scores a variant by one of `evaluate.also`."""
    return f"evaluate/{variant}/{name}"


def report(
    flow: Graph,
    config: ExperimentConfig,
    shards: StepRef[ShardSet],
    backbones: Mapping[str, StepRef[BackboneRecord]],
    search: StepRef[SearchResult] | None,
    checkpoints: Sequence[StepRef[Checkpoint]] = (),
    evaluations: Sequence[StepRef[Evaluation]] = (),
    versions: Sequence[StepRef[ModelVersion]] = (),
    decision: StepRef[PromotionDecision] | None = None,
) -> StepRef[Report]:
    """The page about all of it."""
    return flow.step(
        steps.report,
        config.name,
        yaml.safe_dump(config.model_dump(mode="json", exclude={"runtime"}), sort_keys=False),
        shards,
        list(dict.fromkeys(backbones.values())),
        search,
        list(checkpoints),
        list(evaluations),
        list(versions),
        decision,
        {
            other: [flow.find(also_label(name, other)) for name in config.variants]
            for other in (config.evaluate.also if evaluations else {})
        },
    )
