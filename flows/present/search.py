"""How a search looks in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.present.runs import duration, styled
from pipeline.tuning.space import short_names, value_text
from pipeline.tuning.view import SearchSummary

STATE_STYLES = {"finished": "green", "stopped": "cyan", "running": "yellow", "unfinished": "magenta", "failed": "red"}


def search_view(summary: SearchSummary) -> Group:
    """A search in a line, and a table of its trials."""
    ended = sum(trial.state in ("finished", "stopped", "failed") for trial in summary.trials)
    head = Text.from_markup(
        f"{summary.flow} {summary.run_id[:12]}  search {styled(summary.state)}  "
        f"{ended} of {summary.num_trials} trials ended"
    )
    table = Table()
    table.add_column("trial")
    for heading in (*short_names(summary.space).values(), "mIoU", "steps", "took"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state")
    table.add_column("cause", overflow="fold")
    for trial in summary.trials:
        chosen = trial.trial_id == summary.chosen
        table.add_row(
            trial.trial_id + (" *" if chosen else ""),
            *(Text(value_text(trial.values[path])) for path in summary.space),
            f"{trial.miou:.4f}" if trial.miou is not None else "",
            f"{trial.steps}/{summary.steps}",
            duration(trial.seconds),
            Text(trial.state, style=STATE_STYLES[trial.state]),
            Text(trial.cause or ""),
            style="bold" if chosen else None,
        )
    note = [Text("* the best; its values are used", style="dim")] if summary.chosen else []
    return Group(head, table, *note)
