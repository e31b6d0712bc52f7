"""Commands that put a model to use: on images, in other runtimes, behind a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.commands.options import WORKSPACE, Json, TrackingUri, Workspace, facts_output

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="models:/NAME@champion, models:/NAME/3 or a checkpoint folder.")
]


def predict(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Image files, folders, quoted patterns, .zip and .tar archives; also as URLs.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where label maps and overlays go.")],
    no_overlays: Annotated[bool, typer.Option("--no-overlays", help="Write label maps alone.")] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Images of one size, or windows of one image, predicted at once.")
    ] = 1,
    precision: Annotated[
        Literal["bf16", "model"] | None,
        typer.Option(help="Compute in bf16 where the machine has it, or as the model is; default: as registered."),
    ] = None,
    coco: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Write all label maps as COCO annotations there, too.")
    ] = None,
    areas: Annotated[
        str | None, typer.Option(metavar="FILE.parquet", help="Write pixels and share of each class and image there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave images whose files exist: goes on where a run ended.")
    ] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Segment images: a label PNG and a coloured overlay with legend for each; exit code 1 if one of them failed."""
    import tempfile

    from flows.present.predictions import PredictionLog
    from pipeline.errors import UserError
    from pipeline.evaluation import label_tables
    from pipeline.evaluation.image_sources import list_images
    from pipeline.evaluation.predict import Segmenter, plan_predictions, predict_images
    from pipeline.registry.models import checkpoint_folder
    from pipeline.workflow.tracking import Tracking

    if overwrite and skip_existing:
        raise UserError("--overwrite replaces the files that --skip-existing keeps; give one of the two")
    if coco is not None and coco == areas:
        raise UserError(f"--coco and --areas both name {coco}; give each a file of its own")
    wanted = {coco: label_tables.write_coco, areas: label_tables.write_areas}
    tables = {uri: write for uri, write in wanted.items() if uri is not None}
    label_tables.check_targets(list(tables), replace=overwrite or skip_existing)
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give), tempfile.TemporaryDirectory(prefix="segvit-predict-") as cache:
        folder = checkpoint_folder(tracking, model, cache)
        images = list_images(sources)
        plan = plan_predictions(images, out, overlays=not no_overlays, overwrite=overwrite, skip_existing=skip_existing)
        segmenter = Segmenter(folder, precision)
        log = PredictionLog(console, plan)
        for one in predict_images(segmenter, plan.remaining, batch_size=batch_size):
            log.add(one)
        for uri, write in tables.items():
            label_tables.publish_table(uri, write, plan.tasks, segmenter.class_names)
            console.print(uri, markup=False, soft_wrap=True)
        log.end()
        give({**log.facts(), "coco": coco, "areas": areas})
    if log.failed:
        raise typer.Exit(1)


def export(
    model: Model,
    file_format: Annotated[
        Literal["onnx", "torch"], typer.Option("--format", help="An ONNX file, or a program of torch.export.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: NAME-VERSION.onnx or .pt2 in this folder.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Pixels of the images that it takes; default: as in training.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Write a model as one file for other runtimes; exit code 1, and no file, where it does not compute the same."""
    import tempfile

    from flows.commands.score import pixels
    from pipeline.registry.export_model import SUFFIXES, export_model
    from pipeline.registry.models import checkpoint_folder, resolve_model
    from pipeline.workflow.tracking import Tracking

    size = None if image_size is None else pixels("--image-size", image_size.replace(",", "x"))
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give), tempfile.TemporaryDirectory(prefix="segvit-export-") as cache:
        folder = checkpoint_folder(tracking, model, cache)
        version = resolve_model(tracking, model) if model.startswith("models:") else None
        stem = f"{version.name}-{version.version}" if version else folder.resolve().name
        exported = export_model(
            folder,
            f"models:/{version.name}/{version.version}" if version else None,
            file_format,
            out or Path(stem + SUFFIXES[file_format]),
            image_size=None if size is None else (size[0], size[1]),
            overwrite=overwrite,
        )
        height, width = exported.image_size
        for line in (
            *exported.files,
            f"images    {height}x{width} pixels, any number at once, uint8 RGB (B, 3, H, W)",
            f"parity    logits up to {exported.max_logit:.3g} differ by at most {exported.max_difference:.2g}; "
            f"{exported.equal_labels:.3%} of labels equal",
        ):
            console.print(line, markup=False, soft_wrap=True)
        if inference := exported.metadata.get("inference"):
            settings = ", ".join(f"{name} {value}" for name, value in inference.items())
            note = f"note      predict and serve use {settings}; the file takes an image whole, as it is"
            console.print(note, markup=False, soft_wrap=True)
        give(exported.model_dump(mode="json"))


def serve(
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 5001,
    host: Annotated[str, typer.Option(help="An address of this machine; others than loopback are open to all.")] = (
        "127.0.0.1"
    ),
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Answer images with label maps over HTTP, as `mlflow models serve` does, until SIGTERM or Ctrl-C."""
    import signal
    import sys
    import tempfile

    from pipeline.errors import UserError
    from pipeline.registry.serve import check_address, curl_line, scoring_server, served_folder, server_url
    from pipeline.workflow.tracking import Tracking

    if not check_address(host, port):
        print(f"warning: {host} is open to other machines, and the server asks for no password", file=sys.stderr)
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="segvit-serve-") as scratch:
            folder = served_folder(tracking, model, Path(scratch) / "model")
            with scoring_server(folder, host, port, Path(scratch)) as server:
                url = server_url(host, port)
                print(f"{model} answers at {url}; a grey image, say:\n{curl_line(url)}", flush=True)
                raise UserError(f"the server ended with code {server.wait()}; see its output above")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, former)
