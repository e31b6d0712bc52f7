from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from flows.jobs import follow
from flows.jobs import server as job_server
from flows.jobs.cancel import cancel_job
from flows.jobs.follow import LogLines, job_log
from pipeline.errors import UserError
from tests.flows.jobs.fake_server import FakeJobServer

JOB = "tiny-20260101-000000-abcd"
OPENING = [f"step {index} of a line that comes in several pieces" for index in range(5)]


@pytest.fixture
def job(server: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> FakeJobServer:
    """A job that runs and has said its first lines."""
    monkeypatch.setattr(follow, "FIRST_DELAY_S", 0.05)
    server.jobs[JOB] = {"submission_id": JOB, "entrypoint": "python segvit_job.py", "metadata": {}, "runtime_env": {}}
    server.log = "".join(f"{line}\n" for line in OPENING)
    return server


class Following:
    """`job_log` in a thread of its own."""

    def __init__(self, server: FakeJobServer) -> None:
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, args=(server.address,), daemon=True)
        self._thread.start()

    def _follow(self, address: str) -> None:
        try:
            job_log(address, JOB, follow=True, log=self.lines.append)
        except BaseException as error:
            self.error = error

    def until(self, is_so: Callable[[list[str]], Any]) -> None:
        deadline = time.monotonic() + 60
        while not is_so(self.lines):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.01)

    def end(self) -> None:
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


def test_follow__every_line_once_over_broken_connections(job: FakeJobServer) -> None:
    following = Following(job)
    following.until(lambda lines: lines == OPENING)
    job.stop()
    following.until(lambda lines: len(lines) > len(OPENING))
    job.log += "said while the tunnel was away\nhalf a "
    job.start()
    following.until(lambda lines: lines[-1] == "said while the tunnel was away")
    job.stop()
    job.log += "line\n"
    job.start()
    following.until(lambda lines: "half a line" in lines)
    job.log += "the end, without a line break"
    job.status = "SUCCEEDED"
    following.end()
    assert following.error is None
    lost = f"connection to {job.address} lost (Connection refused), trying again for 300 s"
    told = [line for line in following.lines if line not in (lost, f"connected to {job.address} again")]
    assert told == [*OPENING, "said while the tunnel was away", "half a line", "the end, without a line break"]
    assert following.lines[len(OPENING) : len(OPENING) + 2] == [lost, f"connected to {job.address} again"]


def test_follow__a_head_that_stays_away_ends_it_in_a_line(job: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "PATIENCE_S", 0.3)
    following = Following(job)
    following.until(lambda lines: lines == OPENING)
    job.stop()
    following.end()
    assert isinstance(following.error, UserError)
    assert str(following.error) == (
        f"job {JOB} is no longer followed, and may run on: connection to {job.address} lost (Connection refused), for "
        "0 s; mend the tunnel, or look after the cluster's head\n"
        f"  follow it: segvit logs {JOB} --address {job.address} --follow\n"
        f"  stop it:   segvit cancel {JOB} --address {job.address}"
    )


def test_follow__a_head_that_forgot_the_job_is_told(job: FakeJobServer) -> None:
    following = Following(job)
    following.until(lambda lines: lines == OPENING)
    job.stop()
    job.jobs.clear()
    job.start()
    following.end()
    assert str(following.error).startswith(f"the cluster at {job.address} knows no job {JOB} (")
    assert "submit again and that is reused" in str(following.error)


def test_follow__without_websockets_the_log_is_whole(job: FakeJobServer) -> None:
    job.refuses_tails = True
    following = Following(job)
    following.until(lambda lines: lines == OPENING)
    job.log += "more\n"
    following.until(lambda lines: lines[-1] == "more")
    job.log += "last\n"
    job.status = "SUCCEEDED"
    following.end()
    assert following.error is None
    assert following.lines == [*OPENING, "more", "last"]


def test_follow__a_silent_connection_is_made_anew(job: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SILENCE_S", 0.1)
    following = Following(job)
    tails = f"GET /api/jobs/{JOB}/logs/tail"
    following.until(lambda _: job.requests.count(tails) >= 3)
    job.status = "SUCCEEDED"
    following.end()
    assert following.error is None
    assert following.lines == OPENING


@pytest.mark.parametrize(
    ("said", "message", "cause"),
    [
        ("error: data: no such folder /d\n  and more\n", "", "data: no such folder /d\n  and more"),
        ("Traceback (most recent call last):\nNameError: name 'x'\n", "", "NameError: name 'x'"),
        ("error: an early one\nlines\nerror: the last\n", "", "the last"),
    ],
)
def test_follow__a_failed_job_is_an_error_with_its_cause(
    job: FakeJobServer, said: str, message: str, cause: str
) -> None:
    job.log += said
    job.status, job.message = "FAILED", message
    with pytest.raises(UserError) as raised:
        job_log(job.address, JOB, follow=True, log=lambda _line: None)
    assert str(raised.value) == f"job {JOB} failed: {cause}"


def test_log__without_follow_is_what_there_is(job: FakeJobServer) -> None:
    lines: list[str] = []
    job_log(job.address, JOB, follow=False, log=lines.append)
    assert lines == OPENING
    with pytest.raises(UserError, match="knows no job other"):
        job_log(job.address, "other", follow=False, log=lines.append)
    job.log, job.status = "", "PENDING"
    job_log(job.address, JOB, follow=False, log=lines.append)
    assert lines[len(OPENING) :] == [f"job {JOB} has not started yet"]


def test_lines__cut_anywhere_and_sent_again() -> None:
    text = "".join(f"{index}\n" for index in range(100)) + "partial"
    for size in (1, 3, 1000):
        passed: list[str] = []
        lines = LogLines(passed.append)
        lines.feed(text[:50])
        lines.restart()
        for start in range(0, len(text), size):
            lines.feed(text[start : start + size])
        assert passed == [str(index) for index in range(100)]
        lines.end()
        assert passed[-1] == "partial"


def test_cancel__waits_and_passes_on_what_the_job_still_says(job: FakeJobServer) -> None:
    lines: list[str] = []
    ended = cancel_job(job.address, JOB, lines.append)
    assert ended.status == "STOPPED"
    assert lines == [f"asked job {JOB} to end", "terminated"]
    with pytest.raises(UserError, match=rf"job {JOB} has ended already \(stopped\); there is nothing to cancel"):
        cancel_job(job.address, JOB, lines.append)
