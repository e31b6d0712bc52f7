"""What settings of a recipe bring: variants of an experiment, trained and validated without Ray.

    python tests/benchmarks/bench_recipe.py [flows/configs/camvid_cpu.yaml] [--rows base muon ...] [--seeds 0 1]
        [--steps 300] [--variants full] [--set KEY=VALUE ...] [--device cuda] [--processes 1] [--json FILE]

Every row is the experiment with the settings below; `--set` changes them all, and `--steps` their length, with a
twentieth of warm-up and one validation at the end. Needs neither Ray nor MLflow. A JSON line a training once it is
done, then a Markdown table, whose differences are those of the same seeds. `--processes` trainings share the device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import storage
from pipeline.config import ExperimentConfig, RuntimeConfig
from pipeline.config.file import load_config
from pipeline.records import BackboneRecord, Checkpoint, ShardSet
from pipeline.shards.prepare import prepare_shards
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from segvit.weights.pretrained import find_backbone_weights, save_backbone_state

LARGER = "evaluate.inference.resize=[672,504]"
ROWS: dict[str, tuple[str, ...]] = {
    "base": (),
    "adamw": ("train.optimizer=adamw", "train.learning_rate=6e-5"),
    "muon": ("train.optimizer=muon", "train.learning_rate=1.2e-4"),
    "muon_twice": ("train.optimizer=muon", "train.learning_rate=2.4e-4"),
    "lion": ("train.optimizer=lion", "train.learning_rate=1e-5", "train.weight_decay=0.05"),
    "layer_decay": ("train.layer_decay=0.8",),
    "unfrozen": ("train.freeze_blocks=0",),
    "unfrozen_layer_decay": ("train.freeze_blocks=0", "train.layer_decay=0.8"),
    "ema": ("train.ema_decay=0.99",),
    "average_best": ("train.average_best=3", "train.validate_every_steps=50"),
    "clip": ("train.gradient_clip_norm=5",),
    "clip_by_group": ("train.gradient_clip_norm=5", "train.gradient_clip=by_group"),
    "cosine": ("train.schedule=cosine",),
    "repeat": ("train.repeat_factor_threshold=0.5",),
    "blocks_5_8_11": ("model.out_layers=[5,8,11]",),
    "blocks_9_10_11": ("model.out_layers=[9,10,11]",),
    "decoder_2": ("model.decoder_layers=2",),
    "upsampling_1": ("model.mask_upsampling=1",),
    "upsampling_2": ("model.mask_upsampling=2",),
    "upsampling_4": ("model.mask_upsampling=4",),
    "patch_7": ("model.backbone_options={patch_size: 7}",),
    "crop_336": ("model.image_size=[336,448]",),
    "larger": (LARGER, "train.augmentation.scale_range=[1.05,2.45]"),
    "larger_wide": (LARGER, "train.augmentation.scale_range=[0.75,2.45]"),
    "predicted_larger": (LARGER,),
    "focal_balanced": ("loss.focal=0", "loss.focal_balanced=12"),
    "focal_hard": ("loss.focal=0", "loss.focal_hard=3"),
    "dice_hard": ("loss.dice=0", "loss.dice_hard=5"),
    "cross_entropy": ("loss.cross_entropy=2",),
    "cross_entropy_balanced": ("loss.cross_entropy_balanced=1",),
    "cross_entropy_hard": ("loss.cross_entropy_hard=1",),
    "label_smoothing": ("loss.label_smoothing=0.1",),
    "ignored_left_out": ("loss.count_ignored_as_background=false",),
}


class Task(NamedTuple):
    """One row's variants with one seed."""

    row: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    variants: tuple[str, ...]
    shards: str
    device: str
    loader_workers: int


def run_task(task: Task) -> list[dict[str, Any]]:
    """Train the variants in their order, each from the one that it starts from; their figures."""
    config = load_config(task.config, [*task.overrides, f"train.seed={task.seed}"])
    trained: dict[str, Checkpoint] = {}
    with tempfile.TemporaryDirectory(prefix="segvit-recipe-") as folder:
        figures = []
        for name in config.training_order():
            if name in task.variants:
                job = job_of(task, config, name, trained.get(config.start_from(name) or ""), Path(folder))
                checkpoint, found = train(job, torch.device(task.device), Path(folder) / name)
                trained[name] = checkpoint
                figures.append({"row": task.row, "variant": name, "seed": task.seed, **found})
        return figures


