"""The model registry: versions that load anywhere, with their evaluation and lineage in their tags.

A version is registered once: its key is made of the checkpoint's and the evaluation's digests and the package's
format, and registering them again returns the version that is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from pipeline import storage
from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.records import Checkpoint, Evaluation, ModelVersion, ShardSet
from pipeline.registry.model_package import PACKAGE_FORMAT, log_model
from pipeline.storage.names import CHECKPOINT_FILES, CHECKPOINT_FOLDER
from pipeline.workflow.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CHAMPION = "champion"
CANDIDATE = "candidate"

KEY = "segvit.key"
VARIANT = "segvit.variant"
STARTED_FROM = "segvit.started_from"
MIOU = "segvit.miou"
EVALUATION = "segvit.evaluation"
CHECKPOINT_DIGEST = "segvit.checkpoint_digest"
SHARD_SET = "segvit.shard_set"
SHARDS_DIGEST = "segvit.shards_digest"
DATA_DIGEST = "segvit.data_digest"
FLOW_RUN = "segvit.flow_run"
PROMOTED = "promotion.promoted"
PROMOTION_REASON = "promotion.reason"


def register_model(
    tracking: Tracking,
    name: str,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    shard_set: ShardSet,
    *,
    run_id: str,
    flow_run_id: str,
) -> ModelVersion:
    """Register a checkpoint with its evaluation, or return the version that holds both already.

    A version whose files are gone holds nothing. One whose latency is unreliable takes over a reliable one.

    Args:
        tracking: the MLflow store, which is the registry, too.
        name: the registered model's name, made where it is new.
        checkpoint, evaluation, shard_set: what to register, and the data it comes from.
        run_id: the run that does it; the model is logged there.
        flow_run_id: the flow's run.

    Raises:
        ValueError: the evaluation is of another checkpoint.
        UserError: the checkpoint on storage is not the one that was evaluated.
    """
    if evaluation.checkpoint_digest != checkpoint.digest:
        raise ValueError(
            f"the evaluation is of checkpoint {evaluation.checkpoint_digest[:8]}, not of {checkpoint.digest[:8]}"
        )
    key = _registration_key(checkpoint, evaluation)
    for existing in _versions_with(tracking, name, KEY, key):
        number = int(existing.version)
        if (lost := lost_files(tracking, name, number)) is not None:
            print(f"{lost}; registering the checkpoint again", flush=True)
            continue
        found = version_record(existing)
        if found.evaluation.latency_reliable or not evaluation.latency_reliable:
            return found
        set_version_tags(tracking, name, number, {EVALUATION: evaluation.to_json()})
        return get_version(tracking, name, number)
    logged = log_model(tracking, f"{name}-{checkpoint.variant}", checkpoint, evaluation.inference, run_id)
    _ensure_registered_model(tracking, name)
    client = tracking.client()
    created = client.create_model_version(
        name,
        source=logged.location,
        run_id=run_id,
        model_id=logged.model_id,
        description=(
            f"{checkpoint.variant}: mIoU {evaluation.miou:.4f} on {evaluation.split} "
            f"({evaluation.num_images} images), {evaluation.gflops:.1f} GFLOPs"
        ),
        tags={
            KEY: key,
            VARIANT: checkpoint.variant,
            MIOU: f"{evaluation.miou:.6f}",
            EVALUATION: evaluation.to_json(),
            CHECKPOINT_DIGEST: checkpoint.digest,
            SHARD_SET: shard_set.to_json(),
            SHARDS_DIGEST: shard_set.digest,
            DATA_DIGEST: evaluation.data_digest,
            FLOW_RUN: flow_run_id,
            **({STARTED_FROM: checkpoint.started_from} if checkpoint.started_from else {}),
        },
    )
    for first in _versions_with(tracking, name, KEY, key):
        if first.version == created.version:
            break
        if lost_files(tracking, name, int(first.version)) is None:
            # Another process registered the same meanwhile; the first one counts.
            client.delete_model_version(name, created.version)
            break
    return version_record(first)


def set_alias(tracking: Tracking, name: str, alias: str, version: int) -> None:
    """Point an alias of a registered model at a version."""
    tracking.client().set_registered_model_alias(name, alias, str(version))


def find_alias(tracking: Tracking, name: str, alias: str) -> int | None:
    """The version an alias points at, or None where model or alias do not exist."""
    from mlflow.exceptions import MlflowException

    try:
        found = tracking.client().get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if found is None else int(found)


def get_version(tracking: Tracking, name: str, version: int) -> ModelVersion:
    """A registered version as a record; raises UserError where it does not exist or is not one of ours."""
    return version_record(_mlflow_version(tracking, name, version))


def version_record(version: MlflowVersion) -> ModelVersion:
    """The record of MLflow's version; raises UserError where it carries no evaluation."""
    tags = version.tags
    try:
        evaluation = Evaluation.from_json(tags[EVALUATION])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"version {version.version} of model {version.name} carries no evaluation this release can read; "
            "register it through a flow"
        ) from error
    return ModelVersion(
        name=version.name,
        version=int(version.version),
        model_uri=f"models:/{version.name}/{version.version}",
        variant=tags[VARIANT],
        evaluation=evaluation,
        checkpoint_digest=tags[CHECKPOINT_DIGEST],
        run_id=version.run_id or "",
    )


