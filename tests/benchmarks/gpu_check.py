"""Speed of one GPU on ViT-L at 512 x 512 pixels, 150 classes: training, inference, memory, loader.

    python tests/benchmarks/gpu_check.py [--parts training inference ...] [--batch 16] [--json FILE]
    python tests/benchmarks/gpu_check.py --device cpu --tiny

Needs neither Ray nor MLflow. Every part prints a JSON line as soon as it is done, a part that fails prints its error,
and a Markdown table comes last. Training is forward, loss, backward, clipping and fused AdamW in bf16 on images that
lie on the device; MFU counts the model's multiply-adds (`segvit.flops.training_gflops`) against the vendor's peak
(`segvit.devices`). Inference is from uint8 images to label maps, both on the device. The loader reads real JPEG
shards in processes of its own and feeds the compiled training step. CamVid (SEGVIT_DATA, with SEGVIT_WEIGHTS) is
bench_recipe.py's, the variants of camvid.yaml without Ray. Decoding compares a CPU core with nvJPEG; memory is
bench_memory.py's, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import segvit
from pipeline.training.master_weights import MasterWeights
from segvit.compilation import compile_loss, compile_regions, warm_up
from segvit.devices import peak_flops
from segvit.flops import training_gflops
from segvit.losses.segmentation_loss import LossTargets

NUM_CLASSES = 150
PRESENT = 10
MARKS = {
    "camvid full seed 0": ("val_miou", 0.76),
    "camvid full seed 1": ("val_miou", 0.76),
    "training compiled": ("mfu", 0.5),
    "training bf16_params": ("mfu", 0.5),
    "inference compiled": ("images_per_s", 200.0),
    "loader": ("wait_share", 0.02),
}

Figures = dict[str, float]


class Check:
    """The model's configuration, inputs on the device, and how long to measure."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.tiny, self.batch = options.tiny, options.batch
        name, side = ("vit_tiny_patch16_224", 64) if options.tiny else ("vit_large_patch16_384", 512)
        self.config = segvit.ModelConfig(
            backbone=name,
            image_size=(side, side),
            out_layers=(0, 1, 2) if options.tiny else (7, 15, 23),
            class_token=False,
            drop_path_rate=0.3,
        )
        self.steps = 2 if options.tiny else 20
        # The compiler proper takes minutes on a CPU.
        self.backend = "eager" if options.tiny else "inductor"

    def model(self, *, compiled: bool) -> segvit.SegViT:
        """A model of random weights on the device."""
        torch.manual_seed(0)
        model = segvit.build_model(self.config, NUM_CLASSES).to(self.device)
        if compiled:
            compile_regions(model, self.backend)
        return model

    def images(self, count: int) -> Tensor:
        """uint8 (B, 3, H, W)."""
        return torch.randint(0, 256, (count, 3, *self.config.image_size), dtype=torch.uint8, device=self.device)

    def labels(self, count: int) -> Tensor:
        """(B, H, W): as many classes as images of ADE20K show, in a grid of rectangles, as objects lie."""
        cells = (torch.arange(49) % PRESENT).view(1, 1, 7, 7).expand(count, 1, 7, 7).float()
        return torch.nn.functional.interpolate(cells, size=self.config.image_size)[:, 0].long().to(self.device)

    def autocast(self) -> torch.autocast:
        """bf16, but float32 in miniature."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=not self.tiny)

    def wait(self) -> float:
        """The time, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, run: Callable[[], object], runs: int) -> float:
        """Mean seconds of a run."""
        begin = self.wait()
        for _ in range(runs):
            run()
        return (self.wait() - begin) / runs

    def memory(self) -> Figures:
        """The most memory that tensors took since the last call, in GiB; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {"peak_gib": round(peak, 2)}


class Step:
    """A training step as pipeline.training takes it."""

    def __init__(self, check: Check, *, compiled: bool, checkpointing: bool = False, bf16_params: bool = False) -> None:
        self.check, self.model = check, check.model(compiled=compiled).train()
        if checkpointing:
            self.model.set_grad_checkpointing()
        self.masters = MasterWeights(self.model) if bf16_params else None
        if compiled and self.masters is not None:
            compile_regions(self.masters.copy, check.backend)
        self.loss = segvit.SegmentationLoss(NUM_CLASSES)
        if compiled:
            compile_loss(self.loss, check.backend)
        self.optimizer = torch.optim.AdamW(segvit.parameter_groups(self.model, 2e-5, 0.01), fused=True)

    def __call__(self, images: Tensor, targets: LossTargets) -> None:
        """Forward, loss, backward, clipping, AdamW."""
        normalized = self.model.normalize(images)
        if self.masters is None:
            with self.check.autocast():
                output = self.model(normalized)
        else:
            output = self.masters.copy(normalized)
        self.loss(output, targets)["total"].backward()
        if self.masters is not None:
            self.masters.take_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 35.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.update_copy()


def training(check: Check) -> Iterator[tuple[str, Figures]]:
    """Images a second, MFU, memory: eager, compiled, in bf16 parameters, and with activations computed again."""
    kinds = {
        "eager": {"compiled": False},
        "compiled": {"compiled": True},
        "bf16_params": {"compiled": True, "bf16_params": True},
        "checkpointed": {"compiled": True, "checkpointing": True},
    }
    images, labels = check.images(check.batch), check.labels(check.batch)
    targets = segvit.SegmentationLoss(NUM_CLASSES).targets(labels)
    giga = 2 * training_gflops(check.config, NUM_CLASSES, check.config.image_size)
    peak = peak_flops(torch.cuda.get_device_name(), "bf16") if check.device.type == "cuda" else None
    for kind, settings in kinds.items():
        check.memory()
        step = Step(check, **settings)
        run = partial(step, images, targets)
        first = check.seconds(run, 1)
        check.seconds(run, 2)
        seconds = check.seconds(run, check.steps)
        rate = check.batch / seconds
        figures = {"images_per_s": rate, "step_ms": 1e3 * seconds, "first_step_s": first, "tflops": rate * giga / 1e3}
        yield f"training {kind}", figures | ({"mfu": rate * giga * 1e9 / peak} if peak else {}) | check.memory()
        del step, run


def inference(check: Check) -> Iterator[tuple[str, Figures]]:
    """Images a second to label maps, and how much of the time the model itself takes."""
    for kind in ("eager", "compiled"):
        model = check.model(compiled=kind == "compiled").eval()
        for batch in (2,) if check.tiny else (16, 64):
            images = check.images(batch)
            check.memory()
            with check.autocast(), torch.no_grad():
                first = check.seconds(partial(warm_up, model), 1)
                runs = (partial(model, model.normalize(images)), partial(segvit.predict_batch, model, images))
                for run in runs:
                    check.seconds(run, 1)
                forward, whole = (check.seconds(run, max(check.steps // 2, 1)) for run in runs)
            name = f"inference {kind}" if batch == 64 or check.tiny else f"inference {kind} batch {batch}"
            yield (
                name,
                {"images_per_s": batch / whole, "ms": 1e3 * whole, "model_ms": 1e3 * forward, "first_s": first}
                | check.memory(),
            )


def latency(check: Check) -> Iterator[tuple[str, Figures]]:
    """Milliseconds of one image: eager, compiled, and the eager model as a CUDA graph of the one size."""
    images = check.images(1)
    for kind in ("eager", "compiled", "cuda_graph"):
        if kind == "cuda_graph" and check.device.type != "cuda":
            continue
        model = check.model(compiled=kind == "compiled").eval()
        with check.autocast(), torch.no_grad():
            run: Callable[[], object] = partial(model, model.normalize(images))
            check.seconds(run, 3)
            if kind == "cuda_graph":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                run = graph.replay
            yield f"latency {kind}", {"model_ms": 1e3 * check.seconds(run, check.steps)}


def memory(check: Check) -> Iterator[tuple[str, Figures]]:
    """What bench_memory.py finds in a process of its own: the ways to train in less memory, and that losses agree."""
    script = Path(__file__).with_name("bench_memory.py")
    if not script.exists():
        return
    command = [sys.executable, str(script), "--device", check.device.type, "--batch", str(min(check.batch, 8))]
    command += ["--case", "tiny" if check.tiny else "large512"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    for line in ended.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            name = next((value for value in found.values() if isinstance(value, str)), "all")
            yield f"memory {name}", {key: value for key, value in found.items() if isinstance(value, int | float)}


def camvid(check: Check) -> Iterator[tuple[str, Figures]]:
    """val mIoU of camvid.yaml's variants, two seeds beside each other, and how long their steps wait for images."""
    script, config = Path(__file__).with_name("bench_recipe.py"), "flows/configs/camvid.yaml"
    command = [sys.executable, str(script), "--device", str(torch.empty(0, device=check.device).device)]
    command += ["--variants", "full", "shrunk"]
    if check.tiny:
        config = "flows/configs/quickstart.yaml"
        small: tuple[str, ...] = (
            "data.digits.num_train=8",
            "data.digits.num_val=2",
            "train.batch_size=2",
            "model.weights=random",
            "model.backbone=vit_tiny_patch16_224",
            "model.image_size=[64,64]",
            "model.decoder_width=192",
            "variants.shrunk.distill.images=2",
        )
        command += ["--steps", "2", "--seeds", "0", *(word for one in small for word in ("--set", one))]
    else:
        command += ["--processes", "2", "--loader-workers", str(max(len(os.sched_getaffinity(0)) // 2 - 1, 1))]
    root = script.parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    # Each training's row is shown as soon as it is there, should the rest not end in time.
    with subprocess.Popen([*command, config], env=environment, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found = json.loads(line)
                name = f"camvid {found['variant']} seed {found['seed']}"
                yield name, {key: found[key] for key in ("val_miou", "seconds", "data_wait_share")}
    if process.returncode:
        raise RuntimeError(f"bench_recipe.py ended with code {process.returncode}")


def loader(check: Check) -> Iterator[tuple[str, Figures]]:
    """Share of the time that the compiled training step waits for images from JPEG shards."""
    from pipeline.config import AugmentationConfig, DataConfig
    from pipeline.shards.loader import TrainLoader
    from pipeline.shards.prepare import prepare_shards
    from pipeline.training.prefetch import prefetch

    side, workers = check.config.image_size[0], 0 if check.tiny else max(len(os.sched_getaffinity(0)) - 2, 1)
    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder) / "raw" / "ADEChallengeData2016", 8 if check.tiny else 256, side)
        config = DataConfig(
            dataset="ade20k", root=f"{folder}/raw", samples_per_shard=64, classes_without_pixels="allow"
        )
        prepare_shards(config, f"{folder}/shards", progress=lambda _: None)
        augmentation = AugmentationConfig(resize_long=4 * side, resize_short=side)
        batches = TrainLoader(
            f"{folder}/shards",
            crop=check.config.image_size,
            augmentation=augmentation,
            seed=0,
            global_batch_size=2 if check.tiny else check.batch,
            num_workers=workers,
            for_gpu=check.device.type == "cuda",
        )
        step, waited, runs = Step(check, compiled=True), 0.0, 2 * check.steps
        feed = prefetch(iter(batches), check.device, step.loss.targets)
        for index in range(runs + 3):
            if index == 3:
                begin, waited = check.wait(), 0.0
            started = time.perf_counter()
            batch = next(feed)
            waited += time.perf_counter() - started
            step(batch.images, batch.targets or step.loss.targets(batch.labels))
        seconds = check.wait() - begin
    rate = runs * len(batch.keys) / seconds
    yield "loader", {"wait_share": waited / seconds, "images_per_s": rate, "processes": float(workers)}


def decode(check: Check) -> Iterator[tuple[str, Figures]]:
    """JPEGs a second that one CPU core decodes, and that nvJPEG decodes in one call to the GPU's memory."""
    from torchvision.io import decode_jpeg

    from segvit.image_files import decode_image

    with tempfile.TemporaryDirectory() as folder:
        make_pictures(Path(folder), 2 if check.tiny else 64, check.config.image_size[0])
        files = [file.read_bytes() for file in sorted(Path(folder).glob("images/training/*.jpg"))]
    torch.set_num_threads(1)
    yield (
        "decode cpu core",
        {"images_per_s": len(files) / check.seconds(lambda: [decode_image(one) for one in files], 3)},
    )
    if check.device.type == "cuda":
        data = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in files]
        run = partial(decode_jpeg, data, device="cuda")
        check.seconds(run, 1)
        yield "decode nvjpeg", {"images_per_s": len(files) / check.seconds(run, 3)}


def make_pictures(root: Path, count: int, side: int) -> None:
    """ADE20K's tree of smooth random pictures, four thirds as wide as high, and labels of rectangles."""
    rng = np.random.default_rng(0)
    size = (side * 4 // 3, side)
    for split, number in (("training", count), ("validation", 1)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(number):
            name = f"ADE_{split}_{index:08d}"
            colours = rng.integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8)
            picture = Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)
            picture.save(root / "images" / split / f"{name}.jpg", quality=92)
            classes = rng.integers(1, NUM_CLASSES + 1, (3, 4), dtype=np.uint8)
            Image.fromarray(classes).resize(size, Image.Resampling.NEAREST).save(
                root / "annotations" / split / f"{name}.png"
            )


PARTS = {
    "training": training,
    "inference": inference,
    "latency": latency,
    "loader": loader,
    "decode": decode,
    "memory": memory,
    "camvid": camvid,
}


def table(rows: dict[str, Figures], *, marks: bool = True) -> str:
    """A Markdown table of all rows, and whether the marks are met, which are a large GPU's."""
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    lines = [f"| | {' | '.join(names)} | mark |", "|---" * (len(names) + 2) + "|"]
    for row, figures in rows.items():
        cells = [f"{figures[name]:.4g}" if name in figures else "" for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} | {mark_text(row, figures) if marks else ''} |")
    return "\n".join(lines)


def mark_text(row: str, figures: Figures) -> str:
    """The mark of a row, and whether it is met; empty where it has none."""
    name, mark = MARKS.get(row, ("", 0.0))
    if name not in figures:
        return ""
    met = figures[name] < mark if name == "wait_share" else figures[name] >= mark
    return f"{name} {'<' if name == 'wait_share' else '>='} {mark:g}: {'met' if met else 'missed'}"


def main() -> None:
    """Measure the parts, print, and write `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, a few steps, no compiler: on any machine")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check, rows, begin = Check(options), {}, time.perf_counter()
    name = torch.cuda.get_device_name() if check.device.type == "cuda" else "CPU"
    for part in options.parts:
        try:
            for row, figures in PARTS[part](check):
                rows[row] = figures
                print(json.dumps({"row": row, **figures}), flush=True)
        except Exception as error:
            print(json.dumps({"row": part, "error": f"{type(error).__name__}: {error}"}), flush=True)
            if options.tiny:
                raise
        if check.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{name}, PyTorch {torch.__version__}, batch {options.batch}, {time.perf_counter() - begin:.0f} s\n")
    print(table(rows, marks=check.device.type == "cuda"))
    if options.json:
        options.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
