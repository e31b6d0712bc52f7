from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.workflow.tracking import Tracking

OPEN = """
import sys
from pipeline.workflow.tracking import Tracking
print(Tracking.for_workspace(sys.argv[1]).experiment_id())
"""
# As if killed at the last instant before the store is there.
KILLED = "import os; os.replace = lambda *_: os._exit(9)\n" + OPEN


def start(code: str, workspace: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(workspace)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def store_files(workspace: Path) -> list[str]:
    return sorted(path.name for path in workspace.iterdir())


def test_create_store__three_at_once_find_one_experiment(tmp_path: Path) -> None:
    workspace = tmp_path / "new"
    processes = [start(OPEN, workspace) for _ in range(3)]
    ended = [(*process.communicate(), process.returncode) for process in processes]
    assert ended == [("1\n", "", 0)] * 3
    assert store_files(workspace) == ["mlflow.db", "mlflow.db.lock"]


def test_create_store__killed_while_it_is_made_leaves_nothing_to_find(tmp_path: Path) -> None:
    killed = start(KILLED, tmp_path)
    killed.communicate()
    assert killed.returncode == 9
    assert not Tracking.for_workspace(str(tmp_path)).exists()
    assert Tracking.for_workspace(str(tmp_path)).experiment_id() == "1"
    assert store_files(tmp_path) == ["mlflow.db", "mlflow.db.lock"]


def test_create_store__half_made_by_another_is_replaced(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    (tmp_path / "mlflow.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(504))
    assert Tracking.for_workspace(str(tmp_path)).experiment_id() == "1"
    assert store_files(tmp_path) == ["mlflow.db", "mlflow.db.lock"]


def test_create_store__a_store_in_use_stays(tmp_path: Path) -> None:
    tracking = Tracking.for_workspace(str(tmp_path))
    run_id = tracking.create_run("first", {})
    inode = (tmp_path / "mlflow.db").stat().st_ino
    # Another process holds the write lock meanwhile.
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        process = start(OPEN, tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4.0)
        connection.execute("ROLLBACK")
    assert process.communicate()[0] == "1\n"
    assert (tmp_path / "mlflow.db").stat().st_ino == inode
    assert tracking.client().get_run(run_id).info.run_name == "first"


def test_create_store__other_files_and_closed_folders_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"mlflow\.db is no tracking store \(file is not a database\); move it away"):
        Tracking.for_workspace(str(tmp_path)).experiment_id()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/ws/mlflow\.db cannot be made \(Not a directory\); choose a workspace"):
        Tracking.for_workspace(str(tmp_path / "file" / "ws")).experiment_id()
