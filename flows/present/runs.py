"""How facts look in a terminal: tables, trees and progress lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from pipeline.records import Evaluation, ModelVersion, PromotionDecision, latency_text
from pipeline.registry.models import VersionSummary
from pipeline.storage.names import QUARANTINE
from pipeline.workflow.flow import FlowEvent
from pipeline.workflow.progress import Part, Progress
from pipeline.workflow.runs import PlannedStep, RunSummary, RunTree, StepSummary
from pipeline.workflow.tracking import RunState

if TYPE_CHECKING:
    from pipeline.reports.data_summary import DataSummary, SplitSummary
    from segvit.flops import CostAtSize

BAR_WIDTH = 24  # characters
MOST_QUARANTINED = 20

STATE_STYLES = {
    RunState.DONE: "green",
    RunState.FINISHED: "green",
    RunState.REUSED: "cyan",
    RunState.RUNNING: "yellow",
    RunState.FAILED: "bold red",
    RunState.SKIPPED: "magenta",
    RunState.KILLED: "red",
    RunState.ABANDONED: "red",
}


def print_event(console: Console, event: FlowEvent) -> None:
    """One line for a step that starts or ends."""
    words = {
        RunState.RUNNING: "running",
        RunState.DONE: f"done in {duration(event.seconds)}",
        RunState.REUSED: "reused",
    }
    text = words.get(event.state, event.state.value)
    message = event.message
    if event.state == RunState.SKIPPED and message:
        # The root cause was printed with the step that failed.
        message = f"{message.partition(':')[0]} failed"
    note = f"  ({message})" if message else ""
    console.print(
        f"[{event.index}] {event.label}  {text}{note}",
        style=STATE_STYLES.get(event.state),
        markup=False,
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size_text(num_bytes: int) -> str:
    """Bytes as a person says them, in decimal units as disks are sold."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size = num_bytes / 1000
    for unit in ("kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def variants_table(
    evaluations: Sequence[Evaluation], versions: Mapping[str, ModelVersion], decision: PromotionDecision | None
) -> Table:
    """The variants side by side with what became of each."""
    table = Table(title="Variants", title_justify="left")
    for heading in (
        "variant",
        "val mIoU",
        "mAcc",
        "aAcc",
        "GFLOPs",
        "parameters",
        "latency",
        "version",
        "decision",
    ):
        table.add_column(heading, justify="left" if heading in ("variant", "decision") else "right")
    for evaluation in evaluations:
        version = versions.get(evaluation.variant)
        table.add_row(
            evaluation.variant,
            f"{evaluation.miou:.4f}",
            f"{evaluation.macc:.4f}",
            f"{evaluation.aacc:.4f}",
            f"{evaluation.gflops:.2f}",
            f"{evaluation.parameters / 1e6:.2f} M",
            latency_text(evaluation.latency_ms, evaluation.latency_reliable),
            str(version.version) if version else "",
            outcome(version, decision) if version and decision else "",
        )
    return table


def outcome(version: ModelVersion, decision: PromotionDecision) -> str:
    """What the promotion meant for a version, in a word."""
    if decision.champion_after == version.version:
        return "champion"
    return "refused" if version.version in (decision.version, *decision.also_refused) else "not the best"


def plan_tree(name: str, planned: Sequence[PlannedStep], complete: bool) -> Tree:
    """The steps as a tree: each below the last of the steps it waits for."""
    tree = Tree(f"{name}: {sum(not step.cached for step in planned)} of {len(planned)} steps to run")
    nodes: dict[str, Tree] = {}
    for step in planned:
        state = "[cyan]cached[/cyan]" if step.cached else "[yellow]to run[/yellow]"
        others = f"  [dim]after {', '.join(step.depends_on)}[/dim]" if len(step.depends_on) > 1 else ""
        note = f"  [dim]({escape(step.note)})[/dim]" if step.note else ""
        parent = nodes[step.depends_on[-1]] if step.depends_on else tree
        nodes[step.label] = parent.add(f"{escape(step.label)}  {state}{others}{note}")
    if not complete:
        tree.add("[dim]further steps depend on what these return[/dim]")
    return tree


def costs_view(costs: Sequence[CostAtSize]) -> Group:
    """What models cost, in all and part by part, and what is counted."""
    from segvit.flops import ACTIVATIONS, COUNTED  # loads PyTorch, which no other view needs

    totals = Table(title="Cost of one image", title_justify="left")
    totals.add_column("model", overflow="fold")
    for heading in ("size", "GFLOPs", "published", "parameters", "activations"):
        totals.add_column(heading, justify="right", no_wrap=True)
    parts = Table(title="GFLOPs by part", title_justify="left")
    parts.add_column("model", overflow="fold", ratio=1)
    parts.add_column("parts", ratio=2)
    for cost in costs:
        published = cost.published_gflops
        totals.add_row(
            cost.name,
            "x".join(map(str, cost.size)),
            f"{cost.gflops:.2f}",
            f"{published:.1f} ({cost.gflops / published - 1:+.2%})" if published else "",
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.activation_bytes / 2**30:.2f} GiB",
        )
        parts.add_row(cost.name, ", ".join(f"{name.replace('_', ' ')} {part:.2f}" for name, part in cost.parts.items()))
    return Group(totals, parts, COUNTED, ACTIVATIONS)


