"""Training on Ray Train: what is logged, what is retried, and a run that meets all of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
import ray.train
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.config import RuntimeConfig
from pipeline.errors import UserError
from pipeline.records import Checkpoint
from pipeline.shards.shards import ShardSetError
from pipeline.training import train
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.train import MetricsToTracking, StopOnUserError, scaling
from pipeline.training.train_run import repair_run
from pipeline.workflow import execution, ray_session
from pipeline.workflow.lease import take_lease
from pipeline.workflow.tracking import MetricLog, Tracking
from tests.jobs import with_settings

MakeJob = Callable[..., TrainJob]
UPLOAD_S = 1.5
STEPS, KILLED_AT, BROKEN_AT = 8, 4, 7


class Rows:
    """Stands for a MetricLog."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def metrics(self, row: dict[str, float], step: int) -> None:
        self.logged.append((step, row))


def test_metrics_to_tracking__each_step_once_in_order() -> None:
    rows = Rows()
    callback = MetricsToTracking(rows, logged_step=2)  # type: ignore[arg-type]
    earlier = [{"step": 2, "total": 9.0}, {"step": 3, "total": 8.0}]
    callback.after_report(None, [{"step": 4.0, "total": 7.0, "val_miou": -1.0, "earlier": earlier}, {}], None)
    # A restarted run passes step 4 again, a checkpoint alone says nothing.
    callback.after_report(None, [{"step": 4.0, "total": 7.0, "val_miou": -1.0}], None)
    callback.after_report(None, [{"step": 5.0, "val_miou": -1.0}], None)
    callback.after_report(None, [{"step": 6.0, "total": 5.0, "val_miou": 0.5}], None)
    assert rows.logged == [(3, {"total": 8.0}), (4, {"total": 7.0}), (6, {"total": 5.0, "val_miou": 0.5})]


def test_stop_on_user_error__of_any_rank_and_nothing_else() -> None:
    callback = StopOnUserError()
    callback.after_exception(None, {0: RuntimeError("NCCL"), 1: ConnectionError("reset")})
    wrapped = RuntimeError("in a worker")
    wrapped.__cause__ = ShardSetError("sample a of b cannot be decoded")
    with pytest.raises(ray.train.ControllerError) as caught:
        callback.after_exception(None, {0: RuntimeError("connection closed"), 1: wrapped})
    assert str(caught.value.controller_failure) == "sample a of b cannot be decoded"


