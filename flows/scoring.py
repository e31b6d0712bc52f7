"""Flows around a model that exists already: scoring it on data, and registering it with its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flows.experiment import Experiment
from flows.recipes import parts
from pipeline import steps
from pipeline.config import EvaluateConfig, ExperimentConfig, RuntimeConfig
from pipeline.errors import UserError
from pipeline.records import Checkpoint, Evaluation, ModelVersion, ShardSet
from pipeline.registry.model_source import absolute, is_published_file, source_digests
from pipeline.registry.models import resolve_model
from pipeline.registry.rescoring import keep_evaluation
from pipeline.registry.store import get_version, shard_set_of
from pipeline.shards.shards import ShardSetError, read_manifest
from pipeline.workflow.execution import StepRef
from pipeline.workflow.graph import Graph
from pipeline.workflow.runs import run_tree
from pipeline.workflow.tracking import Tracking


class Scored(NamedTuple):
    """What is on a run's record about a model: its checkpoint, its scores, and the data they are of."""

    checkpoint: Checkpoint
    evaluation: Evaluation
    shard_set: ShardSet


def is_experiment(data: str) -> bool:
    """Whether that names an experiment file, and not a shard set."""
    return Path(data).suffix in (".yaml", ".yml")


def is_registered(model: str) -> bool:
    """Whether that names a registered version."""
    return model.startswith("models:")


def own_settings(tracking: Tracking, model: str) -> EvaluateConfig:
    """How a registered version was scored when it was registered; the defaults for other models."""
    if not is_registered(model):
        return EvaluateConfig()
    evaluation = get_version(tracking, *resolve_model(tracking, model)).evaluation
    inference = {"mode": "whole", **evaluation.inference}
    return EvaluateConfig.model_validate({"split": evaluation.split, "inference": inference})


def score(
    flow: Graph, model: str, data: str, experiment: Experiment | None, variant: str | None, settings: EvaluateConfig
) -> tuple[StepRef[Checkpoint], StepRef[Evaluation]]:
    """The steps that take a model and score it; `experiment` is the file that `data` names, where it names one.

    Raises UserError for a model or data that is not there, for a registered version's data that has changed, and for a
    file of the published format that no variant describes.
    """
    if experiment is not None:
        shards = parts.prepare(flow, experiment.config)
    else:
        used = shard_set_of(flow.tracking, *resolve_model(flow.tracking, data)) if is_registered(data) else None
        uri = data if used is None else used.uri
        try:
            digest = read_manifest(uri).digest()
        except ShardSetError as error:
            raise UserError(
                f"{error}; DATA is an experiment file, a shard set's folder or a version that was scored on one"
            ) from error
        if used is not None and digest != used.digest:
            raise UserError(f"{uri} has changed since {data} was scored on it; run that version's experiment again")
        shards = flow.step(steps.open_shards, uri, digest)
    checkpoint = take_model(flow, model, shards, experiment, variant)
    return checkpoint, flow.step(steps.evaluate, checkpoint, shards, settings)


def take_model(
    flow: Graph, model: str, shards: StepRef[ShardSet], experiment: Experiment | None, variant: str | None
) -> StepRef[Checkpoint]:
    """A step whose record is the model's checkpoint."""
    if is_registered(model):
        reference = resolve_model(flow.tracking, model)
        return flow.step(steps.fetch_model, *reference, get_version(flow.tracking, *reference).checkpoint_digest)
    digests = source_digests(model)
    if not is_published_file(model):
        return flow.step(steps.import_checkpoint, absolute(model), *digests)
    if experiment is None:
        raise UserError(
            f"{model} does not say what model it is; give an experiment file in place of the shard set, one variant "
            "of which describes it, as in flows/configs/ade20k"
        )
    name = described_by(experiment.config, variant)
    return flow.step(
        steps.import_published,
        absolute(model),
        digests.weights,
        name,
        published_arguments(experiment.config, name),
        shards,
    )


def described_by(config: ExperimentConfig, variant: str | None) -> str:
    """The variant that describes a file: the one that is named, or the only one there is."""
    if variant is None and len(config.variants) == 1:
        return next(iter(config.variants))
    if variant not in config.variants:
        asked = f"no variant {variant!r}" if variant else "several variants"
        choices = "|".join(config.variants)
        raise UserError(f"{asked} in {config.name}; name the one that describes the model: --variant {choices}")
    return variant


def published_arguments(config: ExperimentConfig, variant: str) -> dict[str, Any]:
    """What `segvit.load_published` has to be told of a file that is the variant's model."""
    import segvit

    try:
        return segvit.published_arguments(segvit.ModelConfig.from_dict(config.variant_settings(variant).model))
    except ValueError as error:
        raise UserError(f"variant {variant} describes no published file: {error}") from error


def weights_digest(tracking: Tracking, model: str) -> str:
    """The sha256 of a model's weights: those of a registered version, or of what lies there.

    Raises UserError for what is no model.
    """
    if is_registered(model):
        return get_version(tracking, *resolve_model(tracking, model)).checkpoint_digest
    return source_digests(model).weights


def keep_scores(tracking: Tracking, checkpoint: Checkpoint, evaluation: Evaluation, run_id: str) -> bool:
    """Keep an evaluation on the registered version that it is of, for the gate and comparisons.

    False where the checkpoint is of no version, or of one that was registered with such an evaluation.
    """
    if not is_registered(checkpoint.variant):
        return False
    version = get_version(tracking, *resolve_model(tracking, checkpoint.variant))
    return keep_evaluation(tracking, version, evaluation, run_id)


def find_scored(tracking: Tracking, model: str, run_id: str) -> Scored:
    """What a run has on record about a model; raises UserError where it did not score it."""
    digest = weights_digest(tracking, model)
    tree = run_tree(tracking, run_id, records=True)
    kept: dict[str, list[dict[str, Any]]] = {}
    for step in tree.steps:
        if step.record is not None:
            kept.setdefault(step.step, []).append(step.record)
    loaders = (steps.fetch_model, steps.import_checkpoint, steps.import_published, steps.train)
    checkpoints = [Checkpoint.model_validate(record) for step in loaders for record in kept.get(step.name, ())]
    shard_sets = [
        ShardSet.model_validate(record)
        for step in (steps.prepare, steps.open_shards)
        for record in kept.get(step.name, ())
    ]
    for record in kept.get(steps.evaluate.name, ()):
        evaluation = Evaluation.model_validate(record)
        for checkpoint in checkpoints:
            same = checkpoint.digest == evaluation.checkpoint_digest and checkpoint.variant == evaluation.variant
            if same and digest in (checkpoint.digest, checkpoint.source_digest) and shard_sets:
                return Scored(checkpoint, evaluation, shard_sets[0])
    raise UserError(
        f"run {tree.run.run_id[:12]} ({tree.run.flow}) did not score {model}; score it with segvit evaluate, or name "
        "the run that did with --evaluation"
    )


def register(flow: Graph, name: str, scored: Scored) -> StepRef[ModelVersion]:
    """The step that registers a model with its scores."""
    return flow.step(steps.register, name, *scored)


def runtime_of(experiment: Experiment | None) -> RuntimeConfig:
    """The experiment's, or the defaults."""
    return experiment.config.runtime if experiment is not None else RuntimeConfig()
