"""The jobs that a cluster knows."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import NamedTuple

from ray.job_submission import JobDetails, JobStatus, JobType

from flows.jobs.follow import cause_of_end
from flows.jobs.server import connect

PATIENCE_S = 10.0


class JobSummary(NamedTuple):
    """One job.

    Attributes:
        job: its id.
        state: pending, running, succeeded, failed or stopped.
        started: UTC, ISO 8601; empty while it is pending.
        flow, user, workspace, code: as it was submitted; empty for jobs that `segvit submit` did not submit.
        message: why it failed, in a line.
    """

    job: str
    state: str
    started: str
    seconds: float
    flow: str
    user: str
    workspace: str
    code: str
    message: str


def list_jobs(address: str | None) -> list[JobSummary]:
    """The jobs that were submitted to the cluster, newest first; raises UserError where its server does not answer."""
    server = connect(address)
    found = server.patiently(server.list_jobs, lambda _line: None, PATIENCE_S)
    jobs = [info for info in found if info.type == JobType.SUBMISSION]
    return [_summary(info) for info in sorted(jobs, key=lambda info: info.start_time or 0, reverse=True)]


def _summary(info: JobDetails) -> JobSummary:
    told = info.metadata or {}
    started, ended = (info.start_time or 0) / 1000, (info.end_time or 0) / 1000
    failed = info.status == JobStatus.FAILED
    return JobSummary(
        job=info.submission_id or info.job_id or "",
        state=info.status.value.lower(),
        started=datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds") if started else "",
        seconds=max(0.0, (ended or time.time()) - started) if started else 0.0,
        flow=told.get("segvit.flow", ""),
        user=told.get("segvit.user", ""),
        workspace=told.get("segvit.workspace", ""),
        code=told.get("segvit.code", ""),
        # Of a failed job, the server keeps its log's last lines.
        message=" ".join(cause_of_end(info, (info.message or "").splitlines()).split()) if failed else "",
    )
