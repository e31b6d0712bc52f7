"""Commands that take an experiment file, whatever its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.options import WORKSPACE, Config, Json, Overrides, TrackingUri, Workspace, facts_output
from pipeline.masking import masked

if TYPE_CHECKING:
    from pipeline.estimate import TrainEstimate
    from pipeline.workflow.runs import PlannedStep

Gpu = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="Card to estimate training for, as H100; default: this machine's."),
]


def run(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run an experiment, by default from raw images to a promoted model; what is finished already is reused."""
    from flows.experiment import load_experiment
    from flows.notify import notifying
    from flows.present import results
    from flows.present import runs as present
    from pipeline.errors import UserError
    from pipeline.workflow.flow import Flow
    from pipeline.workflow.tracking import Tracking

    experiment = load_experiment(config, overrides or ())
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    try:
        planned = experiment.plan(workspace, tracking)
        all_cached = planned.complete and all(step.cached for step in planned.steps)
    except UserError:
        experiment.check(workspace)  # with whatever else is wrong
        raise
    if not all_cached:
        # What is all there was checked before it was made; looking would load PyTorch for nothing.
        experiment.check(workspace)
    with facts_output(as_json) as (console, give):
        flow = Flow(
            workspace,
            tracking,
            experiment.config.name,
            experiment.config,
            runtime=experiment.config.runtime,
            on_event=lambda event: present.print_event(console, event),
        )

        def warn(line: str) -> None:
            console.print(line, style="yellow", markup=False, soft_wrap=True)

        with notifying(experiment.config.runtime.notify, flow, warn), flow:
            experiment.build(flow)
        records = flow.wait()
        results.print_results(console, records)
        console.print(f"MLflow    {_tracking_view(tracking.uri)}", markup=False, soft_wrap=True)
        give({"run_id": flow.run_id, **results.facts(records), "tracking_uri": masked(tracking.uri)})


def plan(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    gpu: Gpu = None,
    as_json: Json = False,
) -> None:
    """Check an experiment against data, models and machine, and show its steps, and what training takes of a GPU."""
    from flows.experiment import load_experiment
    from flows.present import estimates as present_estimates
    from flows.present import runs as present
    from pipeline.estimate import choose_gpu, estimate_training
    from pipeline.workflow.tracking import Tracking

    experiment = load_experiment(config, overrides or ())
    card = choose_gpu(gpu)
    experiment.check(workspace)
    warnings = experiment.warnings()
    planned = experiment.plan(workspace, Tracking.for_workspace(workspace, tracking_uri))
    with facts_output(as_json) as (console, give):
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
        console.print(present.plan_tree(experiment.config.name, planned.steps, planned.complete))
        # A label of training is train/VARIANT.
        to_train = {step.label.partition("/")[2] for step in planned.steps if step.step == "train" and not step.cached}
        # They take seconds a model, and say nothing to a machine without a GPU.
        to_train = to_train if card is not None else set()
        estimates = {one.variant: one for one in estimate_training(experiment.config, to_train, card)}
        if estimates:
            console.print(present_estimates.estimates_view(list(estimates.values())))
        give([_with_estimate(step, estimates) for step in planned.steps])


def _with_estimate(step: PlannedStep, estimates: Mapping[str, TrainEstimate]) -> dict[str, Any]:
    facts = step.model_dump(mode="json")
    variant = step.label.partition("/")[2]
    if step.step == "train" and variant in estimates:
        facts["estimate"] = estimates[variant].model_dump(mode="json")
    return facts


def _tracking_view(uri: str) -> str:
    if uri.startswith("sqlite:"):
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}, then http://127.0.0.1:5000"
    return masked(uri)
