"""What a trained model is worth to data with two classes that it does not know, against its backbone alone.

    python -m tests.benchmarks.bench_fine_tuning FOLDER [--workspace .segvit] [--model models:/quickstart@champion]

Needs the workspace of a quickstart. FOLDER gets the data set, digits with a ring or a bar besides, and an experiment
of three variants on equal steps: as the model starts, going on from it, and from the backbone alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from flows.cli import main
from pipeline.config import DigitsConfig
from pipeline.datasets.digits import BACKGROUND, Digits

SIZE = 126
# In front of the digits, so that ids differ from those of the model that is gone on from.
NEW = ("ring", "bar")
STEPS = 60


def make_data(root: Path, num_train: int = 320, num_val: int = 96) -> None:
    """A folder of scenes with one digit each, two of three with a new object besides."""
    config = DigitsConfig(num_train=num_train, num_val=num_val, image_size=SIZE, digit_size=(64, 96), max_digits=1)
    digits = Digits(config, seed=1)
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join([*NEW, *digits.class_names]))
    for split, count in (("train", num_train), ("val", num_val)):
        for number in range(count):
            rng = np.random.default_rng([number, split == "val"])
            pixels, label = digits.scene(split, number)
            image = Image.fromarray(pixels)
            drawn = Image.new("L", (SIZE, SIZE))
            kind = number % 3
            if kind < len(NEW):
                x, y = (int(value) for value in rng.integers(0, SIZE - 44, 2))
                colour = tuple(int(value) for value in rng.integers(0, 256, 3))
                for canvas, ink in ((ImageDraw.Draw(image), colour), (ImageDraw.Draw(drawn), 1)):
                    if kind == 0:
                        canvas.ellipse((x, y, x + 40, y + 40), outline=ink, width=9)
                    else:
                        canvas.rectangle((x, y + 14, x + 43, y + 25), fill=ink)
            ids = np.where(np.asarray(drawn) == 1, kind, np.where(label == 255, 255, label + len(NEW)))
            image.save(root / f"images/{split}{number:04d}.png")
            Image.fromarray(ids.astype(np.uint8)).save(root / f"labels/{split}{number:04d}.png")
        names = [f"{split}{number:04d}" for number in range(count)]
        (root / f"splits/{split}.txt").write_text("\n".join(names))
    assert digits.class_names[BACKGROUND] == "background"


def write_experiment(folder: Path, model: str) -> Path:
    """Three variants that differ in what they start from and, the first, in training at all."""
    quickstart = yaml.safe_load(Path("flows/configs/quickstart.yaml").read_text())
    full = quickstart["variants"]["full"]
    experiment = {
        **{name: quickstart[name] for name in ("model", "loss", "train", "runtime")},
        "name": "two-new-classes",
        "recipe": "train",
        "data": {"dataset": "folder", "root": str(folder / "data")},
        "variants": {
            "as_it_starts": {**full, "start_from": model, "train": {"steps": 0}},
            "going_on": {**full, "start_from": model},
            "backbone_alone": full,
        },
        "tune": {"num_trials": 0},
    }
    experiment["train"] |= {"steps": STEPS, "validate_every_steps": STEPS // 3, "checkpoint_every_steps": STEPS}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    return folder / "experiment.yaml"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workspace", default=".segvit")
    parser.add_argument("--model", default="models:/quickstart@champion")
    arguments = parser.parse_args()
    here = arguments.folder.absolute()
    make_data(here / "data")
    main(["run", str(write_experiment(here, arguments.model)), "--workspace", arguments.workspace])
