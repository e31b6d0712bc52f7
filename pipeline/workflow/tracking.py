"""Flow and step runs in MLflow: where the store is, what the runs' tags mean, how they are read back.

A flow is a run with `segvit.kind` = flow; its steps are nested runs with `segvit.kind` = step. A step run
carries `segvit.done` = its fingerprint if and only if it finished and its record is stored; it comes last.
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pipeline import storage
from pipeline.errors import UserError
from pipeline.masking import holds_password, masked
from pipeline.workflow.mlflow_settings import import_mlflow
from pipeline.workflow.moved_store import ARTIFACTS, follow_move, local_folder
from pipeline.workflow.store_creation import create_store
from pipeline.workflow.workspace_format import read_workspace_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RECORD_FILE = "record.json"
PLAN_FILE = "plan.json"
TRACEBACK_FILE = "traceback.txt"

MAX_BATCH_METRICS = 1000
MAX_BATCH_PARAMS = 100
MAX_KEY_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
CONNECT_TIMEOUT_S = 5.0
# How long whoever is at work already waits for a server that has stopped to answer.
PATIENCE_S = 360.0


class Tag:
    """Keys of the tags on runs."""

    KIND = "segvit.kind"
    FLOW = "segvit.flow"
    STATE = "segvit.state"
    ERROR = "segvit.error"
    WORKSPACE = "segvit.workspace"
    COUNTS = "segvit.counts"
    STEP = "segvit.step"
    VERSION = "segvit.version"
    LABEL = "segvit.label"
    FINGERPRINT = "segvit.fingerprint"
    DEPENDS_ON = "segvit.depends_on"
    DONE = "segvit.done"
    RECORD_DIGEST = "segvit.record_sha256"
    REUSED_FROM = "segvit.reused_from"
    TICKET = "segvit.ticket"
    OUTPUTS = "segvit.outputs_sha256"
    CANCEL = "segvit.cancel_requested_by"
    USES = "segvit.uses"
    CLEANED = "segvit.cleaned"
    BYTES = "segvit.bytes"
    TOKEN = "segvit.token"
    PROGRESS = "segvit.progress"
    NOTE = "mlflow.note.content"
    PARENT = "mlflow.parentRunId"


class RunState(StrEnum):
    """State of a flow or step run, in the tag `segvit.state`; MLflow's own status is coarser."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    REUSED = "reused"
    FINISHED = "finished"
    FAILED = "failed"
    SKIPPED = "skipped"
    KILLED = "killed"
    ABANDONED = "abandoned"

    @classmethod
    def _missing_(cls, value: object) -> RunState | None:
        # As earlier releases called it.
        return cls.DONE if value == "run" else None


class Param(NamedTuple):
    """One flattened parameter."""

    key: str
    value: str


