from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.exported_metrics import (
    ALL,
    DATA_WAIT_SHARE,
    GPU_MEMORY,
    GPU_UTILISATION,
    TRAIN_LOSS,
    TRAIN_MFU,
    WORKER_FAILURES,
)
from pipeline.training import log as training_log
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.live import TrainingView, worker_figures, worker_part
from pipeline.training.loop import run_training
from pipeline.training.train import MetricsToTracking
from tests.pipeline.fakes import Told

ALONE = DistributedContext(0, 1, torch.device("cpu"))
ON_GPU = {
    "host": "box",
    "data_wait_share": 0.04,
    "gpu_memory_gib": 11.25,
    "gpu_total_gib": 79.2,
    "gpu_utilisation_percent": 93.0,
    "seconds_left": 65.0,
}


class Rows:
    """Stands for a MetricLog."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def metrics(self, row: dict[str, float], step: int) -> None:
        self.logged.append((step, row))


def test_worker_figures__of_a_cpu_and_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(worker_figures(torch.device("cpu"), 0.5)) == {"host", "data_wait_share"}
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {gpu: 3 << 29}[device])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    found = worker_figures(gpu, 0.25)
    assert {name: found[name] for name in found if name != "host"} == {
        "data_wait_share": 0.25,
        "gpu_memory_gib": 1.5,
        "gpu_total_gib": 80.0,
        "gpu_utilisation_percent": 87.0,
    }

    def missing(device: Any) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert "gpu_utilisation_percent" not in worker_figures(gpu, 0.25)


def test_worker_part__what_is_known_of_it() -> None:
    part = worker_part(3, ON_GPU)
    assert (part.name, part.state) == ("worker 3", "box")
    assert part.text == "GPU memory 11.2 of 79.2 GiB, GPU 93% busy, data wait 4%"
    assert worker_part(0, {"host": "box", "data_wait_share": 0.5}).text == "data wait 50%"


def test_view__steps_figures_and_workers() -> None:
    told: Any = Told()
    view = TrainingView(told, steps=300)
    view.begin(100)
    assert told.progress[-1].line() == "100/300 steps  33%  starting workers"
    rows = [
        {"step": 110, "total": 2.5, "images_per_s": 31.25},
        {"step": 110, "val_miou": 0.5},
        {"step": 120.0, "total": 2.0, "images_per_s": 30.5, "mfu": 0.52, "val_miou": 0.25},
    ]
    view.reported(rows, [ON_GPU, {"host": "other", "data_wait_share": 0.0}])
    shown = told.progress[-1]
    assert shown.line() == (
        "120/300 steps  40%  30.5 images/s  ETA 1:05  loss 2.000, MFU 52%, val mIoU 0.2500, best 0.5000"
    )
    assert [(part.name, part.state) for part in shown.parts] == [("worker 0", "box"), ("worker 1", "other")]
    exported = {(metric, tuple(tags.items())): value for metric, value, tags in told.exported}
    assert exported[TRAIN_LOSS, ()] == 2.0
    assert exported[TRAIN_MFU, ()] == 0.52
    assert exported[DATA_WAIT_SHARE, (("worker", "1"),)] == 0.0
    assert exported[GPU_MEMORY, (("worker", "0"),)] == 11.25
    assert exported[GPU_UTILISATION, (("worker", "0"),)] == 93.0
    assert {metric for metric, _ in exported} <= set(ALL)
    # A report of a checkpoint alone changes no figure.
    view.reported([{"step": 125, "val_miou": -1.0}], [])
    assert told.progress[-1].note == "loss 2.000, MFU 52%, val mIoU 0.2500, best 0.5000"


def test_metrics_to_tracking__shows_the_run_and_logs_none_of_the_workers_figures() -> None:
    rows, told = Rows(), Told()
    view = TrainingView(told, steps=8, val_miou=0.25, best_miou=0.5)  # type: ignore[arg-type]
    callback = MetricsToTracking(rows, logged_step=2, view=view)  # type: ignore[arg-type]
    earlier = [{"step": 3, "total": 8.0}]
    callback.after_report(
        None,
        [
            {"step": 4.0, "total": 7.0, "val_miou": -1.0, "earlier": earlier, "live": ON_GPU},
            {"step": 4.0, "live": {"host": "other", "data_wait_share": 0.1}},
        ],
        None,
    )
    assert rows.logged == [(3, {"total": 8.0}), (4, {"total": 7.0})]
    assert told.progress[-1].line() == "4/8 steps  50%  ETA 1:05  loss 7.000, val mIoU 0.2500, best 0.5000"
    assert len(told.progress[-1].parts) == 2
    callback.after_exception(None, {1: UserError("worker is gone")})
    assert told.progress[-1].note == "worker 1 failed: worker is gone, loss 7.000, val mIoU 0.2500, best 0.5000"
    assert not told.progress[-1].parts
    assert (WORKER_FAILURES, 1, {}) in told.exported


@pytest.mark.parametrize(("line_every_s", "steps"), [(0.0, [1, 2, 3, 4]), (1e9, [1, 4])])
def test_lines__not_more_than_one_in_some_seconds_but_the_last(
    make_job: Callable[..., TrainJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line_every_s: float,
    steps: list[int],
) -> None:
    monkeypatch.setattr(training_log, "LINE_EVERY_S", line_every_s)
    lines: list[str] = []
    reports: list[dict[str, Any]] = []
    run_training(
        make_job(),
        ALONE,
        lambda metrics, _folder: reports.append(metrics),
        log=lines.append,
        work_folder=tmp_path,
        say_validations=line_every_s > 0,
    )
    heads = [line.partition("  loss ")[0] for line in lines if "  loss " in line]
    assert heads == [f"full  step {step}/4 ({25 * step}%)" for step in steps]
    assert lines[-1].startswith("full  step 4/4  val mIoU ") == (line_every_s > 0)
    # However seldom it prints, the history has every step.
    assert [metrics["step"] for metrics in reports] == [1, 2, 3, 4]
    assert all(0 <= metrics["live"]["data_wait_share"] <= 1 for metrics in reports)
    assert reports[-1]["live"]["seconds_left"] == 0
