"""Cityscapes: leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/{train,val}/CITY/*_gtFine_label*.png.

The 19 classes of the benchmark. `labelIds` maps hold the publisher's 34 ids, of which 19 are classes and the
others ignored; `labelTrainIds` maps, made by the publisher's own script, hold the class ids and 255. A split with
both is read from `labelIds`. The test split has no public labels and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets.paired import Pair, PairedDataset, classes_and_palette, pair_by_stem
from pipeline.datasets.raw import LabelIds, load_metadata

RAW, CONVERTED = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


class Cityscapes(PairedDataset):
    """The data set below `root`: a folder with leftImg8bit and gtFine, or with the publisher's two zips."""

    layout = (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png with gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or "
        "_labelTrainIds.png), as folders or as leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
    )
    wrappers = ("cityscapes",)
    required = ("leftImg8bit/train", "gtFine/train", "leftImg8bit/val", "gtFine/val")

    def __init__(self, root: str, linked: Sequence[str] = ()) -> None:
        classes, palette = classes_and_palette("cityscapes")
        metadata = load_metadata("cityscapes")
        raw_ids = {int(raw): class_id for raw, class_id in metadata["raw_id_to_class"].items()}
        ids = LabelIds(raw_ids, ignored=metadata["raw_ignored_ids"], rule="labelIds 0-33, 255 = no label")
        super().__init__("cityscapes", root, classes, palette, ids, linked)
        self.train_ids = LabelIds(
            {class_id: class_id for class_id in range(len(classes))},
            ignored=[255],
            rule=f"labelTrainIds 0-{len(classes) - 1}, 255 = ignored",
        )

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """Images and label maps of the same city, sequence and frame."""
        images = self.find_files(f"leftImg8bit/{split}", "_leftImg8bit.png", "image", split)
        labels, suffix = self.find_files(f"gtFine/{split}", RAW, "label map", split), RAW
        if not labels:
            labels, suffix = self.find_files(f"gtFine/{split}", CONVERTED, "label map", split), CONVERTED
        for pair in pair_by_stem(
            images,
            labels,
            storage.join(self.root, "leftImg8bit", split, "{}_leftImg8bit.png"),
            storage.join(self.root, "gtFine", split, "{}" + suffix),
        ):
            # The file name starts with the city: the folder adds nothing.
            yield pair._replace(name=pair.name.rsplit("/", 1)[-1])

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """By the ids that the file's name says it holds."""
        return (self.train_ids if file.lower().endswith(CONVERTED.lower()) else self.ids).to_classes(raw, file)
