"""A search's trials in MLflow: one nested run a trial, the same one however often the search was started."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from pipeline.tuning.record import TrialRecord, TrialScore, trial_name
from pipeline.tuning.space import values_text
from pipeline.workflow.tracking import RunState, Tag, Tracking

if TYPE_CHECKING:
    from mlflow.entities import Run

SEARCH_TAG = "segvit.search"
TRIAL_TAG = "segvit.trial"
KIND = "trial"
MAX_NAME_LENGTH = 120


class TrialRuns:
    """The trials' runs, below the step that runs the search now.

    A store that does not answer costs what was to be logged, never the search; `settle` makes up for it.

    Args:
        tracking: the store.
        parent_run_id: the step's run.
        search: a name that belongs to this search alone.
    """

    def __init__(self, tracking: Tracking, parent_run_id: str, search: str) -> None:
        self.tracking = tracking
        self.parent_run_id = parent_run_id
        self.search = search
        self._ids: dict[int, str] | None = None

    def start(self, trial: TrialRecord) -> None:
        """Show the trial as running."""
        self._try("start", trial, lambda: self._start(trial))

    def score(self, trial: TrialRecord, score: TrialScore) -> None:
        """Log a score."""
        row = {"step": score.step, "val_miou": score.miou}
        self._try("score", trial, lambda: self.tracking.log_history(self._run_id(trial), [row]))

    def end(self, trial: TrialRecord) -> None:
        """Show how the trial ended."""
        self._try("end", trial, lambda: self._end(trial))

    def settle(self, trials: Iterable[TrialRecord]) -> None:
        """Put the runs of ended trials below the step's run and in the state that the record says."""
        shown: dict[int, Run] = {}
        with suppress(Exception):
            shown = self._find()
        for trial in trials:
            run = shown.get(trial.number)
            # State and status are written last, so all else is there with them.
            settled = (
                run is not None
                and run.info.status == _status(trial)
                and self._wanted(trial).items() <= run.data.tags.items()
            )
            if trial.state != "running" and not settled:
                self.end(trial)

    def _start(self, trial: TrialRecord) -> None:
        run_id = self._run_id(trial)
        client = self.tracking.client()
        if client.get_run(run_id).info.status != "RUNNING":
            # Ended as left over from a driver that died.
            client.update_run(run_id, status="RUNNING")
        self.tracking.set_tags(run_id, self._tags(trial) | {Tag.STATE: RunState.RUNNING.value, Tag.ERROR: ""})

    def _end(self, trial: TrialRecord) -> None:
        run_id = self._run_id(trial)
        run = self.tracking.client().get_run(run_id)
        logged = {metric.step for metric in self.tracking.client().get_metric_history(run_id, "val_miou")}
        missing = [{"step": one.step, "val_miou": one.miou} for one in trial.scores if one.step not in logged]
        if missing:
            self.tracking.log_history(run_id, missing)
        if run.info.status == _status(trial):
            self.tracking.set_tags(run_id, self._wanted(trial))
        else:
            self.tracking.end_run(run_id, _status(trial), self._wanted(trial))

    def _wanted(self, trial: TrialRecord) -> dict[str, str]:
        return self._tags(trial) | {Tag.STATE: trial.state, Tag.ERROR: trial.cause or ""}

    def _tags(self, trial: TrialRecord) -> dict[str, str]:
        return {
            Tag.KIND: KIND,
            Tag.PARENT: self.parent_run_id,
            SEARCH_TAG: self.search,
            TRIAL_TAG: str(trial.number),
        }

    def _run_id(self, trial: TrialRecord) -> str:
        if self._ids is None:
            self._ids = {number: str(run.info.run_id) for number, run in self._find().items()}
        if trial.number not in self._ids:
            tags = self._tags(trial) | {Tag.STATE: RunState.RUNNING.value}
            name = f"trial {trial_name(trial.number)}: {values_text(trial.values)}"[:MAX_NAME_LENGTH]
            run = self.tracking.client().create_run(self.tracking.experiment_id(), run_name=name, tags=tags)
            self._ids[trial.number] = str(run.info.run_id)
            self.tracking.log_params(self._ids[trial.number], trial.values)
        return self._ids[trial.number]

    def _find(self) -> dict[int, Run]:
        found: dict[int, Run] = {}
        wanted = f"tags.`{SEARCH_TAG}` = '{self.search}'"
        for run in list(self.tracking.runs(wanted, order_by="attributes.start_time ASC")):
            number = int(run.data.tags[TRIAL_TAG])
            if number in found:
                # Its creation was answered too late for the process that asked for it.
                self.tracking.client().delete_run(run.info.run_id)
            else:
                found[number] = run
        return found

    def _try(self, what: str, trial: TrialRecord, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            logging.getLogger(__name__).warning("trial %d: its %s was not logged: %s", trial.number, what, error)


def _status(trial: TrialRecord) -> str:
    return "FAILED" if trial.state == "failed" else "FINISHED"
