"""A tracking store that was moved: the paths in it are absolute, and follow it in one transaction.

MLflow names every artifact by an absolute path, and so do tags and records. When a store's folder has been moved, all
rows that name the old place are rewritten at once, so that MLflow's own tools find the files, too. What lies in files,
the records, whose sums are in the store, stays as it is: each run notes where its record was written, and whoever reads
the record puts the new place in the old one's stead (`at_its_place`).
"""

from __future__ import annotations

import json
import logging
import shlex
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pipeline.errors import UserError
from pipeline.workflow import liveness

ARTIFACTS = "mlartifacts"  # beside the database
# On runs: where the store was when their records were written, each with where that is now.
MOVED_FROM = "segvit.moved_from"
BUSY_TIMEOUT_S = 20.0

# Columns of MLflow's that hold one path, and those that may hold JSON with paths in it.
_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_TEXTS = (
    *(("tags", "value"), ("experiment_tags", "value"), ("logged_model_tags", "tag_value")),
    *(("model_version_tags", "value"), ("registered_model_tags", "value")),
)


def follow_move(database: Path, experiment: str) -> None:
    """Rewrite the paths of a store that was moved, so that they name what lies beside it; else do nothing.

    The table is read as it is, since MLflow takes seconds to start. Artifacts that were put elsewhere on purpose are
    left alone. A kill leaves the store as it was before or after.

    Raises UserError for a copy whose original is still there, while a flow of it runs, and where the store cannot be
    written to.
    """
    old = _former_place(database, experiment)
    if old is None:
        return
    new = database.parent
    link = shlex.join(["ln", "-s", str(new), str(old)])
    told = f"{new} was moved from {old}, and its records and models name the files there"
    if old.exists() and _is_original(old / database.name, database, experiment):
        raise UserError(
            f"{new} is a copy of {old}, and its records and models name the files there; use {old}, or remove that "
            "and try again"
        )
    try:
        with closing(sqlite3.connect(database, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            if _former_place(database, experiment) is None:
                # Another process was quicker.
                return
            if (running := _running_flow(connection)) is not None:
                raise UserError(f"{told}; run {running} is at work there: end it or wait for it, then try again")
            changed = _rewrite(connection, str(old), str(new))
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise UserError(f"{told}, and it cannot be changed ({error}); move it back, or run {link}") from error
    logging.getLogger(__name__).warning("%s was moved from %s; %d entries of its store now say so", new, old, changed)


def at_its_place(text: str, tags: Mapping[str, str]) -> str:
    """The JSON `text` that a run with those tags has written, with the places that were moved since as they are now."""
    moves = json.loads(tags.get(MOVED_FROM, "{}"))
    for old, new in moves.items():
        text = _moved_text(text, old, new)
    return text


def local_folder(artifact_uri: str) -> Path | None:
    """The folder that an artifact location names; None for one elsewhere."""
    parts = urlsplit(artifact_uri)
    if parts.scheme in ("", "file"):
        return Path(unquote(parts.path) if parts.scheme else artifact_uri)
    return None


def _former_place(database: Path, experiment: str) -> Path | None:
    """The folder in which the store was made, where that is not the one it is in."""
    here = database.parent / ARTIFACTS
    if not database.is_file() or not here.is_dir():
        return None
    found = _experiment_row(database, experiment, "artifact_location")
    made = None if found is None else local_folder(str(found))
    if made is None or made.name != ARTIFACTS or made == here or (made.exists() and made.samefile(here)):
        return None
    return made.parent


def _is_original(former: Path, database: Path, experiment: str) -> bool:
    """Whether the store at the old place is this one; a workspace begun anew there is not."""
    if not former.is_file():
        # Whoever keeps the store elsewhere has artifacts alone there.
        return (former.parent / ARTIFACTS).is_dir()
    born = _experiment_row(former, experiment, "creation_time")
    return born is not None and born == _experiment_row(database, experiment, "creation_time")


def _experiment_row(database: Path, experiment: str, column: str) -> Any:
    query = f"SELECT {column} FROM experiments WHERE name = ?"
    # Being made, locked or of another kind: MLflow will say it.
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute(query, (experiment,)).fetchone()
        return None if found is None else found[0]
    return None


def _running_flow(connection: sqlite3.Connection) -> str | None:
    query = (
        "SELECT run_uuid, key, value FROM runs JOIN tags USING (run_uuid) "
        "WHERE status = 'RUNNING' AND lifecycle_stage = 'active'"
    )
    tags: dict[str, dict[str, str]] = {}
    for run_id, key, value in connection.execute(query):
        tags.setdefault(run_id, {})[key] = value
    drivers = (run_id for run_id, found in tags.items() if liveness.HEARTBEAT_TAG in found)
    return next((run_id[:12] for run_id in drivers if liveness.why_dead(tags[run_id]) is None), None)


def _rewrite(connection: sqlite3.Connection, old: str, new: str) -> int:
    changed = 0
    for table, column in (*_PATHS, *_TEXTS):
        changed += _rewrite_column(connection, table, column, old, new)
    # Which records lie in files as they were written here; those that come later need no such note.
    noted = dict(connection.execute("SELECT run_uuid, value FROM tags WHERE key = ?", (MOVED_FROM,)))
    written = connection.execute("SELECT run_uuid FROM tags WHERE key = 'segvit.record_sha256'").fetchall()
    for (run_id,) in written:
        moves = {former: _moved(now, old, new) for former, now in json.loads(noted.get(run_id, "{}")).items()}
        moves = {former: now for former, now in {**moves, old: new}.items() if former != now}
        connection.execute("DELETE FROM tags WHERE run_uuid = ? AND key = ?", (run_id, MOVED_FROM))
        row = (MOVED_FROM, json.dumps(moves), run_id)
        connection.execute("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", row)
    return changed


def _rewrite_column(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> int:
    if column not in [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]:
        return 0
    names = f"SELECT rowid, {column} FROM {table} WHERE (instr({column}, ?) OR instr({column}, ?))"
    key_column = "tag_key" if column == "tag_value" else "key"
    if (table, column) in _TEXTS:
        names += f" AND {key_column} != '{MOVED_FROM}'"
    changed = 0
    for row, text in connection.execute(names, (old, quote(old))).fetchall():
        moved = _moved_text(text, old, new)
        if moved != text:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (moved, row))
            changed += 1
    return changed


def _moved_text(text: str, old: str, new: str) -> str:
    """`text`, a path or JSON, with every path in it that lay at or below `old`."""
    if text[:1] in ("{", "["):
        with suppress(ValueError):
            return json.dumps(_moved_value(json.loads(text), old, new))
    return _moved(text, old, new)


def _moved_value(value: Any, old: str, new: str) -> Any:
    match value:
        case str():
            return _moved(value, old, new)
        case list():
            return [_moved_value(item, old, new) for item in value]
        case dict():
            return {_moved(key, old, new): _moved_value(item, old, new) for key, item in value.items()}
    return value


def _moved(path: str, old: str, new: str) -> str:
    for before, after in ((old, new), (f"file://{quote(old)}", f"file://{quote(new)}")):
        if path == before or path.startswith(f"{before}/"):
            return after + path.removeprefix(before)
    return path
