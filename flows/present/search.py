"""How a search looks in a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.present.runs import duration, styled
from pipeline.tuning.view import SearchFacts

STATE_STYLES = {"finished": "green", "stopped": "cyan", "running": "yellow", "unfinished": "magenta", "failed": "red"}


def search_view(facts: SearchFacts) -> Group:
    """A search in a line, and a table of its trials."""
    ended = sum(trial.state in ("finished", "stopped", "failed") for trial in facts.trials)
    head = Text.from_markup(
        f"{facts.flow} {facts.run_id[:12]}  search {styled(facts.state)}  {ended} of {facts.num_trials} trials ended"
    )
    table = Table()
    table.add_column("trial")
    for heading in ("class", "focal", "dice", "learning rate", "val mIoU", "steps", "took"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state")
    table.add_column("cause", overflow="fold")
    for trial in facts.trials:
        chosen = trial.trial_id == facts.chosen
        table.add_row(
            trial.trial_id + (" *" if chosen else ""),
            f"{trial.class_weight:.3g}",
            f"{trial.focal_weight:.3g}",
            f"{trial.dice_weight:.3g}",
            f"{trial.learning_rate:.2e}" if trial.learning_rate is not None else "",
            f"{trial.miou:.4f}" if trial.miou is not None else "",
            f"{trial.steps}/{facts.steps}",
            duration(trial.seconds),
            Text(trial.state, style=STATE_STYLES[trial.state]),
            Text(trial.cause or ""),
            style="bold" if chosen else None,
        )
    return (
        Group(head, table, Text("* the best; its values are used", style="dim")) if facts.chosen else Group(head, table)
    )
