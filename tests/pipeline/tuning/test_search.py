from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import storage
from pipeline.causes import one_line
from pipeline.config import LossConfig, RuntimeConfig, SearchRange, TrainConfig, TuneConfig, VariantSettings
from pipeline.errors import UserError
from pipeline.records import SearchResult
from pipeline.tuning import search as tune
from pipeline.tuning.record import SearchRecord
from pipeline.workflow.lease import LeaseLost, take_lease
from pipeline.workflow.tracking import Tracking

SPACE = {
    "loss.dice": SearchRange(log_uniform=(0.3, 3.0)),
    "model.decoder_layers": SearchRange(int_uniform=(1, 3)),
    "train.augmentation.scale_range": SearchRange(choice=([0.5, 2.0], [0.8, 1.2])),
}
Search = Callable[..., SearchResult]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def search(
    local_ray: None, tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[TuneConfig], SearchResult]:
    """Start the search; its trials do not train, but act as the file `plan` tells and write to the file `started`."""
    plan, started = str(tmp_path / "plan.json"), str(tmp_path / "started")

    # Within a function, so that workers get it by value: they cannot import tests.
    def light_trial(sampled: dict[str, Any], job: Any, tune: TuneConfig, uris: Any) -> None:
        import json
        import os
        from pathlib import Path

        import ray.tune

        from pipeline.workflow.lease import take_lease

        number = int(sampled["trial"])
        with Path(started).open("a") as file:
            file.write(f"{number}\n")
        with Path(f"{started}-by").open("a") as file:
            file.write(f"{os.getpid()}\n")
        attempts = Path(started).read_text().split().count(str(number))
        what = json.loads(Path(plan).read_text()).get(str(number), "")
        for step in range(1, tune.steps + 1):
            if step == 2 and (what == "dies" or (what == "dies once" and attempts == 1)):
                os._exit(1)
            if step == 2 and what == "overtakes":
                take_lease(uris.lease.uri, "the search")
            if step == 2 and what == "fails":
                ray.tune.report({"step": 0.0, "val_miou": -1.0, "cause": f"trial {number} has no memory"})
                return
            miou = 0.05 if what == "is poor" else (10 + 10 * number + step) / 100
            ray.tune.report({"step": float(step), "val_miou": miou})

    monkeypatch.setattr(tune, "run_trial", light_trial)
    monkeypatch.setattr(tune, "check_shard_set", lambda *args, **kwargs: None)
    job: Any = SimpleNamespace(
        shard_set=None,
        variant="full",
        settings=VariantSettings(
            model={
                "backbone": "vit_tiny_patch16_224",
                "structure": "cascade",
                "out_layers": [1, 3],
                "image_size": [48, 64],
            },
            loss=LossConfig(),
            train=TrainConfig(steps=9, batch_size=1, warmup_steps=0, validate_every_steps=9, checkpoint_every_steps=9),
        ),
        runtime=RuntimeConfig(trials_at_once=1, use_gpu=False),
    )

    def start(settings: TuneConfig) -> SearchResult:
        parent = tracking.client().create_run(tracking.experiment_id()).info.run_id
        return tune.search_settings(
            job,
            settings,
            run_name="tune-0123",
            storage_uri=str(tmp_path / "ray"),
            target_uri=str(tmp_path / "search"),
            lease=take_lease(str(tmp_path / "lease"), "the search"),
            tracking=tracking,
            parent_run_id=parent,
        )

    return start


def started(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "started").read_text().split()]


def processes(tmp_path: Path) -> list[int]:
    return [int(line) for line in (tmp_path / "started-by").read_text().split()]


def statuses(tracking: Tracking) -> list[tuple[str, str]]:
    runs = list(tracking.runs("tags.`segvit.kind` = 'trial'"))
    return sorted((run.data.tags["segvit.trial"], run.info.status) for run in runs)


