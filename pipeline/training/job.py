"""What a training worker is given: its job, and its position among the workers. Loads no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import segvit
from pipeline.config import InferenceConfig, RuntimeConfig, TrainConfig, VariantSettings
from pipeline.records import BackboneRecord, Checkpoint, Record, ShardSet
from segvit.schedules import build_schedule

if TYPE_CHECKING:
    import torch


class TrainJob(Record):
    """All that a training worker needs, serialisable.

    Attributes:
        start: the trained model that this one starts from.
        inference: how images are predicted in validation.
        hold_out: share of the train split that is not trained on, and validated on in place of val.
        max_val_samples: validation looks at this many samples at most (None: all).
        goes_on_from: folder of the training run whose last state this one begins with.
        save_checkpoints: False for search trials, which are thrown away.
    """

    variant: str
    settings: VariantSettings
    shard_set: ShardSet
    backbone: BackboneRecord
    runtime: RuntimeConfig
    start: Checkpoint | None = None
    goes_on_from: str | None = None
    inference: InferenceConfig = InferenceConfig()
    hold_out: float = 0.0
    max_val_samples: int | None = None
    save_checkpoints: bool = True

    @property
    def train(self) -> TrainConfig:
        """Optimisation and augmentation."""
        return self.settings.train

    @property
    def model(self) -> segvit.ModelConfig:
        """The model's configuration; raises ValueError where its fields do not fit one another."""
        return segvit.ModelConfig.from_dict(self.settings.model)


class DistributedContext(NamedTuple):
    """Which worker this is, among how many, on which device."""

    rank: int
    world_size: int
    device: torch.device


def job_schedule(train: TrainConfig) -> Callable[[int], float]:
    """The factor of the learning rate by step; raises ValueError for an unknown schedule or option."""
    steps = max(train.steps, 1)
    return build_schedule(train.schedule.name, steps, min(train.warmup_steps, steps), **train.schedule.options)
