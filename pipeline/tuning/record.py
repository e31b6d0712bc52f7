"""The search's own memory: a JSON file a trial, written before anything acts on what it says.

Everything a search knows is in these files: proposals, scores and decisions follow from them and the settings alone,
so any process on any cluster continues a search that another one left. Nothing here is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

import fsspec
from pydantic import ValidationError

from pipeline import storage
from pipeline.config import TuneConfig
from pipeline.records import Record
from pipeline.workflow.lease import Lease

SETTINGS_FILE = "search.json"

TrialState = Literal["running", "finished", "stopped", "failed"]


class TrialScore(Record):
    """One validation of a trial.

    Attributes:
        miou: val mIoU, 0 to 1.
        order: index among all scores of the search, from 0; the rungs are rebuilt in this order.
        stopped: whether the trial was stopped for this score.
    """

    step: int
    miou: float
    order: int
    stopped: bool = False


class TrialRecord(Record):
    """What is known of one trial.

    Attributes:
        number: index among the proposals, from 0.
        values: what is tried, by dotted path of the settings.
        cause: why it failed, in one line.
        seconds: wall-clock time spent on it, what killed processes lost not counted.
        attempts: how often it was started.
    """

    number: int
    values: dict[str, Any]
    state: TrialState = "running"
    scores: tuple[TrialScore, ...] = ()
    cause: str | None = None
    seconds: float = 0.0
    attempts: int = 0

    @property
    def steps(self) -> int:
        """The last step that was validated; 0 before the first."""
        return self.scores[-1].step if self.scores else 0

    @property
    def miou(self) -> float | None:
        """The last score."""
        return self.scores[-1].miou if self.scores else None

    def score_at(self, step: int) -> TrialScore | None:
        """The score at `step`, or None."""
        return next((score for score in self.scores if score.step == step), None)


class TrialSummary(Record):
    """One row of trials.json; `values` by dotted path of the settings."""

    trial_id: str
    values: dict[str, Any]
    miou: float | None = None
    steps: int
    state: str
    cause: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    history: tuple[TrialScore, ...] = ()


class SearchRecord:
    """The trials of one search, under the folder `uri`.

    Only whoever has the lease may save; one that was overtaken learns it by LeaseLost.
    """

    def __init__(self, uri: str, lease: Lease | None = None) -> None:
        self.uri = uri
        self.lease = lease
        self.trials: dict[int, TrialRecord] = {}

    @classmethod
    def load(cls, uri: str) -> SearchRecord:
        """All trials whose files are whole; a damaged file counts as none, its trial will run again."""
        record = cls(uri)
        for name in storage.list_names(uri):
            if name.endswith(".json") and name.removesuffix(".json").isdigit():
                trial = _read_trial(storage.join(uri, name))
                if trial is not None and trial_name(trial.number) == name.removesuffix(".json"):
                    record.trials[trial.number] = trial
        return record

    @classmethod
    def take_over(cls, uri: str, settings: TuneConfig, lease: Lease) -> SearchRecord:
        """`load` it, with the right to save; `settings` is the search as it is asked for, with its whole space."""
        lease.check()
        # What killed processes left half written.
        storage.remove_files(uri, [name for name in storage.list_names(uri) if name.endswith(storage.PARTIAL)])
        storage.publish_json(storage.join(uri, SETTINGS_FILE), settings.model_dump(mode="json"))
        record = cls.load(uri)
        record.lease = lease
        return record

    def save(self, trial: TrialRecord) -> None:
        """Keep `trial`; raises LeaseLost where another process has the right now."""
        self.check_lease()
        content = {"digest": trial.content_digest(), "trial": trial.model_dump(mode="json")}
        storage.publish_json(storage.join(self.uri, f"{trial_name(trial.number)}.json"), content)
        self.trials[trial.number] = trial

    def check_lease(self) -> None:
        """Raise LeaseLost where another process has the right to save."""
        assert self.lease is not None, "a record that was only loaded cannot be changed"
        self.lease.check()

    def change(self, number: int, **changes: Any) -> TrialRecord:
        """Save the trial with some fields changed."""
        trial = self.trials[number].model_copy(update=changes)
        self.save(trial)
        return trial

    def in_state(self, *states: TrialState) -> list[TrialRecord]:
        """The trials in one of `states`, by number."""
        return [self.trials[number] for number in sorted(self.trials) if self.trials[number].state in states]

    def next_order(self) -> int:
        """The `order` of the next score."""
        return 1 + max((score.order for trial in self.trials.values() for score in trial.scores), default=-1)


class TrialUris(Record):
    """Where the search's trials keep what they need to continue.

    Attributes:
        uri: folder of the search's record; a trial's checkpoint lies in a folder of its own below it.
        lease: of the search; trials check it, too.
        train_uri: where Ray Train keeps the runs of trials with several workers.
        step_log: where it is kept what they print; None: nowhere.
    """

    uri: str
    lease: Lease
    train_uri: str
    step_log: str | None = None

    def trial_uri(self, number: int) -> str:
        """The folder of a trial that runs in one process."""
        return storage.join(self.uri, trial_name(number))

    def train_name(self, number: int) -> str:
        """The name of a trial's Ray Train run."""
        return f"trial-{trial_name(number)}"

    def discard(self, number: int) -> None:
        """Remove what an ended trial would have continued from, as far as its processes let it go already."""
        self.lease.check()
        for uri in (self.trial_uri(number), storage.join(self.train_uri, self.train_name(number))):
            with suppress(OSError):
                remove_folder(uri)


def trial_name(number: int) -> str:
    """How a trial is called in files and tables."""
    return f"{number:04d}"


def rung_steps(tune: TuneConfig) -> list[float]:
    """The steps at which ASHA compares trials, ascending."""
    steps, milestone = [], float(tune.report_every_steps)
    while milestone < tune.steps:
        steps.append(milestone)
        milestone *= tune.reduction_factor
    return steps


def max_failed(tune: TuneConfig) -> int:
    """How many trials may fail."""
    return math.ceil(tune.max_failed_fraction * tune.num_trials)


def best_trial(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The trial whose values are used: of those that got furthest the one with the highest score; no failed one."""
    scored = [trial for trial in trials if trial.scores and trial.state != "failed"]
    # A trial stopped early may lead by chance; what went further counts first.
    return max(scored, key=lambda trial: (trial.steps, trial.miou or 0.0, -trial.number), default=None)


def summaries(trials: Iterable[TrialRecord]) -> list[TrialSummary]:
    """The rows of trials.json."""
    return [
        TrialSummary(
            trial_id=trial_name(trial.number),
            values=trial.values,
            miou=trial.miou,
            steps=trial.steps,
            state=trial.state,
            cause=trial.cause,
            seconds=round(trial.seconds, 3),
            attempts=trial.attempts,
            history=trial.scores,
        )
        for trial in trials
    ]


def remove_folder(uri: str) -> None:
    """Remove the folder at `uri` with all in it, where it is there."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache()
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def _read_trial(uri: str) -> TrialRecord | None:
    try:
        content: Mapping[str, Any] = storage.read_json(uri)
        trial = TrialRecord.model_validate(content["trial"])
        return trial if trial.content_digest() == content["digest"] else None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, KeyError, TypeError, FileNotFoundError):
        return None
