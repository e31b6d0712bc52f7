"""The steps of searching, training and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import EvaluateConfig, InferenceConfig, RuntimeConfig, TuneConfig, VariantSettings
from pipeline.records import BackboneRecord, Checkpoint, Evaluation, SearchResult, ShardSet
from pipeline.steps.common import log_figures, runtime_of
from pipeline.workflow import ray_session
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import MetricLog, Tracking

if TYPE_CHECKING:
    from pipeline.training.job import TrainJob


def _verify_search(record: SearchResult, _tracking: Tracking, arguments: Mapping[str, Any]) -> str | None:
    wanted = arguments["search"].num_trials
    if record.num_trials < wanted:
        return f"it made {record.num_trials} trials, {wanted} are asked for now"
    return None


@step(version=4, verify=_verify_search)
def tune(
    context: StepContext,
    shard_set: ShardSet,
    backbone: BackboneRecord,
    settings: VariantSettings,
    search: TuneConfig,
    start: Checkpoint | None,
    inference: InferenceConfig | None = None,
) -> SearchResult:
    """Search the variant's settings with short training runs, from a trained model where one is given.

    `inference` says how images are predicted in validation; None: whole.
    """
    from pipeline.tuning.search import search_settings

    return search_settings(
        _train_job(context, search.variant, shard_set, backbone, settings, start, inference),
        search,
        run_name=context.run_name,
        storage_uri=storage.join(context.workspace, "ray"),
        target_uri=context.output_uri(),
        tracking=context.tracking,
        parent_run_id=context.run_id,
        lease=context.lease,
        progress=context.progress,
    )


def _trainings_at_once(runtime: RuntimeConfig) -> int:
    """So many that none waits for workers: each takes a process of its own, and Ray Train complains of waiting."""
    if runtime.trainings_at_once is not None:
        return runtime.trainings_at_once
    return max(1, ray_session.workers_that_fit(runtime.use_gpu, runtime.cpus_per_worker) // runtime.min_workers)


@step(version=4, at_once=_trainings_at_once)
def train(
    context: StepContext,
    variant_name: str,
    shard_set: ShardSet,
    backbone: BackboneRecord,
    search: SearchResult | None,
    settings: VariantSettings,
    start: Checkpoint | None,
    inference: InferenceConfig | None = None,
    earlier: Checkpoint | None = None,
) -> Checkpoint:
    """Train one variant, with what a search found where there was one, from a trained model where one is given.

    `inference` says how images are predicted in validation; None: whole. `earlier` is what this step made with fewer
    steps, whose training this one goes on with.
    """
    from pipeline.training.train import train_variant

    if search is not None:
        settings = settings.for_search_of(search.variant, variant_name, search.values)
    job = _train_job(context, variant_name, shard_set, backbone, settings, start, inference)
    if earlier is not None:
        # Outputs and training state of one execution bear the same name.
        execution = earlier.uri.rstrip("/").rpartition("/")[2]
        run = storage.join(context.workspace, "ray", f"{context.step}-{execution}")
        job = job.model_copy(update={"goes_on_from": run})
    return train_variant(
        job,
        run_name=context.run_name,
        storage_uri=storage.join(context.workspace, "ray"),
        target_uri=context.output_uri(),
        log=MetricLog(context.tracking, context.run_id),
        lease=context.lease,
        progress=context.progress,
    )


def _train_job(
    context: StepContext,
    variant_name: str,
    shard_set: ShardSet,
    backbone: BackboneRecord,
    settings: VariantSettings,
    start: Checkpoint | None,
    inference: InferenceConfig | None,
) -> TrainJob:
    from pipeline.training.job import TrainJob

    return TrainJob(
        variant=variant_name,
        settings=settings,
        shard_set=shard_set,
        backbone=backbone,
        runtime=runtime_of(context),
        start=start,
        inference=inference or InferenceConfig(),
    )


@step(version=3)
def evaluate(context: StepContext, checkpoint: Checkpoint, shard_set: ShardSet, config: EvaluateConfig) -> Evaluation:
    """Score a checkpoint."""
    from pipeline.evaluation.evaluate import evaluate_checkpoint

    evaluation = evaluate_checkpoint(
        checkpoint,
        shard_set,
        config,
        runtime_of(context),
        context.output_uri(),
        lease=context.lease,
        progress=context.progress,
    )
    log_figures(context, evaluation, checkpoint.step)
    return evaluation
