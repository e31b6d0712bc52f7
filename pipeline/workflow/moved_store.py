"""A tracking store that lies elsewhere than it was made: told before anything looks for files at the old place."""

from __future__ import annotations

import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import UserError

ARTIFACTS = "mlartifacts"  # beside the database


def require_not_moved(database: Path, experiment: str) -> None:
    """Raise UserError where a store lies elsewhere than when it was made: the paths in it are absolute.

    MLflow's own tools read those paths, too, so that only a link at the old place mends all of them. The table is read
    as it is, since MLflow takes seconds to start. Artifacts that were put elsewhere on purpose are left alone.
    """
    here = database.parent / ARTIFACTS
    if not database.is_file() or not here.is_dir():
        return
    query = "SELECT artifact_location FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute(query, (experiment,)).fetchone()
    except sqlite3.Error:
        # Being made, locked or of another kind: MLflow will say it.
        return
    made = None if found is None else local_folder(str(found[0]))
    if made is None or made.name != ARTIFACTS or (made.exists() and made.samefile(here)):
        return
    old, new = made.parent, here.parent
    link = shlex.join(["ln", "-s", str(new), str(old)])
    if old.exists():
        raise UserError(
            f"{new} is a copy of {old}, and its records and models name the files there; use {old}, or remove that and "
            f"run {link}"
        )
    raise UserError(
        f"{new} was moved from {old}, and its records and models name the files there; move it back, or run {link}"
    )


def local_folder(artifact_uri: str) -> Path | None:
    """The folder that an artifact location names; None for one elsewhere."""
    parts = urlsplit(artifact_uri)
    if parts.scheme in ("", "file"):
        return Path(unquote(parts.path) if parts.scheme else artifact_uri)
    return None
