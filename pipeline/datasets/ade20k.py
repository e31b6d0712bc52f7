"""ADE20K of the scene parsing challenge: ADEChallengeData2016/{images,annotations}/{training,validation}.

Label 0 means unlabelled, class i is stored as i + 1 (1-150).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline import storage
from pipeline.datasets.paired import Pair, PairedDataset, classes_and_palette, pair_by_stem
from pipeline.datasets.raw import LabelIds

FOLDERS = {"train": "training", "val": "validation"}


class ADE20K(PairedDataset):
    """The data set below `root`: the folder ADEChallengeData2016, its zip, or what holds either."""

    layout = "ADEChallengeData2016/{images,annotations}/{training,validation}, as it is or as ADEChallengeData2016.zip"
    wrappers = ("ADEChallengeData2016",)
    required = ("images/training", "annotations/training", "images/validation", "annotations/validation")

    def __init__(self, root: str, linked: Sequence[str] = ()) -> None:
        classes, palette = classes_and_palette("ade20k")
        ids = LabelIds(
            {class_id + 1: class_id for class_id in range(len(classes))},
            ignored=[0],
            rule=f"1-{len(classes)}, 0 = unlabelled",
        )
        super().__init__("ade20k", root, classes, palette, ids, linked)

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """Images and annotations of the same name."""
        images = self.find_files(f"images/{FOLDERS[split]}", (".jpg", ".jpeg"), "image", split)
        labels = self.find_files(f"annotations/{FOLDERS[split]}", ".png", "annotation", split)
        return pair_by_stem(
            images,
            labels,
            storage.join(self.root, "images", FOLDERS[split], "{}.jpg"),
            storage.join(self.root, "annotations", FOLDERS[split], "{}.png"),
        )
