"""Commands about the runs of flows."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output


def runs(workspace: Workspace = WORKSPACE, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """List the runs of flows, newest first."""
    from flows import present
    from pipeline.runs import list_runs
    from pipeline.tracking import Tracking

    found = list_runs(Tracking.for_workspace(workspace, tracking_uri))
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
    from flows import present
    from pipeline.runs import run_tree
    from pipeline.tracking import Tracking

    tree = run_tree(Tracking.for_workspace(workspace, tracking_uri), run_id, records=as_json)
    with facts_output(as_json) as (console, give):
        console.print(present.run_tree_view(tree))
        give(tree.model_dump(mode="json"))
