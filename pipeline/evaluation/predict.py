"""Label maps and overlays of image files.

What is to be written is planned first, so that nothing starts where names collide or files exist. An image's label
map is published last: where it and the overlay are, the image is done, and an interrupted run can go on.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import segvit
from pipeline import storage
from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.evaluation.image_sources import SourceImage
from pipeline.records import Record
from segvit.grey_range import GreyRange
from segvit.image_files import DecodeError, decode_image
from segvit.inference.precision import keep_for_precision
from segvit.inference.predict import shares_batches
from segvit.visualize import draw_legend, overlay, palette_image

LABELS_SUFFIX, OVERLAY_SUFFIX = ".labels.png", ".overlay.png"
# Of decoded images that wait for others of their size: 100 MB, and no batch is larger.
MAX_WAITING_PIXELS = 1 << 25
MAX_CLASSES = 256  # of an 8-bit label map
# File systems end names at 255 bytes and paths at 4096; outputs add a suffix and, while they are written, another.
MAX_NAME_BYTES = 220
MAX_PATH_LENGTH = 1000

Pixels = NDArray[np.uint8]  # (H, W, 3)


class Prediction(Record):
    """What was written for one image; `classes` gives the share of pixels of each class found."""

    image: str
    labels: str
    overlay: str | None
    classes: dict[str, float]


class FailedImage(Record):
    """An image without a prediction, and why."""

    image: str
    reason: str


class ImageTask(NamedTuple):
    """One image and the files that are to be written for it; no overlay where none is wanted."""

    image: SourceImage
    labels: Path
    overlay: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that make it done."""
        return (self.labels,) if self.overlay is None else (self.labels, self.overlay)


class PredictionPlan(NamedTuple):
    """The work: `tasks` is all of it, in the order of the images; `done` are those whose files are kept."""

    tasks: list[ImageTask]
    done: list[ImageTask]
    failed: list[FailedImage]

    @property
    def remaining(self) -> list[ImageTask]:
        """The tasks that are not done."""
        done = {task.labels for task in self.done}
        return [task for task in self.tasks if task.labels not in done]


