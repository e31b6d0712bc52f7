"""A data set of one's own: images, label maps and a file that names the classes.

Folders and splits are those of `split_folders`. A class's id is its position in the classes file, unless that gives
`ids`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config import FolderConfig
from pipeline.datasets.class_list import ClassList, read_class_list
from pipeline.datasets.paired import read_label
from pipeline.datasets.raw import LabelIds, Palette, RawSample, RejectedSampleError, digest_of
from pipeline.datasets.split_folders import SplitFolders
from pipeline.datasets.splits import SPLIT_FOLDERS, split_of
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from segvit.image_files import LabelPicture, read_label_picture


class Folder(SplitFolders):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    # All but PNG, TIFF and BMP are listed to be rejected with the reason, not to be missed.
    label_suffixes = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp")
    section = "data.folder"

    def __init__(self, root: str, config: FolderConfig, seed: int, linked: Sequence[str] = ()) -> None:
        self.config = config
        self.layout = (
            f"{config.images}/NAME.jpg with {config.labels}/NAME{config.label_suffix}.png and {config.classes}; the "
            "folders may hold, or be in, train, val and test. segvit init tells what lies there"
        )
        tree = self.arrange(root, config, seed, linked)
        classes = read_class_list(tree, config.classes)
        _refuse_other_classes(tree, config.classes)
        self.settings = digest_of([classes.model_dump(mode="json")])[:16]
        self.listed = ListedIds(classes, config.classes, self.section)
        palette = classes.palette or default_palette(len(classes.names))
        super().__init__("folder", root, classes.names, palette, self.listed.ids, linked)

    def read_ids(self, sample: RawSample) -> LabelPicture:
        """Ids as they are, or by colour where the classes file has colours and the label map does, too."""
        return self.listed.of_picture(read_label_picture(read_label(sample)[0]), sample.label)


class ListedIds:
    """The ids in label maps whose classes the file `source` names; `section` of the experiment file says which that is.

    Attributes:
        ids: from them to class ids.
    """

    def __init__(self, classes: ClassList, source: str, section: str) -> None:
        self.source = source
        self.section = section
        raw_ids = classes.raw_ids()
        ignored = ", ".join(map(str, classes.ignore_ids)) or "none"
        listed = f"0-{len(raw_ids) - 1}" if classes.ids is None else "the ids of"
        self.ids = LabelIds(
            {raw: class_id for class_id, raw in enumerate(raw_ids)},
            ignored=classes.ignore_ids,
            rule=f"{listed} {source}, ignored: {ignored}",
        )
        self.ignored = classes.ignore_ids
        self.colour_of = dict(zip(raw_ids, classes.palette or (), strict=False))
        # Pixels without a class get the first id that means so.
        nothing = dict.fromkeys(classes.ignore_colours, classes.ignore_ids[0] if classes.ignore_ids else -1)
        self.id_of = {colour: raw for raw, colour in self.colour_of.items()} | nothing

    def of_picture(self, picture: LabelPicture, file: str) -> LabelPicture:
        """The ids in a label map, by colour where the classes file has colours and it does, too.

        Raises RejectedSampleError, which names `file`, for colours that no class has.
        """
        if picture.kind == "colours":
            return LabelPicture("grey", self._by_colour(picture.values, file))
        if picture.kind == "grey" or not self.colour_of:
            return picture
        wrong = {
            index: colour
            for index, colour in picture.index_colours.items()
            if index not in self.ignored and colour != self.colour_of.get(index)
        }
        if not wrong or all(colour == (index,) * 3 for index, colour in wrong.items()):
            # The indices are the ids; a ramp of greys is what writers put there that have no colours.
            return LabelPicture("grey", picture.values)
        if self.id_of.keys() >= set(picture.index_colours.values()):
            ids = np.zeros(max(picture.index_colours) + 1, np.int32)
            for index, colour in picture.index_colours.items():
                ids[index] = self.id_of[colour]
            return LabelPicture("grey", ids[picture.values])
        index, colour = next(iter(wrong.items()))
        says = f"{self.source} says {list(self.colour_of[index])}" if index in self.colour_of else "no class has it"
        raise RejectedSampleError(
            file,
            f"has the colour {list(colour)} at index {index} of its palette, where {says}",
            f"correct the colours in {self.source}, or take them out to read indices as ids",
        )

    def _by_colour(self, codes: NDArray[np.integer], file: str) -> NDArray[np.int32]:
        """(H, W) ids of colours, see `colour_code`; raises RejectedSampleError for those that no class has."""
        if not self.colour_of:
            raise RejectedSampleError(
                file,
                f"is a colour picture, and {self.source} gives its classes no colours",
                f"name a classes file with a palette in {self.section}.classes, or export ids",
            )
        found, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
        colours = [(int(code) >> 16, int(code) >> 8 & 255, int(code) & 255) for code in found]
        unknown = [
            (int(count), list(colour))
            for colour, count in zip(colours, counts, strict=True)
            if colour not in self.id_of
        ]
        if unknown:
            listed = ", ".join(f"{colour} ({count} pixels)" for count, colour in sorted(unknown, reverse=True)[:3])
            raise RejectedSampleError(
                file,
                f"has {len(unknown)} colour(s) that no class has: {listed}",
                f"add them to {self.source}, as ignore_colours where they mean no class; blended colours at "
                "edges come from smoothing: export without it",
                {str(colour): count for count, colour in unknown},
            )
        return np.array([self.id_of[colour] for colour in colours], np.int32)[places].reshape(codes.shape)


def _refuse_other_classes(tree: FileTree, path: str) -> None:
    """Raise UserError where a classes file in the folder of one split is another one in the folder of another."""
    folder, _, name = path.partition("/")
    if split_of(folder) is None or (first := tree.file(path)) is None:
        return
    for other in SPLIT_FOLDERS:
        entry = tree.file(f"{other}/{name}")
        if entry is not None and tree.read(entry) != tree.read(first):
            raise UserError(f"{first.uri} and {entry.uri} name other classes; make them equal, ids included")


def default_palette(num_classes: int) -> Palette:
    """Colours that differ from each other and from black: bits of 1, 2, 3, ... dealt out to red, green, blue."""
    colours = []
    for number in range(1, num_classes + 1):
        levels = [0, 0, 0]
        for bit in range(8):
            levels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        colours.append((levels[0], levels[1], levels[2]))
    return tuple(colours)
