"""Plots of a shard set's class balance as PNG."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.reports.data_page import DataFacts

# Mid tones with at least 3:1 contrast on white.
_COLOURS = ("#2f7fc9", "#d9702b", "#2f9e77", "#b05fc7", "#c8505c", "#8f8420")
_MAX_CLASSES_WITH_VALUES = 60


def class_bars(facts: DataFacts) -> bytes:
    """Bars of every class's share of the labelled pixels and of the images, splits side by side, commonest first."""
    splits = [split for split in facts.splits if split.num_images]
    classes = [one.name for one in splits[0].classes] if splits else []
    order = np.argsort([-one.pixels for one in splits[0].classes], kind="stable") if splits else np.empty(0, dtype=int)
    thickness = 0.8 / max(len(splits), 1)
    row_inches = max(0.2, 0.13 * len(splits))
    # A class name may hold a dollar sign.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8.5}):
        figure = Figure(figsize=(11.0, row_inches * len(classes) + 1.2), dpi=100, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        kinds = (("pixel_share", "share of labelled pixels", 2), ("image_share", "share of images", 1))
        for axis, (kind, title, decimals) in zip(panels, kinds, strict=True):
            for number, split in enumerate(splits):
                values = [getattr(split.classes[place], kind) for place in order]
                middles = np.arange(len(classes)) + (number - (len(splits) - 1) / 2) * thickness
                colour = _COLOURS[number % len(_COLOURS)]
                bars = axis.barh(middles, values, thickness * 0.92, color=colour, label=split.name)
                if len(classes) <= _MAX_CLASSES_WITH_VALUES:
                    axis.bar_label(bars, [f"{value:.{decimals}%}" for value in values], padding=2, fontsize=6.5)
            axis.set_title(title, loc="left")
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
            axis.margins(x=0.12, y=0.01)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="x", linewidth=0.5, alpha=0.4)
            axis.set_axisbelow(True)
        panels[0].set_yticks(np.arange(len(classes)), [classes[place] for place in order])
        panels[0].invert_yaxis()
        figure.suptitle(f"{facts.name}: class balance", ha="left", x=0.01)
        if len(splits) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=len(splits), frameon=False)
        buffer = io.BytesIO()
        # No date and no version, so that the same shard set gives the same bytes.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
