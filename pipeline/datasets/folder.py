"""A data set of one's own: images/, labels/ and a file that names the classes.

The label map of images/a/b.jpg is labels/a/b.png: same path, any suffix of either kind, in any case. A class's id is
its position in the classes file, unless that gives `ids`. The splits are splits/train.txt and splits/val.txt (and
test.txt, if there), a path below images/ a line, with or without suffix; or, with `val_fraction`, drawn by a hash of
each name, so that adding images moves none of the others.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import FolderConfig
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, pair_by_stem, put_stem, read_label
from pipeline.datasets.raw import LabelIds, Palette, RawSample, RejectedSampleError, digest_of
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from segvit.image_files import LabelPicture, read_label_picture

# All but PNG, TIFF and BMP are listed to be rejected with the reason, not to be missed.
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp")


class Folder(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    def __init__(self, root: str, config: FolderConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.required = (config.images, config.labels)
        self.layout = f"{config.images}/NAME.jpg with {config.labels}/NAME.png and {config.classes}"
        classes = read_class_list(FileTree(root), config.classes)
        raw_ids = classes.raw_ids()
        ignored = ", ".join(map(str, classes.ignore_ids)) or "none"
        listed = f"0-{len(raw_ids) - 1}" if classes.ids is None else "the ids of"
        self.settings = digest_of([classes.model_dump(mode="json")])[:16]
        self.ignored = classes.ignore_ids
        self.colour_of = dict(zip(raw_ids, classes.palette or (), strict=False))
        # Pixels without a class get the first id that means so.
        nothing = dict.fromkeys(classes.ignore_colours, classes.ignore_ids[0] if classes.ignore_ids else -1)
        self.id_of = {colour: raw for raw, colour in self.colour_of.items()} | nothing
        super().__init__(
            "folder",
            root,
            classes.names,
            classes.palette or default_palette(len(classes.names)),
            LabelIds(
                {raw: class_id for class_id, raw in enumerate(raw_ids)},
                ignored=classes.ignore_ids,
                rule=f"{listed} {config.classes}, ignored: {ignored}",
            ),
        )

    def splits(self) -> tuple[str, ...]:
        """Train and val, and test where there is a list of it; raises UserError where folders or lists are missing."""
        splits = super().splits()
        if self.config.val_fraction is not None:
            return splits
        lists = {split: self._listed(split) for split in (*splits, "test")}
        missing = [f"{self.config.splits}/{split}.txt" for split in splits if lists[split] is None]
        if missing:
            raise UserError(
                f"data root {self.root} has no {', '.join(missing)}; add it, or set data.folder.val_fraction to "
                "draw the val split from all images"
            )
        first_seen: dict[str, str] = {}
        for split, names in lists.items():
            for name in names or ():
                if first_seen.setdefault(name, split) != split:
                    raise UserError(f"{name!r} is in the lists of {first_seen[name]} and of {split}; keep one")
        return tuple(split for split, names in lists.items() if names is not None)

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """The pairs of the split's list, in its order, or those that the hash puts into it, by name."""
        config = self.config
        images = self.find_files(config.images, IMAGE_SUFFIXES, "image", split)
        labels = self.find_files(config.labels, LABEL_SUFFIXES, "label map", split)
        uris = [storage.join(self.root, folder, "{}") for folder in (config.images, config.labels)]
        pairs = pair_by_stem(images, labels, f"{uris[0]}.*", f"{uris[1]}.png")
        if config.val_fraction is not None:
            yield from (pair for pair in pairs if self._drawn_split(pair.name) == split)
            return
        by_name = {pair.name: pair for pair in pairs}
        for name in self._listed(split) or ():
            yield by_name.get(name) or Pair(name, put_stem(uris[0], name), put_stem(uris[1], f"{name}.png"))

    def read_ids(self, sample: RawSample) -> LabelPicture:
        """Ids as they are, or by colour where the classes file has colours and the label map does, too."""
        picture = read_label_picture(read_label(sample)[0])
        if picture.kind == "colours":
            return LabelPicture("grey", self._by_colour(picture.values, sample.label))
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
        says = (
            f"{self.config.classes} says {list(self.colour_of[index])}"
            if index in self.colour_of
            else "no class has it"
        )
        raise RejectedSampleError(
            sample.label,
            f"has the colour {list(colour)} at index {index} of its palette, where {says}",
            f"correct the colours in {self.config.classes}, or take them out to read indices as ids",
        )

    def _by_colour(self, codes: NDArray[np.integer], file: str) -> NDArray[np.int32]:
        """(H, W) ids of colours, see `colour_code`; raises RejectedSampleError for those that no class has."""
        if not self.colour_of:
            raise RejectedSampleError(
                file,
                f"is a colour picture, and {self.config.classes} gives its classes no colours",
                "name a classes file with a palette in data.folder.classes, or export ids",
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
                f"add them to {self.config.classes}, as ignore_colours where they mean no class; blended colours at "
                "edges come from smoothing: export without it",
                {str(colour): count for count, colour in unknown},
            )
        return np.array([self.id_of[colour] for colour in colours], np.int32)[places].reshape(codes.shape)

    def _listed(self, split: str) -> list[str] | None:
        """The names in the split's list without the suffixes of files that are there."""
        lines = self.read_list(f"{self.config.splits}/{split}.txt")
        if lines is None:
            return None
        files = self.tree.files(self.config.images)
        paths = (unicodedata.normalize("NFC", line) for line in lines)
        names = [_stem(path, IMAGE_SUFFIXES) if path in files else path for path in paths]
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise UserError(f"{self.config.splits}/{split}.txt holds {twice!r} twice; remove one")
        return names

    def _drawn_split(self, name: str) -> str:
        """Of the sample `name`: it depends on the name and the seed alone."""
        number = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode(errors="surrogateescape")).digest()[:8])
        assert self.config.val_fraction is not None
        return "val" if number < self.config.val_fraction * 2**64 else "train"


def default_palette(num_classes: int) -> Palette:
    """Colours that differ from each other and from black: bits of 1, 2, 3, ... dealt out to red, green, blue."""
    colours = []
    for number in range(1, num_classes + 1):
        levels = [0, 0, 0]
        for bit in range(8):
            levels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
        colours.append((levels[0], levels[1], levels[2]))
    return tuple(colours)


def _stem(path: str, suffixes: tuple[str, ...]) -> str:
    suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix)), "")
    return path[: len(path) - len(suffix)]
