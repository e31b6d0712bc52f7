"""Submitting an experiment to a Ray cluster as a job: checked here, sent with its source, followed to its end."""

from __future__ import annotations

import base64
import json
import secrets
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from flows.experiment import Experiment, parse_experiment
from flows.jobs import environment, start
from flows.jobs.code import Code
from flows.jobs.follow import follow_job, how_to_go_on
from flows.jobs.preflight import ask_resources, cluster_findings
from flows.jobs.server import JobServer, ServerAwayError, connect, last_line
from flows.jobs.source import EXPERIMENT_FILE, Source, find_source, release, write_folder
from pipeline.config.file import expand_variables, read_tree, variables_in
from pipeline.errors import UserError
from pipeline.workflow.tracking import current_user

STARTING_CLUSTER_S = 60.0
# A flow that is asked to end marks its runs first; see flows.ending.
STOP_WAIT_S = 15


class Request(NamedTuple):
    """What a job is to run and where.

    Attributes:
        overrides: `a.b=c` each.
        workspace: an absolute path that all nodes share, or a URI.
        tracking_uri: the MLflow store as the cluster sees it; None: the caller's where the cluster can reach it.
        variables: `NAME` or `NAME=VALUE` each, beside those of `runtime.env`.
        code: whose code it runs.
        image: a container image to run in, with the code that it holds; None: the nodes themselves.
    """

    config: Path
    overrides: Sequence[str]
    workspace: str
    tracking_uri: str | None = None
    variables: Sequence[str] = ()
    code: Code = Code.AUTO
    image: str | None = None


def submit_experiment(address: str | None, request: Request, *, wait: bool, log: Callable[[str], None]) -> str:
    """Run `segvit run` as a job on the cluster whose job server is at `address`; returns the job's id.

    Nothing is sent before the experiment was checked and fits the cluster. With `wait`, `log` gets the job's log.

    Raises:
        UserError: the experiment is wrong, does not fit the cluster, the server does not answer, or the job did not
            succeed.
        KeyboardInterrupt: Ctrl-C while it is followed; the job goes on.
    """
    _check_workspace(request.workspace)
    experiment, variables, notes = _checked(request)
    source = _source(request)
    if source.left_out:
        notes.append(f"{', '.join(source.left_out)} cannot travel and must be installed on the cluster")
    server = connect(address)
    problems, more = cluster_findings(experiment.config.runtime, ask_resources(server))
    if problems:
        raise UserError("\n  ".join([f"{request.config} does not fit the cluster at {server.address}", *problems]))
    for note in (*notes, *more):
        log(f"note: {note}")
    job = job_name(experiment.config.name)
    try:
        _send(server, job, experiment.config.name, request, source, variables, log)
    except KeyboardInterrupt:
        going_on = how_to_go_on(server.address, job)
        raise KeyboardInterrupt(f"interrupted while job {job} was sent; it may run\n{going_on}") from None
    log(f"job {job} submitted to {server.address}: {source}")
    if wait:
        follow_job(server, job, log)
    else:
        log(how_to_go_on(server.address, job))
    return job


def job_name(experiment: str) -> str:
    """A job's id: whose, when (UTC), and four signs that set it apart from others of that second."""
    return f"{experiment}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _check_workspace(workspace: str) -> None:
    if "://" not in workspace and not Path(workspace).is_absolute():
        raise UserError(
            f"workspace {workspace} is relative, but a job runs elsewhere; "
            "give an absolute path that all nodes share, or a URI"
        )


