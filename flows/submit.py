"""Submitting an experiment to a Ray cluster as a job, and following it to its end."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONFIG_NAME = "experiment.yaml"
STARTING_CLUSTER_S = 60.0
POLL_S = 1.0


def submit_experiment(
    config: Path,
    overrides: Sequence[str],
    *,
    address: str,
    workspace: str,
    tracking_uri: str | None,
    log: Callable[[str], None],
) -> str:
    """Run `segvit run` as a job on the cluster whose job server is at `address`; returns the job's id.

    Only the experiment file travels; the project is installed on the cluster. `log` gets the log as it comes.

    Raises:
        UserError: the config is wrong, the address does not answer, or the job did not succeed.
    """
    if "://" not in workspace and not Path(workspace).is_absolute():
        raise UserError(
            f"workspace {workspace} is relative, but a job runs elsewhere; "
            "give an absolute path that all nodes share, or a URI"
        )
    if not config.is_file():
        raise UserError(f"config {config} cannot be read (no such file); check the path")
    client = connect(address)
    command = ["python", "-m", "flows.cli", "run", CONFIG_NAME, "--workspace", workspace]
    command += [word for override in overrides for word in ("--set", override)]
    command += ["--tracking-uri", tracking_uri] if tracking_uri else []
    with tempfile.TemporaryDirectory(prefix="segvit-submit-") as folder:
        shutil.copyfile(config, Path(folder) / CONFIG_NAME)
        job_id = _submit_job(client, shlex.join(command), folder)
    log(f"job {job_id} submitted to {address}")
    try:
        asyncio.run(_follow_log(client, job_id, log))
    except RuntimeError as error:
        log(f"the log cannot be followed ({_first_line(error)}); waiting for the job to end")
    info = _wait_for_end(client, job_id)
    if info.status != "SUCCEEDED":
        # Read whole, for following it may end before its last lines are there.
        lines = client.get_job_logs(job_id).splitlines()
        causes = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        cause = "\n".join(lines[causes[-1] :]) if causes else info.message or "no cause given"
        raise UserError(f"job {job_id} {info.status.lower()}: {cause.removeprefix('error: ')}")
    return job_id


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server; raises UserError where none answers or it refuses the token."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"address {address!r} is no job server; it looks like http://127.0.0.1:8265")
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise UserError(
            f"no job server answers at {address} ({_first_line(error)}); start the cluster, forward its port 8265, "
            "correct the address, or give the cluster's token (RAY_AUTH_TOKEN_PATH)"
        ) from error


def _submit_job(client: JobSubmissionClient, command: str, folder: str) -> str:
    """Submit, again while the cluster is still starting and has no node that takes jobs; returns the job's id."""
    deadline = time.monotonic() + STARTING_CLUSTER_S
    while True:
        try:
            job_id: str = client.submit_job(entrypoint=command, runtime_env={"working_dir": folder})
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster at {client.get_address()} takes no job ({_first_line(error)}); "
                    "look at its state with: ray status"
                ) from error
            time.sleep(POLL_S)
        else:
            return job_id


def _wait_for_end(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """The job's details once it has ended, which may be a little after its log has."""
    while True:
        info: JobDetails = client.get_job_info(job_id)
        if info.status.is_terminal():
            return info
        time.sleep(POLL_S)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


async def _follow_log(client: JobSubmissionClient, job_id: str, log: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(job_id):
        for line in text.splitlines():
            log(line)
