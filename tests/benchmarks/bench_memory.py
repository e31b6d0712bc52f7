"""Peak memory, time and loss of training steps: checkpointing, bf16 parameters, and shares of one GPU against DDP.

    PYTHONPATH=. python tests/benchmarks/bench_memory.py --device cuda --case large512 [--batch 8]

A JSON line a way of training, all from the same weights on the same images, beside what `segvit plan` predicts; then
the largest relative difference of losses between the ways that must agree. Needs no Ray. Memory is the GPU
allocator's; a CPU has none to ask.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import segvit
from pipeline.training.master_weights import MasterWeights
from pipeline.training.sharding import ensure_process_group, shard_model
from segvit.optim import whole
from segvit.training_cost import TrainingCost, TrainingSetup
from tests.benchmarks.bench_model import CASES as LARGE_CASES

CASES = {
    "tiny": {"backbone": "vit_tiny_patch16_224", "image_size": (64, 64), "out_layers": (1, 3), "drop_path_rate": 0.1},
    **LARGE_CASES,
}
NUM_CLASSES = 150


class Way(NamedTuple):
    """A way of training."""

    precision: str
    checkpointing: bool
    parallel: str  # none, ddp or sharded


WAYS = (
    Way("bf16", False, "none"),
    Way("bf16", True, "none"),
    Way("bf16_params", False, "none"),
    Way("bf16_params", True, "none"),
    Way("fp32", False, "ddp"),
    Way("fp32", False, "sharded"),
    Way("fp32", True, "sharded"),
    Way("bf16_params", False, "ddp"),
    Way("bf16_params", False, "sharded"),
)
SAME_LOSS = (("fp32", "ddp", "sharded"), ("bf16_params", "ddp", "sharded"))


class Run:
    """A model and its optimizer, trained one way."""

    def __init__(self, case: str, way: Way, device: torch.device, batch: int) -> None:
        torch.manual_seed(0)
        config = segvit.ModelConfig(class_token=False, **CASES[case])
        self.way, self.device = way, device
        with device:
            self.model = segvit.build_model(config, NUM_CLASSES).train()
        self.model.set_grad_checkpointing(way.checkpointing)
        in_bf16 = way.precision == "bf16_params"
        if way.parallel == "sharded":
            shard_model(self.model, device, torch.bfloat16 if in_bf16 else None)
        self.masters = MasterWeights(self.model) if in_bf16 and way.parallel != "sharded" else None
        self.optimizer = torch.optim.AdamW(segvit.parameter_groups(self.model, 2e-5, 0.01), fused=True)
        forward: nn.Module = self.model if self.masters is None else self.masters.copy
        if way.parallel == "ddp":
            ensure_process_group(device)
            forward = nn.parallel.DistributedDataParallel(forward, [device] if device.type == "cuda" else None)
        self.forward: Callable[[Tensor], segvit.SegmentationOutput] = forward
        self.loss = segvit.SegmentationLoss(NUM_CLASSES)
        torch.manual_seed(1)
        self.images = torch.randn(batch, 3, *config.image_size).to(device)
        cells = torch.randint(0, 10, (batch, 1, 7, 7)).float()
        self.labels = nn.functional.interpolate(cells, size=config.image_size)[:, 0].long().to(device)

    def step(self) -> float:
        """One optimizer step; the loss before it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.precision == "bf16"):
            output = self.forward(self.images)
        loss = self.loss(output, self.labels)["total"]
        loss.backward()
        if self.masters is not None:
            self.masters.take_gradients()
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        whole(nn.utils.clip_grad_norm_(parameters, 35.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not None:
            self.masters.update_copy()
        return float(loss.detach())


def measure(case: str, way: Way, device: torch.device, batch: int, num_steps: int) -> dict[str, Any]:
    """Losses, peak and seconds of a way's steps; the first step, which makes the optimizer's state, is not timed."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run = Run(case, way, device, batch)
    losses, seconds = [], []
    for _ in range(num_steps):
        started = time.perf_counter()
        losses.append(run.step())  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    setup = TrainingSetup(
        num_images=batch,
        precision=way.precision,
        activation_checkpointing=way.checkpointing,
        sharded=way.parallel == "sharded",
    )
    predicted = TrainingCost(run.model.config, NUM_CLASSES).memory(setup).peak
    if way.parallel == "ddp":  # whose buckets one rank has, too
        predicted += (2 if way.precision == "bf16_params" else 4) * sum(p.numel() for p in run.model.parameters())
    return {
        "case": case,
        "batch": batch,
        **way._asdict(),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "predicted_gb": predicted / 1e9,
        "step_ms": min(seconds[1:] or seconds) * 1e3,
        "losses": losses,
    }


def rows(case: str, device: torch.device, batch: int, num_steps: int = 5) -> Iterator[dict[str, Any]]:
    """A row a way, then one a pair of ways that must agree."""
    found: dict[tuple[str, str], list[float]] = {}
    for way in WAYS:
        row = measure(case, way, device, batch, num_steps)
        gc.collect()
        if not way.checkpointing:
            found[way.precision, way.parallel] = row["losses"]
        yield row
    for precision, one, other in SAME_LOSS:
        pairs = zip(found[precision, one], found[precision, other], strict=True)
        yield {
            "case": case,
            "precision": precision,
            "same": f"{one} and {other}",
            "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        }


def main() -> None:
    """Print the rows as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="tiny", choices=CASES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
    for row in rows(options.case, device, options.batch, options.steps):
        print(json.dumps(row), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
