"""A job's log as it grows, each line once, over connections that break; and the job's end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import aiohttp
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus

from flows.jobs.server import FIRST_DELAY_S, LAST_DELAY_S, JobServer, ServerAwayError, connect, last_line
from pipeline.errors import UserError

SILENCE_S = 60.0
"""A connection that has brought nothing for as long is made anew: it may be dead without either end knowing."""
KEPT_LINES = 200


def job_log(address: str | None, job: str, *, follow: bool, log: Callable[[str], None]) -> None:
    """Pass a job's log to `log`, a line a call; with `follow` until the job ends.

    Raises:
        UserError: there is no such job or server, or it was away for too long; with `follow`, also where the job did
            not succeed.
    """
    server = connect(address)
    info = server.find(job, log)
    if follow:
        follow_job(server, job, log)
        return
    lines = LogLines(log)
    lines.feed(server.patiently(lambda: server.get_job_logs(job), log))
    lines.end()
    if not lines.last and info.status == JobStatus.PENDING:
        log(f"job {job} has not started yet")


def follow_job(server: JobServer, job: str, log: Callable[[str], None]) -> None:
    """Pass the job's log to `log` until the job has ended.

    Raises:
        UserError: the job did not succeed: its cause in a line; or the server was away for too long.
        KeyboardInterrupt: Ctrl-C, with how to go on: the job does.
    """
    lines = LogLines(log)
    try:
        info = _follow(server, job, lines, log)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; job {job} goes on\n{how_to_go_on(server.address, job)}") from None
    except UserError as error:
        if not isinstance(error.__cause__, ServerAwayError | RayError):
            raise
        going_on = how_to_go_on(server.address, job)
        raise UserError(f"job {job} is no longer followed, and may run on: {error}\n{going_on}") from error
    if info.status != JobStatus.SUCCEEDED:
        raise UserError(f"job {job} {info.status.lower()}: {cause_of_end(info, lines.last)}")


def how_to_go_on(address: str, job: str) -> str:
    """The commands that follow and that stop a job."""
    return (
        f"  follow it: segvit logs {job} --address {address} --follow\n"
        f"  stop it:   segvit cancel {job} --address {address}"
    )


def cause_of_end(info: JobDetails, last_lines: list[str]) -> str:
    """Why a job ended as it did: its log's last `error: ` with the lines that belong to it, else its last line."""
    starts = [index for index, line in enumerate(last_lines) if line.startswith("error: ")]
    if starts:
        return "\n".join(last_lines[starts[-1] :]).removeprefix("error: ")
    if info.status == JobStatus.STOPPED:
        return "it was stopped"
    return last_line("\n".join(last_lines)) if info.driver_exit_code else last_line(info.message or "no cause given")


class LogLines:
    """Whole lines of a log that is sent from its beginning, again and again; each is passed on once.

    Attributes:
        num_passed: characters of the lines that were passed on.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._last: deque[str] = deque(maxlen=KEPT_LINES)
        self.num_passed = 0
        self._to_skip = 0
        self._partial = ""

    @property
    def last(self) -> list[str]:
        """The last lines, oldest first."""
        return list(self._last)

    def restart(self) -> None:
        """The log comes from its beginning again."""
        self._to_skip, self._partial = self.num_passed, ""

    def feed(self, text: str) -> None:
        """A further piece of the log, cut anywhere."""
        skipped = min(self._to_skip, len(text))
        self._to_skip -= skipped
        *lines, self._partial = (self._partial + text[skipped:]).split("\n")
        for line in lines:
            self._pass_on(line)

    def end(self) -> None:
        """No more comes: what there is of a last line is one."""
        if self._partial:
            self._pass_on(self._partial)
            self._partial = ""

    def _pass_on(self, line: str) -> None:
        self.num_passed += len(line) + 1
        self._last.append(line)
        self._log(line)


def _follow(server: JobServer, job: str, lines: LogLines, log: Callable[[str], None]) -> JobDetails:
    delay = FIRST_DELAY_S
    while True:
        broken, before = False, lines.num_passed
        lines.restart()
        try:
            asyncio.run(_tail(server, job, lines))
        except (TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
            broken = True
        info = server.find(job, log)
        if info.status.is_terminal():
            # Following may end before the last lines are there; a node that is gone has taken its log along.
            with suppress(ServerAwayError, RuntimeError):
                whole = server.get_job_logs(job)
                lines.restart()
                lines.feed(whole)
            lines.end()
            return info
        if broken:
            # Where only this kind of connection fails, as behind some proxies, the log is asked for as a whole.
            whole = server.patiently(lambda: server.get_job_logs(job), log)
            lines.restart()
            lines.feed(whole)
        delay = FIRST_DELAY_S if lines.num_passed > before else min(delay * 2, LAST_DELAY_S)
        time.sleep(delay)


async def _tail(server: JobServer, job: str, lines: LogLines) -> None:
    """Take what the server sends of the log, until it ends the connection or is silent."""
    stream = server.tail_job_logs(job)
    while True:
        arriving = asyncio.ensure_future(anext(stream, None))
        done, _ = await asyncio.wait({arriving}, timeout=SILENCE_S)
        if not done:
            arriving.cancel()
            return
        text = arriving.result()
        if text is None:
            return
        lines.feed(text)
