"""What a training worker reads: its share of every step's images."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.shards.loader import Batch, TrainLoader
from pipeline.training.job import DistributedContext, TrainJob


def micro_batches(
    job: TrainJob, context: DistributedContext, start_step: int, loader_workers: int | None = None
) -> Iterator[Batch]:
    """This rank's micro-batches from an optimizer step (from 0) on, `accumulation_steps` a step, for ever."""
    loader = TrainLoader(
        job.shard_set,
        split="train",
        crop=job.model.image_size,
        augmentation=job.train.augmentation,
        seed=job.train.seed,
        global_batch_size=job.train.batch_size // job.train.accumulation_steps,
        rank=context.rank,
        world_size=context.world_size,
        start_step=start_step * job.train.accumulation_steps,
        num_workers=job.runtime.loader_workers if loader_workers is None else loader_workers,
        repeat_factor_threshold=job.train.repeat_factor_threshold,
        stream_buffer=job.train.stream_buffer,
        held_apart=job.hold_out,
        for_gpu=context.device.type == "cuda",
    )
    return iter(loader)
