"""A small training job, for tests and fault runs: four transformer blocks, seconds a run."""

from __future__ import annotations

from typing import Any

from pipeline.config import LossConfig, RuntimeConfig, TrainConfig, VariantSettings
from pipeline.records import BackboneRecord, ShardSet
from pipeline.training.job import TrainJob


def tiny_job(shard_set: ShardSet, structure: str = "cascade", **train: Any) -> TrainJob:
    """A job of random weights and without dropout; keywords override its train section."""
    model: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "image_size": [48, 64],
        "structure": structure,
        "decoder_layers": 1,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        **({} if structure == "shrunk" else {"out_layers": [1, 3]}),
        **({"shrink_at": 2} if structure in ("shrunk", "anchored") else {}),
    }
    settings: dict[str, Any] = {
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "validate_every_steps": 4,
        "checkpoint_every_steps": 4,
    }
    return TrainJob(
        variant="full",
        settings=VariantSettings(model=model, loss=LossConfig(), train=TrainConfig(**settings | train)),
        shard_set=shard_set,
        backbone=BackboneRecord(
            backbone="vit_tiny_patch16_224", uri=None, digest="random", source="random", message=""
        ),
        runtime=RuntimeConfig(log_every_steps=1),
    )


def with_settings(job: TrainJob, **changes: Any) -> TrainJob:
    """The job with other settings; `model` adds to the model's fields."""
    if "model" in changes:
        changes["model"] = job.settings.model | changes["model"]
    return job.model_copy(update={"settings": job.settings.model_copy(update=changes)})
