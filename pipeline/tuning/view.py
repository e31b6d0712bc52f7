"""A search as people look at it, finished or not: found by the run of its flow, trials best first."""

from __future__ import annotations

import json

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import SearchRange, TuneConfig
from pipeline.errors import UserError
from pipeline.records import Record
from pipeline.storage.names import TRIALS_FOLDER
from pipeline.tuning.record import (
    SETTINGS_FILE,
    SearchRecord,
    TrialSummary,
    best_trial,
    rung_steps,
    summaries,
    trial_name,
)
from pipeline.workflow.runs import run_tree
from pipeline.workflow.tracking import RunState, Tracking

STEP_NAME = "tune"
UNFINISHED = "unfinished"


class SearchSummary(Record):
    """A search.

    Attributes:
        run_id: the flow's run.
        state: of the step that searches.
        uri: the folder of the search.
        space: the range of each setting that is searched, by dotted path.
        num_trials: how many trials there will be.
        steps: the length of a trial that is not stopped.
        rungs: the steps at which trials are compared, ascending.
        chosen: `trial_id` of the best so far, whose values are used in the end.
        trials: best first; those without a score last.
    """

    run_id: str
    flow: str
    state: RunState
    uri: str
    space: dict[str, SearchRange]
    num_trials: int
    steps: int
    rungs: tuple[float, ...]
    chosen: str | None
    trials: tuple[TrialSummary, ...]


def load_search(tracking: Tracking, run_id: str) -> SearchSummary:
    """The search of the run that `find_run` finds; raises UserError where it has none or it has not begun."""
    tree = run_tree(tracking, run_id)
    step = next((step for step in tree.steps if step.step == STEP_NAME), None)
    if step is None:
        raise UserError(f"run {tree.run.run_id[:12]} has no search; set tune.num_trials in its experiment file")
    if step.fingerprint is None:
        raise UserError(f"the search of run {tree.run.run_id[:12]} has not begun: its step is {step.state.value}")
    uri = storage.join(tree.run.workspace, STEP_NAME, step.fingerprint[:16])
    return read_search(uri, tree.run.run_id, tree.run.flow, step.state)


def read_search(uri: str, run_id: str, flow: str, state: RunState) -> SearchSummary:
    """Read the search in the folder `uri`; raises UserError where nothing is there."""
    folder = storage.join(uri, TRIALS_FOLDER)
    try:
        tune = TuneConfig.model_validate(storage.read_json(storage.join(folder, SETTINGS_FILE)))
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(
            f"no search of run {run_id[:12]} can be read at {uri}: it has not begun, or it is of an older version"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{SETTINGS_FILE} in {folder} is damaged; run the experiment again") from error
    known = SearchRecord.load(folder).in_state("running", "finished", "stopped", "failed")
    best = best_trial(known)
    rows = summaries(known)
    if state != RunState.RUNNING:
        rows = [row.model_copy(update={"state": UNFINISHED}) if row.state == "running" else row for row in rows]
    chosen = trial_name(best.number) if best is not None else None
    return SearchSummary(
        run_id=run_id,
        flow=flow,
        state=state,
        uri=uri,
        space=tune.space,
        num_trials=tune.num_trials,
        steps=tune.steps,
        rungs=tuple(rung_steps(tune)),
        chosen=chosen,
        trials=tuple(sorted(rows, key=lambda row: _rank(row, chosen))),
    )


def _rank(row: TrialSummary, chosen: str | None) -> tuple[bool, bool, float, str]:
    """The chosen one first, though one that was stopped early may have had a higher score; failed ones last."""
    return row.trial_id != chosen, row.state == "failed", -(row.miou if row.miou is not None else -1.0), row.trial_id