def job_of(task: Task, config: ExperimentConfig, variant: str, start: Checkpoint | None, folder: Path) -> TrainJob:
    """The variant's training, with the backbone weights that are found here kept in the folder."""
    settings = config.variant_settings(variant)
    backbone, weights = str(settings.model["backbone"]), config.backbone_weights(variant)
    found = find_backbone_weights(backbone, weights)
    file = folder / f"{variant}.safetensors"
    if found.state is not None:
        save_backbone_state(file, found)
    return TrainJob(
        variant=variant,
        settings=settings,
        shard_set=ShardSet.model_validate_json(task.shards),
        backbone=BackboneRecord(
            backbone=backbone,
            uri=str(file) if file.exists() else None,
            digest="",
            source=found.source,
            message=found.message,
        ),
        runtime=RuntimeConfig(loader_workers=task.loader_workers, cpus_per_worker=config.runtime.cpus_per_worker),
        start=start,
        inference=config.evaluate.inference,
    )


def train(job: TrainJob, device: torch.device, work: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Train a job in this process; its best checkpoint, and its scores, seconds and share of time without images."""
    saved: list[tuple[float, Path]] = []

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        if folder is not None:
            saved.append((metrics["val_miou"], folder))

    started = time.monotonic()
    state = run_training(job, DistributedContext(0, 1, device), report, log=lambda _line: None, work_folder=work)
    miou, folder = max(saved)
    [*_, scores] = [row for row in state.history if "val_miou" in row]
    waits = [row["data_wait_share"] for row in state.history if "data_wait_share" in row]
    figures = {name: value for name, value in scores.items() if name.startswith("val_miou")} | {
        "val_miou": miou,
        "seconds": time.monotonic() - started,
        # The first rows hold the start of the loader's processes.
        "data_wait_share": sum(waits[1:]) / max(len(waits) - 1, 1),
    }
    checkpoint = Checkpoint(
        variant=job.variant,
        uri=str(folder),
        digest=storage.file_digest(str(folder / "model.safetensors")),
        step=state.step,
        miou=miou,
        history_uri=None,
        train_seconds=state.train_seconds,
    )
    return checkpoint, figures


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: each row's mIoU by seed, and the mean of its differences to the base with the same seed and variant."""
    base = {(one["variant"], one["seed"]): one["val_miou"] for one in found if one["row"] == "base"}
    lines = ["| row | variant | val mIoU | over base |", "|---|---|---|---|"]
    for row, variant in dict.fromkeys((one["row"], one["variant"]) for one in found):
        own = {one["seed"]: one["val_miou"] for one in found if (one["row"], one["variant"]) == (row, variant)}
        gains = [miou - base[variant, seed] for seed, miou in own.items() if (variant, seed) in base]
        gain = f"{sum(gains) / len(gains):+.4f}" if gains and row != "base" else ""
        lines.append(f"| {row} | {variant} | {', '.join(f'{miou:.4f}' for miou in own.values())} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Train all rows, print, and write `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="flows/configs/camvid_cpu.yaml")
    parser.add_argument("--rows", nargs="+", default=["base"], choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--variants", nargs="+", default=["full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    common = list(options.set)
    if options.steps:
        names = ("steps", "validate_every_steps", "checkpoint_every_steps")
        common += [*(f"train.{name}={options.steps}" for name in names), f"train.warmup_steps={options.steps // 20}"]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="segvit-recipe-shards-") as folder:
        shards = prepare_shards(load_config(options.config, common).data, folder, progress=lambda _line: None)
        tasks = [
            Task(
                row=row,
                seed=seed,
                config=options.config,
                overrides=(*common, *ROWS[row]),
                variants=tuple(options.variants),
                shards=shards.model_dump_json(),
                device=options.device,
                loader_workers=options.loader_workers,
            )
            for seed in options.seeds
            for row in options.rows
        ]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
            for figures in pool.map(run_task, tasks):
                found += figures
                for one in figures:
                    print(json.dumps(one), flush=True)
    print(f"\n{table(found)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
