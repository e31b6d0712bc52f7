"""What lies in a workspace, by what it belongs to, with sizes: one listing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.workflow.moved_store import ARTIFACTS
from pipeline.workflow.step_lease import LEASE_FOLDER
from pipeline.workflow.step_log import LOGS_FOLDER
from pipeline.workflow.workspace_format import WORKSPACE_FILE

RAY_FOLDER = "ray"
MODELS_FOLDER = "models"
PAGE_SUFFIX = ".html"
DIGITS = r"[0-9a-f]{16}"
_KEYED = re.compile(rf"(?P<digits>{DIGITS})(?:\.[0-9a-f]+{re.escape(storage.PARTIAL)})?")
_RUN_NAME = re.compile(rf"(?P<step>.+)-(?P<digits>{DIGITS})")


class OutputKey(NamedTuple):
    """The folder of a step's outputs: the step's name and the beginning of the fingerprint."""

    step: str
    digits: str

    @property
    def path(self) -> str:
        """From the workspace."""
        return f"{self.step}/{self.digits}"

    @property
    def run_name(self) -> str:
        """As Ray's state and the lease of the same work are called."""
        return f"{self.step}-{self.digits}"


@dataclass(slots=True)
class Files:
    """Some files together: `newest` is when one of them was written last, in seconds since 1970."""

    num_bytes: int = 0
    newest: float = 0.0

    def add(self, num_bytes: int, written: float) -> None:
        """Count one more."""
        self.num_bytes += num_bytes
        self.newest = max(self.newest, written)


@dataclass(slots=True)
class WorkspaceFiles:
    """All files of a workspace, each in one of the groups; keys are paths from the workspace where not told otherwise.

    Attributes:
        outputs: by the step's folder.
        ray: what Ray keeps of trainings and searches, by the same folders.
        logs: by the flow's run.
        artifacts: of MLflow's runs, by run.
        pages: those of the artifacts that are pages, by run, then by name.
        models: of MLflow's logged models, by id.
        partial: what was being written, by its path, with the folder of the step that it is of.
        other: what is none of that, by the first part of the path.
        num_bytes: of all.
    """

    outputs: dict[OutputKey, Files] = field(default_factory=dict)
    ray: dict[OutputKey, Files] = field(default_factory=dict)
    logs: dict[str, Files] = field(default_factory=dict)
    artifacts: dict[str, Files] = field(default_factory=dict)
    pages: dict[str, dict[str, int]] = field(default_factory=dict)
    models: dict[str, Files] = field(default_factory=dict)
    partial: dict[str, tuple[OutputKey | None, Files]] = field(default_factory=dict)
    other: dict[str, Files] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, path: str, num_bytes: int, written: float) -> None:
        """Put one file where it belongs."""
        self.num_bytes += num_bytes
        parts = path.split("/")
        self._group(path, parts, num_bytes).add(num_bytes, written)

    def _group(self, path: str, parts: list[str], num_bytes: int) -> Files:
        keyed = _KEYED.fullmatch(parts[1]) if len(parts) > 1 else None
        key = OutputKey(parts[0], keyed["digits"]) if keyed and parts[0] not in (ARTIFACTS, RAY_FOLDER) else None
        for depth, part in enumerate(parts):
            if part.endswith(storage.PARTIAL):
                return self.partial.setdefault("/".join(parts[: depth + 1]), (key, Files()))[1]
        named = _RUN_NAME.fullmatch(parts[1]) if len(parts) > 2 else None
        match parts:
            case [first, second, _, *_] if first == ARTIFACTS and second == MODELS_FOLDER and len(parts) > 3:
                return self.models.setdefault(parts[2], Files())
            case [first, run_id, _, *_] if first == ARTIFACTS:
                if path.endswith(PAGE_SUFFIX) and len(parts) == 4:
                    self.pages.setdefault(run_id, {})[parts[3]] = num_bytes
                return self.artifacts.setdefault(run_id, Files())
            case [first, _, _, *_] if first == RAY_FOLDER and named:
                return self.ray.setdefault(OutputKey(named["step"], named["digits"]), Files())
            case [first, run_id, _, *_] if first == LOGS_FOLDER:
                return self.logs.setdefault(run_id, Files())
            case [_, _, _, *_] if key is not None:
                return self.outputs.setdefault(key, Files())
        return self.other.setdefault(parts[0], Files())


# Small, and without them nothing else would be found.
LASTING = (LEASE_FOLDER, WORKSPACE_FILE, "mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db-journal")


def list_workspace(workspace: str) -> WorkspaceFiles:
    """Everything in a workspace; what comes or goes meanwhile may be missed."""
    found = WorkspaceFiles()
    entries = _local(storage.local_path(workspace)) if storage.is_local(workspace) else _remote(workspace)
    for path, num_bytes, written in entries:
        found.add(path, num_bytes, written)
    return found


def _local(folder: Path) -> Iterator[tuple[str, int, float]]:
    for parent, _folders, names in os.walk(folder):
        for name in names:
            file = Path(parent) / name
            try:
                about = file.lstat()
            except FileNotFoundError:
                continue
            yield file.relative_to(folder).as_posix(), about.st_size, about.st_mtime


def _remote(uri: str) -> Iterator[tuple[str, int, float]]:
    filesystem, folder = storage.filesystem_of(uri)
    filesystem.invalidate_cache()
    prefix = f"{folder.rstrip('/')}/"
    for name, entry in filesystem.find(folder, detail=True).items():
        yield str(name).removeprefix(prefix), int(entry["size"] or 0), _written(entry)


def _written(entry: dict[str, Any]) -> float:
    """When storage says a file was written; now, which keeps it, where it does not say."""
    for name in ("LastModified", "last_modified", "updated", "modified", "mtime", "created"):
        value = entry.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return datetime.now().timestamp()
