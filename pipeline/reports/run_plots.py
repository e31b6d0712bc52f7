"""The report's plots as inline SVG whose text and axes take the page's colours, for light and dark alike.

Every function takes plain numbers and returns one `<svg>` element; the same input gives the same bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

# Stand-ins that become the page's text and line colours once the SVG is written.
_TEXT = "#0a0b0c"
_LINE = "#0d0e0f"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, read aloud, coloured by the page
    "svg.hashsalt": "segvit-report",
    "text.parse_math": False,  # a class name may hold a dollar sign
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _TEXT,
    "axes.titlecolor": _TEXT,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _TEXT,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
# Mid tones with at least 3:1 contrast on white and on near-black.
_COLOURS = ("#2f7fc9", "#d9702b", "#2f9e77", "#b05fc7", "#c8505c", "#8f8420")
_MARKERS = "osD^vP"
_CURVES = {
    "val_miou": "val mIoU",
    "total": "loss, total",
    "class": "loss, class term",
    "focal": "loss, focal term",
    "dice": "loss, dice term",
    "cross_entropy": "loss, cross-entropy",
    "auxiliary": "loss, auxiliary terms",
    "learning_rate": "learning rate",
    "images_per_s": "images/s",
}
_SMOOTH_AS_IS = ("val_miou", "learning_rate")
_MAX_POINTS = 400
_MAX_CLASSES_WITH_VALUES = 20
_WIDTH_IN = 11.0  # shown at the page's full width

History = Sequence[Mapping[str, Any]]


def variant_colours(variants: Sequence[str]) -> dict[str, str]:
    """One colour a variant, the same in every plot and in the page's legends."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(variants)}


def training_curves(histories: Mapping[str, History]) -> str | None:
    """One panel a quantity over optimizer steps, one line a variant; None where nothing was recorded."""
    panels = [key for key in _CURVES if any(_series(rows, key)[0].size for rows in histories.values())]
    if not panels:
        return None
    colours = variant_colours(list(histories))
    with matplotlib.rc_context(_STYLE):
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(_WIDTH_IN, 2.15 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, key in zip(axes, panels, strict=False):
            axis.set_title(_CURVES[key], loc="left")
            for variant, history in histories.items():
                _draw_curve(axis, *_series(history, key), colours[variant], smooth=key not in _SMOOTH_AS_IS)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_xlabel("step")
            if key == "learning_rate":
                # Variants often share the schedule: interleaved dashes show every line.
                lines = axis.get_lines()
                for index, line in enumerate(lines if len(lines) > 1 else []):
                    line.set_linestyle((-4 * index, (4, 4 * (len(lines) - 1))))
        label = f"Training curves of {', '.join(histories)}: {', '.join(panels)} over steps"
        return _svg(figure, "curves", label)


def class_iou_bars(class_names: Sequence[str], iou: Mapping[str, Sequence[float | None]]) -> str:
    """Bars of per-class IoU, variants side by side; a dash stands for a class absent from the split."""
    colours = variant_colours(list(iou))
    num_classes, num_variants = len(class_names), len(iou)
    columns = 1 if num_classes <= 30 else 3
    rows = math.ceil(num_classes / columns)
    with_values = columns == 1
    row_inches = max(0.2, 0.16 * num_variants) if with_values else max(0.14, 0.07 * num_variants)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, row_inches * rows + 0.6), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False).flatten()
        thickness = 0.8 / num_variants
        for column, axis in enumerate(axes):
            names = class_names[column * rows : (column + 1) * rows]
            for index, (variant, values) in enumerate(iou.items()):
                shown = values[column * rows : (column + 1) * rows]
                places = [row + (index - (num_variants - 1) / 2) * thickness for row in range(len(names))]
                lengths = [_finite(value) or 0.0 for value in shown]
                axis.barh(places, lengths, thickness, color=colours[variant])
                for place, value in zip(places, shown, strict=True):
                    known = _finite(value)
                    if known is None or with_values:
                        text = "–" if known is None else f"{known:.2f}"  # noqa: RUF001 (an en dash is meant)
                        axis.text(
                            (known or 0.0) + 0.006,
                            place,
                            text,
                            va="center",
                            size=7 if known is not None else 9,
                        )
            axis.set_yticks(range(len(names)), [_short(name) for name in names], size=9 if with_values else 7)
            axis.set_ylim(rows - 0.4, -0.6)
            axis.set_xlim(0, 1.04)
            axis.grid(visible=False, axis="y")
            axis.tick_params(axis="y", length=0)
            axis.set_xlabel("IoU")
        return _svg(figure, "class-iou", f"IoU of each of {num_classes} classes for {', '.join(iou)}")


