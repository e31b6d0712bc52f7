"""Ours against what people would pick instead: LightlyTrain's EoMT, and transformers' EoMT with its Trainer.

    python -m tests.benchmarks.against_peers [--peers-env FOLDER] [--minutes 45] [--table] [--out FILE.json]

Same images (CamVid of SEGVIT_DATA, trained on train, scored on val), backbone weights (SEGVIT_WEIGHTS, DINOv2
ViT-S/14), square crop (EoMT takes no other), batch, precision, threads and loader processes. Short runs come first, of
one side after the other, in rounds: seconds a training step with its loading, seconds a prediction, peak memory. Then
each side trains once for as many of its steps as fit into --minutes (0: not at all), and one scorer reads the label
maps that it leaves. Shrunk is made of our trained model by the same process. A peer is installed into an environment of
its own, below --peers-env where that is to be kept; whose backbone does not give the weights' own features is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import ExperimentConfig
from pipeline.config.file import load_config
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from pipeline.training.trainer import computed_precision
from tests.benchmarks.peers import results
from tests.benchmarks.peers.common import (
    DERIVED_LABEL_MAPS,
    LABEL_MAPS,
    MEAN,
    STD,
    WARMUP_STEPS,
    Task,
    read_image,
    square_crop,
    val_images,
)
from tests.benchmarks.peers.environment import ROOT, python_of
from tests.benchmarks.peers.ours import VARIANT
from tests.benchmarks.peers.results import Side

BACKBONE, PATCH = "vit_small_patch14_dinov2", 14
NUM_COMPARED = 2
# Nothing is fetched, nobody is told.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}


def main() -> None:
    """Measure, and print the table or JSON."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="segvit-peers-") as scratch:
        try:
            sides = compare(options, Path(scratch))
        except UserError as error:
            raise SystemExit(f"error: {error}") from error
    measured = {name: dataclasses.asdict(side) for name, side in sides.items()}
    if options.out:
        options.out.write_text(json.dumps({"options": settings_of(options), "sides": measured}, indent=2) + "\n")
    if options.table:
        print("\n".join(results.table(sides, options.minutes)))
    elif not options.out:
        print(json.dumps(measured, indent=2))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=results.SIDES, default=list(results.SIDES))
    parser.add_argument("--config", default="flows/configs/camvid_cpu.yaml", help="whose settings ours trains with")
    parser.add_argument("--crop", type=int, default=294, help="side in pixels, a multiple of 14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=45.0, help="of training to the mIoU; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--images", type=int, default=10, help="timed predictions of a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--loader-workers", type=int, default=0, help="loader processes of every side")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peers-env", type=Path, help="folder that keeps the peers' environments")
    parser.add_argument("--out", type=Path, help="JSON of all that was measured")
    parser.add_argument("--table", action="store_true", help="print Markdown in place of JSON")
    return parser.parse_args()


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Side]:
    """Every side's measurements; a side that fails is refused, and the others go on."""
    task = make_task(options, scratch)
    environments = options.peers_env or scratch / "environments"
    pythons = {name: python_of(name, environments) for name in options.only}
    sides = {name: Side() for name in options.only}
    for number in range(options.rounds):
        for name, side in sides.items():
            if result := attempt(side, name, pythons[name], task, scratch / f"{name}-{number}"):
                side.rounds.append(result)
    for name, side in sides.items() if options.minutes else ():
        if side.refused is None:
            train_and_score(side, name, pythons[name], task, options.minutes, scratch / f"{name}-trained")
    return with_shrunk(sides, Path(task.data), scratch / "ours-trained") if "ours" in sides else sides


def with_shrunk(sides: dict[str, Side], data: Path, folder: Path) -> dict[str, Side]:
    """The sides with Shrunk after ours, whose process left its label maps in the folder."""
    shrunk = results.derived_of(sides["ours"])
    if shrunk.trained is not None:
        score(shrunk, folder / DERIVED_LABEL_MAPS, data)
    return {"ours": sides["ours"], results.SHRUNK: shrunk, **sides}


def score(side: Side, label_maps: Path, data: Path) -> None:
    """Give a side the mIoU of its label maps, or refuse it."""
    try:
        side.miou = results.score(label_maps, data / "valannot")
    except UserError as error:
        side.refused = str(error)


