"""Plots of a search: each searched value against mIoU, parallel coordinates, and what the rungs saw."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from pipeline.tuning.record import TrialSummary
from pipeline.tuning.view import SearchFacts

# Mid tones with at least 3:1 contrast on white.
STATE_COLOURS = {
    "finished": "#2f7fc9",
    "stopped": "#d9702b",
    "running": "#2f9e77",
    "unfinished": "#8f8420",
    "failed": "#c8505c",
}
STATE_MARKERS = {"finished": "o", "stopped": "s", "running": "D", "unfinished": "^", "failed": "X"}
NAMES = {
    "class_weight": "class weight",
    "focal_weight": "focal weight",
    "dice_weight": "dice weight",
    "learning_rate": "learning rate",
}
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.4,
    "legend.frameon": False,
}
_WIDTH_IN = 11.0


def weights_against_miou(facts: SearchFacts) -> bytes:
    """A panel a searched value, on a log scale, against the trials' last mIoU; a ring marks the chosen trial."""
    scored = _scored(facts)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 3.6), dpi=100, layout="constrained")
        panels = figure.subplots(1, len(facts.searched), sharey=True)
        for axis, name in zip(panels, facts.searched, strict=True):
            axis.set_xscale("log")
            for state, trials in _by_state(scored).items():
                axis.scatter(
                    [getattr(trial, name) for trial in trials],
                    [trial.miou for trial in trials],
                    s=[24 + 60 * trial.steps / facts.steps for trial in trials],
                    color=STATE_COLOURS[state],
                    marker=STATE_MARKERS[state],
                    alpha=0.75,
                    linewidths=0,
                    label=state,
                )
            for trial in scored:
                if trial.trial_id == facts.chosen:
                    x, y = getattr(trial, name), trial.miou
                    axis.scatter([x], [y], s=230, facecolors="none", edgecolors="black", linewidths=1.6, label="chosen")
            _log_ticks(axis, [getattr(trial, name) for trial in scored])
            axis.set_xlabel(NAMES[name])
            axis.margins(x=0.1, y=0.12)
        panels[0].set_ylabel("val mIoU at the trial's last step")
        _legend(figure, panels[0])
        _say_if_empty(panels[0], scored)
        return _png(figure)


def parallel_coordinates(facts: SearchFacts) -> bytes:
    """One line a trial through its values, each on a log axis of its own, to its mIoU; colour: mIoU."""
    scored = sorted(_scored(facts), key=lambda trial: trial.miou or 0.0)
    columns = [*facts.searched, "miou"]
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(_WIDTH_IN, 4.6), dpi=100, layout="constrained")
        axis = figure.subplots()
        axis.set_xlim(-0.15, len(columns) - 0.85)
        axis.set_ylim(-0.06, 1.06)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_xticks(range(len(columns)), [NAMES.get(name, "val mIoU") for name in columns])
        axis.tick_params(axis="x", length=0, pad=8, labelsize=10)
        bounds = {name: _bounds([getattr(trial, name) for trial in scored], log=name != "miou") for name in columns}
        best, worst = bounds["miou"][1], bounds["miou"][0]
        colours = Normalize(worst, best)
        map_ = matplotlib.colormaps["viridis_r"]
        for trial in scored:
            heights = [_height(getattr(trial, name), *bounds[name], log=name != "miou") for name in columns]
            chosen = trial.trial_id == facts.chosen
            axis.plot(
                range(len(columns)),
                heights,
                color=map_(0.1 + 0.9 * float(colours(trial.miou or 0.0))),
                linewidth=2.8 if chosen else 1.3,
                linestyle="-" if trial.steps >= facts.steps else (0, (4, 2)),
                alpha=1.0 if chosen else 0.8,
                marker="o",
                markersize=5 if chosen else 3,
                zorder=3 if chosen else 2,
            )
        for place, name in enumerate(columns):
            axis.axvline(place, color="#555555", linewidth=0.9, zorder=1)
            for value in _round_values(*bounds[name], log=name != "miou") if scored else ():
                axis.annotate(
                    _number(value),
                    (place, _height(value, *bounds[name], log=name != "miou")),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
                    zorder=4,
                )
        axis.set_title("solid: ran to the last step; dashed: stopped before; bold: chosen", loc="left", fontsize=9)
        _say_if_empty(axis, scored)
        return _png(figure)


def rungs(facts: SearchFacts) -> bytes:
    """mIoU over steps, one line a trial; vertical lines: the steps at which trials are compared; cross: stopped."""
    scored = _scored(facts)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 4.4), dpi=100, layout="constrained")
        axis = figure.subplots()
        for step in facts.rungs:
            axis.axvline(step, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        for state, trials in _by_state(scored).items():
            for index, trial in enumerate(trials):
                steps, mious = [score.step for score in trial.history], [score.miou for score in trial.history]
                label = state if index == 0 else None
                axis.plot(steps, mious, "o-", color=STATE_COLOURS[state], linewidth=1.2, markersize=3, label=label)
                if trial.trial_id == facts.chosen:
                    axis.plot(steps, mious, "o-", color="black", linewidth=2.4, markersize=4, zorder=3, label="chosen")
        stops = [(score.step, score.miou) for trial in scored for score in trial.history if score.stopped]
        if stops:
            steps, mious = [step for step, _ in stops], [miou for _, miou in stops]
            axis.scatter(steps, mious, marker="x", s=60, color="black", zorder=4, label="stopped here")
        axis.set_xlim(0, facts.steps * 1.03)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_xlabel("optimizer step; dotted: where trials are compared")
        axis.set_ylabel("val mIoU")
        _legend(figure, axis)
        _say_if_empty(axis, scored)
        return _png(figure)


def _scored(facts: SearchFacts) -> list[TrialSummary]:
    return [trial for trial in facts.trials if trial.miou is not None and math.isfinite(trial.miou)]


def _by_state(trials: Sequence[TrialSummary]) -> Mapping[str, list[TrialSummary]]:
    grouped = {state: [trial for trial in trials if trial.state == state] for state in STATE_COLOURS}
    return {state: members for state, members in grouped.items() if members}


def _bounds(values: Sequence[float], log: bool) -> tuple[float, float]:
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if low < high:
        return low, high
    return (low / 1.1, high * 1.1) if log else (low - 0.01, high + 0.01)


def _height(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _round_values(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high], seven at most: on a log scale 1, 2, 5 times a power of ten."""
    if not log:
        return [float(value) for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladder = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    values = [value for value in ladder if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
    return values[:: math.ceil(len(values) / 7)] if values else [low, high]


def _number(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:.3g}"


def _log_ticks(axis: Axes, values: Sequence[float]) -> None:
    low, high = _bounds(values, log=True)
    ticks = _round_values(low / 1.6, high * 1.6, log=True)
    axis.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 5)]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), markerscale=0.9)


def _say_if_empty(axis: Axes, scored: Sequence[TrialSummary]) -> None:
    if not scored:
        axis.text(0.5, 0.5, "no trial has a score yet", transform=axis.transAxes, ha="center", va="center")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No date and no version, so that the same search gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
