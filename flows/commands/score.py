"""Commands about models that exist already: scoring one, and registering it with its scores."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from flows.commands.options import WORKSPACE, Json, Overrides, TrackingUri, Workspace, facts_output

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="models:/NAME@champion, models:/NAME/3, a checkpoint folder or the authors' .pth file."
    ),
]


def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="An experiment file, for its data; a shard set's folder; or models:/NAME/3, as that was scored.",
        ),
    ],
    split: Annotated[str | None, typer.Option(help="The split that is scored; default: the experiment's.")] = None,
    resize: Annotated[
        str | None, typer.Option(metavar="LONGxSHORT", help="Resize images to such sides first, as 2048x640.")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="Average over these scales, as 0.5,0.75,1.0,1.25,1.5,1.75.")
    ] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Average with the mirror image.")] = None,
    window: Annotated[
        str | None, typer.Option(metavar="HxW", help="Slide a window of so many pixels; 'whole': no window.")
    ] = None,
    stride: Annotated[str | None, typer.Option(metavar="HxW", help="Steps of the window; default: 2/3 of it.")] = None,
    precision: Annotated[
        Literal["bf16", "model"] | None,
        typer.Option(help="Compute in bf16 where the machine has it, or as the model is."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of the experiment: the one that describes a .pth file; default: the only one.")
    ] = None,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Score a model on a data set: overall, by class and by image, beside the paper's figure where there is one.

    What a registered version scores is kept with it, for the gate and comparisons.
    """
    from dataclasses import asdict
    from pathlib import Path

    from flows import scoring
    from flows.experiment import load_experiment
    from flows.present import runs as present
    from flows.present import scores as present_scores
    from pipeline.errors import UserError
    from pipeline.evaluation.paper import figure_of
    from pipeline.workflow.flow import Flow, Plan
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    experiment = load_experiment(Path(data), overrides or ()) if scoring.is_experiment(data) else None
    if experiment is None and overrides:
        raise UserError(f"--set {overrides[0]} needs an experiment file; {data} is none")
    scored_before = data if scoring.is_registered(data) else model
    base = experiment.config.evaluate if experiment is not None else scoring.own_settings(tracking, scored_before)
    asked = {"split": split, "resize": resize, "scales": scales, "flip": flip, "window": window, "stride": stride}
    asked["precision"] = precision
    settings = evaluate_settings(base.model_dump(mode="json"), asked)
    with Plan(workspace, tracking) as planned:
        # What does not fit is told before a run is on record.
        scoring.score(planned, model, data, experiment, variant, settings)
    with facts_output(as_json) as (console, give):
        flow = Flow(
            workspace,
            tracking,
            "evaluate",
            {"model": model, "data": data, "evaluate": settings.model_dump(mode="json")},
            runtime=scoring.runtime_of(experiment),
            on_event=lambda event: present.print_event(console, event),
        )
        with flow:
            checkpoint, scored = scoring.score(flow, model, data, experiment, variant, settings)
        flow.wait()
        evaluation, figure = flow.result(scored), figure_of(flow.result(checkpoint))
        kept = scoring.keep_scores(tracking, flow.result(checkpoint), evaluation, flow.run_id)
        images = present_scores.image_scores(evaluation)
        console.print(present_scores.overall_table(evaluation, figure))
        console.print(present_scores.classes_table(evaluation))
        console.print(present_scores.images_table(images))
        console.print(f"run       {flow.run_id}", markup=False, soft_wrap=True)
        console.print(f"folder    {evaluation.uri}", markup=False, soft_wrap=True)
        if kept:
            console.print(f"kept      with {evaluation.variant}, for segvit promote and compare", markup=False)
        give(
            {
                "run_id": flow.run_id,
                "evaluation": evaluation.model_dump(mode="json"),
                "paper": None if figure is None else {"preset": figure.preset, **asdict(figure.result)},
                "images": images,
                "kept_with": evaluation.variant if kept else None,
            }
        )


def register(
    model: Model,
    name: Annotated[str, typer.Option(metavar="NAME", help="The registered model that gets a version.")],
    evaluation: Annotated[
        str, typer.Option(metavar="RUN", help="The run that scored it: its id, the beginning of it, or 'latest'.")
    ] = "latest",
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Register a model with what `segvit evaluate` found, so that it can be promoted and served."""
    from flows import scoring
    from flows.present import runs as present
    from pipeline.workflow.flow import Flow
    from pipeline.workflow.tracking import Tracking

    tracking = Tracking.for_workspace(workspace, tracking_uri)
    found = scoring.find_scored(tracking, model, evaluation)
    with facts_output(as_json) as (console, give):
        flow = Flow(
            workspace,
            tracking,
            "register",
            {"model": model, "name": name, "evaluation": evaluation},
            runtime=scoring.runtime_of(None),
            on_event=lambda event: present.print_event(console, event),
        )
        with flow:
            registered = scoring.register(flow, name, found)
        flow.wait()
        version = flow.result(registered)
        console.print(
            f"{version.model_uri}  mIoU {version.evaluation.miou:.4f} on {version.evaluation.split}; "
            f"segvit promote {name} {version.version} asks the gate",
            markup=False,
            soft_wrap=True,
        )
        give({"run_id": flow.run_id, "version": version.model_dump(mode="json")})


def evaluate_settings(base: dict[str, Any], asked: dict[str, Any]) -> Any:
    """Settings with what the command line asks for; raises UserError naming the option that is wrong."""
    from pydantic import ValidationError

    from pipeline.config import EvaluateConfig
    from pipeline.errors import UserError

    inference = dict(base["inference"])
    if asked["split"]:
        base = {**base, "split": asked["split"]}
    if asked["resize"]:
        inference["resize"] = pixels("--resize", asked["resize"])
    if asked["scales"]:
        try:
            inference["scales"] = [float(one) for one in asked["scales"].split(",")]
        except ValueError:
            raise UserError(
                f"--scales {asked['scales']} must be numbers with commas between them, as 0.75,1.0"
            ) from None
    if asked["flip"] is not None:
        inference["flip"] = asked["flip"]
    if asked["precision"]:
        inference["precision"] = None if asked["precision"] == "model" else asked["precision"]
    if asked["window"] == "whole":
        inference |= {"mode": "whole", "crop": None, "stride": None}
    elif asked["window"]:
        inference |= {"mode": "slide", "crop": pixels("--window", asked["window"]), "stride": None}
    if asked["stride"]:
        inference["stride"] = pixels("--stride", asked["stride"])
    try:
        return EvaluateConfig.model_validate({**base, "inference": inference})
    except ValidationError as error:
        problems = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise UserError(f"these settings of the prediction do not go together: {problems}") from error


def pixels(option: str, text: str) -> list[int]:
    """The numbers of `512x640`, or twice that of `512`; raises UserError."""
    from pipeline.errors import UserError

    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if found is None:
        raise UserError(f"{option} {text} must be two numbers of pixels, as 512x640, or one for both, as 512")
    return [int(found[1]), int(found[2] or found[1])]
