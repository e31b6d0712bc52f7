"""What a shard set holds, for people: counts and shares of every class, class bars, and samples to look at.

K classes, H W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import segvit
from pipeline.config import DataConfig
from pipeline.data_check.look import check_visibly
from pipeline.datasets import RejectedSampleError, list_splits, open_dataset
from pipeline.datasets.raw import Palette
from pipeline.reports.data_summary import DataSummary
from pipeline.reports.pages import data_uri, image_png, refuse_existing, render_page, write_files
from pipeline.shards.sample_check import read_pair
from pipeline.shards.shard_reader import ShardReader, open_shard_set
from pipeline.shards.shards import ShardSetError, evenly_spaced
from segvit.image_files import IGNORE_INDEX, DecodeError, decode_label, open_image
from segvit.visualize import draw_legend

SHEET_SAMPLES = 12
CELL = (320, 240)  # width, height of the largest picture in a sheet, pixels
CAPTION = 18  # pixels
GAP = 6  # pixels
SHEET_PAIRS = 2  # image and overlay, side by side, this often
OVERLAY_ALPHA = 0.6
PAGE, BARS = "index.html", "classes.png"
_TEMPLATE = "data_page.html.j2"


def write_data_report(summary: DataSummary, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write class bars, a contact sheet a split, and a page that shows both to `folder`; the files written.

    Raises UserError where files would be replaced and `overwrite` is not given, ShardSetError for a sample that
    cannot be decoded.
    """
    sheets = {split.name: f"samples-{split.name}.png" for split in summary.splits if split.num_images}
    refuse_existing(folder, [BARS, *sheets.values(), PAGE], overwrite)
    from pipeline.reports.data_plots import class_bars

    reader = open_shard_set(summary.uri)
    manifest = reader.manifest
    contents = {BARS: class_bars(summary)}
    for split, name in sheets.items():
        contents[name] = image_png(contact_sheet(reader_samples(reader, split), manifest.classes, manifest.palette))
    # Inside the page, so that it can be sent on as one file.
    pictures = {name: data_uri(png) for name, png in contents.items()}
    shown = {split: pictures[name] for split, name in sheets.items()}
    contents[PAGE] = render_page(_TEMPLATE, summary=summary, bars=pictures[BARS], sheets=shown).encode()
    return write_files(folder, contents)


def write_source_sheets(config: DataConfig, folder: Path, overwrite: bool = False) -> list[Path]:
    """Write a contact sheet a split of a raw data set to `folder`; the files written.

    Samples that shards would not hold are left out. Raises UserError as `write_data_report`, and where there is no
    such data set.
    """
    dataset = open_dataset(config)
    splits = dict(list_splits(dataset, config))
    names = {split: f"samples-{split}.png" for split in splits}
    refuse_existing(folder, names.values(), overwrite)
    contents = {}
    for split, samples in splits.items():
        chosen = []
        for number in evenly_spaced(len(samples), SHEET_SAMPLES).tolist():
            with contextlib.suppress(RejectedSampleError):
                checked = check_visibly(
                    dataset, samples[number], read_pair(dataset, samples[number], config.max_long_side), config
                )
                chosen.append(SheetSample(samples[number].key, checked.image, checked.label_png))
        if chosen:
            contents[names[split]] = image_png(contact_sheet(chosen, dataset.class_names, dataset.palette))
    return write_files(folder, contents)


class SheetSample(NamedTuple):
    """An image file and the PNG file of its class ids."""

    key: str
    image: bytes
    label: bytes


def reader_samples(reader: ShardReader, split: str, num_samples: int = SHEET_SAMPLES) -> list[SheetSample]:
    """Samples evenly spread over `split`."""
    index = reader.index(split)
    chosen = (reader.read(index, number) for number in evenly_spaced(len(index), num_samples).tolist())
    return [SheetSample(sample.key, sample.image, sample.label) for sample in chosen]


def contact_sheet(samples: Sequence[SheetSample], class_names: Sequence[str], palette: Palette) -> Image.Image:
    """Each sample as image and overlay, and the legend of the classes in them; raises ShardSetError."""
    cell = (2 * CELL[0] + GAP, CELL[1] + CAPTION)
    columns = min(SHEET_PAIRS, len(samples))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + 2 * GAP), rows * (cell[1] + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    seen: set[int] = set()
    for position, sample in enumerate(samples):
        try:
            image, label = open_image(sample.image)[0], decode_label(sample.label)
        except DecodeError as error:
            raise ShardSetError(f"sample {sample.key} {error}; prepare the shard set again") from error
        pixels, small = _shrink(image, label)
        seen.update(np.unique(small).tolist())
        left, top = position % columns * (cell[0] + 2 * GAP) + GAP, position // columns * (cell[1] + GAP)
        draw.text((left, top + CAPTION // 2), sample.key, fill="black", font=font, anchor="lm")
        sheet.paste(Image.fromarray(pixels), (left, top + CAPTION))
        marked = segvit.overlay(pixels, small, palette, OVERLAY_ALPHA)
        sheet.paste(Image.fromarray(marked), (left + CELL[0] + GAP, top + CAPTION))
    classes = sorted(seen - {IGNORE_INDEX})
    return draw_legend(np.asarray(sheet), [class_names[one] for one in classes], [palette[one] for one in classes])


def _shrink(image: Image.Image, label: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Both to fit a cell, never enlarged."""
    height, width = label.shape
    scale = min(1.0, CELL[0] / width, CELL[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    rows = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(np.intp)
    columns = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(np.intp)
    # Nearest for the label: class ids do not average.
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)), label[rows][:, columns]
