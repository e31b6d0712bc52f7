"""Objects in Label Studio's JSON export, a list of tasks, drawn as label maps.

What is read of a task: the path of its image in `data`, and of the first of its `annotations` that is not cancelled
the regions of polygonlabels, rectanglelabels and brushlabels. Their coordinates are percents of original_width and
original_height. Later regions are drawn over earlier ones. Answers about the image as a whole are passed over. Tasks
without such an annotation are left out; one without regions is background.

An image is looked for below the folder of images by as much of the end of its path as is there, then by its last part
alone where one image has that, then by that without the prefix and the changes that an upload gives it. Paths of
storage (s3://bucket/a.jpg), of pages and of /data/local-files/?d=a.jpg are never followed.
"""

from __future__ import annotations

import functools
import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import LabelStudioConfig
from pipeline.datasets.archive import Extent
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.folder import default_palette
from pipeline.datasets.json_parts import open_json, read_parts, to_extents
from pipeline.datasets.json_stream import as_text, read_items
from pipeline.datasets.objects import ObjectClasses, object_classes
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, read_image
from pipeline.datasets.rasterise import Canvas, Patch, checked_size, draw_packed_runs, draw_polygon
from pipeline.datasets.raw import LabelIds, RawSample, digest_of
from pipeline.datasets.splits import draw_val, first_repeated
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError, shown
from pipeline.storage import parse_json
from segvit.image_files import DecodeError, read_image_file

_NOT_OF_THE_FORMAT = (LookupError, TypeError, ValueError, AttributeError, OverflowError)
_KINDS = ("polygonlabels", "rectanglelabels", "brushlabels")
# About an image, or about a region beside what outlines it.
_NO_REGIONS = ("choices", "datetime", "number", "pairwise", "rating", "relation", "taxonomy", "textarea")
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-")
_MAX_FOLDERS = 32  # of a path that are looked at


class TaskIndex(NamedTuple):
    """Where in the file the annotated tasks are.

    Attributes:
        paths: of their images, as the file has them.
        spans: offset and size of each task, one after the other, bytes.
        labels: of all regions.
    """

    paths: list[str]
    spans: array[int]
    labels: frozenset[str]


