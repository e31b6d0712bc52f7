"""Commands about jobs on a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import Config, JobServerAddress, Json, Overrides, facts_output
from flows.jobs.code import Code


def submit(
    config: Config,
    workspace: Annotated[
        str, typer.Option(metavar="DIR", help="Where steps keep their outputs; all nodes must reach it.")
    ],
    address: JobServerAddress = None,
    overrides: Overrides = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow store as the cluster's head sees it; default: MLFLOW_TRACKING_URI, if others reach it.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="A variable of the caller for the job and its workers; may be given often, and as runtime.env in the "
            "experiment. Values travel in the job's package: they are in no command, log or job information, but "
            "whoever may run jobs on the cluster can read them.",
        ),
    ] = None,
    code: Annotated[
        Code,
        typer.Option(
            help="What the job runs: the source here, or the same release installed there; auto: the source from a "
            "checkout, else what is installed."
        ),
    ] = Code.AUTO,
    image: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Container image to run in, with the code in it; needs podman on the nodes."),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the job is submitted.")] = False,
) -> None:
    """Run an experiment as a job on a Ray cluster, following its log; fails when the job does."""
    from flows.jobs.submit import Request, submit_experiment

    request = Request(config, overrides or (), workspace, tracking_uri, env or (), code, image)
    submit_experiment(address, request, wait=not no_wait, log=lambda line: print(line, flush=True))


def jobs(address: JobServerAddress = None, as_json: Json = False) -> None:
    """List the jobs of a Ray cluster, newest first."""
    from flows.jobs.listing import list_jobs
    from flows.present.jobs import jobs_table

    found = list_jobs(address)
    with facts_output(as_json) as (console, give):
        console.print(jobs_table(found))
        give([one._asdict() for one in found])
