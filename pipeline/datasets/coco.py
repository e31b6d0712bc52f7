"""Objects in COCO's JSON format, as COCO itself and most label tools export it, drawn as label maps.

What is read of the file, an object of arrays:
- `images`: id, file_name, height, width;
- `categories`: id, name, supercategory. Class ids follow the order of their ids; a category that only groups others
  (Roboflow writes one) and has no object is none;
- `annotations`: image_id, category_id, iscrowd, segmentation: polygons, or run lengths, compressed or not.

Objects are drawn in the file's order, later ones over earlier ones, as label tools stack them; or, with `on_top:
smaller`, the largest first, so that none is hidden by what is around it. Crowd regions are ignored pixels where no
object is. A file name is looked for below the folder of images as it is written, else by its last part where one image
alone has that. Images that the file does not list are left out; listed ones without objects are background.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import CocoConfig
from pipeline.config.data import PerSplit
from pipeline.datasets.archive import Extent
from pipeline.datasets.folder import default_palette
from pipeline.datasets.json_parts import open_json, read_parts, to_extents
from pipeline.datasets.json_stream import Element, as_text, read_elements
from pipeline.datasets.objects import ObjectClasses, object_classes
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, refuse_outside, to_sample
from pipeline.datasets.rasterise import Canvas, Patch, checked_size, draw_segmentation
from pipeline.datasets.raw import LabelIds, LazySamples, RawSample, digest_of
from pipeline.datasets.splits import SPLITS, draw_val
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError, shown
from pipeline.storage import parse_json
from segvit.image_files import IGNORE_INDEX, DecodeError


class CocoImage(NamedTuple):
    """An image of the file, and where in it the image is described."""

    file_name: str
    offset: int
    size: int


class CocoIndex(NamedTuple):
    """Where in the file everything is.

    Attributes:
        categories: names by id.
        groups: ids of those that only group others and have no object.
        images: in the file's order.
        starts: (N + 1,) of each image, in `spans`.
        spans: (M, 2) offset and size of the annotations, image by image and in the file's order, bytes.
    """

    categories: dict[int, str]
    groups: frozenset[int]
    images: list[CocoImage]
    starts: NDArray[np.int64]
    spans: NDArray[np.int64]


class Coco(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    layout = "images and a JSON file with the arrays images, categories and annotations"

    def __init__(self, root: str, config: CocoConfig, seed: int, linked: Sequence[str] = ()) -> None:
        self.config = config
        self.seed = seed
        self.folders = _per_split(config.images)
        self.required = tuple(dict.fromkeys(self.folders.values()))
        # The classes are in the files, which need the tree.
        super().__init__("coco", root, (), (), LabelIds({}, [], ""), linked)
        files = _per_split(config.annotations)
        self.entries = {split: self._entry(files[split]) for split in SPLITS if split in files}
        self.classes, self.class_of = self._read_classes()
        self.class_names = self.classes.names
        self.palette = default_palette(len(self.class_names))
        parts = [self.class_names, sorted(self.class_of.items()), config.unlabelled, config.on_top]
        self.settings = digest_of([parts])[:16]

    def splits(self) -> tuple[str, ...]:
        """Train and val, and test where a file is given for it; raises UserError where val or a folder is missing."""
        super().splits()
        if "val" not in self.entries and self.config.val_fraction is None:
            raise UserError(
                f"data.coco.annotations {self.config.annotations!r} has no val split; set data.coco.val_fraction, or "
                "give annotations a path for train and one for val"
            )
        return tuple(split for split in SPLITS if split in self.entries or split == "val")

    def samples(self, split: str) -> Sequence[RawSample]:
        """All images of `split` in the file's order, made one by one as they are asked for."""
        pair_at, places = self._pairs(split)
        return LazySamples(lambda place: to_sample(pair_at(place), self.settings), places)

    def find_pairs(self, split: str) -> Iterable[Pair]:
        """An image and the places of its annotations in the file each, in the file's order."""
        pair_at, places = self._pairs(split)
        return map(pair_at, places)

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) class ids, drawn."""
        try:
            return draw_objects(read_parts(sample), self.classes, self.class_of, self.config.on_top)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, DecodeError):
                raise
            raise DecodeError(f"holds an annotation that is not of the format ({error!r})") from error

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """They are drawn as class ids."""
        return raw.astype(np.uint8)

    def _entry(self, path: str) -> Entry:
        if not self.tree.exists():
            raise UserError(f"data root {self.root} does not exist; set data.root to the folder with {path}")
        entry = self.tree.file(path)
        if entry is None:
            raise UserError(f"data root {self.root} has no {path}; add it or correct data.coco.annotations")
        return entry

    def _read_classes(self) -> tuple[ObjectClasses, dict[int, int]]:
        """The classes, and their ids by category id; all files must say the same."""
        indices = [(entry, read_index(entry)) for entry in self.entries.values()]
        first, index = indices[0]
        for entry, other in indices[1:]:
            if other.categories != index.categories:
                ids = sorted(dict(index.categories.items() ^ other.categories.items()))
                raise UserError(
                    f"{first.uri} and {entry.uri} have other categories, such as those of id {ids[0]}; make them equal"
                )
        groups = frozenset.intersection(*(other.groups for _, other in indices))
        names = {number: name for number, name in sorted(index.categories.items()) if number not in groups}
        classes = object_classes(list(names.values()), self.config.unlabelled, first.uri)
        return classes, {number: classes.id_of[name] for number, name in names.items()}

    def _pairs(self, split: str) -> tuple[Callable[[int], Pair], Sequence[int]]:
        """What makes the pair of an image from its place in the file, and the places of the split's images."""
        is_drawn = "val" not in self.entries and split != "test"
        source = "train" if is_drawn else split
        entry, index = self.entries[source], read_index(self.entries[source])
        find = _Finder(self, self.folders.get(source, self.folders["train"]), entry.uri)

        def pair_at(place: int) -> Pair:
            image = index.images[place]
            name, found = find(image.file_name)
            spans = [(image.offset, image.size), *index.spans[index.starts[place] : index.starts[place + 1]].tolist()]
            return Pair(name, found, Entry(f"{entry.uri}#{image.file_name}", entry.stamp, to_extents(entry, spans)))

        places = range(len(index.images))
        if not is_drawn:
            return pair_at, places
        names = [find(image.file_name)[0] for image in index.images]
        drawn = draw_val(names, self.config, self.seed, "data.coco")
        return pair_at, array("q", (place for place in places if (names[place] in drawn) == (split == "val")))


