from __future__ import annotations

import math
import random

import pytest

from pipeline.config import SearchRange, TuneConfig
from pipeline.tuning.proposals import Rungs, propose
from pipeline.tuning.record import TrialRecord, TrialScore
from pipeline.tuning.space import within

CONFIGURED = {
    "loss.dice": 1.0,
    "train.learning_rate": 2e-5,
    "train.weight_decay": 0.01,
    "model.decoder_layers": 3,
    "model.shrink_queries": "nearest",
    "train.augmentation.scale_range": (0.5, 2.0),
}
SPACE = {
    "loss.dice": SearchRange(log_uniform=(0.3, 3.0)),
    "train.learning_rate": SearchRange(log_uniform=(1e-5, 1e-3)),
    "train.weight_decay": SearchRange(uniform=(0.0, 0.1)),
    "model.decoder_layers": SearchRange(int_uniform=(1, 6)),
    "model.shrink_queries": SearchRange(choice=("nearest", "average", None)),
    "train.augmentation.scale_range": SearchRange(choice=([0.8, 1.25], [0.5, 2])),
}
TUNE = TuneConfig(num_trials=40, steps=60, report_every_steps=20, space=SPACE, seed=3)


def searched(count: int, tune: TuneConfig = TUNE) -> list[TrialRecord]:
    """Trials proposed one after the other, the better the nearer their dice weight is to 2."""
    trials: list[TrialRecord] = []
    for number in range(count):
        values = propose(tune, CONFIGURED, trials, number)
        miou = 0.5 - 0.2 * abs(math.log(values["loss.dice"] / 2.0))
        state = ("finished", "stopped", "failed")[0 if number % 5 else 1 if number % 10 else 2]
        scores = (TrialScore(step=60 if state == "finished" else 20, miou=miou, order=number),)
        trials.append(TrialRecord(number=number, values=values, state=state, scores=scores))  # type: ignore[arg-type]
    return trials


def test_propose__is_a_function_of_the_recorded_trials_alone() -> None:
    trials = searched(24)
    again = [TrialRecord.from_json(trial.to_json()) for trial in trials]
    random.Random(0).shuffle(again)
    for number in (1, 9, 10, 23):
        earlier = [trial for trial in again if trial.number < number]
        assert propose(TUNE, CONFIGURED, earlier, number) == trials[number].values
    assert propose(TUNE, CONFIGURED, trials, 24) != propose(TUNE, CONFIGURED, trials[:-1], 24)


def test_propose__begins_with_the_configured_values_where_they_are_within_the_ranges() -> None:
    # A pair is the choice that it equals.
    expected = CONFIGURED | {"train.augmentation.scale_range": [0.5, 2]}
    assert propose(TUNE, CONFIGURED, [], 0) == expected
    outside = {"loss.dice": 5.0, "model.decoder_layers": None, "train.augmentation.scale_range": (0.1, 2.0)}
    first = propose(TUNE, CONFIGURED | outside, [], 0)
    assert {path: value for path, value in first.items() if path not in outside} == {
        path: value for path, value in CONFIGURED.items() if path not in outside
    }
    assert 0.3 <= first["loss.dice"] <= 3.0
    assert first["model.decoder_layers"] in range(1, 7)


def test_propose__stays_within_the_ranges_and_differs_with_number_and_seed() -> None:
    first = [propose(TUNE, CONFIGURED, [], number) for number in range(1, 9)]
    for values in first:
        assert list(values) == list(SPACE)
        assert all(within(values[path], one) for path, one in SPACE.items())
        assert type(values["model.decoder_layers"]) is int
        assert values["train.augmentation.scale_range"] in ([0.8, 1.25], [0.5, 2])
    assert len({values["loss.dice"] for values in first}) == 8
    assert {values["model.shrink_queries"] for values in first} == {"nearest", "average", None}
    other = TUNE.model_copy(update={"seed": 4})
    assert propose(other, CONFIGURED, [], 1) != first[0]


def test_propose__learns_from_scores() -> None:
    far = [abs(math.log(trial.values["loss.dice"] / 2.0)) for trial in searched(40)]
    # Uniform on the log scale of 0.3 to 3, the distance to 2 is 0.82 on average.
    assert sum(far[:12]) / 12 > 0.55
    assert sum(far[-15:]) / 15 < 0.35


@pytest.mark.parametrize("cut", [0, 7, 31, 80])
def test_rungs__rebuilt_from_the_record_decide_as_those_that_lived(cut: int) -> None:
    tune = TuneConfig(num_trials=20, steps=90, report_every_steps=10, reduction_factor=3)
    rng = random.Random(cut)
    scores = [(number, step, rng.random()) for number in range(20) for step in range(10, 100, 10)]
    # Trials run side by side, each in the order of its steps.
    order = sorted(range(len(scores)), key=lambda index: scores[index][1] + 35 * rng.random())
    order.sort(key=lambda index: scores[index][1] // 40)
    live, stopped = Rungs(tune, []), []
    trials = {number: TrialRecord(number=number, values={}) for number in range(20)}
    rebuilt: Rungs | None = None
    for position, index in enumerate(order):
        number, step, miou = scores[index]
        if position == cut:
            rebuilt = Rungs(tune, [TrialRecord.from_json(trial.to_json()) for trial in trials.values()])
        decision = live.stops(number, step, miou)
        if rebuilt is not None:
            assert rebuilt.stops(number, step, miou) == decision
        stopped.append(decision)
        score = TrialScore(step=step, miou=miou, order=position, stopped=decision)
        trials[number] = trials[number].model_copy(update={"scores": (*trials[number].scores, score)})
    assert any(stopped)
    assert not all(stopped)
