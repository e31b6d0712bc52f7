"""What a look at raw data found, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.data_check.check import Problem, SourceCheck, SplitFacts

_MOST_LISTED = 8


def check_view(found: SourceCheck) -> Group:
    """Layout, splits, classes, and every problem with its first files."""
    parts: list[Table | Text] = [Text(f"{found.dataset} at {found.root}" if found.root else found.dataset)]
    parts += [Text(f"  {line}") for line in found.layout]
    parts += [_splits_table(found), _classes_table(found)]
    if found.grey_range is not None:
        low, high = found.grey_range
        parts.append(Text(f"images of more than 8 bits: {low:g} becomes black, {high:g} white (data.grey_range)"))
    parts += [Text(line) for line in _unknown_lines(found)]
    parts += [Text(f"warning: {line}", style="yellow") for line in found.warnings]
    parts += [_problem_text(problem) for problem in found.problems]
    num = len(found.problems)
    parts.append(
        Text(f"{num} problem{'s' * (num > 1)}: mend them, then look again", style="red")
        if num
        else Text("no problem found", style="green")
    )
    return Group(*parts)


def _splits_table(found: SourceCheck) -> Table:
    table = Table()
    table.add_column("split")
    for heading in ("images", "read", "good", "unlabelled pixels"):
        table.add_column(heading, justify="right")
    table.add_column("height x width: smallest, middle, largest")
    table.add_column("files")
    for split in found.splits:
        sizes = dict.fromkeys(f"{height}x{width}" for height, width in split.sizes)
        table.add_row(
            split.name,
            f"{split.num_samples:,}",
            f"{split.num_checked:,}",
            f"{split.num_good:,}",
            f"{split.ignored_share:.2%}",
            ", ".join(sizes),
            ", ".join(f"{count:,} {kind}" for kind, count in split.kinds.items()),
        )
    return table


def _classes_table(found: SourceCheck) -> Table:
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("class", overflow="fold")
    for split in found.splits:
        for heading in ("images", "pixels", "of pixels"):
            table.add_column(f"{split.name} {heading}", justify="right", no_wrap=True)
    for class_id, (name, colour) in enumerate(zip(found.class_names, found.palette, strict=True)):
        cells = [cell for split in found.splits for cell in _class_cells(split, class_id)]
        table.add_row(str(class_id), Text(name, style="rgb({},{},{})".format(*colour)), *cells)
    return table


def _class_cells(split: SplitFacts, class_id: int) -> Iterator[str]:
    labelled = sum(split.class_pixels)
    yield f"{split.class_images[class_id]:,}"
    yield f"{split.class_pixels[class_id]:,}"
    yield f"{split.class_pixels[class_id] / max(labelled, 1):.2%}"


def _unknown_lines(found: SourceCheck) -> Iterator[str]:
    for split in found.splits:
        if split.unknown:
            listed = [f"{what} ({pixels:,} pixels)" for what, pixels in split.unknown.items()]
            more = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
            yield f"{split.name} holds what no class has: {', '.join(listed[:_MOST_LISTED])}{more}"


def _problem_text(problem: Problem) -> Text:
    text = Text(f"problem: {problem.example}", style="red")
    if problem.count > 1:
        others = ", ".join(problem.files[1:])
        left = problem.count - len(problem.files)
        text.append(f"\n  {problem.count} times; also {others}{f' and {left} more' if left > 0 else ''}")
    return text
