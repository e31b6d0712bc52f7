"""The command that shows what the steps of a run, or a job on a cluster, printed."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, TrackingUri, Workspace


def logs(
    run_id: Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run's id, its beginning, or 'latest'; or a job.")],
    step: Annotated[
        str | None, typer.Option("--step", metavar="LABEL", help="One step, as `segvit show` names it; default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until the run has ended.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The job server of the cluster, for the log of a job.")
    ] = None,
) -> None:
    """Show what the steps of a run, or a job on a cluster, printed, while they work and afterwards."""
    if address is not None:
        from flows.jobs.follow import job_log
        from pipeline.errors import UserError

        if step is not None:
            raise UserError(
                f"--step {step} is for runs, and {run_id} is a job, whose log holds all steps; leave --step or "
                "--address out"
            )
        job_log(address, run_id, follow=follow, log=lambda line: print(line, flush=True))
        return
    from flows.present.logs import print_logs
    from pipeline.workflow.run_logs import RunLogs
    from pipeline.workflow.tracking import Tracking

    print_logs(RunLogs(Tracking.for_workspace(workspace, tracking_uri), run_id, step), follow=follow)
