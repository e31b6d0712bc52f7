"""The command line: thin verbs over experiment files, runs and models."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import UserError

app = typer.Typer(
    name="segvit",
    help="Train, tune and ship plain-ViT segmentation models, on a laptop or on a Ray cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Experiment file; see flows/configs.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a setting; may be given often.")
]
Workspace = Annotated[
    str,
    typer.Option(envvar="SEGVIT_WORKSPACE", metavar="DIR", help="Where steps keep their outputs: a folder or a URI."),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(envvar="MLFLOW_TRACKING_URI", metavar="URI", help="MLflow store; default: a file in the workspace."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON on standard output, all else on error.")]

WORKSPACE = ".segvit"
PLAIN_WIDTH = 160


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run an experiment from raw images to a promoted model; what is finished already is reused."""
    from flows import present
    from flows.segmentation import segmentation
    from pipeline.config_file import load_config
    from pipeline.tracking import Tracking
    from pipeline.workflow import Flow

    experiment = load_config(config, overrides)
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with _facts(as_json) as (console, give):
        flow = Flow(
            workspace,
            tracking,
            experiment.name,
            experiment,
            runtime=experiment.runtime,
            on_event=lambda event: present.print_event(console, event),
        )
        with flow:
            refs = segmentation(flow, experiment)
        evaluations = {name: flow.result(ref) for name, ref in refs.evaluations.items()}
        versions = {name: flow.result(ref) for name, ref in refs.versions.items()}
        decision, report = flow.result(refs.decision), flow.result(refs.report)
        console.print(present.variants_table(list(evaluations.values()), versions, decision))
        console.print(f"decision  {decision.reason}", markup=False, soft_wrap=True)
        console.print(f"report    {report.uri}", markup=False, soft_wrap=True)
        console.print(f"MLflow    {_tracking_view(tracking.uri)}", markup=False, soft_wrap=True)
        give(
            {
                "run_id": flow.run_id,
                "evaluations": {name: one.model_dump(mode="json") for name, one in evaluations.items()},
                "versions": {name: one.version for name, one in versions.items()},
                "decision": decision.model_dump(mode="json"),
                "report": report.uri,
                "tracking_uri": tracking.uri,
            }
        )


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show an experiment's steps as a tree, each cached or to run; nothing is executed."""
    from flows import present
    from flows.segmentation import segmentation
    from pipeline.config_file import load_config
    from pipeline.recipe import Plan
    from pipeline.tracking import Tracking

    experiment = load_config(config, overrides)
    planned = Plan(workspace, Tracking.for_workspace(workspace, tracking_uri))
    with planned:
        segmentation(planned, experiment)
    with _facts(as_json) as (console, give):
        console.print(present.plan_tree(experiment.name, planned.steps, planned.complete))
        give([step.model_dump(mode="json") for step in planned.steps])


@app.command()
def runs(workspace: Workspace = WORKSPACE, tracking_uri: TrackingUri = None, as_json: Json = False) -> None:
    """List the runs of flows, newest first."""
    from flows import present
    from pipeline.runs import list_runs
    from pipeline.tracking import Tracking

    found = list_runs(Tracking.for_workspace(workspace, tracking_uri))
    with _facts(as_json) as (console, give):
        console.print(present.runs_table(found))
        give([one.model_dump(mode="json") for one in found])


@app.command()
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
    with _facts(as_json) as (console, give):
        console.print(present.run_tree_view(tree))
        give(tree.model_dump(mode="json"))


@app.command()
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
    with _facts(as_json) as (console, give):
        console.print(present.models_table(found))
        give([one.model_dump(mode="json") for one in found])


@app.command()
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
    with _facts(as_json) as (console, give), tempfile.TemporaryDirectory(prefix="segvit-predict-") as cache:
        folder = checkpoint_folder(tracking, model, cache)
        written = []
        for one in predict_images(folder, images, out, overwrite=overwrite):
            written.append(one.model_dump(mode="json"))
            shares = ", ".join(f"{label} {share:.1%}" for label, share in one.classes.items())
            console.print(f"{one.overlay}  {shares}", markup=False, soft_wrap=True)
        give(written)


@app.command()
def data(
    shard_set: Annotated[str, typer.Argument(metavar="SHARDSET", help="A shard set's folder or URI.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write class bars, samples with overlays and a page there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a shard set holds: images and pixels of every class in every split."""
    from flows import present
    from pipeline.data_report import load_facts, write_data_report

    facts = load_facts(shard_set)
    with _facts(as_json) as (console, give):
        console.print(present.data_view(facts))
        files = write_data_report(facts, out, overwrite) if out is not None else []
        for file in files:
            console.print(str(file), markup=False, soft_wrap=True)
        give({**facts.model_dump(mode="json"), "files": [str(file) for file in files]})


@app.command()
def flops(
    presets: Annotated[list[str] | None, typer.Argument(metavar="PRESET...", help="Names of presets.")] = None,
    published: Annotated[bool, typer.Option("--published", help="The published models, at their own crops.")] = False,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the image in pixels; default: the preset's crop.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count multiply-adds, parameters and activation memory of presets, without weights."""
    from flows import present
    from segvit.flops import preset_cost
    from segvit.presets import published_names

    if published == bool(presets):
        raise UserError("name one preset or more, or use --published for the published models, not both")
    if published and size:
        raise UserError(f"--size {size} has no meaning with --published, whose figures are for their own crops")
    pixels = _parse_size(size) if size is not None else None
    try:
        rows = [preset_cost(name, pixels) for name in presets or published_names()]
    except ValueError as error:
        raise UserError(str(error)) from error
    with _facts(as_json) as (console, give):
        console.print(present.costs_view(rows))
        give([asdict(row) for row in rows])


@app.command()
def submit(
    config: Config,
    address: Annotated[str, typer.Option(metavar="URL", help="The cluster's job server, as http://127.0.0.1:8265.")],
    workspace: Annotated[
        str, typer.Option(metavar="DIR", help="Where steps keep their outputs; all nodes must reach it.")
    ],
    overrides: Overrides = None,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow store as the cluster's head sees it.")
    ] = None,
) -> None:
    """Run an experiment as a job on a Ray cluster, following its log; fails when the job does."""
    from flows.submit import submit_experiment

    submit_experiment(
        config,
        overrides or [],
        address=address,
        workspace=workspace,
        tracking_uri=tracking_uri,
        say=lambda line: print(line, flush=True),
    )


@contextmanager
def _facts(as_json: bool) -> Iterator[tuple[Console, Any]]:
    """A console for people and a function that takes the facts; only one of them reaches standard output.

    With JSON, whatever else is printed, by child processes too, goes to standard error.
    """
    if not as_json:
        # Not a terminal: no 80 columns that cut tables.
        yield Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH), lambda _facts: None
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    collected: list[Any] = []
    try:
        yield Console(file=sys.stderr), collected.append
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    for facts in collected:
        print(json.dumps(facts, indent=2, allow_nan=False))


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not match:
        raise UserError(f"--size {text!r} is not of the form HxW in pixels, such as --size 512x768")
    return int(match[1]), int(match[2])


def _tracking_view(uri: str) -> str:
    if uri.startswith("sqlite:"):
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}, then http://127.0.0.1:5000"
    return uri


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: mistakes give one message and exit code 1, usage errors 2, Ctrl-C 130."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except SystemExit as ended:
        # Typer ends the process after success, too.
        if ended.code:
            raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
