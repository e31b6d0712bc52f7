"""Averaged weights, early stop, and going on with more steps: what is validated, saved and gone on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import TrainConfig
from pipeline.training.averaging import BestWeights, MovingAverage, swapped
from pipeline.training.checkpoint_files import damage_of
from pipeline.training.job import TrainJob
from pipeline.training.loop import run_training, stops_early
from pipeline.training.train_checkpoint import TrainState
from pipeline.training.trainer import Trainer
from tests.pipeline.training.test_loop import ALONE, Reports, assert_same_weights, train

MakeJob = Callable[..., TrainJob]


class Weight(torch.nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.tensor([value]))
        self.frozen = torch.nn.Parameter(torch.tensor([7.0]), requires_grad=False)


def test_moving_average__keeps_less_in_the_first_steps() -> None:
    model = Weight(0.0)
    average = MovingAverage(model, decay=0.5)
    values = []
    for step in (1, 2, 40):
        model.one.data.fill_(float(step))
        average.update(model, step)
        values.append(float(average.weights["one"]))
    first = 1 * (1 - 2 / 11)
    second = first * 3 / 12 + 2 * (1 - 3 / 12)
    assert values == pytest.approx([first, second, second * 0.5 + 40 * 0.5])
    assert set(average.weights) == {"one"}


def test_best_weights__the_best_are_kept_and_averaged() -> None:
    best = BestWeights(2)
    for miou, value in ((0.3, 1.0), (0.5, 2.0), (0.1, 3.0), (0.5, 6.0)):
        best.offer(miou, {"one": torch.tensor([value])})
    assert [(miou, float(weights["one"])) for miou, weights in best.kept] == [(0.5, 6.0), (0.5, 2.0)]
    assert float(best.mean()["one"]) == 4.0


def test_swapped__the_models_own_weights_come_back() -> None:
    model = Weight(1.0)
    with swapped(model, {"one": torch.tensor([5.0])}):
        assert float(model.one) == 5.0
    assert float(model.one) == 1.0
    with swapped(model, None):
        assert float(model.one) == 1.0


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Let validations find these scores, one after the other."""
    found = iter(scores)
    monkeypatch.setattr(Trainer, "_miou", lambda _self: next(found))


def last_row(reports: Reports) -> dict[str, Any]:
    return {name: value for name, value in reports.rows[-1].items() if name.startswith("val_miou")}


