"""What the search tries next and what it gives up, as functions of its settings and recorded trials.

Optuna and ASHA keep their state in memory. Here both are rebuilt from the record whenever they are needed, so a search
that was killed goes on as the undisturbed one would have, as far as its trials run one at a time; with several at once
the order in which they end decides, as it does undisturbed. One with more trials goes on in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from pipeline.config import TuneConfig
from pipeline.tuning.record import TrialRecord
from pipeline.tuning.space import Space, distributions, from_params, to_params, within

METRIC, STEP = "val_miou", "step"


def propose(
    tune: TuneConfig, configured: Mapping[str, Any], trials: Sequence[TrialRecord], number: int
) -> dict[str, Any]:
    """The values of trial `number`, given the `trials` so far; the same arguments give the same values.

    The `configured` values are the trial to beat: number 0 has those of them that lie within the ranges.
    """
    # A sampler of its own for each proposal: the state of one that had made the earlier ones cannot be kept.
    seed = int(np.random.SeedSequence([tune.seed, number]).generate_state(1)[0])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    others = sorted((trial for trial in trials if trial.number != number), key=lambda trial: trial.number)
    study.add_trials([_frozen(trial, tune.space) for trial in others])
    if number == 0:
        fixed = {path: configured[path] for path, one in tune.space.items() if within(configured[path], one)}
        study.enqueue_trial(to_params(fixed, tune.space))
    return from_params(study.ask(distributions(tune.space)).params, tune.space)


def _frozen(trial: TrialRecord, space: Space) -> FrozenTrial:
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
        params=to_params(trial.values, space),
        distributions=distributions(space),
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