class _Finder:
    """From a file name in the JSON file `source` to the image below `folder`."""

    def __init__(self, dataset: PairedDataset, folder: str, source: str) -> None:
        self.source = source
        self.uri = storage.join(dataset.root, *([] if folder == "." else [folder]))
        self.files = {
            path: entry for path, entry in dataset.tree.files(folder).items() if path.lower().endswith(IMAGE_SUFFIXES)
        }
        self.by_last: dict[str, str | None] = {}
        for path in self.files:
            last = path.rpartition("/")[2]
            self.by_last[last] = None if last in self.by_last else path

    def __call__(self, file_name: str) -> tuple[str, Entry | str]:
        path = file_name.replace("\\", "/").lstrip("/")
        if path not in self.files:
            refuse_outside(path, self.source)
            path = self.by_last.get(path.rpartition("/")[2]) or path
        name = path.rpartition(".")[0] or path
        return name, self.files.get(path) or storage.join(self.uri, path)


def _per_split(given: str | PerSplit) -> dict[str, str]:
    """The path of each split; of train where it is one alone."""
    return {"train": given} if isinstance(given, str) else {str(split): path for split, path in given.items()}


def draw_objects(
    parts: Sequence[bytes], classes: ObjectClasses, class_of: dict[int, int], on_top: str
) -> NDArray[np.uint8]:
    """(H, W) class ids from the texts of an image and of its annotations; raises as `draw_segmentation` does."""
    image = parse_json(parts[0])
    height, width = checked_size(image["height"], image["width"])
    canvas = Canvas(classes.blank(height, width))
    annotations = [parse_json(part) for part in parts[1:]]
    for annotation in annotations:
        if not annotation.get("segmentation"):
            raise DecodeError("holds an object with a box and no outline; export masks or polygons")
        if annotation["category_id"] not in class_of:
            raise DecodeError(
                f"holds an object of category {annotation['category_id']!r}, which the file does not list"
            )

    def patches(annotation: Any) -> Iterator[Patch]:
        return draw_segmentation(annotation["segmentation"], height, width)

    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    if on_top == "smaller":
        # Drawn twice rather than kept: many masks of a large image would fill the memory.
        objects.sort(key=lambda annotation: -canvas.area(patches(annotation)))
    for annotation in crowds:
        canvas.paint(patches(annotation), IGNORE_INDEX)
    for annotation in objects:
        canvas.paint(patches(annotation), class_of[annotation["category_id"]])
    return canvas.label


def index_coco(file: IO[bytes]) -> CocoIndex:
    """Where in `file` everything is; raises ValueError where it is not of this format."""
    categories: dict[int, str] = {}
    grouping: set[str] = set()
    used: set[int] = set()
    places: dict[int | str, int] = {}
    images: list[CocoImage] = []
    owners: list[int | str] = []
    spans = array("q")
    for element in read_elements(file):
        if element.key == "categories":
            number = _field(element, "id", int)
            if number in categories:
                raise ValueError(f"category id {shown(number)} is there twice")
            categories[number] = as_text(_field(element, "name", str)).strip()
            grouping.add(as_text(str(element.value.get("supercategory"))).strip())
        elif element.key == "images":
            image_id = _field(element, "id", int | str)
            if image_id in places:
                raise ValueError(f"image id {shown(image_id)} is there twice")
            places[image_id] = len(images)
            images.append(CocoImage(as_text(_field(element, "file_name", str)), element.offset, element.size))
        elif element.key == "annotations":
            used.add(_field(element, "category_id", int))
            owners.append(_field(element, "image_id", int | str))
            spans.extend((element.offset, element.size))
    if not images or not categories:
        raise ValueError(f"it lists no {'categories' if images else 'images'}")
    (name, times), *_ = Counter(image.file_name for image in images).most_common(1)
    if times > 1:
        raise ValueError(f"it lists {shown(name)} twice")
    groups = frozenset(number for number, name in categories.items() if name in grouping and number not in used)
    # Annotations of images that are not listed go behind all others, and are left out.
    owner = np.array([places.get(image_id, len(images)) for image_id in owners], np.int64)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(images) + 1))
    return CocoIndex(categories, groups, images, starts, np.array(spans, np.int64).reshape(-1, 2)[order])


def read_index(entry: Entry) -> CocoIndex:
    """The index of the JSON file `entry`, made once a process; raises UserError."""
    return _read_index(entry.uri, entry.stamp, entry.extents)


@functools.lru_cache(maxsize=4)
def _read_index(uri: str, stamp: str, extents: tuple[Extent, ...]) -> CocoIndex:
    try:
        with open_json(uri, extents) as file:
            return index_coco(file)
    except ValueError as error:
        raise UserError(f"{uri} cannot be read as COCO's JSON ({error}); export it again") from error


def _field(element: Element, name: str, kind: Any) -> Any:
    value = element.value.get(name) if isinstance(element.value, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"the element of {element.key} at byte {element.offset} has no {name}")
    return value
