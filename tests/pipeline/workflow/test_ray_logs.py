from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.workflow import liveness
from pipeline.workflow.ray_logs import DAY_S, KEEP_SESSIONS, MARK, ended_sessions, own_session, sessions_root


def make_session(root: Path, name: str, tags: dict[str, str] | None, days: float = 0.0) -> Path:
    folder = root / f"session_{name}"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "raylet.out").write_text("said")
    if tags is not None:
        (folder / MARK).write_text(json.dumps(tags))
    written = time.time() - days * DAY_S
    for path in (folder / "logs" / "raylet.out", folder / "logs", *folder.glob(MARK), folder):
        os.utime(path, (written, written))
    return folder


def ended_tags() -> dict[str, str]:
    """Of a process of this machine that is gone: this one, begun at another time."""
    return liveness.process_tags() | {liveness.STARTED_TAG: "1.00 2.00"}


def test_own_session__removes_what_ended_long_ago_and_only_our_own(tmp_path: Path) -> None:
    mine = make_session(tmp_path, "mine", None)
    gone = make_session(tmp_path, "gone", ended_tags(), days=4)
    recent = make_session(tmp_path, "recent", ended_tags(), days=1)
    at_work = make_session(tmp_path, "at_work", liveness.process_tags(), days=9)
    foreign = make_session(tmp_path, "foreign", None, days=9)
    of_another_boot = make_session(tmp_path, "boot", ended_tags() | {liveness.BOOT_TAG: "former"}, days=9)
    of_another_container = make_session(tmp_path, "container", ended_tags() | {liveness.BOOT_TAG: "other"}, days=1)
    damaged = make_session(tmp_path, "damaged", None, days=9)
    (damaged / MARK).write_text("[")
    (tmp_path / "session_link").symlink_to(recent)
    own_session(mine)
    assert json.loads((mine / MARK).read_text()) == liveness.process_tags()
    assert not gone.exists()
    assert not of_another_boot.exists()
    for kept in (mine, recent, at_work, foreign, of_another_container, damaged):
        assert (kept / "logs" / "raylet.out").is_file()
    assert [session.folder for session in ended_sessions(tmp_path)] == [recent]


def test_sessions_root__is_where_ray_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    monkeypatch.setenv("RAY_TMPDIR", "/r")
    monkeypatch.setenv("TMPDIR", "/t")
    for unset in (None, "RAY_TMPDIR", "TMPDIR"):
        if unset is not None:
            monkeypatch.delenv(unset)
        assert str(sessions_root()) == get_default_ray_temp_dir()  # type: ignore[no-untyped-call]


def test_own_session__keeps_so_many_of_the_latest(tmp_path: Path) -> None:
    for number in range(KEEP_SESSIONS + 3):
        make_session(tmp_path, f"{number:02d}", ended_tags(), days=number / 100)
    own_session(make_session(tmp_path, "mine", None))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [*(f"session_{number:02d}" for number in range(KEEP_SESSIONS)), "session_mine"]
