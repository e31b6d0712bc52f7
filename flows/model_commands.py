"""Commands about registered models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output


def models(
    name: Annotated[str | None, typer.Argument(help="One registered model; default: all.")] = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """List registered models with aliases, scores and costs."""
    from flows import present
    from pipeline.models import list_models
    from pipeline.tracking import Tracking

    found = list_models(Tracking.for_workspace(workspace, tracking_uri), name)
    with facts_output(as_json) as (console, give):
        console.print(present.models_table(found))
        give([one.model_dump(mode="json") for one in found])


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME@champion, models:/NAME/3 or a folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where label maps and overlays go.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Segment images: a label PNG and a coloured overlay with legend for each."""
    import tempfile

    from pipeline.models import checkpoint_folder
    from pipeline.predict import predict_images
    from pipeline.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give), tempfile.TemporaryDirectory(prefix="segvit-predict-") as cache:
        folder = checkpoint_folder(tracking, model, cache)
        written = []
        for one in predict_images(folder, images, out, overwrite=overwrite):
            written.append(one.model_dump(mode="json"))
            shares = ", ".join(f"{label} {share:.1%}" for label, share in one.classes.items())
            console.print(f"{one.overlay}  {shares}", markup=False, soft_wrap=True)
        give(written)
