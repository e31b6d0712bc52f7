"""Our side of the comparison: the trainer on an experiment's settings, without Ray."""

from __future__ import annotations

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
from pipeline.records import BackboneRecord, ShardSet
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.trainer import build_job_model
from tests.benchmarks.peers.common import Task, Trained, read_features, run

VARIANT = "full"


def fit(task: Task) -> Trained:
    """Train the variant `full`, and predict as validation does."""
    config = load_config(task.config, overrides(task))
    job = job_of(task, config)
    features = read_features(task)
    similarity = features.similarity(tokens_of(job, task.weights))
    checkpoints: list[Path] = []

    def report(_metrics: dict[str, Any], folder: Path | None) -> None:
        if folder is not None:
            checkpoints.append(folder)

    device = torch.device(task.device)
    run_training(job, DistributedContext(0, 1, device), report, work_folder=Path(task.folder))
    model, _metadata = segvit.load_checkpoint(checkpoints[-1])
    model.to(device)
    options = job.inference.options()

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        return segvit.predict(model, image, **options).cpu().numpy()

    return Trained(predict, similarity, ("timm",))


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
    ]


def job_of(task: Task, config: ExperimentConfig) -> TrainJob:
    """The variant's job; where no label maps are wanted, one val image is validated on."""
    settings = config.variant_settings(VARIANT)
    name = str(settings.model["backbone"])
    return TrainJob(
        variant=VARIANT,
        settings=settings,
        shard_set=ShardSet.model_validate_json(Path(task.shard_set).read_text()),
        backbone=BackboneRecord(backbone=name, uri=task.weights, digest="", source="file", message=""),
        runtime=config.runtime,
        inference=config.evaluate.inference,
        max_val_samples=None if task.predict else 1,
    )


def tokens_of(job: TrainJob, weights: str) -> Any:
    """The job's backbone with the norm after its last block, which our decoders do without."""
    backbone, state = build_job_model(job).eval().backbone, load_file(weights)

    def tokens(images: Tensor) -> Tensor:
        last = backbone(images)[-1].tokens
        return F.layer_norm(last, last.shape[-1:], state["norm.weight"].float(), state["norm.bias"].float(), 1e-6)

    return tokens


if __name__ == "__main__":
    run(fit)
