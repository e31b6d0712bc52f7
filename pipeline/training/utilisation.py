"""How much of what its devices can do a training run does: model FLOPs utilisation (PaLM, arXiv 2204.02311, app. B)."""

from __future__ import annotations

import torch

from pipeline.training.job import DistributedContext, TrainJob
from segvit.devices import peak_flops
from segvit.flops import training_gflops


def utilisation_per_image(job: TrainJob, context: DistributedContext, precision: str) -> float | None:
    """The MFU of one image a second over all workers; times images a second it is the run's.

    The model's operations, forward and backward, over the vendor's peak at the precision that is computed in. None
    where that is not known: on a CPU, and on a GPU that `segvit.devices` does not list.
    """
    if context.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(context.device), precision)
    if peak is None:
        return None
    giga = training_gflops(job.model, job.shard_set.num_classes, job.model.image_size, job.train.freeze_blocks)
    return 2e9 * giga / (peak * context.world_size)