class LabelStudio(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    def __init__(self, root: str, config: LabelStudioConfig, seed: int, linked: Sequence[str] = ()) -> None:
        self.config = config
        self.seed = seed
        self.layout = f"images below {config.images} and Label Studio's JSON in {config.tasks}"
        self.required = (config.images,)
        # The classes are in the file, which needs the tree.
        super().__init__("label_studio", root, (), (), LabelIds({}, [], ""), linked)
        self.entry = self._find_file()
        self.classes = self._read_classes()
        self.class_names = self.classes.names
        self.palette = default_palette(len(self.class_names))
        self.settings = digest_of([[self.class_names, sorted(self.classes.id_of.items()), self.classes.void]])[:16]

    def splits(self) -> tuple[str, ...]:
        """Train and val; raises UserError where the images or `val_fraction` are missing."""
        if self.config.val_fraction is None:
            raise UserError(f"{self.entry.uri} has no val split; set data.label_studio.val_fraction to draw one")
        return super().splits()

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """An image and the place of its task in the file each, in the file's order."""
        index, find = read_tasks(self.entry), _Finder(self)
        found = [find(path) for path in index.paths]
        names = [name for name, _ in found]
        twice = first_repeated(names)
        if twice is not None:
            raise UserError(f"{self.entry.uri} holds two annotated tasks of the image {shown(twice)}; remove one")
        drawn = draw_val(names, self.config, self.seed, "data.label_studio")
        for number, (name, image) in enumerate(found):
            if (name in drawn) == (split == "val"):
                extents = to_extents(self.entry, [(index.spans[2 * number], index.spans[2 * number + 1])])
                yield Pair(name, image, Entry(f"{self.entry.uri}#{index.paths[number]}", self.entry.stamp, extents))

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) class ids, drawn."""
        try:
            regions = find_regions(parse_json(b"".join(read_parts(sample))))
            if not regions:
                return self.classes.blank(*_image_size(read_image(sample)))
            return draw_regions(regions, self.classes)
        except _NOT_OF_THE_FORMAT as error:
            if isinstance(error, DecodeError):
                raise
            raise DecodeError(f"is not of Label Studio's format ({error!r})") from error

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """They are drawn as class ids."""
        return raw.astype(np.uint8)

    def _find_file(self) -> Entry:
        if not self.tree.exists():
            raise UserError(
                f"data root {self.root} does not exist; set data.root to the folder with {self.config.tasks}"
            )
        entry = self.tree.file(self.config.tasks)
        if entry is None:
            raise UserError(
                f"data root {self.root} has no {self.config.tasks}; add it or correct data.label_studio.tasks"
            )
        return entry

    def _read_classes(self) -> ObjectClasses:
        labels, where = sorted(read_tasks(self.entry).labels), self.entry.uri
        if self.config.classes is not None:
            labels, where = list(read_class_list(self.tree, self.config.classes).names), self.config.classes
        return object_classes(labels, self.config.unlabelled, where)


class _Finder:
    """From the path of a task's image to the image below the folder that `dataset` is set to."""

    def __init__(self, dataset: LabelStudio) -> None:
        folder = dataset.config.images
        self.uri = storage.join(dataset.root, *([] if folder == "." else [folder]))
        self.files = {
            path: entry for path, entry in dataset.tree.files(folder).items() if path.lower().endswith(IMAGE_SUFFIXES)
        }
        self.by_last: dict[str, str | None] = {}
        self.by_upload: dict[str, str | None] = {}
        for path in self.files:
            last = path.rpartition("/")[2]
            for names, name in ((self.by_last, last), (self.by_upload, _uploaded(last))):
                names[name] = None if name in names else path

    def __call__(self, path: str) -> tuple[str, Entry | str]:
        places = _places(path)
        found = next(filter(None, map(self._find, places)), None)
        if found is None:
            last = places[0].rpartition("/")[2]
            return last.rpartition(".")[0] or last, storage.join(self.uri, last)
        return found.rpartition(".")[0] or found, self.files[found]

    def _find(self, path: str) -> str | None:
        parts = path.split("/")[-_MAX_FOLDERS:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        last = parts[-1]
        plain = _UPLOAD_PREFIX.sub("", last, count=1) if _UPLOAD_PREFIX.match(last) else None
        return (
            next((end for end in ends if end in self.files), None)
            or self.by_last.get(last)
            or (plain and (self.by_last.get(plain) or self.by_upload.get(plain)))
            or None
        )


def _uploaded(name: str) -> str:
    """What Django, which Label Studio is made with, calls an uploaded file."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _places(path: str) -> list[str]:
    """The path in `path`, which may be one of a page or of a storage, as it is and with its escapes resolved."""
    path = path.replace("\\", "/")
    if "://" in path or path.startswith("/"):
        url = urlsplit(path)
        local = next((part[2:] for part in url.query.split("&") if part.startswith("d=")), None)
        path = local or url.path
    return list(dict.fromkeys((path, unquote(path))))


def find_regions(task: Any) -> list[Any] | None:
    """What the first annotation of `task` that is not cancelled outlines; None where there is no such annotation.

    Raises what comes of content of another form.
    """
    for annotation in task["annotations"]:
        if not annotation.get("was_cancelled"):
            return [region for region in annotation["result"] if region["type"] not in _NO_REGIONS]
    return None


def draw_regions(regions: list[Any], classes: ObjectClasses) -> NDArray[np.uint8]:
    """(H, W) class ids of one or more `regions`; raises DecodeError, and what comes of content of another form."""
    sizes = {(region.get("original_height"), region.get("original_width")) for region in regions}
    if len(sizes) > 1:
        raise DecodeError("holds regions of several images; keep those of one")
    height, width = checked_size(*sizes.pop())
    canvas = Canvas(classes.blank(height, width))
    for region in regions:
        kind = region["type"]
        if kind not in _KINDS:
            raise DecodeError(
                f"holds a region of type {kind!r}, which is not read; draw with one of {', '.join(_KINDS)}"
            )
        if region.get("image_rotation"):
            raise DecodeError(f"was labelled turned by {region['image_rotation']} degrees; turn the image in its file")
        names = region["value"].get(kind) or ["none"]
        if len(names) != 1 or names[0] not in classes.id_of:
            raise DecodeError(f"holds a region of class {', '.join(map(str, names))}, which is none or no single one")
        canvas.paint([_draw_region(kind, region["value"], height, width)], classes.id_of[names[0]])
    return canvas.label


def _draw_region(kind: str, value: Mapping[str, Any], height: int, width: int) -> Patch:
    if kind == "brushlabels":
        if value["format"] != "rle":
            raise DecodeError(f"holds a brush mask of format {value['format']!r}; export COCO, or masks as PNG")
        packed = value["rle"]
        # Of a number bytes() makes as many zeros.
        if not isinstance(packed, list):
            raise DecodeError("holds a brush mask that is no list of bytes")
        return draw_packed_runs(bytes(packed), height, width)
    points = value["points"] if kind == "polygonlabels" else [(value["x"], value["y"])]
    corners = [(float(x) * width / 100, float(y) * height / 100) for x, y in points]
    if kind == "rectanglelabels":
        # It is turned around its upper left corner, clockwise.
        (x, y), turn = corners[0], math.radians(float(value.get("rotation") or 0))
        across, down = float(value["width"]) * width / 100, float(value["height"]) * height / 100
        ends = ((0.0, 0.0), (across, 0.0), (across, down), (0.0, down))
        corners = [
            (x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)) for u, v in ends
        ]
    return draw_polygon([value for corner in corners for value in corner], height, width)


def _image_size(data: bytes) -> tuple[int, int]:
    """Height and width of the image in `data`, upright; of a task without regions nothing else says them."""
    file = read_image_file(data)
    if file.image is not None:
        return file.image.height, file.image.width
    assert file.values is not None
    return file.values.shape[0], file.values.shape[1]


def index_tasks(file: IO[bytes]) -> TaskIndex:
    """Where in `file` the annotated tasks are; raises ValueError where it is not of this format."""
    paths: list[str] = []
    spans = array("q")
    labels: set[str] = set()
    for _, task, offset, size in read_items(file):
        try:
            regions = find_regions(task)
            if regions is None:
                continue
            paths.append(_image_path(task["data"]))
            for region in regions:
                if region["type"] in _KINDS:
                    labels.update(as_text(str(name)) for name in region["value"].get(region["type"]) or ())
        except _NOT_OF_THE_FORMAT as error:
            raise ValueError(f"the task at byte {offset}: {error!r}; JSON-MIN is not read") from error
        spans.extend((offset, size))
    if not paths:
        raise ValueError("it holds no annotated task")
    return TaskIndex(paths, spans, frozenset(labels))


def _image_path(data: Mapping[str, Any]) -> str:
    """The path of the task's image; raises ValueError where none, or no single one, is it."""
    paths = {
        key: as_text(value)
        for key, value in data.items()
        if isinstance(value, str) and _places(value)[-1].lower().endswith(IMAGE_SUFFIXES) and "\0" not in value
    }
    if "image" not in paths and len(paths) != 1:
        raise ValueError(f"its data names {len(paths)} images")
    return paths.get("image") or next(iter(paths.values()))


def read_tasks(entry: Entry) -> TaskIndex:
    """The index of the JSON file `entry`, made once a process; raises UserError."""
    return _read_tasks(entry.uri, entry.stamp, entry.extents)


@functools.lru_cache(maxsize=4)
def _read_tasks(uri: str, stamp: str, extents: tuple[Extent, ...]) -> TaskIndex:
    try:
        with open_json(uri, extents) as file:
            return index_tasks(file)
    except ValueError as error:
        raise UserError(f"{uri} cannot be read as Label Studio's JSON ({error}); export it again as JSON") from error
