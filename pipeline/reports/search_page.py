"""A search's plots as files, and one HTML page that holds all of them."""

from __future__ import annotations

from pathlib import Path

from pipeline import storage
from pipeline.errors import UserError
from pipeline.reports.pages import picture_uri, render_page
from pipeline.tuning.view import SearchFacts

WEIGHTS_PLOT, PARALLEL_PLOT, RUNGS_PLOT, PAGE = "weights.png", "parallel.png", "rungs.png", "index.html"
_TEMPLATE = "search_page.html.j2"


def write_search_report(facts: SearchFacts, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write the plots and a page that shows them and all trials to `folder`; the files written.

    Raises UserError where files would be replaced and `overwrite` is not given.
    """
    names = [WEIGHTS_PLOT, PARALLEL_PLOT, RUNGS_PLOT, PAGE]
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(f"{folder / there[0]} exists; choose another folder or use --overwrite")
    from pipeline.reports import search_plots as plots

    contents = {
        WEIGHTS_PLOT: plots.weights_against_miou(facts),
        PARALLEL_PLOT: plots.parallel_coordinates(facts),
        RUNGS_PLOT: plots.rungs(facts),
    }
    # Inside the page, so that it can be sent on as one file.
    pictures = {name: picture_uri(png) for name, png in contents.items()}
    page = render_page(
        _TEMPLATE,
        facts=facts,
        weights=pictures[WEIGHTS_PLOT],
        parallel=pictures[PARALLEL_PLOT],
        rungs=pictures[RUNGS_PLOT],
    )
    contents[PAGE] = page.encode()
    for name, content in contents.items():
        storage.publish_bytes(str(folder / name), content)
    return [folder / name for name in names]
