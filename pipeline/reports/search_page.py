"""A search's plots as files, and one HTML page that holds all of them."""

from __future__ import annotations

from pathlib import Path

from pipeline.reports.pages import data_uri, refuse_existing, render_page, write_files
from pipeline.tuning.space import short_names, value_text
from pipeline.tuning.view import SearchSummary

VALUES_PLOT, PARALLEL_PLOT, STEPS_PLOT, PAGE = "values.png", "parallel.png", "steps.png", "index.html"
_TEMPLATE = "search_page.html.j2"


def write_search_report(summary: SearchSummary, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write the plots and a page that shows them and all trials to `folder`; the files written.

    Raises UserError where files would be replaced and `overwrite` is not given.
    """
    refuse_existing(folder, [VALUES_PLOT, PARALLEL_PLOT, STEPS_PLOT, PAGE], overwrite)
    from pipeline.reports import search_plots
    from pipeline.reports.style import png

    contents = {
        VALUES_PLOT: png(search_plots.values_against_miou(summary)),
        PARALLEL_PLOT: png(search_plots.parallel_coordinates(summary)),
        STEPS_PLOT: png(search_plots.scores_over_steps(summary)),
    }
    # Inside the page, so that it can be sent on as one file.
    values, parallel, steps = map(data_uri, contents.values())
    contents[PAGE] = render_page(
        _TEMPLATE,
        {"value": value_text},
        summary=summary,
        names=short_names(summary.space),
        values=values,
        parallel=parallel,
        steps=steps,
    ).encode()
    return write_files(folder, contents)