def test_search__deaths_are_retried_once_failures_reported_and_the_rest_chosen_from(
    search: Search, tracking: Tracking, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"0": "dies", "1": "dies once", "2": "is poor"}))
    settings = TuneConfig(
        num_trials=3, steps=3, report_every_steps=1, reduction_factor=3, max_failed_fraction=0.3, space=SPACE
    )
    result = search(settings)
    assert started(tmp_path) == [0, 0, 1, 1, 2]
    # What died is no more; trial 2 goes on in the process of the one that ended well.
    *died, ended, last = processes(tmp_path)
    assert len({*died, ended}) == 4
    assert last == ended
    rows = json.loads(Path(str(result.trials_uri)).read_text())
    assert [(row["state"], row["attempts"], row["steps"]) for row in rows] == [
        ("failed", 2, 1),
        ("finished", 2, 3),
        ("stopped", 1, 1),
    ]
    assert rows[0]["cause"].startswith("its process died 2 times (The actor died")
    assert [score["step"] for score in rows[1]["history"]] == [1, 2, 3]
    assert rows[0]["values"] == {
        "loss.dice": 1.0,
        "model.decoder_layers": 3,
        "train.augmentation.scale_range": [0.5, 2.0],
    }
    assert (result.miou, result.num_trials, result.variant) == (0.23, 3, "full")
    assert result.values == rows[1]["values"]
    assert statuses(tracking) == [("0", "FAILED"), ("1", "FINISHED"), ("2", "FINISHED")]
    assert not (tmp_path / "ray" / "tune-0123").exists()
    # The same step again, after its end was not recorded: nothing runs, the same comes out.
    assert search(settings) == result
    assert started(tmp_path) == [0, 0, 1, 1, 2]
    assert len(statuses(tracking)) == 3
    content = bytearray(storage.read_bytes(str(result.trials_uri)))
    content[10] ^= 1
    Path(str(result.trials_uri)).write_bytes(content)
    assert search(settings) == result
    assert storage.file_digest(str(result.trials_uri)) == result.trials_digest
    # More trials go on with these.
    more = search(settings.model_copy(update={"num_trials": 4}))
    assert started(tmp_path) == [0, 0, 1, 1, 2, 3]
    assert (more.miou, more.num_trials) == (0.43, 4)


def test_search__over_the_limit_ends_with_the_first_cause_and_the_next_start_tries_again(
    search: Search, tracking: Tracking, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"1": "fails"}))
    settings = TuneConfig(
        num_trials=4, steps=2, report_every_steps=1, reduction_factor=9, max_failed_fraction=0.0, space=SPACE
    )
    message = (
        r"^1 of 4 search trials failed, tune.max_failed_fraction 0 allows 0; "
        r"the first one: trial 1, trial 1 has no memory$"
    )
    with pytest.raises(UserError, match=message):
        search(settings)
    assert started(tmp_path) == [0, 1]
    assert not (tmp_path / "search" / "trials.json").exists()
    assert statuses(tracking) == [("0", "FINISHED"), ("1", "FAILED")]
    (tmp_path / "plan.json").write_text("{}")
    result = search(settings)
    assert started(tmp_path) == [0, 1, 1, 2, 3]
    assert result.miou == 0.42
    trials = SearchRecord.load(str(tmp_path / "search" / "trials")).trials
    assert [(trial.state, trial.attempts, trial.cause) for trial in trials.values()] == [
        ("finished", 1, None),
        ("finished", 2, None),
        ("finished", 1, None),
        ("finished", 1, None),
    ]
    assert statuses(tracking) == [(str(number), "FINISHED") for number in range(4)]


def test_search__overtaken_ends_with_one_line_and_changes_nothing_more(search: Search, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"0": "overtakes"}))
    settings = TuneConfig(num_trials=3, steps=3, report_every_steps=1, reduction_factor=3, space=SPACE)
    message = r"^the search was taken over by another process \(lease 2 of \w{8}, after 1\); this one stops"
    with pytest.raises(LeaseLost, match=message) as lost:
        search(settings)
    assert len(one_line(lost.value)) < 200
    assert started(tmp_path) == [0]
    (trial,) = SearchRecord.load(str(tmp_path / "search" / "trials")).trials.values()
    assert (trial.state, [score.step for score in trial.scores]) == ("running", [1])
    assert not (tmp_path / "search" / "trials.json").exists()
    (tmp_path / "plan.json").write_text("{}")
    assert search(settings).num_trials == 3
