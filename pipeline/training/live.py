"""What a training worker tells of itself while it runs, and how the controller shows it: never part of the history."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch

from pipeline import exported_metrics
from pipeline.workflow.progress import Part, Progress, StepProgress

GIB = 2**30
# Of a report's metrics: this worker's figures, beside those that are kept.
LIVE = "live"


def worker_figures(device: torch.device, data_wait_share: float) -> dict[str, Any]:
    """Host, share of its time that it waits for images; of a GPU the memory that tensors took, and how busy it is."""
    figures: dict[str, Any] = {"host": socket.gethostname(), "data_wait_share": data_wait_share}
    if device.type == "cuda":
        figures["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        figures["gpu_total_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
        # Only where NVIDIA's management library has Python bindings installed, and the driver answers.
        with suppress(Exception):
            figures["gpu_utilisation_percent"] = float(torch.cuda.utilization(device))
    return figures


def worker_part(rank: int, figures: Mapping[str, Any]) -> Part:
    """A worker as a line: where it is and what of it is in use."""
    words = [f"data wait {figures['data_wait_share']:.0%}"]
    if "gpu_memory_gib" in figures:
        words.insert(0, f"GPU memory {figures['gpu_memory_gib']:.1f} of {figures['gpu_total_gib']:.1f} GiB")
    if "gpu_utilisation_percent" in figures:
        words.insert(1, f"GPU {figures['gpu_utilisation_percent']:.0f}% busy")
    return Part(name=f"worker {rank}", state=str(figures["host"]), text=", ".join(words))


class TrainingView:
    """Shows a training run, from the reports of its workers, to whoever follows the flow and in Ray's exporter.

    Args:
        progress: where to tell it.
        steps: of the whole run.
        val_miou: the last validation's and the best one's, where earlier attempts had any; -1: none.
    """

    def __init__(self, progress: StepProgress, steps: int, val_miou: float = -1.0, best_miou: float = -1.0) -> None:
        self.progress, self.steps = progress, steps
        self.step, self.val_miou, self.best_miou = 0.0, val_miou, best_miou
        self._loss: float | None = None
        self._rate: float | None = None
        self._mfu: float | None = None
        self._left: float | None = None
        self._workers: list[Mapping[str, Any]] = []

    def begin(self, step: int) -> None:
        """The workers are about to start, after `step`."""
        self.step = step
        self._tell("starting workers")

    def reported(self, rows: Iterable[Mapping[str, float]], workers: Iterable[Mapping[str, Any]]) -> None:
        """Take in what the history got, and each worker's figures by rank."""
        for row in rows:
            self.step = row["step"]
            self._loss, self._rate = row.get("total", self._loss), row.get("images_per_s", self._rate)
            self._mfu = row.get("mfu", self._mfu)
            if row.get("val_miou", -1.0) >= 0:
                self.val_miou = row["val_miou"]
                self.best_miou = max(self.best_miou, self.val_miou)
        self._workers = list(workers)
        self._left = self._workers[0].get("seconds_left") if self._workers else None
        self._tell()
        self._export()

    def failed(self, causes: Mapping[int, str]) -> None:
        """Workers of these ranks failed; Ray may start them again."""
        self.progress.export(exported_metrics.WORKER_FAILURES, len(causes))
        self._workers, self._left = [], None
        rank, cause = next(iter(causes.items()))
        self._tell(f"worker {rank} failed: {cause}")

    def _tell(self, note: str = "") -> None:
        words = [note] if note else []
        if self._loss is not None:
            words.append(f"loss {self._loss:.3f}")
        if self._mfu is not None:
            words.append(f"MFU {self._mfu:.0%}")
        if self.val_miou >= 0:
            words.append(f"val mIoU {self.val_miou:.4f}, best {self.best_miou:.4f}")
        self.progress.tell(
            Progress(
                done=self.step,
                total=self.steps,
                unit="steps",
                rate=self._rate,
                rate_unit="images",
                seconds_left=self._left,
                note=", ".join(words),
                parts=tuple(worker_part(rank, one) for rank, one in enumerate(self._workers)),
            )
        )

    def _export(self) -> None:
        found = {
            exported_metrics.TRAIN_STEP: self.step,
            exported_metrics.TRAIN_LOSS: self._loss,
            exported_metrics.TRAIN_RATE: self._rate,
            exported_metrics.TRAIN_MFU: self._mfu,
            exported_metrics.TRAIN_WORKERS: float(len(self._workers)),
        }
        for metric, value in found.items():
            if value is not None:
                self.progress.export(metric, value)
        if self.val_miou >= 0:
            self.progress.export(exported_metrics.TRAIN_VAL_MIOU, self.val_miou, {"split": "val"})
        for rank, figures in enumerate(self._workers):
            for metric, name in (
                (exported_metrics.DATA_WAIT_SHARE, "data_wait_share"),
                (exported_metrics.GPU_MEMORY, "gpu_memory_gib"),
                (exported_metrics.GPU_UTILISATION, "gpu_utilisation_percent"),
            ):
                if name in figures:
                    self.progress.export(metric, figures[name], {"worker": str(rank)})