def _checked(request: Request) -> tuple[Experiment, dict[str, str], list[str]]:
    """The experiment, the variables that go with it, and what its user may want to know."""
    tree = read_tree(request.config, request.overrides, expand=False)
    runtime = tree.get("runtime")
    listed = runtime.get("env") if isinstance(runtime, dict) else None
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    variables = environment.asked_environment(request.variables, names)
    experiment = _parse(tree, variables, str(request.config))
    experiment.check(None)
    if problems := environment.path_problems(experiment.config, variables):
        raise UserError("\n  ".join([f"{request.config}: {len(problems)} problem(s)", *problems]))
    notes = environment.notes_on_paths(experiment.config, variables)
    notes += environment.notes_on_variables(variables_in(tree), variables)
    if environment.TRACKING_VARIABLE not in variables or request.tracking_uri:
        uri, note = environment.tracking_store(request.tracking_uri)
        if uri:
            variables[environment.TRACKING_VARIABLE] = uri
        notes += [note] if note else []
    if request.image and variables:
        notes.append(
            f"with --image the values of {', '.join(variables)} are readable in Ray's job information and logs"
        )
    return experiment, variables, notes


def _parse(tree: dict[str, Any], variables: Mapping[str, str], source: str) -> Experiment:
    """The experiment with the variables that are sent; others are the cluster's to fill in."""
    try:
        return parse_experiment(expand_variables(tree, variables), source)
    except UserError as error:
        waiting = [name for name in sorted(variables_in(tree)) if f"${{{name}}}" in str(error)]
        if not waiting:
            raise
        raise UserError(
            f"{error}\n  the cluster fills in {', '.join(waiting)}, which goes for text only; send it along: --env NAME"
        ) from error


def _source(request: Request) -> Source:
    if request.image is None:
        return find_source(request.code)
    if request.code is Code.SOURCE:
        raise UserError("--code source does not go with --image: Ray runs a container with the code that it holds")
    return Source({}, {}, (), "", release())


def _send(
    server: JobServer,
    job: str,
    flow: str,
    request: Request,
    source: Source,
    variables: Mapping[str, str],
    log: Callable[[str], None],
) -> None:
    run = ["run", EXPERIMENT_FILE, "--workspace", request.workspace]
    run += [word for override in request.overrides for word in ("--set", override)]
    experiment = request.config.read_bytes()
    described = {"flow": flow, "user": current_user(), "workspace": request.workspace}
    metadata = {f"segvit.{key}": value for key, value in {**described, "code": str(source)}.items()}
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    if request.image is not None:
        content = {"version": source.version, "environment": {}, "files": {EXPERIMENT_FILE: experiment.decode()}}
        packed = base64.b64encode(json.dumps(content).encode()).decode()
        runtime_env: dict[str, Any] = {
            "image_uri": request.image,
            "env_vars": {**variables, **stop, start.JOB_VARIABLE: packed},
        }
        _post(server, job, ["python", "-m", start.__name__, *run], runtime_env, metadata, log)
        return
    with tempfile.TemporaryDirectory(prefix="segvit-submit-") as folder:
        write_folder(Path(folder), source, experiment, variables)
        runtime_env = {
            "working_dir": folder,
            "env_vars": stop,
            "worker_process_setup_hook": f"{start.MODULE}.{start.load_environment.__name__}",
        }
        _post(server, job, ["python", f"{start.MODULE}.py", *run], runtime_env, metadata, log)


def _post(
    server: JobServer,
    job: str,
    command: Sequence[str],
    runtime_env: Mapping[str, Any],
    metadata: dict[str, str],
    log: Callable[[str], None],
) -> None:
    """Submit, again while the server is away or the cluster still starts; a request that arrived counts once."""

    def submit() -> None:
        try:
            server.submit_job(
                entrypoint=shlex.join(command), submission_id=job, runtime_env=dict(runtime_env), metadata=metadata
            )
        except (ServerAwayError, RuntimeError):
            # The answer may have been lost, and not the request.
            if not _has_arrived(server, job):
                raise

    try:
        server.patiently(submit, log, STARTING_CLUSTER_S)
    except UserError as error:
        raise UserError(
            f"job {job} was not taken: {error}; look at the cluster's state with: ray status, and whether the job "
            f"is there with: segvit jobs --address {server.address}"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the cluster at {server.address} takes no job ({last_line(str(error))})") from error


def _has_arrived(server: JobServer, job: str) -> bool:
    try:
        server.get_job_info(job)
    except RuntimeError:
        return False
    return True
