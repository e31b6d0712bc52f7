"""The command that looks at a search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output


def search(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, its beginning, or 'latest'.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write plots of the trials and a page that shows them there."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show the trials of a run's search, the best first, also while it runs or after it was killed."""
    from flows.present.search import search_view
    from pipeline.reports.search_page import write_search_report
    from pipeline.tuning.view import load_search
    from pipeline.workflow.tracking import Tracking

    summary = load_search(Tracking.for_workspace(workspace, tracking_uri), run_id)
    with facts_output(as_json) as (console, give):
        console.print(search_view(summary))
        files = write_search_report(summary, out, overwrite) if out is not None else []
        for file in files:
            console.print(str(file), markup=False, soft_wrap=True)
        give({**summary.model_dump(mode="json"), "files": [str(file) for file in files]})