class Segmenter:
    """A checkpoint's model, on a GPU where there is one, with what its classes mean and how it predicts.

    Args:
        checkpoint_folder: holds model.safetensors and config.json.
        precision: ``bf16`` or ``model``, in place of what the model was registered with; None: that.

    Raises:
        UserError: the checkpoint cannot be read, or has more classes than a label map holds.
    """

    def __init__(self, checkpoint_folder: Path, precision: Literal["bf16", "model"] | None = None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.model, metadata = segvit.load_checkpoint(checkpoint_folder, device)
        except (ValueError, FileNotFoundError) as error:
            raise UserError(str(error)) from error
        num_classes = self.model.num_classes
        if num_classes > MAX_CLASSES:
            raise UserError(f"the model has {num_classes} classes, a label map's 8 bits hold {MAX_CLASSES}")
        self.class_names: list[str] = metadata.get("class_names", [f"class {index}" for index in range(num_classes)])
        self.palette: list[list[int]] = metadata.get("palette", [[index] * 3 for index in range(num_classes)])
        self.inference: dict[str, Any] = dict(metadata.get("inference", {}))
        if precision is not None:
            self.inference["precision"] = None if precision == "model" else precision
        keep_for_precision(self.model, self.inference.get("precision"))
        self.grey_range: GreyRange | None = metadata.get("grey_range")

    def label_maps(self, images: Sequence[Pixels], batch_size: int) -> list[NDArray[np.uint8]]:
        """Label maps (H, W) of images of one size, predicted as the model was registered to."""
        if not shares_batches(self.inference):
            maps = [segvit.predict(self.model, image, **self.inference, batch_size=batch_size) for image in images]
        else:
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            maps = list(segvit.predict_batch(self.model, batch, **self.inference))
        return [one.to(torch.uint8).cpu().numpy() for one in maps]


def plan_predictions(
    images: Sequence[SourceImage],
    target: Path,
    *,
    overlays: bool = True,
    overwrite: bool = False,
    skip_existing: bool = False,
) -> PredictionPlan:
    """Where each image's `PATH.labels.png` and `PATH.overlay.png` go, below `target` by its path without suffix.

    Images of one folder that differ in their suffix alone keep it. With `skip_existing` images whose files are there
    are done. What was written before is no image, where `target` lies below a source. Raises UserError for two images
    of one output name, and for outputs that exist, unless told what to do with them.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give --out a folder")
    problems = [(image, _path_problem(image.path)) for image in images]
    failed = [FailedImage(image=image.uri, reason=problem) for image, problem in problems if problem]
    usable = [image for image, problem in problems if not problem and not _is_own_output(image, target)]
    tasks = [
        ImageTask(image, target / f"{name}{LABELS_SUFFIX}", target / f"{name}{OVERLAY_SUFFIX}" if overlays else None)
        for image, name in zip(usable, _output_names(usable), strict=True)
    ]
    done = [task for task in tasks if skip_existing and all(file.exists() for file in task.files)]
    for file in (file for task in tasks for file in task.files if not (overwrite or skip_existing)):
        if file.exists():
            raise UserError(
                f"{file} exists; give --overwrite to replace it, --skip-existing to keep it, or another --out"
            )
    return PredictionPlan(tasks, done, failed)


def predict_images(
    segmenter: Segmenter, tasks: Sequence[ImageTask], *, batch_size: int = 1
) -> Iterator[Prediction | FailedImage]:
    """Predict images and write their files, `batch_size` images of one size at once, or windows of one image.

    An image that cannot be read or written by its name is a FailedImage; the others go on. Raises UserError where
    nothing can be written any more.
    """
    # With windows, scales or flips it is the views of one image that are batched.
    group_size = batch_size if shares_batches(segmenter.inference) else 1
    for group in _groups(tasks, group_size, segmenter.grey_range):
        if isinstance(group, FailedImage):
            yield group
            continue
        try:
            maps = segmenter.label_maps([pixels for _, pixels in group], batch_size)
        except torch.OutOfMemoryError:
            for task, pixels in group:
                size = f"{pixels.shape[1]}x{pixels.shape[0]}"
                reason = f"{size} pixels need more memory than the device has; lower --batch-size or the image's size"
                yield FailedImage(image=task.image.uri, reason=reason)
            continue
        for (task, pixels), labels in zip(group, maps, strict=True):
            yield _write(segmenter, task, pixels, labels)


def _groups(
    tasks: Sequence[ImageTask], group_size: int, grey_range: GreyRange | None
) -> Iterator[FailedImage | list[tuple[ImageTask, Pixels]]]:
    """Images of one size, at most so many; images that cannot be read on their own."""
    waiting: dict[tuple[int, ...], list[tuple[ImageTask, Pixels]]] = {}
    for task in tasks:
        try:
            pixels = decode_image(task.image.read(), grey_range)
        # Storage and its clients raise nearly anything; each means that this image cannot be had.
        except Exception as error:
            yield FailedImage(image=task.image.uri, reason=_read_problem(task.image, error))
            continue
        size = pixels.shape[:2]
        waiting.setdefault(size, []).append((task, pixels))
        if len(waiting[size]) == group_size:
            yield waiting.pop(size)
        elif sum(len(group) * height * width for (height, width), group in waiting.items()) > MAX_WAITING_PIXELS:
            yield from waiting.values()
            waiting.clear()
    yield from waiting.values()


def _write(
    segmenter: Segmenter, task: ImageTask, pixels: Pixels, labels: NDArray[np.uint8]
) -> Prediction | FailedImage:
    counts = np.bincount(labels.ravel(), minlength=len(segmenter.class_names))
    present = np.flatnonzero(counts).tolist()
    names, palette = segmenter.class_names, segmenter.palette
    try:
        if task.overlay is not None:
            picture = overlay(pixels, labels, palette)
            _publish_png(
                task.overlay, draw_legend(picture, [names[one] for one in present], [palette[one] for one in present])
            )
        _publish_png(task.labels, palette_image(labels, palette))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        return FailedImage(image=task.image.uri, reason=f"its output has the place of another file ({error.filename})")
    except OSError as error:
        raise UserError(f"predictions cannot be written: {one_line(error)}") from error
    return Prediction(
        image=task.image.uri,
        labels=str(task.labels),
        overlay=None if task.overlay is None else str(task.overlay),
        classes={names[index]: float(counts[index] / labels.size) for index in present},
    )


def _output_names(images: Sequence[SourceImage]) -> list[str]:
    stems = [str(PurePosixPath(image.path).with_suffix("")) for image in images]
    shared = Counter(stems)
    names = [image.path if shared[stem] > 1 else stem for image, stem in zip(images, stems, strict=True)]
    first: dict[str, SourceImage] = {}
    for name, image in zip(names, images, strict=True):
        other = first.setdefault(name, image)
        if other is not image:
            raise UserError(
                f"{other.uri} and {image.uri} would both be written as {name}{LABELS_SUFFIX}; "
                "predict them into different folders, or give the folder above both"
            )
    return names


def _path_problem(path: str) -> str | None:
    """What keeps a path from being one below the target folder; None where nothing does."""
    if path.startswith("/") or ".." in path.split("/"):
        return "its path leads out of its source; rename it"
    if "::" in path or "://" in path:
        return "its path holds '::' or '://', which storage takes for another location; rename it"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in path):
        return "its path holds characters that cannot be shown; rename it"
    if len(path) > MAX_PATH_LENGTH or max(len(part.encode()) for part in path.split("/")) > MAX_NAME_BYTES:
        return f"its name leaves no room for that of its outputs; use at most {MAX_NAME_BYTES} bytes"
    return None


def _is_own_output(image: SourceImage, target: Path) -> bool:
    if not image.path.endswith((LABELS_SUFFIX, OVERLAY_SUFFIX)) or not storage.is_local(image.uri):
        return False
    return storage.local_path(image.uri).resolve().is_relative_to(target.resolve())


def _read_problem(image: SourceImage, error: Exception) -> str:
    if isinstance(error, DecodeError):
        return str(error)
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{image.uri} ")
    return "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"


def _publish_png(path: Path, picture: Image.Image) -> None:
    with storage.publishing(str(path)) as file:
        picture.save(file, format="PNG")
