"""How a cluster's jobs look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from flows.present.runs import duration

if TYPE_CHECKING:
    from flows.jobs.listing import JobSummary

STYLES = {"succeeded": "green", "running": "yellow", "failed": "bold red", "stopped": "red"}


def jobs_table(jobs: Sequence[JobSummary]) -> Table:
    """A row a job, with its cause where it failed."""
    table = Table(title="Jobs", title_justify="left")
    for heading in ("job", "state", "started (UTC)", "duration", "user", "code", "cause"):
        table.add_column(heading, overflow="fold")
    for one in jobs:
        table.add_row(
            Text(one.job),
            Text(one.state, STYLES.get(one.state, "")),
            one.started.removesuffix("+00:00").replace("T", " "),
            duration(one.seconds) if one.started else "",
            Text(one.user),
            Text(one.code),
            Text(one.message),
        )
    return table
