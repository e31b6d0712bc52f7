"""One evaluation in a terminal: overall beside the paper, by class, by image."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.records import Evaluation, latency_text
from pipeline.storage.names import SCORES_FILE

if TYPE_CHECKING:
    from segvit import PaperFigure

MOST_IMAGES = 5


def overall_table(evaluation: Evaluation, figure: PaperFigure | None) -> Table:
    """The scores and costs of a model, and what the paper reports for it where it does."""
    title = f"{evaluation.variant} on {evaluation.split}, {evaluation.num_images} images{inference_text(evaluation)}"
    table = Table(title=title, title_justify="left")
    rows = {
        "mIoU": (f"{evaluation.miou:.4f}", ""),
        "mAcc": (f"{evaluation.macc:.4f}", ""),
        "aAcc": (f"{evaluation.aacc:.4f}", ""),
        "boundary IoU": (number(evaluation.boundary_iou), ""),
        "GFLOPs": (f"{evaluation.gflops:.2f}", ""),
        "parameters": (f"{evaluation.parameters / 1e6:.2f} M", ""),
        "latency": (latency_text(evaluation.latency_ms, evaluation.latency_reliable), ""),
    }
    if figure is not None:
        several = len(evaluation.inference.get("scales", ())) > 1
        published = figure.result.miou_multi_scale if several else figure.result.miou
        rows["mIoU"] = (rows["mIoU"][0], f"{published / 100:.4f}")
        rows["GFLOPs"] = (rows["GFLOPs"][0], f"{figure.result.gflops:.1f}")
    table.add_column("")
    table.add_column("found", justify="right")
    if figure is not None:
        table.add_column(f"paper ({figure.preset})", justify="right")
    for name, (found, paper) in rows.items():
        table.add_row(name, found, *([paper] if figure is not None else []))
    return table


def classes_table(evaluation: Evaluation) -> Table:
    """IoU and accuracy of every class, the best first."""
    table = Table(title="Classes", title_justify="left")
    table.add_column("class")
    table.add_column("IoU", justify="right")
    table.add_column("accuracy", justify="right")
    rows = zip(evaluation.class_names, evaluation.per_class_iou, evaluation.per_class_accuracy, strict=True)
    for name, iou, accuracy in sorted(rows, key=lambda row: -1.0 if row[1] is None else row[1], reverse=True):
        table.add_row(Text(name), number(iou), number(accuracy))
    return table


def images_table(images: Sequence[dict[str, Any]]) -> Table:
    """The images with the lowest mIoU."""
    worst = images[:MOST_IMAGES]
    table = Table(title=f"The {len(worst)} images with the lowest mIoU", title_justify="left")
    table.add_column("image", overflow="fold")
    table.add_column("mIoU", justify="right")
    table.add_column("pixel accuracy", justify="right")
    for image in worst:
        table.add_row(Text(image["key"]), number(image["miou"]), number(image["accuracy"]))
    return table


def image_scores(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Key, mIoU and pixel accuracy of every image, the lowest mIoU first."""
    with tempfile.TemporaryDirectory(prefix="segvit-scores-") as scratch:
        file = storage.fetch_file(storage.join(evaluation.uri, SCORES_FILE), scratch)
        images: list[dict[str, Any]] = storage.read_json(str(file))
    # An image without a label that counts has no score.
    return [{**image, **{name: known(image[name]) for name in ("miou", "accuracy")}} for image in images]


def inference_text(evaluation: Evaluation) -> str:
    """How images were predicted, where not in one pass: ", scales 0.5, 1.0, with flip"."""
    parts = []
    for name, value in evaluation.inference.items():
        listed = " x ".join(map(str, value)) if name in ("crop", "stride", "resize") else value
        listed = ", ".join(map(str, value)) if name == "scales" else listed
        parts.append("with flip" if name == "flip" else f"{name} {listed}")
    return "".join(f", {part}" for part in parts)


def known(value: float) -> float | None:
    """The value, or None for NaN."""
    return None if math.isnan(value) else value


def number(value: float | None) -> str:
    """Four digits; "-" for what does not occur."""
    return "-" if value is None else f"{value:.4f}"
