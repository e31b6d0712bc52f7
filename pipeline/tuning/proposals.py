"""What the search tries next and what it gives up, as functions of its settings and recorded trials.

Optuna and ASHA keep their state in memory. Here both are rebuilt from the record whenever they are needed, so a search
that was killed goes on as the undisturbed one would have, as far as its trials run one at a time; with several at once
the order in which they end decides, as it does undisturbed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from pipeline.config import TuneConfig
from pipeline.tuning.record import LEARNING_RATE, WEIGHTS, TrialRecord

METRIC, STEP = "val_miou", "step"


def search_space(tune: TuneConfig) -> dict[str, FloatDistribution]:
    """The ranges, all on a log scale."""
    ranges = {name: getattr(tune, name) for name in WEIGHTS}
    if tune.learning_rate is not None:
        ranges[LEARNING_RATE] = tune.learning_rate
    return {name: FloatDistribution(low, high, log=True) for name, (low, high) in ranges.items()}


def propose(
    tune: TuneConfig, configured: dict[str, float], trials: Sequence[TrialRecord], number: int
) -> dict[str, float]:
    """The values of trial `number`, given the `trials` so far; the same arguments give the same values.

    The `configured` values are the trial to beat: number 0, where they lie within the ranges.
    """
    space = search_space(tune)
    if number == 0 and all(space[name].low <= configured[name] <= space[name].high for name in space):
        return {name: configured[name] for name in space}
    # A sampler of its own for each proposal: the state of one that had made the earlier ones cannot be kept.
    seed = int(np.random.SeedSequence([tune.seed, number]).generate_state(1)[0])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    others = sorted((trial for trial in trials if trial.number != number), key=lambda trial: trial.number)
    study.add_trials([_frozen(trial, space) for trial in others])
    params = study.ask(dict(space)).params
    return {name: float(params[name]) for name in space}


def _frozen(trial: TrialRecord, space: dict[str, FloatDistribution]) -> FrozenTrial:
    states = {
        "running": TrialState.RUNNING,
        "finished": TrialState.COMPLETE,
        "stopped": TrialState.PRUNED,
        "failed": TrialState.FAIL,
    }
    state = states[trial.state]
    return create_trial(
        state=state,
        value=trial.miou if state == TrialState.COMPLETE else None,
        params=dict(trial.values),
        distributions=dict(space),
        intermediate_values={score.step: score.miou for score in trial.scores},
    )


class Rungs:
    """ASHA's rungs, filled with the scores of recorded trials in the order in which they came."""

    def __init__(self, tune: TuneConfig, trials: Iterable[TrialRecord]) -> None:
        self._tune = tune
        self._asha = ASHAScheduler(
            time_attr=STEP,
            metric=METRIC,
            mode="max",
            max_t=tune.steps,
            grace_period=min(tune.report_every_steps, tune.steps),
            reduction_factor=tune.reduction_factor,
        )
        self._stand_ins: dict[int, Any] = {}
        scores = [(score, trial.number) for trial in trials for score in trial.scores]
        for score, number in sorted(scores, key=lambda pair: pair[0].order):
            self.stops(number, score.step, score.miou)

    def stops(self, number: int, step: int, miou: float) -> bool:
        """Enter a score; whether its trial is to stop before its last step."""
        if step >= self._tune.steps:
            return False
        # ASHA knows trials by their ids alone; Ray Tune's own ids change with every start of the search.
        controller: Any = None
        if number not in self._stand_ins:
            self._stand_ins[number] = SimpleNamespace(trial_id=str(number))
            self._asha.on_trial_add(controller, self._stand_ins[number])
        action = self._asha.on_trial_result(controller, self._stand_ins[number], {STEP: step, METRIC: miou})
        return bool(action == TrialScheduler.STOP)
