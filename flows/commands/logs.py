"""The command that shows what the steps of a run printed."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, TrackingUri, Workspace


def logs(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its beginning, or 'latest'.")],
    step: Annotated[
        str | None, typer.Option("--step", metavar="LABEL", help="One step, as `segvit show` names it; default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until the run has ended.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Show what the steps of a run printed, while they work and afterwards."""
    from flows.present.logs import print_logs
    from pipeline.workflow.run_logs import RunLogs
    from pipeline.workflow.tracking import Tracking

    print_logs(RunLogs(Tracking.for_workspace(workspace, tracking_uri), run_id, step), follow=follow)