def train_and_score(side: Side, name: str, python: str, task: Task, minutes: float, folder: Path) -> None:
    """The long run of one side."""
    steps = results.steps_within(minutes, side.seconds("step_seconds"))
    task = dataclasses.replace(task, steps=max(steps, WARMUP_STEPS + 1), predict=True)
    side.trained = attempt(side, name, python, task, folder)
    if side.trained is not None:
        score(side, folder / LABEL_MAPS, Path(task.data))


def attempt(side: Side, name: str, python: str, task: Task, folder: Path) -> dict[str, Any] | None:
    """One process's result, or None where the side is or now becomes refused."""
    if side.refused is not None:
        return None
    try:
        result = run_side(name, python, task, folder)
        results.check_weights(result)
    except UserError as error:
        side.refused = str(error)
        print(f"{name} is refused: {error}", file=sys.stderr)
        return None
    return result


def run_side(name: str, python: str, task: Task, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own.

    Raises:
        UserError: it failed; its output lies beside its folder.
    """
    folder.mkdir()
    task = dataclasses.replace(task, folder=str(folder))
    task.write(folder / "task.json")
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(task.threads)}
    command = [python, "-m", f"tests.benchmarks.peers.{name}", str(folder / "task.json")]
    print(f"{name}: {task.steps} steps", file=sys.stderr)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        cause = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        print(done.stdout[-4000:], file=sys.stderr)
        raise UserError(f"its process ended with code {done.returncode}: {cause[:300]}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def make_task(options: argparse.Namespace, scratch: Path) -> Task:
    """What all sides are given: the shards of ours, the features of the weights.

    Raises:
        UserError: a variable or a file is missing, or an option breaks a rule.
    """
    data, weights = (path_of(variable) for variable in ("SEGVIT_DATA", "SEGVIT_WEIGHTS"))
    data = data / "camvid"
    if options.crop < PATCH or options.crop % PATCH:
        lower = max(PATCH, options.crop // PATCH * PATCH)
        raise UserError(f"--crop {options.crop} is not a multiple of {PATCH}; use {lower} or {lower + PATCH}")
    config = load_config(options.config, [f"data.root={data}"])
    backbone = config.variant_settings(VARIANT).model["backbone"]
    if backbone != BACKBONE:
        raise UserError(f"{options.config} has the backbone {backbone}, the peers have {BACKBONE}; name that one")
    features, shard_set = scratch / "features.npz", scratch / "shard_set.json"
    shards = prepare_shards(config.data, str(scratch / "shards"), progress=lambda _line: None)
    shard_set.write_text(shards.model_dump_json())
    write_features(features, data, weights, options.crop)
    return Task(
        folder="",
        data=str(data),
        weights=str(weights),
        features=str(features),
        config=str(Path(options.config).resolve()),
        shard_set=str(shard_set),
        crop=options.crop,
        batch=options.batch,
        threads=options.threads,
        loader_workers=options.loader_workers,
        device=options.device,
        precision=precision_of(config, options.device),
        steps=WARMUP_STEPS + options.steps,
        num_timed=options.images,
        predict=False,
    )


def path_of(variable: str) -> Path:
    """The existing file or folder that a variable of the environment names."""
    value = os.environ.get(variable)
    if not value or not Path(value).exists():
        raise UserError(f"{variable} is {value!r}, not an existing path; export it (see README.md)")
    return Path(value).resolve()


def precision_of(config: ExperimentConfig, device: str) -> str:
    """The experiment's precision where the device has it."""
    return computed_precision(config.train.precision, torch.device(device))


def write_features(file: Path, data: Path, weights: Path, crop: int) -> None:
    """timm's own reading of the weights, on a few val crops."""
    import timm
    from timm.models import load_checkpoint

    images = [square_crop(read_image(image), crop) for image in val_images(str(data))[:NUM_COMPARED]]
    crops = np.stack(images)
    network: Any = timm.create_model(BACKBONE, num_classes=0, dynamic_img_size=True).eval()
    load_checkpoint(network, str(weights))
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        tokens = network.forward_features((pixels - mean) / std)[:, network.num_prefix_tokens :]
    np.savez(file, crops=crops, tokens=tokens.numpy())


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
