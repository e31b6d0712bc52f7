"""Plots of a shard set's class balance as PNG."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.reports.data_summary import DataSummary
from pipeline.reports.style import WIDTH_IN, colours_of, plot_style, png

_MAX_CLASSES_WITH_VALUES = 60


def class_bars(summary: DataSummary) -> bytes:
    """Bars of every class's share of the labelled pixels and of the images, splits side by side, commonest first."""
    splits = [split for split in summary.splits if split.num_images]
    classes = [one.name for one in splits[0].classes] if splits else []
    order = np.argsort([-one.pixels for one in splits[0].classes], kind="stable") if splits else np.empty(0, dtype=int)
    thickness = 0.8 / max(len(splits), 1)
    row_inches = max(0.2, 0.13 * len(splits))
    colours = colours_of(split.name for split in splits)
    with plot_style():
        figure = Figure(figsize=(WIDTH_IN, row_inches * len(classes) + 1.2))
        panels = figure.subplots(1, 2, sharey=True)
        kinds = (("pixel_share", "share of labelled pixels", 2), ("image_share", "share of images", 1))
        for axis, (kind, title, decimals) in zip(panels, kinds, strict=True):
            for number, split in enumerate(splits):
                values = [getattr(split.classes[index], kind) for index in order]
                middles = np.arange(len(classes)) + (number - (len(splits) - 1) / 2) * thickness
                bars = axis.barh(middles, values, thickness * 0.92, color=colours[split.name], label=split.name)
                if len(classes) <= _MAX_CLASSES_WITH_VALUES:
                    axis.bar_label(bars, [f"{value:.{decimals}%}" for value in values], padding=2, fontsize=6.5)
            axis.set_title(title, loc="left")
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.margins(x=0.12, y=0.01)
            axis.grid(visible=False, axis="y")
        panels[0].set_yticks(np.arange(len(classes)), [classes[index] for index in order])
        panels[0].invert_yaxis()
        figure.suptitle(f"{summary.name}: class balance", ha="left", x=0.01)
        if len(splits) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=len(splits))
        return png(figure)
