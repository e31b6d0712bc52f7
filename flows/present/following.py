"""How a flow looks in a terminal while it runs: its tree refreshed in place, or a line for each thing that changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from flows.present.runs import STATE_STYLES, duration, part_line, run_tree_view
from pipeline.workflow.following import Look
from pipeline.workflow.progress import Pace, Progress
from pipeline.workflow.runs import RunTree, StepSummary
from pipeline.workflow.tracking import RunState

PLAIN_LINE_EVERY_S = 10.0


def show_looks(console: Console, looks: Iterator[Look], clock: Callable[[], float] = time.monotonic) -> RunTree:
    """Show the looks as they come, at the end the run as it ended, which is returned."""
    last = _show_in_place(console, looks, clock) if console.is_terminal else _print_changes(console, looks, clock)
    console.print(run_tree_view(last.tree))
    return last.tree


def _show_in_place(console: Console, looks: Iterator[Look], clock: Callable[[], float]) -> Look:
    ages = _Ages(clock)
    look = next(looks)
    with Live(live_view(ages.counted_down(look)), console=console, auto_refresh=False, transient=True) as live:
        for look in looks:
            live.update(live_view(ages.counted_down(look)), refresh=True)
    return look


def _print_changes(console: Console, looks: Iterator[Look], clock: Callable[[], float]) -> Look:
    changes = Changes(clock)
    for look in looks:
        for text in changes.lines(look):
            console.print(text, soft_wrap=True)
    return look


def live_view(look: Look) -> RenderableType:
    """The run's tree, each running step with its progress, and whether the store is silent."""
    tree = run_tree_view(look.tree)
    return Group(tree, _silence(look.silence)) if look.silence is not None else tree


class _Ages:
    """When a progress was first seen here: no two clocks are compared."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[Progress, float]] = {}

    def counted_down(self, look: Look) -> Look:
        """The look with the time that is left as of now."""
        steps = tuple(self._count_down(step) for step in look.tree.steps)
        return look._replace(tree=look.tree.model_copy(update={"steps": steps}))

    def _count_down(self, step: StepSummary) -> StepSummary:
        if step.progress is None:
            return step
        now = self._clock()
        told, since = self._seen.get(step.label, (None, now))
        if told != step.progress:
            since = now
            self._seen[step.label] = (step.progress, now)
        return step.model_copy(update={"progress": step.progress.after(now - since)})


class Changes:
    """What has changed since the look before, a line each; of figures that always change one every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = False
        self._states: dict[str, RunState] = {}
        self._told: dict[str, Progress] = {}
        self._parts: dict[tuple[str, str], str] = {}
        self._paces: dict[str, Pace] = {}
        self._silence: str | None = None

    def lines(self, look: Look) -> Iterator[Text]:
        """The lines for this look."""
        run = look.tree.run
        if not self._begun:
            self._begun = True
            driver = f" on {run.host} (process {run.pid})" if run.host else ""
            yield Text(f"run {run.run_id[:12]} of flow {run.flow}: {run.state.value}, started {run.started}{driver}")
        if look.silence != self._silence:
            self._silence = look.silence
            yield _silence(look.silence) if look.silence is not None else Text("the store answers again")
        for index, step in enumerate(look.tree.steps, 1):
            yield from self._of_step(index, step)

    def _of_step(self, index: int, step: StepSummary) -> Iterator[Text]:
        if step.state != self._states.get(step.label, RunState.WAITING):
            took = f" after {duration(step.seconds)}" if step.state != RunState.RUNNING and step.seconds else ""
            cause = f"  ({step.error})" if step.error else ""
            text = f"[{index}] {step.label}  {step.state.value}{took}{cause}"
            yield Text(text, style=STATE_STYLES.get(step.state, ""))
        self._states[step.label] = step.state
        progress = step.progress
        if progress is None:
            return
        for part in progress.parts:
            if self._parts.get((step.label, part.name)) != part.state:
                self._parts[step.label, part.name] = part.state
                yield Text(f"{step.label}  {part_line(part)}")
        pace = self._paces.setdefault(step.label, Pace(PLAIN_LINE_EVERY_S, self._clock))
        if progress != self._told.get(step.label) and pace.is_due():
            self._told[step.label] = progress
            yield Text(f"{step.label}  {progress.line()}")


def _silence(reason: str | None) -> Text:
    return Text(f"no answer from the store: {reason}; asking again", style="yellow")
