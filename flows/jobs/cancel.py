"""Stopping a job from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.job_submission import JobDetails, JobStatus

from flows.jobs.server import connect, last_line
from pipeline.errors import UserError

POLL_S = 1.0
STOP_TIMEOUT_S = 60.0


def cancel_job(address: str | None, job: str, log: Callable[[str], None]) -> JobDetails:
    """Ask a job to end, and wait until it has; returns how it ended. Its flow marks its runs before it ends.

    `log` gets what the job still says.

    Raises:
        UserError: there is no such job or server, it has ended already, or has not after STOP_TIMEOUT_S.
    """
    server = connect(address)
    info = server.find(job, log)
    if info.status.is_terminal():
        raise UserError(f"job {job} has ended already ({info.status.lower()}); there is nothing to cancel")
    said = server.patiently(lambda: server.get_job_logs(job), log)
    try:
        server.patiently(lambda: server.stop_job(job), log)
    except RuntimeError as error:
        raise UserError(f"job {job} cannot be stopped ({last_line(str(error))})") from error
    log(f"asked job {job} to end")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not (info := server.find(job, log)).status.is_terminal():
        if time.monotonic() > deadline:
            raise UserError(
                f"job {job} has not ended after {STOP_TIMEOUT_S:.0f} s; the request stands: look again with "
                f"segvit jobs --address {server.address}"
            )
        time.sleep(POLL_S)
    for line in server.patiently(lambda: server.get_job_logs(job), log)[len(said) :].splitlines():
        log(line)
    if info.status != JobStatus.STOPPED:
        log(f"job {job} had ended by itself ({info.status.lower()})")
    return info
