"""What the sides' processes measured, summed up: medians of rounds, the score of label maps, the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from segvit.metrics import ConfusionMatrix
from tests.benchmarks.peers.common import MIN_SIMILARITY, NUM_CLASSES, UNLABELLED

SIDES = {"ours": "ours", "lightly": "LightlyTrain's EoMT", "huggingface": "transformers' EoMT"}
# Made of the trained model of ours, in its process.
SHRUNK = "shrunk"
TITLES = {**SIDES, SHRUNK: "ours, Shrunk"}
# What rounds are compared by; the keys of results.
TIMES = {"step_seconds": "training step", "image_seconds": "an image at its own size", "crop_seconds": "a crop"}
PREDICTION_TIMES = ("image_seconds", "crop_seconds")
IGNORED = 255


@dataclass
class Side:
    """One side's measurements.

    Attributes:
        rounds: results of the short runs.
        trained: the result of the long run.
        miou: of its label maps.
        refused: why it has no figures.
    """

    rounds: list[Mapping[str, Any]] = field(default_factory=list)
    trained: Mapping[str, Any] | None = None
    miou: float | None = None
    refused: str | None = None

    def seconds(self, key: str) -> float:
        """The median over rounds of a round's median."""
        return statistics.median(self.round_seconds(key))

    def round_seconds(self, key: str) -> list[float]:
        """Each round's median."""
        return [statistics.median(result[key]) for result in self.rounds]

    @property
    def peak_bytes(self) -> int:
        """The most of all short runs."""
        return max(int(result["peak_bytes"]) for result in self.rounds)


def check_weights(result: Mapping[str, Any]) -> None:
    """Raise UserError where a side did not train from the weights that it was given."""
    similarity = float(result["similarity"])
    if not similarity >= MIN_SIMILARITY:
        raise UserError(
            f"its backbone's features have a cosine similarity of {similarity:.3f} to the weights' own, below "
            f"{MIN_SIMILARITY}: the weights did not arrive; look at how they are converted"
        )


def ours_over(ours: Side, peer: Side, key: str) -> float:
    """Our time over a peer's: the median of the rounds' ratios, each of two runs that followed one another."""
    pairs = zip(ours.round_seconds(key), peer.round_seconds(key), strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def steps_within(minutes: float, step_seconds: float) -> int:
    """Optimizer steps that take so long."""
    return max(1, int(minutes * 60 / step_seconds))


def score(predicted: Path, labels: Path) -> float:
    """mIoU of the label maps in a folder against CamVid's of the same names.

    Raises:
        UserError: a label map is missing, of another size, or holds other ids.
    """
    confusion = ConfusionMatrix(NUM_CLASSES)
    for file in sorted(labels.glob("*.png")):
        true = np.array(Image.open(file))
        true[true == UNLABELLED] = IGNORED
        try:
            confusion.update(np.array(Image.open(predicted / file.name)), true)
        except (OSError, ValueError) as error:
            raise UserError(f"label map {predicted / file.name} cannot be scored: {error}") from error
    return confusion.metrics().miou


def derived_of(side: Side) -> Side:
    """What was made of a side's trained model: it shares the training, its predictions are its own."""
    rounds: list[Mapping[str, Any]] = [{**result, **result["derived"]} for result in side.rounds]
    trained = None if side.trained is None else {**side.trained, **side.trained["derived"]}
    return Side(rounds=rounds, trained=trained, refused=side.refused)


def table(sides: Mapping[str, Side], minutes: float) -> list[str]:
    """Markdown: a row for each side, the peers' times with our share of them in brackets."""
    trained = f"val mIoU after {minutes:g} min" if minutes else "val mIoU after the same time"
    lines = [f"| | {' | '.join(TIMES.values())} | peak memory | {trained} |", "|---|" + "---|" * (len(TIMES) + 2)]
    own = {name: side for name in ("ours", SHRUNK) if (side := sides.get(name)) and side.refused is None}
    for name, side in sides.items():
        if side.refused is not None:
            lines.append(f"| {TITLES[name]} | refused: {side.refused} |" + " |" * (len(TIMES) + 1))
            continue
        cells = [time_cell(side, {} if name in own else own, key) for key in TIMES]
        lines.append(f"| {TITLES[name]} | {' | '.join([*cells, f'{side.peak_bytes / 1e9:.2f} GB', miou_cell(side)])} |")
    return [*lines, "", *packages_lines(sides)]


def time_cell(side: Side, own: Mapping[str, Side], key: str) -> str:
    """A time, and what each of our own sides takes of it; Shrunk has no training steps of its own."""
    compared = {name: one for name, one in own.items() if name != SHRUNK or key in PREDICTION_TIMES}
    cell = f"{side.seconds(key):.3f} s"
    if not compared:
        return cell
    shares = [f"{TITLES[name]} {ours_over(one, side, key):.2f}" for name, one in compared.items()]
    return f"{cell} ({'; '.join(shares)} of it)"


def miou_cell(side: Side) -> str:
    """The score with the steps and minutes it took."""
    if side.miou is None or side.trained is None:
        return "not measured"
    return f"{side.miou:.3f} ({side.trained['steps']} steps, {side.trained['train_seconds'] / 60:.1f} min)"


def packages_lines(sides: Mapping[str, Side]) -> Sequence[str]:
    """Versions of what each side computed with, and the cores that it had."""
    lines = []
    for name, side in sides.items():
        if side.rounds and name in SIDES:
            packages = ", ".join(f"{package} {number}" for package, number in side.rounds[0]["packages"].items())
            cores = statistics.median(result["cores"] for result in side.rounds)
            lines.append(f"{TITLES[name]}: {packages}; had {cores:.1f} cores")
    return lines
