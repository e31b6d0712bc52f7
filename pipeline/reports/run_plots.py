"""The report's plots as inline SVG whose text and axes take the page's colours, for light and dark alike.

Every function takes plain numbers and returns one `<svg>` element; the same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from pipeline.reports.style import TEXT, WIDTH_IN, colours_of, finite, plot_style, svg

_CURVES = {
    "val_miou": "val mIoU",
    "total": "loss, total",
    "auxiliary": "loss, auxiliary terms",
    "learning_rate": "learning rate",
    "images_per_s": "images/s",
    "mfu": "model FLOPs utilisation",
    "data_wait_share": "share of the time that waits for images",
}
_CURVES_FIRST = 2  # of _CURVES; the loss terms that a history holds come after these
_NO_CURVES = ("step", "seconds")
_SMOOTH_AS_IS = ("val_miou", "learning_rate")
_MAX_POINTS = 400
_MAX_CLASSES_WITH_VALUES = 20

History = Sequence[Mapping[str, Any]]


def training_curves(histories: Mapping[str, History]) -> str | None:
    """One panel a quantity over optimizer steps, one line a variant; None where nothing was recorded."""
    titles = _curve_titles(histories)
    panels = [key for key in titles if any(_series(rows, key)[0].size for rows in histories.values())]
    if not panels:
        return None
    colours = colours_of(histories)
    with plot_style():
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(WIDTH_IN, 2.15 * rows + 0.3))
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(panels) :]:
            axis.remove()
        for axis, key in zip(axes, panels, strict=False):
            axis.set_title(titles[key], loc="left")
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
        return svg(figure, "curves", label)


def _curve_titles(histories: Mapping[str, History]) -> dict[str, str]:
    """What to draw, in order: all loss terms that there are between the scores and the rest."""
    keys = dict.fromkeys(key for history in histories.values() for row in history for key in row)
    terms = {key: f"loss, {key} term" for key in keys if key not in _CURVES and key not in _NO_CURVES}
    known = list(_CURVES.items())
    return dict(known[:_CURVES_FIRST]) | terms | dict(known[_CURVES_FIRST:])


def class_iou_bars(class_names: Sequence[str], iou: Mapping[str, Sequence[float | None]]) -> str:
    """Bars of per-class IoU, variants side by side; a dash stands for a class absent from the split."""
    colours = colours_of(iou)
    num_classes, num_variants = len(class_names), len(iou)
    columns = 1 if num_classes <= 30 else 3
    rows = math.ceil(num_classes / columns)
    with_values = columns == 1
    row_inches = max(0.2, 0.16 * num_variants) if with_values else max(0.14, 0.07 * num_variants)
    with plot_style():
        figure = Figure(figsize=(WIDTH_IN, row_inches * rows + 0.6))
        axes = figure.subplots(1, columns, squeeze=False).flatten()
        thickness = 0.8 / num_variants
        for column, axis in enumerate(axes):
            names = class_names[column * rows : (column + 1) * rows]
            for index, (variant, values) in enumerate(iou.items()):
                shown = values[column * rows : (column + 1) * rows]
                middles = [row + (index - (num_variants - 1) / 2) * thickness for row in range(len(names))]
                lengths = [finite(value) or 0.0 for value in shown]
                axis.barh(middles, lengths, thickness, color=colours[variant])
                for middle, value in zip(middles, shown, strict=True):
                    known = finite(value)
                    if known is None or with_values:
                        text = "–" if known is None else f"{known:.2f}"  # noqa: RUF001 (an en dash is meant)
                        axis.text(
                            (known or 0.0) + 0.006,
                            middle,
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
        return svg(figure, "class-iou", f"IoU of each of {num_classes} classes for {', '.join(iou)}")


def confusion_heat_map(matrix: NDArray[np.int64], class_names: Sequence[str], name: str) -> str:
    """Row-normalised heat map of (K, K) pixel counts, rows = true class; values (%) up to 20 classes."""
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
    num_classes = len(class_names)
    with_values = num_classes <= _MAX_CLASSES_WITH_VALUES
    size = (5.6 if num_classes <= 12 else 7.2) if with_values else 0.13 * num_classes + 2.4
    with plot_style():
        figure = Figure(figsize=(size, size * (0.86 if with_values else 0.98)))
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
        return svg(figure, name, label, natural=not with_values)


def image_miou_histogram(scores: Mapping[str, Sequence[float]]) -> str:
    """How many images have which mIoU, one outline a variant."""
    colours = colours_of(scores)
    with plot_style():
        figure = Figure(figsize=(WIDTH_IN, 2.2))
        axis = figure.subplots()
        for variant, values in scores.items():
            known = [value for value in values if math.isfinite(value)]
            axis.hist(known, bins=20, range=(0, 1), histtype="step", linewidth=1.8, color=colours[variant])
        axis.set_xlim(0, 1)
        axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_xlabel("mIoU of one image")
        axis.set_ylabel("images")
        return svg(figure, "image-miou", f"Histogram of the images' mIoU for {', '.join(scores)}")


def _series(history: History, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and finite values of `key`, thinned by averaging to a few hundred points."""
    points = [(row["step"], row[key]) for row in history if finite(row.get(key)) is not None]
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
            colour = "#ffffff" if value > 0.35 else TEXT
            text = f"{100 * value:.0f}"
            axis.text(column, row, text, ha="center", va="center", size=font - 0.5, color=colour)


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"
