"""PASCAL-Context with 59 classes, or 60 with the background, on the images of VOC2010.

VOCdevkit/VOC2010 holds JPEGImages/*.jpg and either SegmentationClassContext/*.png (converted: 0 = background,
1-59 the classes) or trainval_merged.json, which is drawn then (see detail_masks); with both, the PNG files are read.
The splits are ImageSets/SegmentationContext/{train,val}.txt, or else the phases in trainval_merged.json.
`pascal_context_59` ignores the background, `pascal_context_60` counts it as class 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets.archive import Extent
from pipeline.datasets.detail_masks import DetailImage, draw_label, index_detail
from pipeline.datasets.paired import Pair, PairedDataset, classes_and_palette, put_stem, read_label
from pipeline.datasets.raw import LabelIds, RawSample, load_metadata
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError
from segvit.image_files import decode_label

DETAIL = "trainval_merged.json"
IMAGES, CONVERTED, LISTS = "JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"


class PascalContext(PairedDataset):
    """The data set below `root`: VOCdevkit, VOC2010, or what holds either or VOCtrainval_03-May-2010.tar."""

    layout = (
        "VOCdevkit/VOC2010/JPEGImages/*.jpg (or VOCtrainval_03-May-2010.tar) with trainval_merged.json, or with "
        "SegmentationClassContext/*.png and ImageSets/SegmentationContext/{train,val}.txt"
    )
    wrappers = ("VOCdevkit/VOC2010", "VOC2010")
    required = (IMAGES,)
    is_whole = False

    def __init__(self, root: str, with_background: bool, linked: Sequence[str] = ()) -> None:
        classes, palette = classes_and_palette("pascal_context")
        first = 0 if with_background else 1
        ignored = [255] if with_background else [0, 255]
        rule = f"0-{len(classes) - 1}, 0 = background"
        classes_by_id = {raw: raw - first for raw in range(first, len(classes))}
        super().__init__(
            f"pascal_context_{len(classes) - first}",
            root,
            classes[first:],
            palette[first:],
            LabelIds(classes_by_id, ignored, rule),
            linked,
        )
        detail_ids = load_metadata("pascal_context")["detail_category_ids"]
        self.detail_ids = LabelIds(
            {raw: number - first for number, raw in enumerate(detail_ids) if number >= first},
            ignored=detail_ids[:first],
            rule=f"the {len(detail_ids)} category ids of PASCAL-Context",
        )
        self._detail: tuple[Entry, dict[str, DetailImage]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_detail": None}

    def splits(self) -> tuple[str, ...]:
        """Train and val; raises UserError where images, annotations or lists are missing."""
        splits = super().splits()
        if self.tree.has_folder(CONVERTED):
            for split in splits:
                self._listed(split)
        else:
            self._open_detail()
        return splits

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """Pairs of the split's list, in its order; without lists those of its phase, by name."""
        images = self.find_files(IMAGES, ".jpg", "image", split)
        if self.tree.has_folder(CONVERTED):
            labels: dict[str, Entry] = self.find_files(CONVERTED, ".png", "label map", split)
            label_uri = storage.join(self.root, CONVERTED, "{}.png")
        else:
            labels = self._detail_labels()
            label_uri = f"{self._open_detail()[0].uri}#{{}}"
        for name in self._listed(split):
            image = images.get(name) or storage.join(self.root, IMAGES, f"{name}.jpg")
            yield Pair(name, image, labels.get(name) or put_stem(label_uri, name))

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) ids of a converted PNG file, or category ids drawn from the annotations."""
        parts = read_label(sample)
        return decode_label(parts[0]) if _is_png(sample.label) else draw_label(parts)

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """By the converted ids in a PNG file and by category ids otherwise."""
        return (self.ids if _is_png(file) else self.detail_ids).to_classes(raw, file)

    @property
    def _title(self) -> str:
        return "PASCAL-Context"

    def _listed(self, split: str) -> list[str]:
        names = self.read_list(f"{LISTS}/{split}.txt")
        if names is not None:
            return names
        if self.tree.has_folder(CONVERTED) and self.tree.file(DETAIL) is None:
            raise self.incomplete(f"no {LISTS}/{split}.txt")
        return sorted(name for name, image in self._open_detail()[1].items() if image.phase == split)

    def _detail_labels(self) -> dict[str, Entry]:
        """The annotations as entries: they are a list of ranges in the JSON file."""
        entry, images = self._open_detail()
        uri, start = (entry.extents[0].uri, entry.extents[0].offset) if entry.extents else (entry.uri, 0)
        return {
            name: Entry(
                f"{entry.uri}#{name}",
                image.stamp,
                tuple(Extent(uri, start + offset, size, size) for offset, size in image.spans),
            )
            for name, image in images.items()
        }

    def _open_detail(self) -> tuple[Entry, dict[str, DetailImage]]:
        """The JSON file and its index, made once; raises UserError."""
        if self._detail is None:
            entry = self.tree.file(DETAIL)
            if entry is None:
                raise self.incomplete(f"neither {CONVERTED} nor {DETAIL}")
            if any(extent.kind != "range" for extent in entry.extents):
                raise UserError(f"{entry.uri} is compressed and too large to read in place; unpack it into {self.root}")
            with storage.open_uri(entry.extents[0].uri if entry.extents else entry.uri) as file:
                file.seek(entry.extents[0].offset if entry.extents else 0)
                try:
                    self._detail = entry, index_detail(file)
                except ValueError as error:
                    raise UserError(f"{entry.uri} cannot be read ({error}); fetch it again") from error
        return self._detail


def _is_png(file: str) -> bool:
    return file.lower().endswith(".png")
