"""Commands that take an experiment file, whatever its recipe."""

from __future__ import annotations

from flows.commands.options import WORKSPACE, Config, Json, Overrides, TrackingUri, Workspace, facts_output
from pipeline.masking import masked


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
    as_json: Json = False,
) -> None:
    """Check an experiment against data, models and machine, and show its steps, each cached or to run."""
    from flows.experiment import load_experiment
    from flows.present import runs as present
    from pipeline.workflow.tracking import Tracking

    experiment = load_experiment(config, overrides or ())
    experiment.check(workspace)
    warnings = experiment.warnings()
    planned = experiment.plan(workspace, Tracking.for_workspace(workspace, tracking_uri))
    with facts_output(as_json) as (console, give):
        for warning in warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
        console.print(present.plan_tree(experiment.config.name, planned.steps, planned.complete))
        give([step.model_dump(mode="json") for step in planned.steps])


def _tracking_view(uri: str) -> str:
    if uri.startswith("sqlite:"):
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}, then http://127.0.0.1:5000"
    return masked(uri)
