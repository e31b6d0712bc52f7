"""Time from an image to its label map."""

from __future__ import annotations

import statistics
import time

import torch

from segvit.inference import predict_batch
from segvit.model import SegViT

WARMUP_RUNS = 2


def measure_latency(model: SegViT, size: tuple[int, int], repeats: int = 10) -> float:
    """Median milliseconds of whole-image prediction at batch 1, on the model's device.

    Args:
        model: The model; its mode and precision are left as they are.
        size: (height, width) of the image in pixels.
        repeats: Timed runs, after two untimed ones.

    Raises:
        ValueError: No repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    device = model.mean.device
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, device=device)
    times_ms = [timed_run_ms(model, image) for _ in range(WARMUP_RUNS + repeats)]
    return statistics.median(times_ms[WARMUP_RUNS:])


def timed_run_ms(model: SegViT, image: torch.Tensor) -> float:
    """Milliseconds of one prediction, up to the label map being there."""
    wait_for(image.device)
    start = time.perf_counter()
    predict_batch(model, image)
    wait_for(image.device)
    return (time.perf_counter() - start) * 1000


def wait_for(device: torch.device) -> None:
    """Wait for queued GPU work; on the CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
