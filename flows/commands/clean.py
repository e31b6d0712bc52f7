"""The command that removes what a workspace does not need any more."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output

KEEP_RUNS = 5
UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
UNITS_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def clean(
    keep_runs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help=f"The latest N runs keep all they have; default: {KEEP_RUNS}, or 0 with --older-than or --max-size.",
        ),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="So do runs that ended less long ago, as 30d, 12h or 2w.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the others the oldest go first, until the workspace is as small: 20GB."),
    ] = None,
    versions: Annotated[
        bool,
        typer.Option("--versions", help="Registered versions without an alias go, too, if no run that stays has them."),
    ] = False,
    keep_champions: Annotated[
        int, typer.Option(metavar="N", min=0, help="With --versions: former champions that a rollback can go back to.")
    ] = 2,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only show what would go.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Remove what no run, version or alias needs: outputs, checkpoints, models, and what killed processes left.

    What models with an alias and their rollback need stays, and so does what running flows use. The history of all
    runs stays, too: parameters, metrics, logs and records.
    """
    from flows.present import clean as present
    from pipeline.cleaning.clean import carry_out, look_at, remove_sessions
    from pipeline.cleaning.plan import Limits, make_plan
    from pipeline.workflow.tracking import Tracking

    narrowed = older_than is not None or max_size is not None
    limits = Limits(
        keep_runs=(0 if narrowed else KEEP_RUNS) if keep_runs is None else keep_runs,
        older_than_s=measure("--older-than", older_than, UNITS_S, "30d, 12h or 2w") if older_than else 0.0,
        max_bytes=int(measure("--max-size", max_size, UNITS_BYTES, "20GB or 500MB")) if max_size else None,
        versions=versions,
        keep_champions=keep_champions,
    )
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    found = look_at(tracking, workspace)
    plan = make_plan(found, limits)
    with facts_output(as_json) as (console, give):
        console.print(present.plan_view(plan))
        sessions = remove_sessions(dry_run=not yes)
        console.print(present.sessions_line(sessions, removed=yes), markup=False)

        def log(line: str) -> None:
            console.print(line, markup=False, soft_wrap=True)

        gone = carry_out(tracking, found, limits, log) if yes else []
        remaining = look_at(tracking, workspace).files.num_bytes if yes else None
        log(present.ending(plan, gone, remaining))
        give(
            {
                **plan.model_dump(mode="json"),
                "dry_run": not yes,
                "removed": [one.model_dump(mode="json") for one in gone],
                "remaining_bytes": remaining,
                "ray_sessions": [{"folder": str(one.folder), "num_bytes": size} for one, size in sessions],
            }
        )


def measure(option: str, text: str, units: dict[str, int], example: str) -> float:
    """The number that `12h` or `20GB` stand for; raises UserError."""
    import re

    from pipeline.errors import UserError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2] not in units:
        raise UserError(f"{option} {text} must be a number with one of {', '.join(units)}, as {example}")
    return float(found[1]) * units[found[2]]