def data_view(facts: DataSummary) -> Group:
    """A shard set's splits, and a table of classes for each, with bars of their share of the labelled pixels."""
    splits = Table(title=f"{facts.name}  {facts.digest[:12]}", title_justify="left")
    splits.add_column("split")
    for heading in ("images", "shards", "MB", "pixels", "ignored"):
        splits.add_column(heading, justify="right")
    for split in facts.splits:
        splits.add_row(
            split.name,
            f"{split.num_images:,}",
            str(split.num_shards),
            f"{split.num_bytes / 1e6:,.1f}",
            f"{split.num_pixels:,}",
            f"{split.ignored_share:.2%}",
        )
    tables = [_classes_table(split, facts.palette) for split in facts.splits]
    shown = [f"  {one.file} {one.reason}; {one.remedy}" for one in facts.quarantined[:MOST_QUARANTINED]]
    left = facts.num_quarantined - len(shown)
    more = [f"  and {left} more: see {facts.uri}/{QUARANTINE}"] if left else []
    lines = [f"{facts.num_quarantined} samples quarantined", *shown, *more]
    return Group(splits, *tables, *(Text(line) for line in lines))


def _classes_table(split: SplitSummary, palette: Sequence[tuple[int, int, int]]) -> Table:
    table = Table(title=f"{split.name}: classes", title_justify="left")
    table.add_column("class", overflow="fold")
    for heading in ("images", "of images", "pixels", "of pixels"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", min_width=BAR_WIDTH, no_wrap=True)
    most = max((one.pixel_share for one in split.classes), default=0.0)
    for one, colour in zip(split.classes, palette, strict=True):
        style = "rgb({},{},{})".format(*colour)
        table.add_row(
            Text(one.name),
            f"{one.images:,}",
            f"{one.image_share:.1%}",
            f"{one.pixels:,}",
            f"{one.pixel_share:.2%}",
            Text(bar(one.pixel_share / most if most else 0.0), style=style),
        )
    return table


def bar(fraction: float) -> str:
    """A bar of `fraction` (0 to 1) of the full width, in eighths of a character; never nothing for something."""
    eighths = max(round(fraction * BAR_WIDTH * 8), int(fraction > 0))
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).rstrip()


def runs_table(runs: Sequence[RunSummary]) -> Table:
    """Flow runs, newest first."""
    table = Table()
    for heading in ("run", "flow", "state", "started (UTC)", "took", "size", "steps", "cause"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for run in runs:
        counts = ", ".join(f"{count} {state}" for state, count in run.steps.items())
        table.add_row(
            run.run_id[:12],
            escape(run.flow),
            styled(run.state),
            run.started,
            duration(run.seconds),
            "" if run.num_bytes is None else size_text(run.num_bytes),
            counts,
            escape(run.error or ""),
        )
    return table


def run_tree_view(tree: RunTree) -> Tree:
    """A flow's run with its steps below it."""
    run = tree.run
    # A failed flow's own cause is that of its steps, told below.
    cause = f"  [red]{escape(run.error)}[/red]" if run.error and run.state != RunState.FAILED else ""
    head = f"{escape(run.flow)} {run.run_id[:12]}  {styled(run.state)}  {run.started}  {duration(run.seconds)}"
    root = Tree(head + cause)
    nodes: dict[str, Tree] = {}
    for step in tree.steps:
        known = [label for label in step.depends_on if label in nodes]
        nodes[step.label] = node = (nodes[known[-1]] if known else root).add(step_line(step))
        if step.progress is not None:
            node.add(progress_view(step.progress))
    return root


def progress_view(progress: Progress) -> Group:
    """How far a step is, with a bar, and below it its workers or trials."""
    line = Text.assemble((bar(progress.fraction).ljust(BAR_WIDTH, "·"), "yellow"), "  ", progress.line())
    return Group(line, *(Text(f"  {part_line(part)}", style="dim") for part in progress.parts))


def part_line(part: Part) -> str:
    """A worker or a trial in a line."""
    return "  ".join(word for word in (part.name, part.state, part.text) if word)


def step_line(step: StepSummary) -> str:
    """A step in a line: label, state, duration, where it was reused from, whether its outputs are gone, cause."""
    took = f"  {duration(step.seconds)}" if step.seconds is not None else ""
    origin = f"  [dim]from {step.reused_from[:12]}[/dim]" if step.reused_from else ""
    cause = f"  [red]{escape(step.error)}[/red]" if step.error else ""
    cleaned = f"  [dim]outputs removed {step.cleaned[:10]}[/dim]" if step.cleaned else ""
    return f"{escape(step.label)}  {styled(step.state)}{took}{origin}{cleaned}{cause}"


def styled(state: RunState) -> str:
    """The state's name in its colour."""
    style = STATE_STYLES.get(state, "dim")
    return f"[{style}]{state.value}[/{style}]"


def models_table(models: Sequence[VersionSummary]) -> Table:
    """Registered versions, newest first."""
    table = Table()
    for heading in (
        "model",
        "version",
        "aliases",
        "variant",
        "val mIoU",
        "GFLOPs",
        "latency",
        "created (UTC)",
        "decision",
    ):
        table.add_column(heading)
    for model in models:
        table.add_row(
            model.name,
            str(model.version),
            ", ".join(model.aliases),
            model.variant,
            f"{model.miou:.4f}",
            f"{model.gflops:.2f}",
            latency_text(model.latency_ms, model.latency_reliable),
            model.created,
            model.reason or "",
        )
    return table
