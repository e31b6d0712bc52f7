"""Plots of a search, on any mix of ranges, by Optuna: values against mIoU, parallel coordinates, scores over steps.

A trial that was stopped or has not ended cannot be compared with one that ran to the last step. Optuna has that
distinction as constraints, which trials meet or not: it greys or dots those that do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from optuna.trial import FrozenTrial, create_trial
from optuna.visualization.matplotlib import plot_intermediate_values, plot_parallel_coordinate, plot_slice

from pipeline.reports.style import STYLE, TEXT, WIDTH_IN, finite, plot_style
from pipeline.tuning.space import distributions, short_names, to_params
from pipeline.tuning.view import SearchSummary

_SCORE = "mIoU"
_UNENDED = "#8a949d"
# Optuna's own shades end in white.
_SHADES = LinearSegmentedColormap.from_list("shades", ["#8f8420", "#2f9e77", "#2f7fc9"])


def values_against_miou(search: SearchSummary) -> Figure:
    """A panel a searched setting against the trials' last mIoU; grey: not to the last step; a ring: the chosen one."""
    with _optuna_plots():
        study, chosen = _study(search)
        axes: list[Axes] = list(np.atleast_1d(np.asarray(plot_slice(study, target_name=_SCORE), dtype=object)))
        figure = _finish(axes, (max(WIDTH_IN, 2.2 * len(search.space)), 3.2))
        for axis in axes if study.trials else []:
            name = axis.get_xlabel()
            has_words = axis.xaxis.have_units()
            if chosen is not None:
                value = repr(chosen.params[name]) if has_words else chosen.params[name]
                ring = axis.scatter([value], np.array([chosen.value]), s=190, linewidths=1.6, zorder=4)
                ring.set(facecolors="none", edgecolors=TEXT)
            if has_words:
                axis.margins(x=0.2)
                axis.autoscale(axis="x")
                texts = axis.xaxis.get_major_formatter().format_ticks(list(axis.get_xticks()))
                axis.set_xticks(axis.get_xticks(), [text.strip("'") for text in texts], rotation=20, ha="right")
            else:
                _readable_ticks(axis.xaxis)
        return figure


def parallel_coordinates(search: SearchSummary) -> Figure:
    """One line a trial from its mIoU through its values; dotted: not to the last step."""
    with _optuna_plots():
        study, _ = _study(search)
        axis = plot_parallel_coordinate(study, target_name=_SCORE)
        figure = _finish([axis], (max(WIDTH_IN, 1.6 * len(search.space)), 4.2))
        axis.tick_params(axis="x", labelrotation=0)
        for other in figure.axes if study.trials else []:
            other.grid(visible=False)
            other.spines["right"].set_visible(other is not axis)
            if not isinstance(other.yaxis.get_major_locator(), FixedLocator):
                _readable_ticks(other.yaxis)
            for text in other.get_yticklabels() if other is not axis else []:
                text.set_bbox({"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6})
        return figure


def scores_over_steps(search: SearchSummary) -> Figure:
    """mIoU over steps, one line a trial; vertical lines: where trials are compared; heavy: the chosen one."""
    with _optuna_plots():
        study, chosen = _study(search)
        axis = plot_intermediate_values(study)
        figure = _finish([axis], (WIDTH_IN, 4.2))
        for trial, line in zip(study.trials, axis.get_lines(), strict=False):
            to_the_end = trial.last_step == search.steps
            line.set_color(_SHADES(trial.number / max(len(study.trials) - 1, 1)) if to_the_end else _UNENDED)
            if trial == chosen:
                line.set(color=TEXT, linewidth=2.4, alpha=1.0, zorder=4)
        for step in search.rungs:
            axis.axvline(step, color=TEXT, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        axis.set(xlim=(0, search.steps * 1.03), xlabel="optimizer step", ylabel=_SCORE)
        _readable_ticks(axis.xaxis)
        return figure


@contextmanager
def _optuna_plots() -> Iterator[None]:
    # Optuna draws by pyplot, which opens windows where it can, and asks for this style by name.
    plt.switch_backend("agg")
    theirs = matplotlib.style.library["ggplot"]
    matplotlib.style.library["ggplot"] = matplotlib.RcParams(STYLE)
    try:
        with plot_style(), warnings.catch_warnings():
            # These plots are experimental to Optuna; an axis with one value on it has equal limits.
            warnings.simplefilter("ignore")
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            yield
    finally:
        matplotlib.style.library["ggplot"] = theirs


def _study(search: SearchSummary) -> tuple[optuna.Study, FrozenTrial | None]:
    """The trials with a score as a study whose parameters have short names, and the chosen one there."""
    names = short_names(search.space)
    space = {names[path]: one for path, one in search.space.items()}
    scored = [trial for trial in search.trials if finite(trial.miou) is not None]
    scored.sort(key=lambda trial: trial.trial_id)
    study = optuna.create_study(direction="maximize")
    for trial in scored:
        study.add_trial(
            create_trial(
                value=trial.miou,
                params=to_params({names[path]: value for path, value in trial.values.items()}, space),
                distributions=distributions(space),
                intermediate_values={score.step: score.miou for score in trial.history},
                constraints={"steps left": float(search.steps - trial.steps)},
            )
        )
    numbers = [number for number, trial in enumerate(scored) if trial.trial_id == search.chosen]
    return study, study.trials[numbers[0]] if numbers else None


def _finish(axes: Sequence[Axes], size: tuple[float, float]) -> Figure:
    """The figure of these axes in inches, without Optuna's titles and legends, in colours that read on any ground."""
    figure = axes[0].get_figure(root=True)
    assert figure is not None, "Optuna draws on figures"
    figure.set_size_inches(size)
    figure.set_layout_engine("constrained")
    figure.suptitle("")
    for axis in axes:
        axis.set_title("")
        if (legend := axis.get_legend()) is not None:
            legend.remove()
        for collection in axis.collections:
            collection.set_cmap(_SHADES)
            if collection.get_array() is None:
                collection.set_color(_UNENDED)
    if not axes[0].has_data():
        axes[0].text(0.5, 0.5, "no trial has a score yet", transform=axes[0].transAxes, ha="center", va="center")
    plt.close(figure)
    return figure


def _readable_ticks(axis: Axis) -> None:
    """Few round numbers, also on a logarithmic axis."""
    low, high = axis.get_view_interval()
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 12 * low else (1, 3) if high < 200 * low else (1,)))
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))
    axis.set_minor_locator(NullLocator())


def _tick_text(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:g}"
