"""Commands about registered models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output

Name = Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Decide and check everything; write nothing.")]


def models(
    name: Annotated[str | None, typer.Argument(help="One registered model; default: all.")] = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """List registered models with aliases, scores and costs."""
    from flows.present import runs as present
    from pipeline.registry.models import list_models
    from pipeline.workflow.tracking import Tracking

    found = list_models(Tracking.for_workspace(workspace, tracking_uri), name)
    with facts_output(as_json) as (console, give):
        console.print(present.models_table(found))
        give([one.model_dump(mode="json") for one in found])


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="The version that is to become champion.")],
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON as an experiment's `promote`; default: the version's own."),
    ] = None,
    dry_run: DryRun = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Ask the gate about a version, and make it champion if it passes; exit code 1 if it does not."""
    from flows.present import models as present_models
    from pipeline.registry import store
    from pipeline.registry.models import require_model
    from pipeline.registry.policy_file import choose_policy
    from pipeline.registry.promote import promote_version
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    require_model(tracking, name)
    candidate = store.get_version(tracking, name, version)
    chosen = choose_policy(tracking, candidate, policy)
    with facts_output(as_json) as (console, give):
        console.print(f"policy: {chosen.source}", markup=False, soft_wrap=True)
        decision = promote_version(tracking, candidate, chosen.policy, manual=True, dry_run=dry_run)
        console.print(present_models.checks_table(decision))
        lead = "dry run, nothing written: " if dry_run else ""
        console.print(lead + decision.reason, markup=False, soft_wrap=True)
        give({**decision.model_dump(mode="json"), "policy_source": chosen.source, "dry_run": dry_run})
    if decision.champion_after != version:
        raise typer.Exit(1)


def rollback(
    name: Name,
    dry_run: DryRun = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Make the champion before this one champion again; no flow promotes the version that is withdrawn."""
    from pipeline.registry.models import require_model
    from pipeline.registry.promote import roll_back
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    require_model(tracking, name)
    with facts_output(as_json) as (console, give):
        done = roll_back(tracking, name, dry_run=dry_run)
        for one in done.skipped:
            console.print(f"skipped version {one.version}: {one.reason}", markup=False, soft_wrap=True)
        left = "none" if done.champion_before is None else f"version {done.champion_before}"
        lead = "dry run, nothing written: " if dry_run else ""
        console.print(
            f"{lead}champion of {name}: version {done.champion_after}, before {left}; {done.check.detail}",
            markup=False,
            soft_wrap=True,
        )
        give({**done.model_dump(mode="json"), "dry_run": dry_run})


def compare(
    name: Name,
    first: Annotated[int, typer.Argument(metavar="V1", help="A version.")],
    second: Annotated[int, typer.Argument(metavar="V2", help="The version to measure against it.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a page with overlays of the images that differ most there."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Compare two versions of a model: overall, by class, image by image, and how sure the difference is."""
    from flows.present import models as present_models
    from pipeline.registry.compare import compare_versions
    from pipeline.registry.models import require_model
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    require_model(tracking, name)
    comparison = compare_versions(tracking, name, first, second)
    with facts_output(as_json) as (console, give):
        console.print(present_models.comparison_view(comparison))
        files: list[str] = []
        note = None
        if out is not None:
            from pipeline.reports.comparison_page import write_comparison

            written = write_comparison(tracking, comparison, out, overwrite)
            files, note = [str(file) for file in written.files], written.note
            for line in [*files, *([note] if note else [])]:
                console.print(line, markup=False, soft_wrap=True)
        give({**comparison.model_dump(mode="json"), "files": files, "note": note})
