"""Label maps and overlays of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import segvit
from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Record
from segvit.grey_range import GreyRange
from segvit.image_files import DecodeError, decode_image
from segvit.visualize import draw_legend, overlay, palette_image


class Prediction(Record):
    """What was written for one image; `classes` gives the share of pixels of each class found."""

    image: str
    labels: str
    overlay: str
    classes: dict[str, float]


def predict_images(
    checkpoint_folder: Path, images: Sequence[Path], target: Path, *, overwrite: bool = False
) -> Iterator[Prediction]:
    """Predict image files one by one; each gives `<name>.labels.png` (class ids, coloured) and `<name>.overlay.png`.

    Raises UserError for an image that cannot be read, two images of one name, and outputs that exist already.
    """
    targets = {image: (target / f"{image.stem}.labels.png", target / f"{image.stem}.overlay.png") for image in images}
    stems = [image.stem for image in targets]
    for image in targets:
        if stems.count(image.stem) > 1:
            raise UserError(f"two images are named {image.stem}; predict them into different folders")
        for file in targets[image]:
            if file.exists() and not overwrite:
                raise UserError(f"{file} exists; give --overwrite to replace it, or another --out")
    try:
        model, metadata = segvit.load_checkpoint(checkpoint_folder)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    names: list[str] = metadata["class_names"]
    palette: list[list[int]] = metadata["palette"]
    for image, (labels_file, overlay_file) in targets.items():
        pixels = _read_image(image, metadata.get("grey_range"))
        labels = segvit.predict(model, pixels, **metadata.get("inference", {})).numpy()
        present = np.unique(labels).tolist()
        picture = draw_legend(
            overlay(pixels, labels, palette),
            [names[index] for index in present],
            [palette[index] for index in present],
        )
        _publish_png(labels_file, palette_image(labels, palette))
        _publish_png(overlay_file, picture)
        yield Prediction(
            image=str(image),
            labels=str(labels_file),
            overlay=str(overlay_file),
            classes={names[index]: float((labels == index).mean()) for index in present},
        )


def _read_image(path: Path, grey_range: GreyRange | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        return decode_image(path.read_bytes(), grey_range)
    except FileNotFoundError as error:
        raise UserError(f"no image at {path}; check the path") from error
    except (DecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def _publish_png(path: Path, picture: Image.Image) -> None:
    with storage.publishing(str(path)) as file:
        picture.save(file, format="PNG")
