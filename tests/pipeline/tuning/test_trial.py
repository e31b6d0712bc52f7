from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray.tune

from pipeline.config import RuntimeConfig, TuneConfig
from pipeline.training import loop
from pipeline.training.job import TrainJob
from pipeline.tuning import trial as search_trial
from pipeline.tuning.record import SearchRecord, TrialUris
from pipeline.tuning.trial import history_scores, in_process, run_trial, trial_job, trial_resources
from pipeline.workflow.lease import LeaseLost, take_lease

MakeJob = Callable[..., TrainJob]
SAMPLED: dict[str, Any] = {"trial": 2, "values": {"loss.class": 2.0, "loss.focal": 10.0, "loss.dice": 1.5}}
TUNE = TuneConfig(num_trials=4, steps=5, report_every_steps=2, max_val_samples=2, hold_out=0.2)


class Killed(BaseException):
    pass


@pytest.fixture
def uris(tmp_path: Path) -> TrialUris:
    lease = take_lease(str(tmp_path / "lease"), "the search")
    record = SearchRecord.take_over(str(tmp_path / "trials"), TUNE, lease)
    return TrialUris(uri=record.uri, lease=lease, train_uri=str(tmp_path / "ray"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trials of this process report, but for how far they are: that comes by the clock."""
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        if row["val_miou"] >= 0 or "cause" in row:
            rows.append(row)

    monkeypatch.setattr(ray.tune, "report", report)
    return rows


def test_trial_job__is_short_and_has_the_sampled_values(make_job: MakeJob) -> None:
    values = SAMPLED["values"] | {
        "train.learning_rate": 5e-4,
        "model.decoder_layers": 2,
        "train.augmentation.scale_range": [0.8, 1.2],
    }
    job = trial_job(make_job(warmup_steps=3), TUNE, 2, values)
    assert job.settings.loss.weights == {"class": 2.0, "focal": 10.0, "dice": 1.5}
    train = job.settings.train
    assert (train.steps, train.warmup_steps, train.learning_rate) == (5, 0, 5e-4)
    assert (train.validate_every_steps, train.checkpoint_every_steps) == (2, 2)
    assert train.augmentation.scale_range == (0.8, 1.2)
    assert job.settings.model["decoder_layers"] == 2
    assert job.hold_out == 0.2
    assert (job.max_val_samples, job.save_checkpoints, job.variant) == (2, True, "trial 0002")
    # What is not searched is the variant's own.
    assert trial_job(make_job(), TUNE, 2, SAMPLED["values"]).settings.train.learning_rate == 1e-4


def test_run_trial__values_that_do_not_fit_are_a_failed_trial(
    make_job: MakeJob, uris: TrialUris, told: list[dict[str, Any]]
) -> None:
    run_trial({"trial": 2, "values": {"train.warmup_steps": 7}}, make_job(), TUNE, uris)
    assert [(row["step"], row["val_miou"]) for row in told] == [(0.0, -1.0)]
    assert told[0]["cause"].startswith("its values (warmup_steps 7) do not fit the variant: ")
    assert "warmup_steps 7 must be below steps 5" in told[0]["cause"]
    told.clear()
    run_trial({"trial": 2, "values": {"model.decoder_heads": 5}}, make_job(), TUNE, uris)
    assert re.search(r"heads|divi", told[0]["cause"])


def test_trial_resources__one_worker_runs_in_the_trials_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_trial, "wants_gpu", lambda runtime: True)
    assert trial_resources(RuntimeConfig(cpus_per_worker=3)) == {"CPU": 3, "GPU": 1}
    assert trial_resources(RuntimeConfig(num_workers=2)) == {"CPU": 0.01}
    assert not in_process(RuntimeConfig(num_workers=(1, 2)))


def test_run_trial__killed_goes_on_behind_its_checkpoint_to_the_same_scores(
    make_job: MakeJob,
    uris: TrialUris,
    told: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = make_job()
    whole = TrialUris(uri=str(tmp_path / "whole"), lease=uris.lease, train_uri=uris.train_uri)
    (tmp_path / "whole").mkdir()
    run_trial(SAMPLED, job, TUNE, whole)
    expected = list(told)
    assert [row["step"] for row in expected] == [2, 4, 5]
    told.clear()
    capsys.readouterr()

    def die_at_four(row: dict[str, Any]) -> None:
        # Behind the checkpoint, before anybody hears of the score.
        if row["step"] == 4:
            raise Killed
        told.append(row)

    with monkeypatch.context() as patch:
        patch.setattr(ray.tune, "report", die_at_four)
        with pytest.raises(Killed):
            run_trial(SAMPLED, job, TUNE, uris)
    folder = Path(uris.trial_uri(2))
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", "step-00000004"]
    (folder / "step-00000005.0a1b2c3d.partial").mkdir()
    told.clear()
    capsys.readouterr()
    run_trial(SAMPLED, job, TUNE, uris)
    assert told == expected
    trained = [line for line in capsys.readouterr().out.splitlines() if "  loss " in line]
    assert len(trained) == 1
    assert "step 5/5" in trained[0]
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", "step-00000005"]
    uris.discard(2)
    assert not folder.exists()


def test_run_trial__damaged_checkpoint_is_not_used(
    make_job: MakeJob, uris: TrialUris, told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tune = TUNE.model_copy(update={"steps": 2})
    run_trial(SAMPLED, make_job(), tune, uris)
    first = list(told)
    weights = Path(uris.trial_uri(2)) / "step-00000002" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told.clear()
    run_trial(SAMPLED, make_job(), tune, uris)
    assert told == first
    assert "model.safetensors has another sha256 than when it was written; starting the trial anew" in (
        capsys.readouterr().out
    )
    (Path(uris.trial_uri(2)) / "latest.json").write_text("{")
    told.clear()
    run_trial(SAMPLED, make_job(), tune, uris)
    assert told == first


def test_run_trial__failure_is_told_in_one_line_and_a_lost_search_ends_it(
    make_job: MakeJob, uris: TrialUris, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such\n thing")

    run_trial({"trial": 2, "values": {"train.learning_rate": 1e30}}, make_job(), TUNE, uris)
    assert [(row["step"], row["val_miou"]) for row in told] == [(0.0, -1.0)]
    assert re.match(
        r"the (loss|gradient's norm) is (nan|inf) at step [12]\b.*Lower train\.learning_rate", told[0]["cause"]
    )
    assert "\n" not in told[0]["cause"]
    told.clear()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_training", fail)
        run_trial(SAMPLED, make_job(), TUNE, uris)
    assert told == [{"step": 0.0, "val_miou": -1.0, "cause": "ValueError: no such thing"}]
    take_lease(uris.lease.uri, "the search")
    with pytest.raises(LeaseLost):
        run_trial(SAMPLED, make_job(), TUNE, uris)
    assert len(told) == 1
    assert not Path(uris.trial_uri(2)).exists()


def test_run_trial__tells_between_scores_how_far_it_is(
    make_job: MakeJob, uris: TrialUris, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", rows.append)
    monkeypatch.setattr(search_trial, "REPORT_EVERY_S", 0.0)
    run_trial(SAMPLED, make_job(), TUNE, uris)
    assert [(row["step"], row["val_miou"] >= 0) for row in rows] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
        (5, True),
    ]
    assert all(set(row) == {"step", "val_miou"} for row in rows)
    # The search prints the scores.
    assert "val mIoU" not in capsys.readouterr().out


def test_history_scores__are_the_validations() -> None:
    history = '{"step": 1, "total": 2.5}\n{"step": 2, "val_miou": 0.25}\n{"step": 4, "total": 1.0, "val_miou": 0.5}\n'
    assert list(history_scores(history + '{"step": 5, "val_miou": -1.0}\n')) == [(2, 0.25), (4, 0.5)]
