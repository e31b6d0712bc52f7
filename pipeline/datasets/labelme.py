"""Objects in labelme's JSON files, one an image, drawn as label maps.

Folders and splits are those of `split_folders`: the file of images/a/b.jpg is a/b.json, by default beside it. Read are
imageHeight, imageWidth and of each of the `shapes` its label, shape_type and points: polygon, rectangle, circle, mask.
Later shapes are drawn over earlier ones, as labelme shows them. The copy of the image in imageData is not looked at.
Images without a file are not annotated yet and left out, unless a list names them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import LabelmeConfig
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.folder import default_palette
from pipeline.datasets.objects import ObjectClasses, object_classes
from pipeline.datasets.paired import Pair, read_label
from pipeline.datasets.rasterise import Canvas, Patch, checked_size, draw_circle, draw_polygon
from pipeline.datasets.raw import LabelIds, RawSample, digest_of
from pipeline.datasets.split_folders import Source, SplitFolders
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from pipeline.storage import parse_json
from segvit.image_files import DecodeError, decode_label

_NOT_OF_THE_FORMAT = (LookupError, TypeError, ValueError, AttributeError, OverflowError)


class Labelme(SplitFolders):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    label_suffixes = (".json",)
    section = "data.labelme"

    def __init__(self, root: str, config: LabelmeConfig, seed: int, linked: Sequence[str] = ()) -> None:
        self.layout = f"{config.images}/NAME.jpg with labelme's {config.labels}/NAME{config.label_suffix}.json"
        tree = self.arrange(root, config, seed, linked)
        # The classes are in the files, which need the tree.
        super().__init__("labelme", root, (), (), LabelIds({}, [], ""), linked)
        self.classes = self._read_classes(tree, config)
        self.class_names = self.classes.names
        self.palette = default_palette(len(self.class_names))
        self.settings = digest_of([[self.class_names, sorted(self.classes.id_of.items()), self.classes.void]])[:16]

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) class ids, drawn."""
        try:
            return draw_shapes(parse_json(b"".join(read_label(sample))), self.classes)
        except _NOT_OF_THE_FORMAT as error:
            if isinstance(error, DecodeError):
                raise
            raise DecodeError(f"is not of labelme's format ({error!r})") from error

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """They are drawn as class ids."""
        return raw.astype(np.uint8)

    def all_pairs(self, source: Source, split: str) -> Iterator[Pair]:
        """Those that are annotated, or listed."""
        for pair in super().all_pairs(source, split):
            if source.path is not None or not isinstance(pair.label, str):
                yield pair

    def _read_classes(self, tree: FileTree, config: LabelmeConfig) -> ObjectClasses:
        if config.classes is not None:
            return object_classes(read_class_list(tree, config.classes).names, config.unlabelled, config.classes)
        self.require(self.required)
        labels: set[str] = set()
        sources = {source._replace(path=None) for source in self.sources().values()}
        for source in sorted(sources, key=lambda source: source.labels):
            for entry in self.find_labels(source, "train").values():
                try:
                    labels |= {str(shape["label"]) for shape in parse_json(self.tree.read(entry))["shapes"]}
                except _NOT_OF_THE_FORMAT as error:
                    raise UserError(
                        f"{entry.uri} is not of labelme's format ({error!r}); correct or remove it"
                    ) from error
        return object_classes(sorted(labels), config.unlabelled, f"data root {self.root}")


def draw_shapes(content: Any, classes: ObjectClasses) -> NDArray[np.uint8]:
    """(H, W) class ids of the content of a file; raises DecodeError, and what comes of content of another form."""
    height, width = checked_size(content["imageHeight"], content["imageWidth"])
    canvas = Canvas(classes.blank(height, width))
    for shape in content["shapes"]:
        if shape["label"] not in classes.id_of:
            raise DecodeError(f"holds a shape of class {shape['label']!r}, which the file of classes does not name")
        canvas.paint([_draw_shape(shape, height, width)], classes.id_of[shape["label"]])
    return canvas.label


def _draw_shape(shape: Any, height: int, width: int) -> Patch:
    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = shape.get("shape_type") or "polygon"
    if kind in ("polygon", "oriented_rectangle"):
        return draw_polygon([value for point in points for value in point], height, width)
    if kind not in ("rectangle", "circle", "mask"):
        raise DecodeError(f"holds a {kind} of class {shape['label']!r}, which has no area; draw a polygon instead")
    if len(points) != 2:
        raise DecodeError(f"holds a {kind} of {len(points)} points; labelme writes two")
    (x0, y0), (x1, y1) = points
    if kind == "rectangle":
        return draw_polygon([x0, y0, x1, y0, x1, y1, x0, y1], height, width)
    if kind == "circle":
        return draw_circle(x0, y0, math.hypot(x1 - x0, y1 - y0), height, width)
    return _place_mask(shape["mask"], int(x0), int(y0), height, width)


def _place_mask(text: str, x: int, y: int, height: int, width: int) -> Patch:
    """A picture in base64 whose upper left corner is at the pixel (x, y)."""
    part = decode_label(base64.b64decode(text)) > 0
    if not (0 <= x <= width - part.shape[1] and 0 <= y <= height - part.shape[0]):
        raise DecodeError(f"holds a mask of {part.shape[0]}x{part.shape[1]} pixels that leaves the image")
    return Patch(y, x, part)
