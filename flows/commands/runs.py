"""Commands about the runs of flows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.workflow.tracking import Tracking


def runs(workspace: Workspace = WORKSPACE, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """List the runs of flows, newest first."""
    from flows.present import runs as present
    from pipeline.workflow.run_sizes import with_sizes
    from pipeline.workflow.runs import list_runs
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    found = with_sizes(tracking, list_runs(tracking))
    with facts_output(as_json) as (console, give):
        console.print(present.runs_table(found))
        give([one.model_dump(mode="json") for one in found])


def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its beginning, or 'latest'.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Show it as it goes on until it ends; fails unless it finished.")
    ] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show a run's steps: state, duration, progress, cause of failure."""
    from flows.present import runs as present
    from pipeline.workflow.runs import run_tree
    from pipeline.workflow.tracking import RunState, Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give):
        if follow:
            run_id = _follow(console, tracking, run_id)
        tree = run_tree(tracking, run_id, records=as_json)
        if not follow:
            console.print(present.run_tree_view(tree))
        give(tree.model_dump(mode="json"))
    if follow and tree.run.state != RunState.FINISHED:
        raise typer.Exit(1)


def _follow(console: Console, tracking: Tracking, run_id: str) -> str:
    """Show the run until it ends; returns its whole id."""
    from flows.present.following import show_looks
    from pipeline.workflow.following import follow_run

    try:
        return show_looks(console, follow_run(tracking, run_id)).run.run_id
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no longer followed; the flow goes on") from None


def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run's id, its beginning, or 'latest'; or a job.")],
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The job server of the cluster, where a job is to end.")
    ] = None,
) -> None:
    """End a running flow, wherever its driver is, or a job; a later run goes on with what had finished."""
    with facts_output(as_json) as (console, give):

        def log(line: str) -> None:
            console.print(line, markup=False, soft_wrap=True)

        if address is not None:
            from flows.jobs.cancel import cancel_job

            job = cancel_job(address, run_id, log)
            log(f"job {run_id} is {job.status.lower()}")
            give({"job": run_id, "state": job.status.lower()})
            return
        from pipeline.workflow.runs import cancel_run
        from pipeline.workflow.tracking import Tracking, current_user

        ended = cancel_run(Tracking.for_workspace(workspace, tracking_uri), run_id, current_user(), log=log)
        log(f"run {ended.run_id[:12]} of flow {ended.flow} is {ended.state} ({ended.error or 'it ended by itself'})")
        give(ended.model_dump(mode="json"))
