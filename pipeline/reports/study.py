"""An ablation as a table, a row a variant, trained once a seed: as Parquet, as Markdown, as a page with its plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline import storage
from pipeline.evaluation.bootstrap import mean_interval
from pipeline.evaluation.per_image import CountTable, read_counts
from pipeline.records import Checkpoint, Evaluation, Record, latency_text
from pipeline.reports.pages import render_page
from pipeline.reports.style import WIDTH_IN, colours_of, plot_style, svg
from pipeline.storage.names import STUDY_PAGE, STUDY_TABLE, STUDY_TEXT

HEADINGS = (
    "variant",
    "val mIoU",
    "95 % interval",
    "against the first row",
    "each seed",
    "GFLOPs",
    "parameters",
    "latency",
    "training",
    "weights",
)
_TEMPLATE = "study_page.html.j2"


class Cell(NamedTuple):
    """One training of the ablation and its scores; `weights`: where the backbone's came from."""

    seed: int
    checkpoint: Checkpoint
    evaluation: Evaluation
    weights: str


class StudyRow(Record):
    """A variant over its seeds.

    Attributes:
        miou: mean over the seeds; `low` and `high` bound it, drawn over seeds and images.
        mious: one a seed, in the order of `seeds`.
        difference: of the mean from that of the study's first variant, which has none; bounded likewise, in resamples
            that are the same for both.
        train_seconds: mean of a training; of what the variant started from, nothing is counted.
        step: of the checkpoint that was scored, of the first seed; with `train.keep: best` training may have gone on.
        latency_ms: the least over the seeds, whose models cost the same.
    """

    variant: str
    seeds: tuple[int, ...]
    miou: float
    low: float
    high: float
    mious: tuple[float, ...]
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    gflops: float
    parameters: int
    latency_ms: float
    latency_reliable: bool
    step: int
    train_seconds: float
    started_from: str | None
    weights: str
    split: str
    num_images: int


def study_rows(cells: Mapping[str, Sequence[Cell]]) -> list[StudyRow]:
    """A row a variant, from what its trainings left, one a seed and the seeds alike.

    Raises UserError where counts of single images are gone.
    """
    rows: list[StudyRow] = []
    baseline: list[CountTable] = []
    for variant, trained in cells.items():
        tables = [read_counts(cell.evaluation) for cell in trained]
        rows.append(_study_row(variant, trained, tables, rows[0].miou if rows else None, baseline))
        baseline = baseline or tables
    return rows


def _study_row(
    variant: str,
    cells: Sequence[Cell],
    tables: Sequence[CountTable],
    baseline_miou: float | None,
    baseline: Sequence[CountTable],
) -> StudyRow:
    evaluations = [cell.evaluation for cell in cells]
    low, high = mean_interval(tables)
    difference_low, difference_high = mean_interval(tables, baseline) if baseline else (None, None)
    miou = sum(one.miou for one in evaluations) / len(cells)
    first = evaluations[0]
    return StudyRow(
        variant=variant,
        seeds=tuple(cell.seed for cell in cells),
        miou=miou,
        low=low,
        high=high,
        mious=tuple(one.miou for one in evaluations),
        difference=None if baseline_miou is None else miou - baseline_miou,
        difference_low=difference_low,
        difference_high=difference_high,
        gflops=first.gflops,
        parameters=first.parameters,
        latency_ms=min(one.latency_ms for one in evaluations),
        latency_reliable=all(one.latency_reliable for one in evaluations),
        step=cells[0].checkpoint.step,
        train_seconds=sum(cell.checkpoint.train_seconds for cell in cells) / len(cells),
        started_from=cells[0].checkpoint.started_from,
        weights=cells[0].weights,
        split=first.split,
        num_images=first.num_images,
    )


def write_study(name: str, rows: Sequence[StudyRow], target_uri: str) -> str:
    """Publish the three files to the folder, the table last; returns the table's sha256."""
    storage.publish_bytes(storage.join(target_uri, STUDY_TEXT), markdown(name, rows).encode())
    storage.publish_bytes(storage.join(target_uri, STUDY_PAGE), page(name, rows).encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row.model_dump() for row in rows]), buffer, compression="zstd")
    uri = storage.join(target_uri, STUDY_TABLE)
    storage.publish_bytes(uri, buffer.getvalue())
    return storage.file_digest(uri)


def cells_of(row: StudyRow) -> tuple[str, ...]:
    """A row as text, under `HEADINGS`."""
    return (
        row.variant,
        f"{row.miou:.3f}",
        f"{row.low:.3f} to {row.high:.3f}",
        ""
        if row.difference is None
        else f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})",
        ", ".join(f"{miou:.3f}" for miou in row.mious),
        f"{row.gflops:.2f}",
        f"{row.parameters / 1e6:.2f} M",
        latency_text(row.latency_ms, row.latency_reliable),
        f"step {row.step:,}, {row.train_seconds:.0f} s" + (f", from {row.started_from}" if row.started_from else ""),
        row.weights,
    )


def markdown(name: str, rows: Sequence[StudyRow]) -> str:
    """The table for a document."""
    lines = [f"### {name}", "", summary(rows), "", "| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells_of(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[StudyRow]) -> str:
    """What the table's figures are of."""
    seeds = ", ".join(map(str, rows[0].seeds))
    return (
        f"Mean over seed{'s' if len(rows[0].seeds) > 1 else ''} {seeds}; {rows[0].num_images} images of "
        f"{rows[0].split}; intervals over seeds and images."
    )


def page(name: str, rows: Sequence[StudyRow]) -> str:
    """The page: the plot of mIoU against GFLOPs, and the table."""
    best = max(row.miou for row in rows)
    return render_page(
        _TEMPLATE,
        name=name,
        summary=summary(rows),
        headings=HEADINGS,
        rows=[(cells_of(row), row.miou == best) for row in rows],
        plot=Markup(cost_plot(rows)),
        file=Path(STUDY_TABLE).name,
    )


def cost_plot(rows: Sequence[StudyRow]) -> str:
    """mIoU against GFLOPs, a point a variant with its interval, as inline SVG."""
    colours = colours_of(row.variant for row in rows)
    with plot_style():
        figure = Figure(figsize=(WIDTH_IN, 4.2))
        axis = figure.subplots()
        for row in rows:
            spread = [[max(0.0, row.miou - row.low)], [max(0.0, row.high - row.miou)]]
            axis.errorbar(row.gflops, row.miou, yerr=spread, fmt="o", capsize=3, color=colours[row.variant])
            axis.annotate(row.variant, (row.gflops, row.miou), xytext=(6, 4), textcoords="offset points")
        axis.set_xlabel("GFLOPs")
        axis.set_ylabel("val mIoU")
        axis.margins(x=0.15)
    return svg(figure, "study", "mIoU against GFLOPs of every variant")
