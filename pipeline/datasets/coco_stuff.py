"""COCO-Stuff 10K v1.1, as its zip holds it or already converted to PNG.

The publisher's tree is images/*.jpg, annotations/*.mat (MATLAB 5, the map is `S`, ids 1-182 with 11 unused, 0 =
unlabelled) and imageLists/{train,test}.txt; test is val here. The converters of the field write annotations as
`<stem>_labelTrainIds.png` or, for test, as `<stem>.png`, both 0 = unlabelled and class i as i + 1 (1-171), in
annotations/{train2014,test2014} beside images/{train2014,test2014}, or flat beside imageLists. A sample with a .mat
file is read from that. Not accepted: the pixel maps of COCO-Stuff 164K, whose ids are one lower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets.mat_file import decode_mat
from pipeline.datasets.paired import Pair, PairedDataset, classes_and_palette, pair_by_stem, read_label
from pipeline.datasets.raw import LabelIds, RawSample, load_metadata
from pipeline.datasets.tree import Entry
from segvit.image_files import decode_label

LISTS = {"train": "train", "val": "test"}
FOLDERS = {"train": "train2014", "val": "test2014"}
CONVERTED = "_labelTrainIds.png"


class CocoStuff10K(PairedDataset):
    """The data set below `root`: a folder, or cocostuff-10k-v1.1.zip, or what holds either."""

    layout = (
        "images/*.jpg, annotations/*.mat and imageLists/{train,test}.txt, as it is or as cocostuff-10k-v1.1.zip; or "
        "images/{train2014,test2014}/*.jpg with annotations/{train2014,test2014}/*_labelTrainIds.png"
    )
    wrappers = ("cocostuff-10k-v1.1",)
    required = ("images", "annotations")

    def __init__(self, root: str, linked: Sequence[str] = ()) -> None:
        classes, palette = classes_and_palette("coco_stuff10k")
        raw_ids = {int(raw): class_id for raw, class_id in load_metadata("coco_stuff10k")["raw_id_to_class"].items()}
        ids = LabelIds(raw_ids, [0], "the publisher's 1-182, 0 = unlabelled")
        super().__init__("coco_stuff10k", root, classes, palette, ids, linked)
        self.train_ids = LabelIds(
            {class_id + 1: class_id for class_id in range(len(classes))},
            ignored=[0],
            rule=f"converted ids 1-{len(classes)}, 0 = unlabelled",
        )

    def splits(self) -> tuple[str, ...]:
        """Train and val; raises UserError where a folder or list of theirs is missing."""
        splits = super().splits()
        if not self._is_converted():
            for split in splits:
                self._listed(split)
        return splits

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """Pairs of the split's list, in its order, or of its folders by name."""
        if self._is_converted():
            images = self.find_files(f"images/{FOLDERS[split]}", ".jpg", "image", split)
            labels = self._find_labels(f"annotations/{FOLDERS[split]}", split)
            uris = [storage.join(self.root, folder, FOLDERS[split]) for folder in ("images", "annotations")]
            yield from pair_by_stem(images, labels, f"{uris[0]}/{{}}.jpg", f"{uris[1]}/{{}}{CONVERTED}")
            return
        images = self.find_files("images", ".jpg", "image", split)
        labels = self._find_labels("annotations", split)
        for stem in self._listed(split):
            yield Pair(
                stem,
                images.get(stem) or storage.join(self.root, "images", f"{stem}.jpg"),
                labels.get(stem) or storage.join(self.root, "annotations", f"{stem}.mat"),
            )

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) ids of a .mat or .png file."""
        (data,) = read_label(sample)
        return decode_mat(data) if sample.label.lower().endswith(".mat") else decode_label(data)

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """By the publisher's ids in a .mat file and by converted ones in a .png file."""
        return (self.ids if file.lower().endswith(".mat") else self.train_ids).to_classes(raw, file)

    def _is_converted(self) -> bool:
        return all(self.tree.has_folder(f"images/{folder}") for folder in FOLDERS.values())

    def _listed(self, split: str) -> list[str]:
        path = f"imageLists/{LISTS[split]}.txt"
        names = self.read_list(path)
        if names is None:
            raise self.incomplete(f"no {path}")
        return names

    def _find_labels(self, folder: str, split: str) -> dict[str, Entry]:
        labels = self.find_files(folder, ".png", "annotation", split)
        found = {}
        for stem in sorted(labels):
            # `<stem>_labelTrainIds.png` sorts behind `<stem>.png` and wins, and a .mat file over both.
            found[stem.removesuffix(CONVERTED.removesuffix(".png"))] = labels[stem]
        return found | self.find_files(folder, ".mat", "annotation", split)