def test_train_variant__leading_process_that_dies_is_started_again_but_not_for_ever(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(*_: Any) -> None:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(train, "_fit", die)
    places: dict[str, Any] = {"storage_uri": str(tmp_path), "target_uri": str(tmp_path / "published")}
    log = MetricLog(Tracking("sqlite:///unused"), "unused")
    lease = take_lease(str(tmp_path / "lease"), "training")
    with pytest.raises(UserError, match="training of full ended 3 times without a whole last checkpoint in"):
        train.train_variant(make_job(), run_name="run", lease=lease, log=log, **places)
    assert capsys.readouterr().out == "full  the process that leads the workers died (ActorDiedError)\n" * 3


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as folder:
        options = {
            "address": "local",
            "num_cpus": 2,
            "dashboard_host": "127.0.0.1",
            "log_to_driver": False,
            "object_store_memory": 100 << 20,
            "_temp_dir": folder,
        }
        ray_session.start(lambda: options)
        yield
        ray_session.stop()


def test_scaling__one_count_or_a_range(two_cores: None) -> None:
    fixed: Any = scaling(RuntimeConfig(num_workers=3, cpus_per_worker=2))
    assert (fixed.num_workers, fixed.elasticity_enabled) == (3, False)
    assert fixed.resources_per_worker == {"CPU": 2}
    elastic: Any = scaling(RuntimeConfig(num_workers=(1, 4)))
    assert (elastic.num_workers, elastic.elasticity_enabled) == ((1, 4), True)
    with pytest.raises(UserError, match="no GPU"):
        scaling(RuntimeConfig(use_gpu=True))


def troubled_worker(folder: str) -> Callable[[dict[str, Any]], None]:
    """`train_worker` with slow uploads that is killed once, and whose loss breaks while a file is there."""

    def worker(loop_config: dict[str, Any]) -> None:
        from ray.train.v2._internal.execution.storage import StorageContext

        from pipeline.training.train import train_worker
        from pipeline.training.trainer import Trainer
        from segvit.losses.segmentation_loss import SegmentationLoss

        place, persist = Path(folder), StorageContext.persist_current_checkpoint
        train_step, forward = Trainer.train_step, SegmentationLoss.forward

        def note(event: str) -> None:
            with (place / "events").open("a") as file:
                file.write(f"{event}\n")

        def slow(self: StorageContext, checkpoint: Any, name: str) -> Any:
            note("upload")
            time.sleep(UPLOAD_S)
            saved = persist(self, checkpoint, name)
            note("uploaded")
            return saved

        def step(self: Trainer, batches: Any) -> Any:
            number = self.state.step + 1
            if number == KILLED_AT and not (place / "killed").exists():
                # The first checkpoint has to be on Ray's list by then.
                while not list((place / "ray").glob("run/checkpoint_manager*")):
                    time.sleep(0.1)
                (place / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            broken = number == BROKEN_AT and (place / "broken").exists()
            SegmentationLoss.forward = nan if broken else forward  # type: ignore[method-assign]
            note(str(number))
            return train_step(self, batches)

        def nan(self: SegmentationLoss, *args: Any, **options: Any) -> Any:
            return {name: value * float("nan") for name, value in forward(self, *args, **options).items()}

        note("start")
        setattr(StorageContext, "persist_current_checkpoint", slow)  # noqa: B010
        Trainer.train_step = step  # type: ignore[method-assign]
        train_worker(loop_config)

    return worker


def test_train_variant__killed_broken_mended_and_published(
    two_cores: None, make_job: MakeJob, tracking: Tracking, tmp_path: Path
) -> None:
    job = make_job(steps=STEPS, validate_every_steps=5, checkpoint_every_steps=2, keep="last")
    job = with_settings(job, model={"dropout": 0.2, "drop_path_rate": 0.2})
    alone = DistributedContext(0, 1, torch.device("cpu"))
    undisturbed = run_training(job, alone, lambda *_: None, log=lambda _: None, work_folder=tmp_path / "alone")

    def fit(worker: Any) -> tuple[Checkpoint, str]:
        run_id = tracking.client().create_run(tracking.experiment_id()).info.run_id
        log, folder = MetricLog(tracking, run_id), str(tmp_path)

        def task() -> Checkpoint:
            from pipeline.training import train as in_task

            setattr(in_task, "train_worker", worker)  # noqa: B010
            return in_task.train_variant(
                job,
                run_name="run",
                storage_uri=f"{folder}/ray",
                target_uri=f"{folder}/published",
                lease=take_lease(f"{folder}/lease", "training"),
                log=log,
            )

        # As flows do it.
        return ray_session.get(ray_session.submit(task, name="train", max_retries=0)), run_id

    def events() -> list[str]:
        return (tmp_path / "events").read_text().split()

    # Killed before step 4, it goes on from step 2; at step 7 the loss is nan, and nobody tries again.
    worker = troubled_worker(str(tmp_path))
    (tmp_path / "broken").touch()
    with pytest.raises(UserError) as caught:
        fit(worker)
    cause = execution.one_line(caught.value)
    assert re.match(r"training of full failed: the loss is nan at step 7 \(in .*\); both must be finite", cause)
    seen = [event for event in events() if not event.startswith("upload")]
    assert seen == ["start", "1", "2", "3", "start", "3", "4", "5", "6", "7"]
    # Training went on while a checkpoint was uploaded.
    assert events().index("3") < events().index("uploaded")
    batch = next(micro_batches(job, alone, BROKEN_AT - 1))
    with safe_open(tmp_path / f"ray/run/non_finite/step-{BROKEN_AT:08d}-rank-0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("images"), batch.images)
        assert json.loads(file.metadata()["keys"]) == list(batch.keys)

    # Mended, the next driver takes up the last checkpoint.
    (tmp_path / "broken").unlink()
    (tmp_path / "events").unlink()
    record, run_id = fit(worker)
    assert events()[0] == "start"
    assert events()[1] in ("3", "5", "6", "7")
    assert (record.step, record.variant) == (STEPS, "full")
    assert record.miou == undisturbed.val_miou
    one, other = (
        load_file(tmp_path / f"alone/step-{STEPS:08d}/model.safetensors"),
        load_file(tmp_path / "published/model.safetensors"),
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    history = [json.loads(line) for line in (tmp_path / "published/history.jsonl").read_text().splitlines()]
    totals = [(row["step"], row["total"], row["learning_rate"]) for row in history if "total" in row]
    assert totals == [
        (row["step"], row["total"], row["learning_rate"]) for row in undisturbed.history if "total" in row
    ]
    # The new MLflow run has the whole curve, each step once.
    for name in ("total", "val_miou"):
        curve = [(one.step, one.value) for one in tracking.client().get_metric_history(run_id, name)]
        assert curve == [(row["step"], row[name]) for row in undisturbed.history if name in row]
    # The two best and the last, whole.
    saved = repair_run(str(tmp_path / "ray/run"), "best", take_lease(str(tmp_path / "lease"), "training"))
    assert {5, 8} <= {one.step for one in saved}
    assert len(saved) <= 3

    # A kill before the record was kept: it is published again, without training.
    (tmp_path / "events").unlink()
    shutil.rmtree(tmp_path / "published")
    again, _ = fit(None)
    assert again == record
    assert (tmp_path / "published/model.safetensors").is_file()
    assert not (tmp_path / "events").exists()


def overtaken_worker(uri: str) -> Callable[[dict[str, Any]], None]:
    """`train_worker` whose lease another process takes when its first checkpoint is about to be uploaded."""

    def worker(loop_config: dict[str, Any]) -> None:
        from pipeline.training.train import _Uploads, train_worker
        from pipeline.workflow.lease import take_lease

        upload = _Uploads._upload

        def lose_and_upload(self: _Uploads, checkpoint: Any, name: str) -> Any:
            take_lease(uri, "training")
            return upload(self, checkpoint, name)

        setattr(_Uploads, "_upload", lose_and_upload)  # noqa: B010
        train_worker(loop_config)

    return worker


def test_train_variant__overtaken_uploads_and_publishes_nothing_more(
    two_cores: None, make_job: MakeJob, tracking: Tracking, tmp_path: Path
) -> None:
    job = make_job(steps=STEPS, validate_every_steps=STEPS, checkpoint_every_steps=2, keep="last")
    run_id = tracking.client().create_run(tracking.experiment_id()).info.run_id
    lease = take_lease(str(tmp_path / "lease"), "training")
    folder, worker = str(tmp_path), overtaken_worker(lease.uri)

    def task() -> Checkpoint:
        from pipeline.training import train as in_task

        setattr(in_task, "train_worker", worker)  # noqa: B010
        return in_task.train_variant(
            job,
            run_name="run",
            storage_uri=f"{folder}/ray",
            target_uri=f"{folder}/published",
            lease=lease,
            log=MetricLog(tracking, run_id),
        )

    with pytest.raises(UserError) as caught:
        ray_session.get(ray_session.submit(task, name="train", max_retries=0))
    said = execution.one_line(caught.value)
    assert re.search(r"training was taken over by another process \(lease \d of \w{8}, after 1\)", said)
    assert [path for path in (tmp_path / "ray/run").glob("checkpoint_*") if path.is_dir()] == []
    assert not (tmp_path / "published").exists()
