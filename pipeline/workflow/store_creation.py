"""Making a workspace's tracking store: beside its place, then published whole.

MLflow makes the tables of a sqlite file one by one where the file is to lie, so that a second process which starts
meanwhile, or the next one after a kill, finds half of them.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage import PARTIAL
from pipeline.workflow.mlflow_settings import import_mlflow

LOCK_SUFFIX = ".lock"
# The last thing that MLflow writes while it makes a store.
_READY = "SELECT count(*) FROM experiments"
# What sqlite keeps beside a file, which it would take for the journal of a new one.
_BESIDE = ("-journal", "-wal", "-shm")


def create_store(database: Path, experiment: str, artifact_location: str | None) -> None:
    """Make the sqlite store with its experiment, unless it is there; of several processes one makes it.

    A file that an earlier, killed process left half made is replaced, as long as it holds no experiment.

    Raises UserError where the folder cannot be written or what lies there is no database.
    """
    if _is_whole(database):
        return
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with _locked(database.with_name(database.name + LOCK_SUFFIX)):
            if not _is_whole(database):
                _publish(database, experiment, artifact_location)
    except OSError as error:
        raise UserError(
            f"the tracking store {database} cannot be made ({error.strerror or error}); "
            "choose a workspace in a folder that can be written"
        ) from error


def _publish(database: Path, experiment: str, artifact_location: str | None) -> None:
    for left in database.parent.glob(f".{database.name}.*{PARTIAL}*"):
        left.unlink(missing_ok=True)
    partial = database.with_name(f".{database.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        _make(partial, experiment, artifact_location)
        for suffix in _BESIDE:
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        os.replace(partial, database)
    finally:
        for left in partial.parent.glob(f"{partial.name}*"):
            left.unlink(missing_ok=True)


def _make(file: Path, experiment: str, artifact_location: str | None) -> None:
    import_mlflow()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # As MLflow's own client would, with the artifacts of its default experiment, which we do not use, beside.
    root = artifact_location or str(file.parent / "mlruns")
    store = SqlAlchemyStore(f"sqlite:///{file}", root)  # type: ignore[no-untyped-call]
    try:
        store.create_experiment(experiment, artifact_location=artifact_location)  # type: ignore[no-untyped-call]
    finally:
        store.engine.dispose()
    # The rename publishes what is on disk.
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _is_whole(database: Path) -> bool:
    """Whether a store with an experiment lies there; raises UserError for a file that is none."""
    if not database.is_file() or database.stat().st_size == 0:
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            try:
                return int(connection.execute(_READY).fetchone()[0]) > 0
            except sqlite3.OperationalError as error:
                # Locked by a writer it is in use, and MLflow waits for it.
                return "no such table" not in str(error)
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{database} is no tracking store ({error}); move it away, or choose another workspace"
        ) from error


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    # Never removed: another may already wait for this very file.
    with file.open("w") as lock:
        with suppress(OSError):
            # A file system without locks: the rename still publishes a whole store.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
