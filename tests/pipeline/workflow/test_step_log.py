from __future__ import annotations

import logging
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.workflow import step_log
from pipeline.workflow.step_log import append_text, current_log, log_uri, read_log, recording


def lines_of(uri: str) -> list[str]:
    """Without their times."""
    return [line[21:] for line in read_log(uri).splitlines()]


@pytest.fixture(params=["disk", "object store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return log_uri(str(tmp_path), "run", "train/full")
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/logs-test"):
        filesystem.rm("/logs-test", recursive=True)
    return log_uri("memory://logs-test", "run", "train/full")


def test_recording__keeps_what_is_printed_and_logged(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    made_before = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test.step_log")
    logger.addHandler(made_before)
    former = made_before.stream
    with recording(uri, "begins"):
        assert current_log() == uri
        print("one", flush=True)
        print("half", end="")
        print(" a line")
        print("10 %\r90 %\rready \x1b[31mred\x07")
        logger.warning("careful")
        print("to error", file=sys.stderr)
        print("no end of line", end="")
    print("after")
    logger.removeHandler(made_before)
    assert current_log() is None
    assert made_before.stream is former
    kept = ["begins", "one", "half a line", "ready [31mred", "careful", "to error", "no end of line"]
    assert lines_of(uri) == kept
    said = capsys.readouterr()
    assert said.out.startswith("one\nhalf a line\n10 %")
    assert "careful\nto error\n" in said.err
    with suppress(ZeroDivisionError), recording(uri):
        print("again")
        raise ZeroDivisionError
    append_text(uri, "Traceback\n  line")
    assert lines_of(uri) == [*kept, "again", "Traceback", "  line"]
    with recording(None):
        assert current_log() is None


def test_recording__what_was_printed_before_a_kill_is_kept(tmp_path: Path) -> None:
    uri = log_uri(str(tmp_path), "run", "step")
    code = f"""
import os, signal
from pipeline.workflow.step_log import recording
with recording({uri!r}):
    for number in range(100):
        print(number)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert lines_of(uri) == [str(number) for number in range(100)]


def test_recording__of_several_processes_and_bounded(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_log, "MAX_LOG_BYTES", 4000)
    with recording(uri):
        for number in range(1000):
            print(f"line {number}")
        with recording(uri):
            print("of another")
    text = read_log(uri)
    assert len(text) < 2 * 4000 + 200
    assert text.splitlines()[-1].endswith("  of another")
    assert "line 999\n" in text
    assert "line 0\n" not in text
    assert ("is older is in train-full.log.1" in text) or ("lines before these were dropped" in text)
    names = storage.list_names(uri.rpartition("/")[0])
    assert len(names) == (2 if uri.startswith("/") else 1)


def test_recording__a_log_that_cannot_be_written_harms_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file")
    with recording(log_uri(str(tmp_path), "run", "step"), "begins"):
        print("said")
    assert capsys.readouterr().out == "said\n"
    with pytest.raises(OSError, match="logs"):
        append_text(log_uri(str(tmp_path), "run", "step"), "x")
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
