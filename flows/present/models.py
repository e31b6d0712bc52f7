"""How decisions about models and comparisons of them look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.records import PromotionDecision
from pipeline.registry.compare import Comparison, ImageDifference


def checks_table(decision: PromotionDecision) -> Table:
    """The gate's conditions and how each came out."""
    table = Table(title=f"{decision.name} version {decision.version}", title_justify="left")
    for heading in ("condition", "", "found"):
        table.add_column(heading, overflow="fold")
    for check in decision.checks:
        outcome = Text("passed", "green") if check.passed else Text("failed", "bold red")
        table.add_row(Text(check.name), outcome, Text(check.detail))
    return table


def comparison_view(comparison: Comparison) -> Group:
    """A comparison's verdict and its tables: overall, classes, images."""
    named = (("largest gains", comparison.gains), ("largest drops", comparison.drops))
    images = [_images_table(title, comparison, found) for title, found in named if found]
    return Group(_overall_table(comparison), _classes_table(comparison), *images, verdict(comparison))


def verdict(comparison: Comparison) -> str:
    """The difference and how sure it is, in a sentence."""
    interval, second = comparison.interval, comparison.second.version
    if interval.low > 0:
        meaning = f"version {second} is better"
    elif interval.high < 0:
        meaning = f"version {second} is worse"
    else:
        meaning = "the images do not tell them apart"
    return (
        f"mIoU {comparison.difference:+.4f}, {interval.confidence:.0%} interval {interval.low:+.4f} to "
        f"{interval.high:+.4f} ({interval.resamples:,} resamples of {comparison.second.evaluation.num_images} images): "
        f"{meaning}; better on {comparison.wins} images, worse on {comparison.losses}, the same on {comparison.ties}"
    )


def _overall_table(comparison: Comparison) -> Table:
    first, second = comparison.first.evaluation, comparison.second.evaluation
    table = _table(f"{comparison.name}: {second.split}", "", comparison)
    reliable = first.latency_reliable and second.latency_reliable
    latency = "latency (ms)" if reliable else "latency (ms), ~: timed beside other work"
    for label, before, after, digits in (
        ("mIoU", first.miou, second.miou, 4),
        ("mAcc", first.macc, second.macc, 4),
        ("aAcc", first.aacc, second.aacc, 4),
        ("boundary IoU", first.boundary_iou, second.boundary_iou, 4),
        ("GFLOPs", first.gflops, second.gflops, 2),
        ("parameters (M)", first.parameters / 1e6, second.parameters / 1e6, 2),
        (latency, first.latency_ms, second.latency_ms, 1),
    ):
        difference = None if before is None or after is None else after - before
        cells = (_number(before, digits), _number(after, digits), _number(difference, digits, sign="+"))
        table.add_row(label, *cells)
    return table


def _classes_table(comparison: Comparison) -> Table:
    table = _table("IoU of classes", "class", comparison)
    for row in sorted(comparison.classes, key=lambda row: 2.0 if row.difference is None else -row.difference):
        style = "" if not row.difference else "green" if row.difference > 0 else "red"
        difference = Text(_number(row.difference, sign="+"), style)
        table.add_row(Text(row.name), _number(row.first), _number(row.second), difference)
    return table


def _images_table(title: str, comparison: Comparison, images: Sequence[ImageDifference]) -> Table:
    table = _table(f"mIoU of images: {title}", "image", comparison)
    for image in images:
        cells = (_number(image.first), _number(image.second), _number(image.difference, sign="+"))
        table.add_row(Text(image.key), *cells)
    return table


def _table(title: str, what: str, comparison: Comparison) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(what, overflow="fold")
    for heading in (f"version {comparison.first.version}", f"version {comparison.second.version}", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None, digits: int = 4, sign: str = "") -> str:
    return "\N{EN DASH}" if value is None else f"{value:{sign}.{digits}f}"
