"""A comparison as files: pictures of the images that differ most, and one self-contained page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from pipeline.registry import store
from pipeline.registry.compare import Comparison, ImageDifference
from pipeline.registry.models import checkpoint_folder
from pipeline.reports.pages import data_uri, image_png, refuse_existing, render_page, write_files
from pipeline.shards.shard_reader import SampleBytes, open_shard_set
from pipeline.workflow.tracking import Tracking
from segvit.image_files import IGNORE_INDEX, DecodeError, decode_image, decode_label

if TYPE_CHECKING:
    import segvit

PAGE = "compare.html"
PANEL_PX = 640  # longest side of each of the four pictures
GAP_PX = 6
CAPTION_PX = 20
_TEMPLATE = "comparison_page.html.j2"
_KINDS = {"gain": "largest gain", "drop": "largest drop"}


class Written(NamedTuple):
    """The files of a comparison, the page first; `note` says why pictures are missing, where they are."""

    files: list[Path]
    note: str | None


class _Picture(NamedTuple):
    name: str
    image: ImageDifference
    png: bytes


def write_comparison(tracking: Tracking, comparison: Comparison, folder: Path, overwrite: bool = False) -> Written:
    """Write the page and a PNG for each image shown to `folder`.

    Both registered models predict those images again, read from the shard set that they were scored on; where it is
    gone there are no pictures, and the page says so. Raises UserError where files would be replaced and `overwrite`
    is not given.
    """
    chosen = {
        f"{kind}-{rank}.png": image
        for kind, images in (("gain", comparison.gains), ("drop", comparison.drops))
        for rank, image in enumerate(images, start=1)
    }
    refuse_existing(folder, (PAGE, *chosen), overwrite)
    note: str | None = None
    pictures: list[_Picture] = []
    try:
        pictures = _draw(tracking, comparison, chosen)
    except UserError as error:
        note = f"no pictures: {error}"
    contents = {picture.name: picture.png for picture in pictures}
    *files, page = write_files(folder, contents | {PAGE: _page(comparison, pictures, note).encode()})
    return Written([page, *files], note)


def _draw(tracking: Tracking, comparison: Comparison, chosen: dict[str, ImageDifference]) -> list[_Picture]:
    import segvit

    samples = _read_samples(tracking, comparison, [image.key for image in chosen.values()])
    loaded: list[tuple[segvit.SegViT, dict[str, object]]] = []
    for version in (comparison.first, comparison.second):
        with tempfile.TemporaryDirectory(prefix="segvit-compare-") as cache:
            model, metadata = segvit.load_checkpoint(checkpoint_folder(tracking, version.model_uri, cache))
        # As it was scored, which may be another way than that in which it is registered to predict.
        loaded.append((model, metadata | {"inference": version.evaluation.inference}))
    return [
        _Picture(name, image, image_png(_side_by_side(samples[image.key], image, comparison, loaded)))
        for name, image in chosen.items()
    ]


def _read_samples(tracking: Tracking, comparison: Comparison, keys: Sequence[str]) -> dict[str, SampleBytes]:
    reader = open_shard_set(store.shard_set_of(tracking, comparison.name, comparison.scored_on))
    index = reader.index(comparison.second.evaluation.split)
    positions = {key: position for position, key in enumerate(index.keys.to_pylist())}
    unknown = [key for key in keys if key not in positions]
    if unknown:
        raise UserError(f"{reader.uri} holds no sample {unknown[0]}")
    return {key: reader.read(index, positions[key]) for key in keys}


def _side_by_side(
    sample: SampleBytes,
    image: ImageDifference,
    comparison: Comparison,
    loaded: Sequence[tuple[segvit.SegViT, dict[str, object]]],
) -> Image.Image:
    """Image, truth and both predictions in a row with captions, and a legend of the classes in them."""
    import segvit
    from segvit.visualize import draw_legend

    try:
        pixels, truth = decode_image(sample.image), decode_label(sample.label)
    except DecodeError as error:
        raise UserError(f"sample {sample.key} {error}; prepare the shard set again") from error
    palette: list[list[int]] = loaded[1][1]["palette"]  # type: ignore[assignment]
    maps = [truth] + [
        segvit.predict(model, pixels, **metadata["inference"]).cpu().numpy()  # type: ignore[arg-type]
        for model, metadata in loaded
    ]
    panels = [pixels, *(segvit.overlay(pixels, labels, palette) for labels in maps)]
    captions = [
        image.key,
        "truth",
        f"version {comparison.first.version}: mIoU {image.first:.3f}",
        f"version {comparison.second.version}: mIoU {image.second:.3f} ({image.difference:+.3f})",
    ]
    present = sorted(set(np.unique(np.concatenate([labels.ravel() for labels in maps])).tolist()) - {IGNORE_INDEX})
    names = comparison.second.evaluation.class_names
    return draw_legend(_row(panels, captions), [names[one] for one in present], [palette[one] for one in present])


def _row(panels: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> NDArray[np.uint8]:
    height, width = panels[0].shape[:2]
    scale = min(1.0, PANEL_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = Image.new("RGB", (len(panels) * (size[0] + GAP_PX) - GAP_PX, size[1] + CAPTION_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = column * (size[0] + GAP_PX)
        while font.getlength(caption) > size[0] and len(caption) > 4:
            caption = f"{caption.rstrip('.')[:-1]}..."
        draw.text((left, CAPTION_PX // 2), caption, fill="black", font=font, anchor="lm")
        sheet.paste(Image.fromarray(panel).resize(size, Image.Resampling.BOX), (left, CAPTION_PX))
    return np.asarray(sheet)


def _page(comparison: Comparison, pictures: Sequence[_Picture], note: str | None) -> str:
    known = [row for row in comparison.classes if row.difference is not None]
    shown = {
        heading: [(picture.image, data_uri(picture.png)) for picture in pictures if picture.name.startswith(kind)]
        for kind, heading in _KINDS.items()
    }
    return render_page(
        _TEMPLATE,
        comparison=comparison,
        classes=sorted(comparison.classes, key=lambda row: -(row.difference if row.difference is not None else -2.0)),
        widest=max([abs(row.difference or 0.0) for row in known] + [1e-9]),
        shown=shown,
        note=note,
    )
