"""Registered models as people see and name them: the list, `models:/name@alias`, their files."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Checkpoint, Record
from pipeline.registry import store
from pipeline.registry.store import all_pages, is_file_path, version_location
from pipeline.storage.names import CHECKPOINT_FILES, CHECKPOINT_FOLDER, CONFIG_FILE, WEIGHTS_FILE
from pipeline.workflow.lease import Lease
from pipeline.workflow.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

    from segvit.config import ModelConfig

MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


class VersionSummary(Record):
    """A registered version as the command line shows it.

    Attributes:
        created: UTC, ISO 8601.
        promoted: what the gate decided last; None where it was never asked.
        reason: why.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    variant: str
    miou: float
    gflops: float
    parameters: int
    latency_ms: float
    latency_reliable: bool
    created: str
    checkpoint_digest: str
    data_digest: str
    run_id: str
    promoted: bool | None
    reason: str | None


class ModelReference(NamedTuple):
    """A registered version by name and number."""

    name: str
    version: int


def list_models(tracking: Tracking, name: str | None = None) -> list[VersionSummary]:
    """All versions of one or of all registered models, newest first; raises UserError for an unknown name."""
    if not tracking.exists():
        return []
    client = tracking.client()
    models = all_pages(client.search_registered_models)
    if name is not None:
        _require_known(name, [model.name for model in models])
        models = [model for model in models if model.name == name]
    summaries = []
    for model in models:
        aliases = {alias: int(number) for alias, number in model.aliases.items()}
        for version in all_pages(client.search_model_versions, filter_string=f"name = '{model.name}'"):
            if store.EVALUATION in version.tags:
                summaries.append(_summary(version, aliases))
    return sorted(summaries, key=lambda one: (one.name, -one.version))


def require_model(tracking: Tracking, name: str) -> None:
    """Raise UserError with the choices unless a model of that name is registered."""
    models = all_pages(tracking.client().search_registered_models) if tracking.exists() else []
    _require_known(name, [model.name for model in models])


def resolve_model(tracking: Tracking, model: str) -> ModelReference:
    """The version that `models:/name/3` or `models:/name@alias` names; raises UserError with the choices."""
    found = MODEL_URI.fullmatch(model)
    if found is None:
        raise UserError(
            f"{model!r} is no model; use models:/NAME@champion, models:/NAME/VERSION or a checkpoint folder"
        )
    name, alias = found["name"], found["alias"]
    summaries = list_models(tracking)
    _require_known(name, sorted({one.name for one in summaries}))
    own = [one for one in summaries if one.name == name]
    for one in own:
        if alias in one.aliases if alias else one.version == int(found["version"]):
            return ModelReference(name, one.version)
    aliases = sorted(alias for one in own for alias in one.aliases)
    raise UserError(
        f"{model} does not exist; {name} has versions {', '.join(str(one.version) for one in own)} "
        f"and {'aliases ' + ', '.join(aliases) if aliases else 'no alias'}"
    )


def checkpoint_folder(tracking: Tracking, model: str, cache: str | Path) -> Path:
    """A local checkpoint folder for `models:/name@alias`, `models:/name/3`, or a checkpoint folder's URI.

    `cache` receives a copy of what is not local. Raises UserError for what is neither.
    """
    if model.startswith("models:"):
        reference = resolve_model(tracking, model)
        return _download(tracking, reference, CHECKPOINT_FOLDER, cache)
    for file in CHECKPOINT_FILES:
        if not storage.exists(storage.join(model, file)):
            raise UserError(f"{model} is no checkpoint folder, it has no {file}; a model is models:/NAME@ALIAS")
    return storage.fetch_folder(model, cache)


def fetch_checkpoint(
    tracking: Tracking, reference: ModelReference, digest: str, target_uri: str, lease: Lease
) -> Checkpoint:
    """Publish a registered version's checkpoint to `target_uri`.

    Raises UserError where the version has lost its files, or holds other weights than those of that sha256.
    """
    model = f"models:/{reference.name}/{reference.version}"
    with tempfile.TemporaryDirectory(prefix="segvit-model-") as scratch:
        source = _download(tracking, reference, CHECKPOINT_FOLDER, scratch)
        if storage.file_digest(str(source / WEIGHTS_FILE)) != digest:
            raise UserError(f"{model} does not hold the weights that were registered; register it anew")
        config = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
        lease.check()
        storage.publish_folder(source, target_uri, last=CONFIG_FILE)
    miou = store.get_version(tracking, *reference).evaluation.miou
    step = int(config["metadata"].get("step", 0))
    return Checkpoint(
        variant=model, uri=target_uri, digest=digest, step=step, miou=miou, history_uri=None, train_seconds=0.0
    )


def version_config(tracking: Tracking, reference: ModelReference) -> ModelConfig:
    """The model configuration of a registered version; raises UserError where its files are lost or damaged."""
    from segvit.checkpoint import read_config
    from segvit.config import ModelConfig

    with tempfile.TemporaryDirectory(prefix="segvit-config-") as scratch:
        file = _download(tracking, reference, f"{CHECKPOINT_FOLDER}/{CONFIG_FILE}", scratch)
        try:
            return ModelConfig.from_dict(read_config(file)["model"])
        except (OSError, ValueError) as error:
            raise UserError(f"models:/{reference.name}/{reference.version} is damaged ({error})") from error


def model_folder(tracking: Tracking, reference: ModelReference, cache: str | Path) -> Path:
    """A local folder of the whole registered model, as `mlflow.pyfunc.load_model` takes it."""
    return _download(tracking, reference, "", cache)


def _summary(version: MlflowVersion, aliases: dict[str, int]) -> VersionSummary:
    record = store.version_record(version)
    promoted = version.tags.get(store.PROMOTED)
    return VersionSummary(
        name=record.name,
        version=record.version,
        aliases=tuple(sorted(alias for alias, number in aliases.items() if number == record.version)),
        variant=record.variant,
        miou=record.evaluation.miou,
        gflops=record.evaluation.gflops,
        parameters=record.evaluation.parameters,
        latency_ms=record.evaluation.latency_ms,
        latency_reliable=record.evaluation.latency_reliable,
        created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        checkpoint_digest=record.checkpoint_digest,
        data_digest=record.evaluation.data_digest,
        run_id=record.run_id,
        promoted=None if promoted is None else bool(json.loads(promoted)),
        reason=version.tags.get(store.PROMOTION_REASON),
    )


def _download(tracking: Tracking, reference: ModelReference, path: str, cache: str | Path) -> Path:
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    location = storage.join(version_location(tracking, *reference), *([path] if path else []))
    if is_file_path(location):
        folder = storage.local_path(location)
        if not folder.exists():
            raise UserError(f"models:/{reference.name}/{reference.version} has lost its files ({folder} is gone)")
        return folder
    Path(cache).mkdir(parents=True, exist_ok=True)
    try:
        return Path(
            mlflow.artifacts.download_artifacts(artifact_uri=location, dst_path=str(cache), tracking_uri=tracking.uri)
        )
    except (MlflowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"models:/{reference.name}/{reference.version} cannot be downloaded ({problem})") from error


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        choices = f"choose from {', '.join(known)}" if known else "none is registered yet"
        raise UserError(f"unknown model {name!r}; {choices}")
