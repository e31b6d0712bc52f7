"""Session folders of the local Rays that flows start: logs of ended ones are kept for some days, and then removed.

Ray writes a folder for each session below /tmp/ray and never removes one. Only those are touched that bear a mark of
ours, which says what process they were started by; other people's sessions, and Rays started by hand, have none.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.workflow import liveness

MARK = "segvit.json"
KEEP_DAYS = 3.0
KEEP_SESSIONS = 10
DAY_S = 86400.0


class EndedSession(NamedTuple):
    """The folder of a session whose driver is gone; `age_s` since something was last written there."""

    folder: Path
    age_s: float


def own_session(session_folder: str | Path) -> None:
    """Mark the session that this process has started as one of ours, and remove what earlier ones left too long ago.

    Nothing of it is worth a flow: what cannot be written or removed stays.
    """
    folder = Path(session_folder)
    with suppress(OSError):
        storage.publish_json(str(folder / MARK), liveness.process_tags())
    for session in old_sessions(ended_sessions(folder.parent)):
        shutil.rmtree(session.folder, ignore_errors=True)


def sessions_root() -> Path:
    """Where Ray puts the folders of its sessions."""
    folder = os.environ.get("RAY_TMPDIR")
    if folder is None and sys.platform.startswith("linux"):
        folder = os.environ.get("TMPDIR")
    return Path(folder or "/tmp") / "ray"


def ended_sessions(root: Path) -> list[EndedSession]:
    """Our sessions below `root` whose drivers are gone, and that this user may remove; the latest first."""
    return sorted(_ended(root), key=lambda session: session.age_s)


def old_sessions(sessions: list[EndedSession], keep_days: float = KEEP_DAYS) -> list[EndedSession]:
    """Those that ended more than `keep_days` ago, and those beyond the latest KEEP_SESSIONS."""
    return [one for place, one in enumerate(sessions) if place >= KEEP_SESSIONS or one.age_s > keep_days * DAY_S]


def _ended(root: Path) -> Iterator[EndedSession]:
    for mark in root.glob(f"session_*/{MARK}"):
        folder = mark.parent
        try:
            tags = {str(key): str(value) for key, value in json.loads(mark.read_text()).items()}
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            age_s = time.time() - max(file.stat().st_mtime for file in (folder, mark, *(folder / "logs").glob("*")))
        except (OSError, ValueError, AttributeError):
            continue
        # Of another boot, or seen from another container: nobody can tell, and only age counts.
        if liveness.is_running(tags) is False or (liveness.is_running(tags) is None and age_s > KEEP_DAYS * DAY_S):
            yield EndedSession(folder, age_s)
