from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipeline.causes import one_line
from pipeline.errors import UserError

ROOM = "free some space or choose another workspace, then run again"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/w/a.tar"), f"the disk is full at /w/a.tar; {ROOM}"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), f"the disk is full; {ROOM}"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/w"), f"the disk quota is used up at /w; {ROOM}"),
        (
            MlflowException("(sqlite3.OperationalError) database or disk is full\n[SQL: ...]"),
            f"the disk is full; {ROOM}",
        ),
        # Of the same number, but about reading.
        (OSError(errno.EFBIG, "larger than 512 MiB", "/w"), "OSError: [Errno 27] larger than 512 MiB: '/w'"),
        (
            MlflowException(
                "API request to http://h:5000/api/2.0/mlflow/runs/create failed with exception "
                "HTTPConnectionPool(host='h', port=5000): Max retries exceeded"
            ),
            "the tracking server http://h:5000 does not answer; start it or mend the network, then run again",
        ),
        (UserError("the disk is full of sand"), "the disk is full of sand"),
    ],
)
def test_one_line__what_a_person_can_mend(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


def read_nothing(checkpoint_uri: str) -> None:
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def caught(function: Callable[..., object], *arguments: object) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError


def test_one_line__a_system_error_without_a_file_names_what_was_worked_on() -> None:
    line = one_line(caught(read_nothing, "s3://key:secret@host/model"))
    assert re.fullmatch(
        r"FileNotFoundError: \[Errno 2\] No such file or directory "
        r"\(at s3://\*\*\*@host/model, pipeline/test_causes\.py line \d+\)",
        line,
    )


def test_one_line__a_system_error_of_another_process_names_the_code() -> None:
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    error.traceback_str = 'File "/a/pipeline/store.py", line 7, in register\nFileNotFoundError'  # type: ignore[attr-defined]
    assert one_line(error).endswith("No such file or directory (in register, pipeline/store.py line 7)")
    assert one_line(OSError(errno.EIO, os.strerror(errno.EIO))).endswith("error (of which file is not known)")


def test_one_line__a_removed_working_directory_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert "the working directory of the process was removed" in one_line(caught(Path("x").absolute))