def shard_set_of(tracking: Tracking, name: str, version: int) -> ShardSet:
    """The shard set that a version was scored on; raises UserError where it does not say which."""
    try:
        return ShardSet.from_json(version_tags(tracking, name, version)[SHARD_SET])
    except (KeyError, ValidationError) as error:
        raise UserError(f"version {version} does not say where its shard set lies; it is of another release") from error


def versions_of_checkpoint(tracking: Tracking, name: str, checkpoint_digest: str) -> list[ModelVersion]:
    """The versions of a model that hold a checkpoint, each with an evaluation of its own; the newest first.

    Those whose evaluation is of another release are left out.
    """
    found = []
    for version in reversed(_versions_with(tracking, name, CHECKPOINT_DIGEST, checkpoint_digest)):
        with suppress(UserError):
            found.append(version_record(version))
    return found


def verify_version(record: ModelVersion, tracking: Tracking, arguments: Mapping[str, Any]) -> str | None:
    """Why a cached version no longer holds, or None; a step's `verify`."""
    try:
        found = get_version(tracking, record.name, record.version)
    except UserError as error:
        return str(error)
    if found.checkpoint_digest != record.checkpoint_digest:
        return f"{record.model_uri} is of another checkpoint"
    evaluation = arguments.get("evaluation", record.evaluation)
    if evaluation.latency_reliable and not record.evaluation.latency_reliable:
        return f"the latency of {record.model_uri} was timed again, reliably"
    return lost_files(tracking, record.name, record.version)


def lost_files(tracking: Tracking, name: str, version: int) -> str | None:
    """Which file of the checkpoint in a registered version is gone; None where none is, or where nobody answers."""
    from mlflow.artifacts import list_artifacts

    folder = storage.join(version_location(tracking, name, version), CHECKPOINT_FOLDER)
    if is_file_path(folder):
        there = {file for file in CHECKPOINT_FILES if storage.exists(storage.join(folder, file))}
    else:
        try:
            listed = list_artifacts(artifact_uri=folder, tracking_uri=tracking.uri)
        except Exception as error:  # of whichever client the artifacts need; an outage takes no file away
            print(f"whether models:/{name}/{version} has its files cannot be told ({one_line(error)})", flush=True)
            return None
        there = {one.path.rpartition("/")[2] for one in listed}
    gone = [file for file in CHECKPOINT_FILES if file not in there]
    return f"models:/{name}/{version} has lost its files ({', '.join(gone)})" if gone else None


def version_tags(tracking: Tracking, name: str, version: int) -> dict[str, str]:
    """The tags of a registered version; raises UserError where it does not exist."""
    return dict(_mlflow_version(tracking, name, version).tags)


def set_version_tags(tracking: Tracking, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version, in order."""
    for key, value in tags.items():
        tracking.client().set_model_version_tag(name, str(version), key, value)


def _registration_key(checkpoint: Checkpoint, evaluation: Evaluation) -> str:
    made_of = f"{PACKAGE_FORMAT} {checkpoint.content_digest()} {evaluation.content_digest()}"
    return hashlib.sha256(made_of.encode()).hexdigest()


def _versions_with(tracking: Tracking, name: str, tag: str, value: str) -> list[MlflowVersion]:
    """The oldest first."""
    wanted = f"name = '{name}' and tags.`{tag}` = '{value}'"
    found = all_pages(tracking.client().search_model_versions, filter_string=wanted)
    return sorted(found, key=lambda version: int(version.version))


def _ensure_registered_model(tracking: Tracking, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracking.client().create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _mlflow_version(tracking: Tracking, name: str, version: int) -> MlflowVersion:
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client().get_model_version(name, str(version))
    except MlflowException as error:
        raise UserError(f"model {name} has no version {version} in {tracking.uri}") from error


def version_location(tracking: Tracking, name: str, version: int) -> str:
    """Where the files of a registered version lie: a path, or a URI that MLflow can download."""
    return str(tracking.client().get_model_version_download_uri(name, str(version)))


def is_file_path(uri: str) -> bool:
    """Whether MLflow's `uri` is a path of this machine."""
    return urlsplit(uri).scheme in ("", "file")


def all_pages(search: Any, **arguments: Any) -> list[Any]:
    """Every result of a paged search of MLflow's client."""
    found: list[Any] = []
    token = None
    while True:
        page = search(**arguments, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
