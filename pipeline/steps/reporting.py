"""The steps that write reports."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime

from pipeline import storage
from pipeline.records import (
    BackboneRecord,
    Checkpoint,
    Evaluation,
    ModelVersion,
    PromotionDecision,
    Report,
    SearchResult,
    ShardSet,
    Study,
)
from pipeline.storage.names import REPORT_FILE
from pipeline.workflow.step import StepContext, step


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
