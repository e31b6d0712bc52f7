"""How a cleaning looks in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flows.present.runs import size_text
from pipeline.cleaning.plan import CleanPlan, Item
from pipeline.workflow.ray_logs import EndedSession

MOST_ROWS = 30


def plan_view(plan: CleanPlan) -> Group:
    """What goes, item by item, the largest first; what stays, summed by the reason."""
    goes = Table(title=f"{plan.workspace}: what goes", title_justify="left")
    for heading in ("what", "name", "size", "why"):
        goes.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
    for item in plan.goes[:MOST_ROWS]:
        goes.add_row(item.kind, escape(item.name), size_text(item.num_bytes), escape(item.reason))
    more = plan.goes[MOST_ROWS:]
    if more:
        goes.add_row("", f"and {len(more)} more", size_text(sum(item.num_bytes for item in more)), "")
    stays = Table(title="what stays", title_justify="left")
    for heading in ("what", "number", "size", "why"):
        stays.add_column(heading, justify="right" if heading in ("number", "size") else "left", overflow="fold")
    number: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for item in plan.stays:
        number[item.kind, item.reason] += 1
        size[item.kind, item.reason] += item.num_bytes
    for (kind, reason), num_bytes in size.most_common(MOST_ROWS):
        stays.add_row(kind, str(number[kind, reason]), size_text(num_bytes), escape(reason))
    if len(size) > MOST_ROWS:
        left = sorted(size.values())[: len(size) - MOST_ROWS]
        stays.add_row("", f"{len(left)} more", size_text(sum(left)), "")
    return Group(goes, stays, *(f"[yellow]{escape(loss)}[/yellow]" for loss in plan.losses))


def sessions_line(sessions: Sequence[tuple[EndedSession, int]], *, removed: bool) -> str:
    """Ray's own logs, which lie outside of the workspace."""
    if not sessions:
        return "no logs of ended Ray sessions of this user's flows"
    verb = "removed" if removed else "also go"
    return (
        f"logs of {len(sessions)} ended Ray sessions in {sessions[0][0].folder.parent}, "
        f"{size_text(sum(size for _, size in sessions))}: {verb}"
    )


def ending(plan: CleanPlan, gone: Sequence[Item], remaining: int | None) -> str:
    """The sum of it."""
    before = size_text(plan.num_bytes)
    if remaining is None:
        after = size_text(plan.num_bytes - plan.freed_bytes)
        return f"dry run, nothing removed: {before} would become {after}; remove it with --yes"
    freed = size_text(sum(item.num_bytes for item in gone))
    return f"removed {len(gone)} of {len(plan.goes)}, {freed}: {before} became {size_text(remaining)}"
