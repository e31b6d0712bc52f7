"""Time from an image to its label map."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from segvit.inference.predict import predict
from segvit.model import SegViT

WARMUP_RUNS = 2
WHOLE: Mapping[str, Any] = MappingProxyType({})


def measure_latency(
    model: SegViT, size: tuple[int, int], repeats: int = 10, inference: Mapping[str, Any] = WHOLE
) -> float:
    """Median milliseconds of the prediction of one image, on the model's device.

    Args:
        model: The model; its mode and precision are left as they are.
        size: (height, width) of the image in pixels.
        repeats: Timed runs, after two untimed ones.
        inference: Keyword arguments of `predict`; by default the image goes through the model whole.

    Raises:
        ValueError: No repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    device = model.mean.device
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=device)
    times_ms = [timed_run_ms(model, image, inference) for _ in range(WARMUP_RUNS + repeats)]
    return statistics.median(times_ms[WARMUP_RUNS:])


def timed_run_ms(model: SegViT, image: torch.Tensor, inference: Mapping[str, Any]) -> float:
    """Milliseconds of one prediction, up to the label map being there."""
    wait_for(image.device)
    start = time.perf_counter()
    predict(model, image, **inference)
    wait_for(image.device)
    return (time.perf_counter() - start) * 1000


def wait_for(device: torch.device) -> None:
    """Wait for queued GPU work; on the CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
