"""Commands that look at raw data, shard sets and model structures."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Json, facts_output
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import DataConfig
    from segvit.flops import CostAtSize

SAMPLES_FOR_DRAFT = 64
READABLE_SIDE = 2048  # pixels


def data(
    shard_set: Annotated[str, typer.Argument(metavar="SHARDSET", help="A shard set's folder or URI.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write class bars, samples with overlays and a page there.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a shard set holds: images and pixels of every class in every split."""
    from flows.present import runs as present
    from pipeline.reports.data_page import write_data_report
    from pipeline.reports.data_summary import summarize_shard_set

    summary = summarize_shard_set(shard_set)
    with facts_output(as_json) as (console, give):
        console.print(present.data_view(summary))
        files = write_data_report(summary, out, overwrite) if out is not None else []
        for file in files:
            console.print(str(file), markup=False, soft_wrap=True)
        give({**summary.model_dump(mode="json"), "files": [str(file) for file in files]})


def check(
    source: Annotated[
        str, typer.Argument(metavar="DATA|CONFIG.yaml", help="A data set's folder, archive or URL; or an experiment.")
    ],
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Read N samples of each split, evenly spread; default: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a contact sheet of each split there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    as_json: Json = False,
) -> None:
    """Look at raw data before anything is made of it: layout, classes, sizes, copies and all problems at once.

    Exit code 1 where there are problems.
    """
    from flows.present.data_check import check_view
    from pipeline.data_check.check import check_source
    from pipeline.reports.data_page import write_source_sheets

    config, layout = _source(source)
    with facts_output(as_json) as (console, give):
        try:
            found = check_source(config, layout, samples, lambda line: print(line, file=sys.stderr, flush=True))
        except UserError as error:
            raise _with_layout(error, config, layout) from error
        console.print(check_view(found), soft_wrap=True)
        files = write_source_sheets(config, out, overwrite) if out is not None else []
        for file in files:
            console.print(str(file), markup=False, soft_wrap=True)
        give({**found.model_dump(mode="json"), "files": [str(file) for file in files]})
    if found.problems:
        raise typer.Exit(1)


def init(
    source: Annotated[str, typer.Argument(metavar="DATA", help="A data set's folder, archive or URL.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the experiment goes.")] = Path("experiment.yaml"),
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME", help="A timm model; default: the one whose weights are at hand.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Write a complete experiment for a data set and this machine: it plans and runs as it is."""
    from flows.draft import choose_backbone, draft_experiment, experiment_name
    from pipeline import storage
    from pipeline.data_check.check import check_source
    from pipeline.datasets.recognise import recognise
    from pipeline.preflight import Machine

    if out.exists() and not overwrite:
        raise UserError(f"{out} exists; choose another file with --out, or use --overwrite")
    # Absolute, because the experiment may be run from any folder.
    root = str(storage.local_path(source)) if storage.is_local(source) else source
    config, layout = recognise(root)
    timm_name, why = (backbone, "as asked") if backbone else choose_backbone()
    # The draft limits large images; without a limit they could not be read.
    limited = config.model_copy(update={"max_long_side": config.max_long_side or READABLE_SIDE})
    try:
        found = check_source(limited, layout, SAMPLES_FOR_DRAFT)
    except UserError as error:
        raise _with_layout(error, config, layout) from error
    if not found.splits[0].num_good:
        raise UserError(f"no sample of {source} can be trained on: {found.problems[0].example}")
    try:
        machine = Machine.here() or Machine(1, 1)
        text = draft_experiment(experiment_name(root), config, found, machine, timm_name, why)
    except ValueError as error:
        raise UserError(f"--backbone {timm_name!r}: {error}") from error
    storage.publish_bytes(str(out.absolute()), text.encode())
    for line in layout:
        print(line)
    if found.problems:
        print(f"{len(found.problems)} problem(s) in the data, such as: {found.problems[0].example}")
        print(f"segvit check {shlex.quote(source)} lists all of them")
    print(f"wrote {out}; next: segvit run {shlex.quote(str(out))}")


def _source(source: str) -> tuple[DataConfig, Sequence[str]]:
    """What to read, and why it is taken for that."""
    from flows.experiment import load_experiment
    from pipeline.datasets.recognise import recognise

    if Path(source).suffix in (".yaml", ".yml"):
        return load_experiment(Path(source)).config.data, (f"as {source} describes it",)
    return recognise(source)


def _with_layout(error: UserError, config: DataConfig, layout: Sequence[str]) -> UserError:
    """`error` of data that cannot be opened, below what is known of them."""
    from pipeline.data_check.ids import ids_in_use

    known = ids_in_use(config) if config.dataset == "folder" else None
    return UserError("\n".join([str(error), *(f"  {line}" for line in (*layout, *([known] if known else [])))]))


def flops(
    presets: Annotated[
        list[str] | None, typer.Argument(metavar="PRESET|CONFIG...", help="Names of presets, or experiment files.")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="The published models, at their own crops.")] = False,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Size of the image in pixels; default: the training crop.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count multiply-adds, parameters and activation memory of presets or of experiments' variants, without weights."""
    from flows.present import runs as present
    from segvit.presets import published_names

    if published == bool(presets):
        raise UserError(
            "name one preset or experiment file or more, or use --published for the published models, not both"
        )
    if published and size:
        raise UserError(f"--size {size} has no meaning with --published, whose figures are for their own crops")
    pixels = _parse_size(size) if size is not None else None
    try:
        rows = [row for name in presets or published_names() for row in _costs(name, pixels)]
    except ValueError as error:
        raise UserError(str(error)) from error
    with facts_output(as_json) as (console, give):
        console.print(present.costs_view(rows))
        give([asdict(row) for row in rows])


def _costs(name: str, pixels: tuple[int, int] | None) -> list[CostAtSize]:
    """Of a preset, or of every variant of an experiment file."""
    from flows.experiment import load_experiment
    from pipeline.preflight import variant_models
    from segvit.flops import cost_at, preset_cost

    if Path(name).suffix not in (".yaml", ".yml"):
        return [preset_cost(name, pixels)]
    models = variant_models(load_experiment(Path(name)).config)
    return [cost_at(variant, *model, pixels) for variant, model in models.items()]


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if not match:
        raise UserError(f"--size {text!r} is not of the form HxW in pixels, such as --size 512x768")
    return int(match[1]), int(match[2])
