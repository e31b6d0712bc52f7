"""What a job runs first, on the cluster: it takes the caller's variables, compares versions, and runs `segvit`.

A copy of this file travels with every job, for the cluster may have another release installed, or none. It needs the
standard library alone.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

MODULE = "segvit_job"
JOB_FILE = "segvit_job.json"
JOB_VARIABLE = "SEGVIT_JOB"
DISTRIBUTION = "segvit-pipeline"


def load_environment() -> None:
    """Give this process the caller's variables; Ray calls it in each of the job's workers before anything else.

    They come in a file of the job's package, because Ray writes the variables of a runtime environment to its logs.
    """
    os.environ.update(_read_job()["environment"])


def main(arguments: list[str]) -> None:
    """Run `segvit` with the arguments; exits with 1 where the cluster has another release than the caller relies on."""
    job = _read_job()
    os.environ.update(job["environment"])
    if problem := version_problem(job["version"]):
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    if "files" in job:
        # In a container nothing else travels.
        os.chdir(tempfile.mkdtemp(prefix="segvit-job-"))
        for name, text in job["files"].items():
            Path(name).write_text(text, encoding="utf-8")
    try:
        command = importlib.import_module("flows.cli").main
    except ImportError as error:
        print(
            f"error: {error} (for {sys.executable} on the cluster); install what is missing there, or start Ray with "
            "the directory of its own Python first in PATH",
            file=sys.stderr,
        )
        sys.exit(1)
    command(arguments)


def version_problem(wanted: str | None) -> str | None:
    """Why the installed release will not do, None where it does or where the source travels."""
    if wanted is None:
        return None
    try:
        found = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found = None
    if found == wanted:
        return None
    there = f"{DISTRIBUTION} {found}" if found else f"no {DISTRIBUTION}"
    return (
        f"the cluster has {there} installed and this job was submitted by {wanted}; install {wanted} there, "
        "or send the source along: --code source"
    )


def _read_job() -> dict[str, Any]:
    if JOB_VARIABLE in os.environ:
        content = base64.b64decode(os.environ[JOB_VARIABLE])
    else:
        file = Path(__file__).with_name(JOB_FILE)
        with suppress(PermissionError):
            # Ray unpacks it for every user of the node to read.
            file.chmod(0o600)
        content = file.read_bytes()
    job: dict[str, Any] = json.loads(content)
    return job


if __name__ == "__main__":
    main(sys.argv[1:])
