"""Commands that take an experiment file."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.options import WORKSPACE, Config, Json, Overrides, TrackingUri, Workspace, facts_output


def run(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run an experiment from raw images to a promoted model; what is finished already is reused."""
    from flows.present import runs as present
    from flows.recipes.segmentation import segmentation
    from pipeline.config_file import load_config
    from pipeline.workflow.flow import Flow
    from pipeline.workflow.tracking import Tracking

    experiment = load_config(config, overrides)
    tracking = Tracking.for_workspace(workspace, tracking_uri)
    with facts_output(as_json) as (console, give):
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


def plan(
    config: Config,
    overrides: Overrides = None,
    workspace: Workspace = WORKSPACE,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Show an experiment's steps as a tree, each cached or to run; nothing is executed."""
    from flows.present import runs as present
    from flows.recipes.segmentation import segmentation
    from pipeline.config_file import load_config
    from pipeline.workflow.graph import Plan
    from pipeline.workflow.tracking import Tracking

    experiment = load_config(config, overrides)
    planned = Plan(workspace, Tracking.for_workspace(workspace, tracking_uri))
    with planned:
        segmentation(planned, experiment)
    with facts_output(as_json) as (console, give):
        console.print(present.plan_tree(experiment.name, planned.steps, planned.complete))
        give([step.model_dump(mode="json") for step in planned.steps])


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


def _tracking_view(uri: str) -> str:
    if uri.startswith("sqlite:"):
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}, then http://127.0.0.1:5000"
    return uri
