"""Carrying a plan out: first what says that something is there, then the files, so that a kill leaves no half of it.

A version goes before its model, and a step's mark before its outputs; outputs get another name within the cleaner's
turn and are removed after it. What a kill leaves is nobody's any more, and the next clean finds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from pipeline import storage
from pipeline.causes import one_line
from pipeline.cleaning.plan import TRASH, CleanPlan, Item, Limits, Workspace, make_plan
from pipeline.cleaning.store_view import StoreView, read_store
from pipeline.cleaning.turn import Cleaner, cleaning
from pipeline.cleaning.workspace_files import OutputKey, list_workspace
from pipeline.errors import UserError
from pipeline.registry.champion_lease import champion_lease
from pipeline.registry.decisions import champions
from pipeline.registry.store import CHAMPION
from pipeline.storage.file_stamps import folder_bytes
from pipeline.workflow.moved_store import ARTIFACTS
from pipeline.workflow.ray_logs import EndedSession, ended_sessions, sessions_root
from pipeline.workflow.tracking import Tracking
from pipeline.workflow.workspace_format import read_workspace_file, store_name

Log = Callable[[str], None]


def look_at(tracking: Tracking, workspace: str) -> Workspace:
    """What there is; nothing is created. Raises UserError where there is no workspace."""
    is_local = storage.is_local(workspace)
    uri = str(storage.local_path(workspace).absolute()) if is_local else workspace
    if not storage.exists(uri):
        raise UserError(f"no workspace at {workspace}; give its folder with --workspace")
    name = store_name(uri, tracking.uri, tracking.experiment)
    about = read_workspace_file(uri)
    # Files first: what is made meanwhile is then on record, or not yet seen.
    files = list_workspace(uri)
    return Workspace(
        uri=uri,
        files=files,
        store=read_store(tracking),
        owns_all=about.is_only_store(name),
        is_shared=any(store != name for store in about.stores),
        owns_store=is_local and tracking.artifact_location == f"{uri}/{ARTIFACTS}" and tracking.exists(),
    )


def carry_out(tracking: Tracking, workspace: Workspace, limits: Limits, log: Log = print) -> list[Item]:
    """Remove what a fresh plan says goes; returns what went. What came into use meanwhile stays, and is told.

    `workspace`: as `look_at` has just found it.
    """
    if not tracking.exists():
        raise UserError(
            f"there is no tracking store at {tracking.uri}: nothing tells what is needed of {workspace.uri}"
        )
    gone: list[Item] = []
    with cleaning(tracking, workspace.uri) as cleaner:
        remover = _Remover(cleaner, workspace.store, log)
        for item in _in_order(make_plan(workspace, limits)):
            cleaner.watch.check()
            try:
                why_not = remover.remove(item, limits)
            except OSError as error:
                why_not = one_line(error)
            if why_not is None:
                gone.append(item)
            else:
                log(f"{item.name} stays: {why_not}")
        cleaner.watch.interruptible = False
    for name in storage.list_names(workspace.uri):
        if name.startswith(TRASH):
            # Folders without a file are in no listing.
            _remove(storage.join(workspace.uri, name))
    if any(item.kind in ("deleted runs", "model files", "version") for item in gone):
        _collect_garbage(tracking, workspace, log)
    return gone


def remove_sessions(*, dry_run: bool) -> list[tuple[EndedSession, int]]:
    """Logs of all ended Ray sessions that flows of this user started on this machine, with their sizes; they go."""
    found = [(session, folder_bytes(str(session.folder))) for session in ended_sessions(sessions_root())]
    if not dry_run:
        for session, _ in found:
            shutil.rmtree(session.folder, ignore_errors=True)
    return found


def _in_order(plan: CleanPlan) -> Iterator[Item]:
    order = ("version", "outputs", "ray state", "logs", "page", "model files", "deleted runs", "leftover")
    yield from sorted(plan.goes, key=lambda item: order.index(item.kind))


class _Remover:
    """Removes one item after the other; each method returns why it did not."""

    def __init__(self, cleaner: Cleaner, store: StoreView, log: Log) -> None:
        self.cleaner, self.tracking, self.workspace, self.log = cleaner, cleaner.tracking, cleaner.workspace, log
        self.store = store
        self.done = {step.key for step in store.steps if step.is_done}
        self.fingerprints = {step.key: step.fingerprint for step in store.steps}
        self.steps = {step.run_id: step for step in store.steps}
        self.versions = {version.uri: version for version in store.versions}

    def remove(self, item: Item, limits: Limits) -> str | None:
        """None where it went."""
        match item.kind:
            case "version":
                return self._version(item.name, limits)
            case "outputs":
                step, _, digits = item.name.partition("/")
                return self._in_turn(OutputKey(step, digits), item.name)
            case "ray state":
                step, _, digits = item.name.removeprefix("ray/").rpartition("-")
                key = OutputKey(step, digits)
                return self._in_turn(key, item.name, take_marks=key not in self.done)
            case "page":
                run_id, _, name = item.name.partition("/")
                storage.remove_files(storage.join(self.workspace, ARTIFACTS, run_id, "artifacts"), [name])
            case "model files":
                self._model(item.name)
            case "logs":
                _remove(storage.join(self.workspace, "logs", item.name))
            case "leftover":
                _remove(storage.join(self.workspace, item.name))
            case "deleted runs":
                pass  # with all others, at the end
        return None

    def _in_turn(self, key: OutputKey, path: str, *, take_marks: bool = True) -> str | None:
        fingerprint = self.fingerprints.get(key)
        uri = storage.join(self.workspace, path)
        if fingerprint is None:
            # Nobody stands in a line whose name is not known; it was written long ago.
            _remove(_out_of_the_way(self.workspace, uri))
            return None
        with self.cleaner.turn(key.step, fingerprint, take_marks=take_marks) as why_not:
            if why_not is not None:
                return why_not
            trash = _out_of_the_way(self.workspace, uri)
        _remove(trash)
        return None

    def _version(self, uri: str, limits: Limits) -> str | None:
        version = self.versions[uri]
        client = self.tracking.client()
        step = self.steps.get(version.run_id)
        with champion_lease(self.tracking, version.name) as lease:
            model = client.get_registered_model(version.name)
            aliases = [alias for alias, number in model.aliases.items() if int(number) == version.number]
            now = model.aliases.get(CHAMPION)
            line = champions(self.tracking, version.name, None if now is None else int(now))
            former = list(dict.fromkeys(number for number in reversed(line) if str(number) != str(now)))
            if aliases:
                return f"it is {', '.join(aliases)} meanwhile"
            if version.number in former[: limits.keep_champions]:
                return "a rollback may go back to it meanwhile"
            if step is None:
                lease.check()
                client.delete_model_version(version.name, str(version.number))
            else:
                with self.cleaner.turn(step.step, step.fingerprint) as why_not:
                    if why_not is not None:
                        return why_not
                    lease.check()
                    client.delete_model_version(version.name, str(version.number))
        for model_id, location in self.store.models.items():
            if location == version.source:
                self._model(model_id)
        return None

    def _model(self, model_id: str) -> None:
        if model_id in self.store.models:
            self.tracking.client().delete_logged_model(model_id)


def _out_of_the_way(workspace: str, uri: str) -> str:
    """Give a local folder a name under which nobody looks for it; a remote one has to be removed where it is."""
    if not storage.is_local(workspace):
        return uri
    trash = storage.local_path(workspace) / f"{TRASH}{uuid.uuid4().hex[:8]}{storage.PARTIAL}"
    with suppress(FileNotFoundError):
        os.replace(storage.local_path(uri), trash)
    return str(trash)


def _remove(uri: str) -> None:
    filesystem, path = storage.filesystem_of(uri)
    if storage.is_local(uri):
        folder = Path(path)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, onerror=_unless_gone)
        else:
            folder.unlink(missing_ok=True)
        return
    filesystem.invalidate_cache()
    with suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def _unless_gone(_function: object, _path: str, about: tuple[type[BaseException], BaseException, object]) -> None:
    # Another cleaner is at it, too.
    if not isinstance(about[1], FileNotFoundError):
        raise about[1]


def _collect_garbage(tracking: Tracking, workspace: Workspace, log: Log) -> None:
    """What is deleted in MLflow goes for good, with its files: that is a command of MLflow's own."""
    if not workspace.owns_store:
        log(f"what was deleted in {tracking.uri} still has its files: run `mlflow gc` where that store is")
        return
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "gc",
        "--backend-store-uri",
        tracking.uri,
        "--tracking-uri",
        tracking.uri,
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        cause = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise UserError(f"`mlflow gc` could not remove what is deleted in {tracking.uri} ({cause}); run clean again")