def confusion_heat_map(matrix: NDArray[np.int64], class_names: Sequence[str], name: str) -> str:
    """Row-normalised heat map of (K, K) pixel counts, rows = true class; values (%) up to 20 classes."""
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
    num_classes = len(class_names)
    with_values = num_classes <= _MAX_CLASSES_WITH_VALUES
    size = (5.6 if num_classes <= 12 else 7.2) if with_values else 0.13 * num_classes + 2.4
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size, size * (0.86 if with_values else 0.98)), layout="constrained")
        axis = figure.subplots()
        axis.imshow(share, cmap=_transparent_to_blue(), vmin=0, vmax=1, interpolation="none", aspect="auto")
        labels = [_short(label) for label in class_names]
        font = 9.0 if num_classes <= 12 else 7.5 if with_values else 6.5
        axis.set_xticks(range(num_classes), labels, size=font)
        axis.set_yticks(range(num_classes), labels, size=font)
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(True)
        if with_values:
            _write_values(axis, share, font)
            for tick in axis.get_xticklabels():
                tick.set(rotation=40, ha="right", rotation_mode="anchor")
        else:
            # A large matrix is scrolled: names on all four sides keep them in sight.
            axis.tick_params(axis="x", labeltop=True, labelrotation=90)
            axis.tick_params(axis="y", labelright=True)
        label = f"Confusion matrix of {num_classes} classes, rows normalised"
        return _svg(figure, name, label, natural=not with_values)


def image_miou_histogram(scores: Mapping[str, Sequence[float]]) -> str:
    """How many images have which mIoU, one outline a variant."""
    colours = variant_colours(list(scores))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 2.2), layout="constrained")
        axis = figure.subplots()
        for variant, values in scores.items():
            known = [value for value in values if math.isfinite(value)]
            axis.hist(known, bins=20, range=(0, 1), histtype="step", linewidth=1.8, color=colours[variant])
        axis.set_xlim(0, 1)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_xlabel("mIoU of one image")
        axis.set_ylabel("images")
        return _svg(figure, "image-miou", f"Histogram of the images' mIoU for {', '.join(scores)}")


def weight_search(
    values: Mapping[str, Sequence[float]],
    miou: Sequence[float],
    states: Sequence[str],
    steps: Sequence[int],
    chosen: int,
) -> str:
    """A panel a searched quantity (log scale) against mIoU; colour and marker: state, area: steps run.

    A ring marks the trial at place `chosen`, whose values are used.
    """
    largest = max([*steps, 1])
    area = np.array([24 + 60 * step / largest for step in steps])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 3.1), layout="constrained")
        axes = figure.subplots(1, len(values), squeeze=False, sharey=True).flatten()
        for axis, (label, numbers) in zip(axes, values.items(), strict=True):
            axis.set_xscale("log")
            for index, state in enumerate(dict.fromkeys(states)):
                members = [place for place, other in enumerate(states) if other == state]
                axis.scatter(
                    [numbers[place] for place in members],
                    [miou[place] for place in members],
                    s=area[members],
                    color=_COLOURS[index % len(_COLOURS)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    alpha=0.75,
                    linewidths=0,
                    label=state,
                )
            ring = {"s": 230, "facecolors": "none", "edgecolors": _TEXT, "linewidths": 1.6}
            axis.scatter([numbers[chosen]], [miou[chosen]], label="chosen", **ring)
            axis.xaxis.set_major_locator(FixedLocator(_log_ticks(min(numbers), max(numbers))))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.margins(x=0.12, y=0.14)
            axis.set_xlabel(label)
        axes[0].set_ylabel("val mIoU of the trial")
        handles, labels = axes[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), markerscale=0.8)
        for handle in legend.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([46.0])
        return _svg(figure, "search", f"val mIoU of {len(miou)} trials against {', '.join(values)}")


def _series(history: History, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and finite values of `key`, thinned by averaging to a few hundred points."""
    points = [(row["step"], row[key]) for row in history if _finite(row.get(key)) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    if steps.size <= _MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(steps.size), _MAX_POINTS)
    return np.array([steps[part].mean() for part in bins]), np.array([values[part].mean() for part in bins])


def _draw_curve(axis: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str, smooth: bool) -> None:
    """A line; long noisy ones as a faint line under their running mean."""
    window = steps.size // 20
    if not smooth or window < 3:
        marker = "o" if steps.size <= 30 else ""
        axis.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3)
        return
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    axis.plot(steps, np.convolve(padded, np.ones(window) / window, mode="valid"), color=colour, linewidth=1.6)


def _transparent_to_blue() -> ListedColormap:
    """Nothing at 0, full colour at 1: the page's own background stands for zero. Small shares are lifted."""
    colours = np.tile(np.array([0.12, 0.40, 0.72, 1.0]), (256, 1))
    colours[:, 3] = np.linspace(0, 1, 256) ** 0.6
    return ListedColormap(colours)


def _write_values(axis: Axes, share: NDArray[np.float64], font: float) -> None:
    for (row, column), value in np.ndenumerate(share):
        if np.isfinite(value) and value >= 0.005:
            colour = "#ffffff" if value > 0.35 else _TEXT
            text = f"{100 * value:.0f}"
            axis.text(column, row, text, ha="center", va="center", size=font - 0.5, color=colour)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) that span [low, high], five at most."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ladder = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    first = max(index for index, tick in enumerate(ladder) if tick <= low * 1.0001)
    last = min(index for index, tick in enumerate(ladder) if tick >= high * 0.9999)
    ticks = ladder[first : last + 1]
    return ticks[:: math.ceil(len(ticks) / 5)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def _svg(figure: Figure, name: str, label: str, natural: bool = False) -> str:
    """The figure as an element with ids unique to the page, scaled to its box or at its `natural` size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(_TEXT, "currentColor").replace(_LINE, "var(--line)")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width, height = figure.get_size_inches() * 96
    size = f'width="{width:.0f}" height="{height:.0f}"' if natural else 'width="100%"'
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" {size} ', 1).strip()
