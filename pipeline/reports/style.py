"""The look of all plots, and figures as bytes that are the same for the same input.

SVG is for inside a page, whose text and line colours it takes, light or dark; PNG is a file on white ground.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# The page's own colours in the light theme; an SVG names the page's variables instead.
TEXT, LINE = "#1b2126", "#ccd3d9"
STYLE: dict[Any, Any] = {
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
    "axes.edgecolor": LINE,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}
WIDTH_IN = 11.0  # shown at the page's full width
# Mid tones with at least 3:1 contrast on white and on near-black.
_COLOURS = ("#2f7fc9", "#d9702b", "#2f9e77", "#b05fc7", "#c8505c", "#8f8420")


def plot_style() -> AbstractContextManager[None]:
    """Within it, figures look like all others."""
    return matplotlib.rc_context(STYLE)


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """One colour a name, the same in every plot of these names and in their page's legends."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    # No version of the software.
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str, label: str, natural: bool = False) -> str:
    """The figure as an element with ids unique to the page, scaled to its box or at its `natural` size."""
    buffer = io.StringIO()
    with plot_style():
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(TEXT, "currentColor").replace(LINE, "var(--line)")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    width, height = figure.get_size_inches() * 96
    size = f'width="{width:.0f}" height="{height:.0f}"' if natural else 'width="100%"'
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" {size} ', 1).strip()
