"""Commands about the runs of flows."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output


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
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show a run's steps: state, duration, cause of failure."""
    from flows.present import runs as present
    from pipeline.workflow.runs import run_tree
    from pipeline.workflow.tracking import Tracking

    tree = run_tree(Tracking.for_workspace(workspace, tracking_uri), run_id, records=as_json)
    with facts_output(as_json) as (console, give):
        console.print(present.run_tree_view(tree))
        give(tree.model_dump(mode="json"))


def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its beginning, or 'latest'.")],
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """End a running flow, wherever its driver is; a later run goes on with what had finished."""
    from pipeline.workflow.runs import cancel_run
    from pipeline.workflow.tracking import Tracking, current_user

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give):

        def log(line: str) -> None:
            console.print(line, markup=False, soft_wrap=True)

        ended = cancel_run(tracking, run_id, current_user(), log=log)
        log(f"run {ended.run_id[:12]} of flow {ended.flow} is {ended.state} ({ended.error or 'it ended by itself'})")
        give(ended.model_dump(mode="json"))
