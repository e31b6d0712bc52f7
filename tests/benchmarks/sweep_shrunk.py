"""mIoU against GFLOPs of a configuration's anchored Shrunk, over where it shrinks and what it keeps.

    python -m tests.benchmarks.sweep_shrunk flows/configs/camvid_cpu.yaml --folder FOLDER [--seeds 0 1]
        [--shrink-at 4 6] [--keep-every 3] [--keep-unlike 0 0.12 0.24]
        [--keep-edges 0] [--edge-window 3] [--device cuda]

Trains the variant `full` once a seed, without Ray, and from it the variant `shrunk` once a combination, each as the
configuration says. FOLDER keeps the shards, the full models and a line of JSON a combination; what is there is not
made again. SEGVIT_WEIGHTS names the backbone's weights; without it they are random.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import torch

import segvit
from pipeline.config import ExperimentConfig
from pipeline.config.file import load_config
from pipeline.records import BackboneRecord, Checkpoint, ShardSet
from pipeline.shards.prepare import prepare_shards
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.trainer import Trainer

SWEPT = ("shrink_at", "keep_every", "keep_unlike", "keep_edges", "edge_window")


def main() -> None:
    """Print one line a full model and one a combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shrink-at", type=int, nargs="+")
    parser.add_argument("--keep-every", type=int, nargs="+")
    parser.add_argument("--keep-unlike", type=float, nargs="+")
    parser.add_argument("--keep-edges", type=float, nargs="+")
    parser.add_argument("--edge-window", type=int, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="as of `segvit run`")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    shards = None
    for seed in options.seeds:
        config = load_config(options.config, [*options.set, f"train.seed={seed}"])
        shards = shards or prepare_shards(config.data, str(options.folder / "shards"), progress=print)
        start = full_model(config, shards, options.folder / f"full-{seed}", options.device)
        given = [getattr(options, name) or [None] for name in SWEPT]
        for values in product(*given):
            chosen = {name: value for name, value in zip(SWEPT, values, strict=True) if value is not None}
            add_row(config, shards, start, chosen, options)


def full_model(config: ExperimentConfig, shards: ShardSet, folder: Path, device: str) -> Checkpoint:
    """The variant `full`, trained into `folder` where it is not there."""
    if not folder.is_dir():
        trainer = new_trainer(job_of(config, "full", shards), device)
        train(trainer)
        trainer.save(folder)
        print(f"{folder.name}: {gflops_of(trainer):.2f} GFLOPs, mIoU {trainer.validate()['val_miou']:.4f}", flush=True)
    uri, step = str(folder), config.variant_settings("full").train.steps
    return Checkpoint(variant="full", uri=uri, digest="", step=step, miou=None, history_uri=None, train_seconds=0.0)


def add_row(
    config: ExperimentConfig, shards: ShardSet, start: Checkpoint, chosen: dict[str, Any], options: argparse.Namespace
) -> None:
    """Convert, train and score one combination, unless it has its line."""
    rows = options.folder / "rows.jsonl"
    key = {"seed": config.train.seed, **chosen}
    for line in rows.read_text().splitlines() if rows.exists() else ():
        if key.items() <= json.loads(line).items():
            print(line, flush=True)
            return
    job = job_of(config, "shrunk", shards, chosen).model_copy(update={"start": start})
    trainer = new_trainer(job, options.device)
    row = {**key, "gflops": round(gflops_of(trainer), 3), "converted": round(trainer.validate()["val_miou"], 4)}
    train(trainer)
    line = json.dumps({**row, "miou": round(trainer.validate()["val_miou"], 4)})
    print(line, flush=True)
    with rows.open("a") as file:
        file.write(line + "\n")


def job_of(config: ExperimentConfig, variant: str, shards: ShardSet, chosen: dict[str, Any] | None = None) -> TrainJob:
    """A variant's job, with other fields of the model where `chosen` names them."""
    settings = config.variant_settings(variant)
    settings = settings.model_copy(update={"model": {**settings.model, **(chosen or {})}})
    name = str(settings.model["backbone"])
    weights = BackboneRecord(
        backbone=name, uri=os.environ.get("SEGVIT_WEIGHTS"), digest="", source="SEGVIT_WEIGHTS", message=""
    )
    return TrainJob(variant=variant, settings=settings, shard_set=shards, backbone=weights, runtime=config.runtime)


def new_trainer(job: TrainJob, device: str) -> Trainer:
    """One worker's."""
    torch.set_num_threads(job.runtime.cpus_per_worker)
    return Trainer(job, DistributedContext(0, 1, torch.device(device)))


def train(trainer: Trainer) -> None:
    """All steps, without a look at the validation split."""
    job = trainer.job
    batches = micro_batches(job, trainer.context, 0) if job.train.steps else iter(())
    for _ in range(job.train.steps):
        trainer.train_step([next(batches) for _ in range(job.train.accumulation_steps)])
    if (step := trainer.watch.first_step(1)) is not None:
        raise SystemExit(f"{job.variant} is not finite from step {step} on; lower the learning rate")


def gflops_of(trainer: Trainer) -> float:
    """Of one image of the training size."""
    return segvit.model_cost(trainer.model.config, trainer.model.num_classes, trainer.job.model.image_size).gflops


if __name__ == "__main__":
    main()