_clients: dict[str, MlflowClient] = {}
_experiments: dict[tuple[str, str], str] = {}
_clients_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Tracking:
    """An MLflow store, named explicitly; serialisable, so that it can be handed to any process.

    Attributes:
        uri: `sqlite:////absolute/path.db` or `http(s)://host:port`.
        experiment: the experiment that holds the runs.
        artifact_location: where a new experiment keeps artifacts; None leaves it to the server.
        patience_s: how long the first contact waits for a server to answer. A person's mistake shall cost seconds,
            but what starts in the middle of a flow waits, as MLflow's own retries do after the first contact.
    """

    uri: str
    experiment: str = "segvit"
    artifact_location: str | None = None
    patience_s: float = 0.0

    @classmethod
    def for_workspace(cls, workspace: str, uri: str | None = None, experiment: str = "segvit") -> Tracking:
        """The store at `uri`, or by default a sqlite file in the workspace with artifacts beside it.

        A store that was moved follows its files (`pipeline.workflow.moved_store`). Raises UserError for a URI MLflow
        could not use from every process of a flow, and for a store that is a copy or of a later release.
        """
        if holds_password(workspace):
            raise UserError(
                f"workspace {masked(workspace)} holds a password, which every record would keep; give credentials in "
                "the environment, as fsspec's file system reads them"
            )
        if storage.is_local(workspace):
            read_workspace_file(workspace)
        if uri is None:
            if not storage.is_local(workspace):
                raise UserError(
                    f"workspace {workspace} is remote and cannot hold the default sqlite store; "
                    "give the address of a tracking server"
                )
            folder = storage.local_path(workspace).absolute()
            follow_move(folder / "mlflow.db", experiment)
            return cls(f"sqlite:///{folder / 'mlflow.db'}", experiment, str(folder / ARTIFACTS))
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///")).absolute()
            follow_move(path, experiment)
            return cls(f"sqlite:///{path}", experiment, str(path.parent / ARTIFACTS))
        if "://" not in uri:
            raise UserError(f"tracking URI {uri!r} has no scheme; use sqlite:///FILE or http://HOST:PORT")
        return cls(uri.rstrip("/"), experiment)

    def patient(self) -> Tracking:
        """The same store for those who start while a flow is at work: they wait for a server that is away."""
        return replace(self, patience_s=PATIENCE_S)

    @property
    def is_server(self) -> bool:
        """Whether requests go over a network, where an answer can get lost after the work was done."""
        return urlsplit(self.uri).scheme in ("http", "https")

    def is_reachable(self) -> bool:
        """Whether there is someone to talk to right now; a few seconds at most."""
        try:
            replace(self, patience_s=0.0)._require_answer()
        except UserError:
            return False
        return True

    def exists(self) -> bool:
        """Whether there is a store to read; looking creates nothing."""
        path = self._sqlite_path()
        return path is None or path.is_file()

    def client(self) -> MlflowClient:
        """MLflow's client for this store, one a process; raises UserError where no server answers."""
        with _clients_lock:
            if self.uri not in _clients:
                self._require_answer()
                if (path := self._sqlite_path()) is not None:
                    create_store(path, self.experiment, self.artifact_location)
                _clients[self.uri] = _new_client(self.uri)
            return _clients[self.uri]

    def find_experiment(self) -> str | None:
        """The experiment's id, or None where the store or the experiment does not exist yet."""
        if (self.uri, self.experiment) in _experiments:
            return _experiments[self.uri, self.experiment]
        if not self.exists():
            return None
        found = self.client().get_experiment_by_name(self.experiment)
        if found is None:
            return None
        if found.lifecycle_stage != "active":
            raise UserError(f"experiment {self.experiment!r} is deleted in {self.uri}; restore it or use another name")
        _experiments[self.uri, self.experiment] = str(found.experiment_id)
        return str(found.experiment_id)

    def experiment_id(self) -> str:
        """The experiment's id; store and experiment are created where they do not exist."""
        client = self.client()
        found = self.find_experiment()
        if found is not None:
            return found
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(self.experiment, artifact_location=self.artifact_location))
        except MlflowException:
            # Another process was quicker.
            found = self.find_experiment()
            if found is None:
                raise
            return found

    def runs(self, filter_string: str, *, order_by: str = "attributes.start_time DESC") -> Iterator[Run]:
        """Runs of the experiment that match MLflow's filter, fetched page by page."""
        experiment = self.find_experiment()
        token: str | None = None
        while experiment is not None:
            page = self.client().search_runs(
                [experiment], filter_string, max_results=200, order_by=[order_by], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def first_runs(self, filter_string: str, limit: int) -> Sequence[Run]:
        """The latest `limit` runs that match; one query."""
        experiment = self.find_experiment()
        if experiment is None:
            return []
        order = ["attributes.start_time DESC"]
        return list(self.client().search_runs([experiment], filter_string, max_results=limit, order_by=order))

    def read_text(self, run_id: str, name: str, artifact_uri: str | None = None) -> str | None:
        """A text artifact of a run, or None where there is none; `artifact_uri` of the run saves asking for it.

        Raises MLflow's exception where the store does not answer: that is no sign of a missing artifact.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        place = artifact_uri or str(self.client().get_run(run_id).info.artifact_uri)
        local = local_folder(place)
        if local is not None:
            try:
                return (local / name).read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
                return None
        with tempfile.TemporaryDirectory(prefix="segvit-artifact-") as folder:
            try:
                uri = f"{place.rstrip('/')}/{name}"
                path = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=self.uri)
                return Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return None
            except (MlflowException, OSError):
                if any(entry.path == name for entry in self.client().list_artifacts(run_id)):
                    raise
                return None

    def create_run(self, name: str, tags: Mapping[str, str]) -> str:
        """A new run's id. Where the server's answer got lost and MLflow asked again, there may be a twin of it:
        with `segvit.token` among the tags, twins are looked for and deleted."""
        client = self.client()
        run_id = str(client.create_run(self.experiment_id(), run_name=name, tags=dict(tags)).info.run_id)
        if self.is_server and (token := tags.get(Tag.TOKEN)):
            for run in self.first_runs(f"tags.`{Tag.TOKEN}` = '{token}'", 10):
                if run.info.run_id != run_id:
                    client.delete_run(run.info.run_id)
        return run_id

    def log_params(self, run_id: str, params: Mapping[str, Any] | Sequence[Param]) -> None:
        """Log a mapping, nested ones flattened to dotted keys, in as few requests as MLflow allows."""
        from mlflow.entities import Param as MlflowParam

        flat = flatten(params) if isinstance(params, Mapping) else list(params)
        entities = [MlflowParam(_param_key(param.key), masked(param.value)[:MAX_PARAM_LENGTH]) for param in flat]
        for start in range(0, len(entities), MAX_BATCH_PARAMS):
            self.client().log_batch(run_id, params=entities[start : start + MAX_BATCH_PARAMS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set several tags in one request."""
        from mlflow.entities import RunTag

        entities = [RunTag(key, value[:MAX_TAG_LENGTH]) for key, value in tags.items()]
        self.client().log_batch(run_id, tags=entities)

    def end_run(self, run_id: str, status: str, tags: Mapping[str, str]) -> None:
        """Set the tags, then MLflow's status (FINISHED, FAILED or KILLED) and the end time."""
        self.set_tags(run_id, tags)
        self.client().set_terminated(run_id, status)

    def log_history(self, run_id: str, rows: Sequence[Mapping[str, float]], step_key: str = "step") -> None:
        """Log a training history, a row a step, as metrics; a few requests in all."""
        from mlflow.entities import Metric

        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        metrics = [
            Metric(key, float(value), now_ms, int(row[step_key]))
            for row in rows
            for key, value in row.items()
            if key != step_key
        ]
        for start in range(0, len(metrics), MAX_BATCH_METRICS):
            self.client().log_batch(run_id, metrics=metrics[start : start + MAX_BATCH_METRICS])

    def _sqlite_path(self) -> Path | None:
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def _require_answer(self) -> None:
        # MLflow itself would always retry for minutes.
        if not self.is_server:
            return
        parts = urlsplit(self.uri)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        deadline, pause_s = time.monotonic() + self.patience_s, 0.5
        while True:
            try:
                socket.create_connection(address, timeout=CONNECT_TIMEOUT_S).close()
                return
            except OSError as error:
                if time.monotonic() + pause_s > deadline:
                    raise UserError(
                        f"the tracking server {self.uri} does not answer ({error.strerror or error}); "
                        "start it or correct the address"
                    ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 8.0)


@dataclass(frozen=True, slots=True)
class MetricLog:
    """Where one run's metrics go; serialisable, for processes that log as they work."""

    tracking: Tracking
    run_id: str

    def metrics(self, row: Mapping[str, float], step: int) -> None:
        """Log one row of metrics at a step; a store that fails to answer costs the row, never the work."""
        try:
            self.tracking.log_history(self.run_id, [{**row, "step": step}])
        except Exception as error:
            logging.getLogger(__name__).warning("metrics of step %d were not logged: %s", step, error)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[Param]:
    """Leaves of a nested mapping as parameters with dotted keys; lists and other values as JSON."""
    flat: list[Param] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat += flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat.append(Param(f"{prefix}{key}", text))
    return flat


def _param_key(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY_LENGTH]


def note_tag(state: RunState, cause: str | None = None) -> dict[str, str]:
    """The tag that MLflow's own pages show as the run's description: its state, and why."""
    return {Tag.NOTE: f"{state.value}: {cause}" if cause else state.value}


def current_user() -> str:
    """The user's name, for records of who did something."""
    with suppress(KeyError, OSError):
        return getpass.getuser()
    return "unknown"


def _new_client(uri: str) -> MlflowClient:
    import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)
