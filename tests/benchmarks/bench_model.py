"""Time and memory of training and inference: decoder, loss, full step, whole-image prediction.

    python tests/benchmarks/bench_model.py [--case base512 large640 ...] [--device cpu] [--threads 2] [--json FILE]

Every figure of a case is the best of several rounds; the parts of a round run one after the other, so that noise of
the machine hits all of them. Memory is the peak of the process above what it held before the first step, each figure
from a process of its own; on a GPU the allocator's. B = 1, float32 unless --bf16, dropout and stochastic depth on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import segvit

CASES: dict[str, dict[str, Any]] = {
    "base512": {"backbone": "vit_base_patch16_384", "image_size": (512, 512), "drop_path_rate": 0.1},
    "large512": {
        "backbone": "vit_large_patch16_384",
        "image_size": (512, 512),
        "out_layers": (7, 15, 23),
        "drop_path_rate": 0.3,
    },
    "large640": {
        "backbone": "vit_large_patch16_384",
        "image_size": (640, 640),
        "out_layers": (7, 15, 23),
        "drop_path_rate": 0.3,
    },
    "large640_shrunk": {
        "backbone": "vit_large_patch16_384",
        "image_size": (640, 640),
        "structure": "shrunk",
        "shrink_at": 8,
        "drop_path_rate": 0.3,
    },
    "large640_anchored": {
        "backbone": "vit_large_patch16_384",
        "image_size": (640, 640),
        "structure": "anchored",
        "shrink_at": 8,
        "drop_path_rate": 0.3,
    },
}
NUM_CLASSES = 150
NUM_PRESENT = 10
MEMORY_OF = ("decoder_loss_backward", "training_step", "training_step_adamw", "inference")


class Bench:
    """One case's model, input and timed parts."""

    def __init__(self, case: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.bf16 = options.bf16
        config = segvit.ModelConfig(class_token=False, **CASES[case])
        self.size = config.image_size
        with self.device:
            self.model = segvit.build_model(config, NUM_CLASSES)
            self.images = torch.randn(options.batch, 3, *self.size)
            # Present classes in a grid of patches, as objects lie, not as noise.
            cells = (torch.arange(49) % NUM_PRESENT).view(1, 1, 7, 7).expand(options.batch, 1, 7, 7)
            labels = torch.nn.functional.interpolate(cells.float(), size=self.size, mode="nearest")
            self.labels = labels[:, 0].long()
            self.pixels = torch.randint(0, 256, (options.batch, 3, *self.size), dtype=torch.uint8)
        self.loss = segvit.SegmentationLoss(NUM_CLASSES)
        self.forward: Callable[[Tensor], segvit.SegmentationOutput] = self.model
        if options.compile:
            self.forward = torch.compile(self.model, mode=options.compile)
        self.features: list[Any] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def prepare_features(self) -> None:
        """Backbone features that take gradients, as in training."""
        with torch.no_grad(), self.autocast():
            features = self.model.eval().backbone(self.images)
        self.features = [feature._replace(tokens=feature.tokens.requires_grad_()) for feature in features]

    def backbone_forward(self) -> None:
        """The backbone alone, in evaluation mode without gradients."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            self.model.backbone(self.images)

    def decoder_forward(self) -> None:
        """The decoder alone, in evaluation mode without gradients."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            self.model.decoder(self.features)

    def decoder_loss_backward(self) -> None:
        """Decoder, loss and their gradients, down to the backbone's features."""
        self.model.train()
        with self.autocast():
            output = segvit.model.assemble(self.model.decoder(self.features), self.size)
        self.loss(output, self.labels)["total"].backward()
        self.model.zero_grad()
        for feature in self.features:
            feature.tokens.grad = None

    def training_step(self) -> None:
        """Forward, loss, backward; gradients freed."""
        self.model.train()
        with self.autocast():
            output = self.forward(self.images)
        self.loss(output, self.labels)["total"].backward()
        self.model.zero_grad()

    def training_step_adamw(self) -> None:
        """Forward, loss, backward, AdamW."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(segvit.parameter_groups(self.model, 2e-5, 0.01), fused=True)
        self.model.train()
        with self.autocast():
            output = self.forward(self.images)
        self.loss(output, self.labels)["total"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        """uint8 images to label maps."""
        with self.autocast():
            segvit.predict_batch(self.forward, self.pixels)  # type: ignore[arg-type]

    def seconds(self, part: str) -> float:
        """Seconds of one run of a part."""
        self.wait()
        start = time.perf_counter()
        getattr(self, part)()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for queued GPU work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


PARTS = (
    "backbone_forward",
    "decoder_forward",
    "decoder_loss_backward",
    "training_step",
    "inference",
)


def best_times(benches: dict[str, Bench], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Best seconds of every part of every case, the cases' rounds interleaved."""
    best: dict[str, dict[str, float]] = {case: {} for case in benches}
    if not {"decoder_forward", "decoder_loss_backward"}.isdisjoint(options.parts):
        for bench in benches.values():
            bench.prepare_features()
    for turn in range(options.rounds + 1):
        for case, bench in benches.items():
            for part in options.parts:
                seconds = bench.seconds(part)
                if turn:  # the first round warms up
                    best[case][part] = min(seconds, best[case].get(part, seconds))
    return best


def peak_memory(bench: Bench, part: str) -> float:
    """10^9 bytes that three runs of a part take above what was held before the first."""
    if part == "decoder_loss_backward":
        bench.prepare_features()
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = resident_bytes()
    for _ in range(3):
        getattr(bench, part)()
    if bench.device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    return (peak_resident_bytes() - before) / 1e9


def resident_bytes() -> int:
    """Memory the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most memory the process has held; getrusage would count its parent's at the fork, too."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def memory_in_own_process(case: str, part: str) -> float:
    """`peak_memory` measured by a child process with the same options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", case, part]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ended.stdout)


def main() -> None:
    """Print a table a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["base512", "large640", "large640_shrunk"], choices=CASES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", help="torch.compile's mode, such as default or max-autotune")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        case, part = options.memory_of
        print(peak_memory(Bench(case, options), part))
        return
    benches = {case: Bench(case, options) for case in options.case}
    times = best_times(benches, options)
    results: dict[str, Any] = {}
    for case, parts in times.items():
        print(case)
        unit = parts.get("backbone_forward")
        for part, seconds in parts.items():
            share = f"  {seconds / unit:6.3f} of the backbone's forward" if unit else ""
            print(f"  {part:24s} {seconds * 1e3:9.1f} ms{share}")
        results[case] = {"ms": {part: seconds * 1e3 for part, seconds in parts.items()}}
        if not options.no_memory:
            # A GPU's allocator tells exactly; of a process, only its peak is known.
            own_process = options.device == "cpu"
            memory = {
                part: memory_in_own_process(case, part) if own_process else peak_memory(benches[case], part)
                for part in MEMORY_OF
            }
            for part, gigabytes in memory.items():
                print(f"  {part:24s} {gigabytes:9.3f} GB above the start")
            results[case]["gb"] = memory
    for case in times.keys() & {"large640_shrunk", "large640_anchored"} if "large640" in times else ():
        for part, seconds in times[case].items():
            print(f"{part} of {case} over large640: {seconds / times['large640'][part]:.3f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
