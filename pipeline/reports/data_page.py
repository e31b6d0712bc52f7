"""What a shard set holds, for people: counts and shares of every class, class bars, and samples to look at.

K classes, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import segvit
from pipeline.reports.data_summary import DataSummary
from pipeline.reports.pages import data_uri, image_png, refuse_existing, render_page, write_files
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
    contents = {BARS: class_bars(summary)}
    for split, name in sheets.items():
        contents[name] = image_png(contact_sheet(reader, split))
    # Inside the page, so that it can be sent on as one file.
    pictures = {name: data_uri(png) for name, png in contents.items()}
    shown = {split: pictures[name] for split, name in sheets.items()}
    contents[PAGE] = render_page(_TEMPLATE, summary=summary, bars=pictures[BARS], sheets=shown).encode()
    return write_files(folder, contents)


def contact_sheet(reader: ShardReader, split: str, num_samples: int = SHEET_SAMPLES) -> Image.Image:
    """Samples evenly spread over `split`, each as image and overlay, and the legend of the classes in them."""
    index, manifest = reader.index(split), reader.manifest
    chosen = evenly_spaced(len(index), num_samples)
    cell = (2 * CELL[0] + GAP, CELL[1] + CAPTION)
    columns = min(SHEET_PAIRS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + 2 * GAP), rows * (cell[1] + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    seen: set[int] = set()
    for position, number in enumerate(chosen.tolist()):
        sample = reader.read(index, number)
        try:
            image, label = open_image(sample.image)[0], decode_label(sample.label)
        except DecodeError as error:
            raise ShardSetError(f"sample {sample.key} of {reader.uri} {error}; prepare the shard set again") from error
        pixels, small = _shrink(image, label)
        seen.update(np.unique(small).tolist())
        left, top = position % columns * (cell[0] + 2 * GAP) + GAP, position // columns * (cell[1] + GAP)
        draw.text((left, top + CAPTION // 2), sample.key, fill="black", font=font, anchor="lm")
        sheet.paste(Image.fromarray(pixels), (left, top + CAPTION))
        marked = segvit.overlay(pixels, small, manifest.palette, OVERLAY_ALPHA)
        sheet.paste(Image.fromarray(marked), (left + CELL[0] + GAP, top + CAPTION))
    classes = sorted(seen - {IGNORE_INDEX})
    names, colours = [manifest.classes[one] for one in classes], [manifest.palette[one] for one in classes]
    return draw_legend(np.asarray(sheet), names, colours)


def _shrink(image: Image.Image, label: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Both to fit a cell, never enlarged."""
    height, width = label.shape
    scale = min(1.0, CELL[0] / width, CELL[1] / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    rows = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(np.intp)
    columns = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(np.intp)
    # Nearest for the label: class ids do not average.
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)), label[rows][:, columns]
