"""How much each run of a flow left in storage: what its own steps made, noted when they were done, and their models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.storage.file_stamps import folder_bytes
from pipeline.workflow.moved_store import local_folder
from pipeline.workflow.runs import RunSummary
from pipeline.workflow.tracking import RunState, Tag, Tracking

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run


def with_sizes(tracking: Tracking, runs: Sequence[RunSummary]) -> list[RunSummary]:
    """The runs with `num_bytes`: of outputs and models that are still there, without what they reused from others.

    A query for all steps and one for all models; steps of releases that noted no size are measured, in a local
    workspace, and count nothing in a remote one.
    """
    experiment = tracking.find_experiment()
    if not runs or experiment is None:
        return list(runs)
    workspaces = {run.run_id: run.workspace for run in runs}
    sizes = dict.fromkeys(workspaces, 0)
    flow_of: dict[str, str] = {}
    first_ms = int(min(datetime.fromisoformat(run.started).timestamp() for run in runs) * 1000)
    steps = f"tags.`{Tag.KIND}` = 'step' and attributes.start_time >= {first_ms}"
    for step in tracking.runs(steps):
        flow = step.data.tags.get(Tag.PARENT, "")
        if flow in sizes:
            flow_of[str(step.info.run_id)] = flow
            sizes[flow] += _step_bytes(step, workspaces[flow])
    token: str | None = None
    while True:
        page = tracking.client().search_logged_models([experiment], page_token=token)
        for model in page:
            if model.source_run_id in flow_of:
                sizes[flow_of[model.source_run_id]] += _model_bytes(model)
        token = page.token
        if not token:
            return [run.model_copy(update={"num_bytes": sizes[run.run_id]}) for run in runs]


def _step_bytes(step: Run, workspace: str) -> int:
    tags = step.data.tags
    if Tag.CLEANED in tags or tags.get(Tag.STATE) != RunState.DONE:
        return 0
    if Tag.BYTES in tags:
        return int(tags[Tag.BYTES])
    if not workspace or not storage.is_local(workspace):
        return 0
    return folder_bytes(storage.join(workspace, tags[Tag.STEP], tags[Tag.FINGERPRINT][:16]))


def _model_bytes(model: LoggedModel) -> int:
    noted = model.tags.get(Tag.BYTES)
    if noted is not None:
        return int(noted)
    folder = local_folder(str(model.artifact_location))
    return 0 if folder is None else folder_bytes(str(folder))
