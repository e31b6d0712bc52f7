"""The steps around the registry: versions and checkpoints that come in, versions that are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import EvaluateConfig, PromotionPolicy
from pipeline.records import Checkpoint, Evaluation, ModelVersion, PromotionDecision, RescoredChampion, ShardSet
from pipeline.registry import decisions, rescoring, store
from pipeline.registry.promote import promote_best, verify_decision
from pipeline.steps.common import log_figures, runtime_of
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import Tracking


@step(version=1)
def fetch_model(context: StepContext, name: str, version: int, checkpoint_digest: str) -> Checkpoint:
    """Keep a registered version's checkpoint where all workers reach it, for variants that start from it."""
    from pipeline.registry.models import ModelReference, fetch_checkpoint

    return fetch_checkpoint(
        context.tracking, ModelReference(name, version), checkpoint_digest, context.output_uri(), context.lease
    )


@step(version=2)
def import_checkpoint(context: StepContext, source: str, digest: str, config_digest: str) -> Checkpoint:
    """Keep a checkpoint folder from elsewhere where all workers reach it; the sums are those of its two files."""
    from pipeline.registry.import_model import import_folder

    return import_folder(source, digest, config_digest, context.output_uri(), context.lease)


@step(version=1)
def import_start(context: StepContext, source: str, digest: str, model: dict[str, Any]) -> Checkpoint:
    """Convert a file of the published format, for a model of that configuration that starts from it."""
    from pipeline.registry.import_model import import_published_start

    return import_published_start(source, digest, model, context.output_uri(), context.lease)


@step(version=1)
def import_published(
    context: StepContext, source: str, digest: str, name: str, arguments: dict[str, Any], shard_set: ShardSet
) -> Checkpoint:
    """Convert a file of the published format where all workers reach it."""
    from pipeline.registry import import_model

    return import_model.import_published(
        source, digest, name, arguments, shard_set, context.output_uri(), context.lease
    )


@step(version=3, verify=store.verify_version)
def register(
    context: StepContext, name: str, checkpoint: Checkpoint, evaluation: Evaluation, shard_set: ShardSet
) -> ModelVersion:
    """Register a checkpoint with its evaluation."""
    context.lease.check()
    return store.register_model(
        context.tracking,
        name,
        checkpoint,
        evaluation,
        shard_set,
        run_id=context.run_id,
        flow_run_id=context.flow_run_id,
    )


def _verify_rescored(record: RescoredChampion, tracking: Tracking, arguments: Mapping[str, Any]) -> str | None:
    return rescoring.standing_changed(record, tracking, arguments["versions"])


@step(version=1, verify=_verify_rescored)
def rescore_champion(
    context: StepContext, versions: Sequence[ModelVersion], shard_set: ShardSet, config: EvaluateConfig
) -> RescoredChampion:
    """Score the champion of now as the versions were scored, where nothing comparable is on record of it."""
    record = rescoring.rescore_champion(
        context.tracking,
        versions,
        shard_set,
        config,
        runtime_of(context),
        target_uri=context.output_uri(),
        run_id=context.run_id,
        lease=context.lease,
        progress=context.progress,
    )
    if record.evaluation is not None:
        log_figures(context, record.evaluation, 0)
    return record


@step(version=4, verify=verify_decision)
def promote(
    context: StepContext,
    versions: Sequence[ModelVersion],
    policy: PromotionPolicy,
    rescored: RescoredChampion | None = None,
) -> PromotionDecision:
    """Ask the gate about the versions, the best first; the one decided about is the candidate.

    `rescored`: the step to wait for. What it found is on the champion's version, where the gate looks; a champion that
    came after it is one that the gate refuses to compare with.
    """
    decisions.keep_policy(context.tracking, versions, policy)
    decision = promote_best(context.tracking, versions, policy)
    print(decision.reason, flush=True)
    return decision
