"""CamVid in the SegNet layout: {train,val,test}/*.png images, {train,val,test}annot/*.png label maps.

Label ids 0-10 are the classes and 11 means unlabelled. `test` may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline import storage
from pipeline.datasets.paired import Pair, PairedDataset, classes_and_palette, pair_by_stem
from pipeline.datasets.raw import LabelIds, load_metadata

OPTIONAL_SPLITS = ("test",)


class CamVid(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location."""

    layout = "{train,val}/*.png with {train,val}annot/*.png"
    wrappers = ("CamVid",)
    required = ("train", "trainannot", "val", "valannot")

    def __init__(self, root: str, linked: Sequence[str] = ()) -> None:
        classes, palette = classes_and_palette("camvid")
        ignored = load_metadata("camvid")["raw_ignored_ids"]
        rule = f"0-{len(classes) - 1}, {ignored[0]} = unlabelled"
        ids = LabelIds({class_id: class_id for class_id in range(len(classes))}, ignored=ignored, rule=rule)
        super().__init__("camvid", root, classes, palette, ids, linked)

    def splits(self) -> tuple[str, ...]:
        """The splits whose folders are there; raises UserError where train or val is not."""
        return super().splits() + tuple(split for split in OPTIONAL_SPLITS if self.tree.has_folder(split))

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """Images and label maps of the same name."""
        images = self.find_files(split, ".png", "image", split)
        labels = self.find_files(f"{split}annot", ".png", "label map", split)
        uris = (storage.join(self.root, folder, "{}.png") for folder in (split, f"{split}annot"))
        return pair_by_stem(images, labels, *uris)
