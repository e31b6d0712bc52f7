"""Our side of the comparison: the trainer on an experiment's settings, without Ray; then Shrunk, made of the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import segvit
from pipeline.config import ExperimentConfig
from pipeline.config.file import load_config
from pipeline.records import BackboneRecord, Checkpoint, ShardSet
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.trainer import build_job_model
from segvit.backbones.families import outline_backbone
from segvit.inference.precision import keep_for_precision
from tests.benchmarks.peers.common import Derived, Predict, Task, Trained, read_features, run

VARIANT, SHRUNK = "full", "shrunk"
# That short runs convert Shrunk with; times do not depend on it.
NUM_SHORT = 8


def fit(task: Task) -> Trained:
    """Train the variant `full`, convert it to `shrunk`, and predict as validation does."""
    config = load_config(task.config, overrides(task))
    job = job_of(task, config, VARIANT)
    features = read_features(task)
    similarity = features.similarity(tokens_of(job, task.weights))
    full = train(job, task)
    return Trained(predictor(job, task, full), similarity, ("timm",), shrunk_of(full, task, config))


def shrunk_of(full: Path, task: Task, config: ExperimentConfig) -> Derived:
    """The variant `shrunk`, made of the trained `full`."""
    start = Checkpoint(
        variant=VARIANT, uri=str(full), digest="", step=task.steps, miou=None, history_uri=None, train_seconds=0.0
    )
    job = job_of(task, config, SHRUNK).model_copy(update={"start": start})
    began = time.perf_counter()
    shrunk = train(job, task)
    return Derived(predictor(job, task, shrunk), time.perf_counter() - began)


def train(job: TrainJob, task: Task) -> Path:
    """The folder of the trained model."""
    checkpoints: list[Path] = []

    def report(_metrics: dict[str, Any], folder: Path | None) -> None:
        if folder is not None:
            checkpoints.append(folder)

    work = Path(task.folder) / job.variant
    work.mkdir()
    run_training(job, DistributedContext(0, 1, torch.device(task.device)), report, work_folder=work)
    return checkpoints[-1]


def predictor(job: TrainJob, task: Task, folder: Path) -> Predict:
    """How the model in a folder predicts."""
    model, _metadata = segvit.load_checkpoint(folder)
    model.to(task.device)
    keep_for_precision(model, "bf16" if task.precision == "bf16" else None)
    options = job.inference.options()

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        return segvit.predict(model, image, **options).cpu().numpy()

    return predict


def overrides(task: Task) -> list[str]:
    """What the comparison sets alike for all; everything else is the experiment's."""
    # The experiment's warm-up, where it leaves steps to train in.
    warmup = load_config(task.config).train.warmup_steps
    return [
        f"data.root={task.data}",
        f"model.image_size=[{task.crop}, {task.crop}]",
        f"train.batch_size={task.batch}",
        f"train.steps={task.steps}",
        f"train.warmup_steps={min(warmup, task.steps // 4)}",
        f"train.validate_every_steps={task.steps}",
        f"train.precision={task.precision}",
        f"runtime.cpus_per_worker={task.threads}",
        f"runtime.loader_workers={task.loader_workers}",
        *([] if task.predict else [f"variants.{SHRUNK}.distill.images={NUM_SHORT}"]),
    ]


def job_of(task: Task, config: ExperimentConfig, variant: str) -> TrainJob:
    """A variant's job; where no label maps are wanted, one val image is validated on."""
    settings = config.variant_settings(variant)
    name = str(settings.model["backbone"])
    return TrainJob(
        variant=variant,
        settings=settings,
        shard_set=ShardSet.model_validate_json(Path(task.shard_set).read_text()),
        backbone=BackboneRecord(backbone=name, uri=task.weights, digest="", source="file", message=""),
        runtime=config.runtime,
        inference=config.evaluate.inference,
        max_val_samples=None if task.predict else 1,
    )


def tokens_of(job: TrainJob, weights: str) -> Any:
    """The job's backbone with all its blocks, and the norm after the last one, which our decoders do without."""
    outline: Any = outline_backbone(str(job.settings.model["backbone"]))
    whole = {**job.settings.model, "out_layers": [len(outline.blocks) - 1]}
    job = job.model_copy(update={"settings": job.settings.model_copy(update={"model": whole})})
    backbone, state = build_job_model(job).eval().backbone, load_file(weights)

    def tokens(images: Tensor) -> Tensor:
        last = backbone(images)[-1].tokens
        return F.layer_norm(last, last.shape[-1:], state["norm.weight"].float(), state["norm.bias"].float(), 1e-6)

    return tokens


if __name__ == "__main__":
    run(fit)