@pytest.mark.parametrize(("average", "is_chosen"), [(0.4, True), (0.2, False)])
def test_checkpoint__holds_the_better_of_weights_and_average_and_goes_on_from_its_own(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: float, is_chosen: bool
) -> None:
    settings = {"steps": 4, "validate_every_steps": 2, "checkpoint_every_steps": 2}
    plain = train(make_job(**settings), tmp_path / "plain")
    scored(monkeypatch, [0.3, average] * 4)
    averaged = train(make_job(ema_decay=0.9, **settings), tmp_path / "averaged")
    assert last_row(averaged) == {
        "val_miou": max(0.3, average),
        "val_miou_trained": 0.3,
        "val_miou_average": average,
    }
    folder = averaged.folders[0]
    assert damage_of(str(folder)) is None
    trained, mean = load_file(plain.folders[0] / "model.safetensors"), load_file(folder / "average.safetensors")
    saved = load_file(folder / "model.safetensors")
    for name, weight in mean.items():
        assert torch.equal(saved[name], weight if is_chosen else trained[name]), name
    assert (folder / "trained.safetensors").exists() == is_chosen
    # From the weights that were trained, whatever was saved to be published; and from the average as it was.
    resumed = train(make_job(ema_decay=0.9, **settings), tmp_path / "resumed", resume=folder)
    assert [row["total"] for row in resumed.rows] == [row["total"] for row in plain.rows[2:]]
    ends = [load_file(one.folders[-1] / "average.safetensors") for one in (averaged, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_checkpoint__mean_of_the_best_validations_at_the_end(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 3, "validate_every_steps": 1, "checkpoint_every_steps": 1}
    scored(monkeypatch, [0.5, 0.1, 0.4, 0.6])
    reports = train(make_job(average_best=2, **settings), tmp_path / "whole")
    assert last_row(reports) == {"val_miou": 0.6, "val_miou_trained": 0.4, "val_miou_mean_of_best": 0.6}
    first, _, last = (load_file(folder / "model.safetensors") for folder in reports.folders)
    third = load_file(reports.folders[2] / "trained.safetensors")
    for name, weight in third.items():
        assert torch.allclose(last[name], (first[name] + weight) / 2), name
    # Resumed after the second validation, the first one's weights are still known.
    scored(monkeypatch, [0.4, 0.6])
    resumed = train(make_job(average_best=2, **settings), tmp_path / "resumed", resume=reports.folders[1])
    assert_same_weights(reports.folders[2], resumed.folders[-1], tolerance=0.0)


def test_checkpoint__of_equal_validations_the_same_ones_are_kept_after_a_resume(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(average_best=2, steps=3, validate_every_steps=1, checkpoint_every_steps=1)
    scored(monkeypatch, [0.5, 0.5, 0.5, 0.6])
    whole = train(job, tmp_path / "whole")
    scored(monkeypatch, [0.5, 0.6])
    resumed = train(job, tmp_path / "resumed", resume=whole.folders[1])
    assert_same_weights(whole.folders[2], resumed.folders[-1], tolerance=0.0)


@pytest.mark.parametrize(
    ("stop_after", "scores", "stops"),
    [(None, [0.5, 0.1, 0.1, 0.1], False), (2, [0.5, 0.4, 0.3], True), (2, [0.5, 0.4, 0.6], False), (1, [0.5], False)],
)
def test_stops_early__validations_without_a_better_one(
    stop_after: int | None, scores: list[float], stops: bool
) -> None:
    config = TrainConfig(
        steps=9, batch_size=1, warmup_steps=0, validate_every_steps=1, checkpoint_every_steps=1, stop_after=stop_after
    )
    state = TrainState(history=[{"step": float(step), "val_miou": one} for step, one in enumerate(scores[:-1])])
    assert stops_early(config, state, scores[-1]) == stops


def test_run_training__ends_early_and_says_that_it_is_finished(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, [0.5, 0.4, 0.3, 0.2])
    job = make_job(steps=4, validate_every_steps=1, checkpoint_every_steps=1, stop_after=2)
    reports = train(job, tmp_path)
    states = [json.loads((folder / "state.json").read_text()) for folder in reports.folders]
    assert [(state["step"], state["finished"]) for state in states] == [(1, False), (2, False), (3, True)]


def test_run_training__goes_on_with_more_steps_under_the_longer_schedule(make_job: MakeJob, tmp_path: Path) -> None:
    short = train(make_job(steps=3, validate_every_steps=3, checkpoint_every_steps=3), tmp_path / "short")
    longer = make_job(steps=6, continue_after=3, validate_every_steps=3, checkpoint_every_steps=3)
    longer = longer.model_copy(update={"goes_on_from": str(tmp_path)})
    reports = Reports()
    state = run_training(
        longer, ALONE, reports, resume_from=short.folders[-1], log=lambda _line: None, work_folder=tmp_path / "longer"
    )
    assert (state.step, state.finished) == (6, True)
    assert [row["step"] for row in reports.rows] == [4, 5, 6]
    one_go = train(make_job(steps=6, validate_every_steps=6, checkpoint_every_steps=6), tmp_path / "one_go")
    assert [row["learning_rate"] for row in reports.rows] == [row["learning_rate"] for row in one_go.rows[3:]]
    # It begins from the shorter training's state, which had another schedule.
    assert reports.rows[0]["total"] != one_go.rows[3]["total"]
    assert state.best_miou == max(row["val_miou"] for row in reports.rows)


def test_train_config__steps_to_go_on_after_are_fewer() -> None:
    with pytest.raises(ValueError, match="continue_after 6 must be below steps 6, those before included"):
        TrainConfig(
            steps=6, continue_after=6, batch_size=1, warmup_steps=0, validate_every_steps=1, checkpoint_every_steps=1
        )
