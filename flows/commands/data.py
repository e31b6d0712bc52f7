"""Commands that look at shard sets and at model structures."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import Json, facts_output
from pipeline.errors import UserError

if TYPE_CHECKING:
    from segvit.flops import CostAtSize


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
