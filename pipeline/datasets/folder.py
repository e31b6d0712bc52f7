"""A data set of one's own: images, label maps and a file that names the classes.

The label map of images/a/b.jpg is labels/a/b.png, or labels/a/b_mask.png with a `label_suffix`: same path, any suffix
of either kind, in any case. A class's id is its position in the classes file, unless that gives `ids`.

The splits are what the first of these says that is there:
- the lists splits/train.txt and splits/val.txt (and test.txt, if there), a path below images/ a line, with or without
  suffix; ImageSets/Segmentation of VOC and of CVAT is such a folder;
- folders: images/train with labels/train, or train/images with train/labels, likewise val and, if it has labels, test;
- `val_fraction`, which draws val by a hash of each name, so that adding images moves none of the others. It draws from
  all images, from a list that is not parted yet, or from the folder for train where none is for val; never from test.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.config import FolderConfig
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, pair_by_stem, put_stem, read_label
from pipeline.datasets.raw import LabelIds, Palette, RawSample, RejectedSampleError, digest_of
from pipeline.datasets.splits import SPLIT_FOLDERS, SPLITS, draw_val, folders_by_split, split_of
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError
from segvit.image_files import LabelPicture, read_label_picture

# All but PNG, TIFF and BMP are listed to be rejected with the reason, not to be missed.
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg", ".webp")
# Lists of images that are not parted into train and val yet.
_POOLS = ("trainval", "default")


class _Source(NamedTuple):
    """Where the samples of one split are found.

    Attributes:
        images, labels: the folders.
        path: of the list; None: all in the folders.
        is_drawn: train and val are drawn from it.
        without: names in the folders that are of another split.
    """

    images: str
    labels: str
    path: str | None = None
    is_drawn: bool = False
    without: frozenset[str] = frozenset()


class Folder(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    def __init__(self, root: str, config: FolderConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.required = _find_folders(root, config)
        self.layout = (
            f"{config.images}/NAME.jpg with {config.labels}/NAME{config.label_suffix}.png and {config.classes}; the "
            "folders may hold, or be in, train, val and test"
        )
        tree = FileTree(root, (), self.required)
        classes = read_class_list(tree, config.classes)
        _refuse_other_classes(tree, config.classes)
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
        """Train and val, and test where it is there; raises UserError where folders or lists are missing."""
        super().splits()
        sources = self._sources()
        first_seen: dict[str, str] = {}
        for split, source in sources.items():
            for name in self._listed(source) or () if not source.is_drawn else ():
                if first_seen.setdefault(name, split) != split:
                    raise UserError(f"{name!r} is in the lists of {first_seen[name]} and of {split}; keep one")
        return tuple(sources)

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """The pairs of the split's list, in its order, or those of its folders or that are drawn for it, by name."""
        source = self._sources()[split]
        pairs = [pair for pair in self._pairs(source, split) if pair.name not in source.without]
        if not source.is_drawn:
            yield from pairs
            return
        drawn = draw_val([pair.name for pair in pairs], self.config, self.seed, "data.folder")
        yield from (pair for pair in pairs if (pair.name in drawn) == (split == "val"))

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

    def _sources(self) -> dict[str, _Source]:
        """Of each split, train first; raises UserError where train or val has none."""
        config, lists = self.config, self._lists()
        whole = _Source(config.images, config.labels)
        if config.val_fraction is None and {"train", "val"} <= lists.keys():
            return {split: whole._replace(path=lists[split]) for split in SPLITS if split in lists}
        folders = self._folders()
        if folders:
            return self._sources_in(folders)
        if config.val_fraction is None:
            missing = [f"{config.splits}/{split}.txt" for split in ("train", "val") if split not in lists]
            raise UserError(
                f"data root {self.root} has no {', '.join(missing)}; add it, or set data.folder.val_fraction to "
                f"draw the val split from {', '.join(lists.values()) or 'all images'}"
            )
        pool = next((lists[name] for name in _POOLS if name in lists), None)
        if pool is None and "val" not in lists:
            pool = lists.get("train")
        test = {"test": whole._replace(path=lists["test"])} if "test" in lists else {}
        of_test = frozenset(name for source in test.values() for name in self._listed(source) or ())
        drawn = whole._replace(path=pool, is_drawn=True, without=of_test)
        return {"train": drawn, "val": drawn, **test}

    def _sources_in(self, folders: dict[str, _Source]) -> dict[str, _Source]:
        """`folders`, with val drawn from train where that is wanted and there is none; raises UserError."""
        fraction = self.config.val_fraction
        there = ", ".join(source.images for source in folders.values())
        if fraction is not None and "val" in folders:
            raise UserError(
                f"data root {self.root} has its own val split, {folders['val'].images}, and data.folder.val_fraction "
                f"{fraction:g} would draw another; remove val_fraction"
            )
        if "train" not in folders or (fraction is None and "val" not in folders):
            split = "val" if "train" in folders else "train"
            remedy = ", or set data.folder.val_fraction to draw val from train" if split == "val" else ""
            raise UserError(f"data root {self.root} has {there} and no such folder for {split}; add it{remedy}")
        if fraction is None:
            return folders
        drawn = folders["train"]._replace(is_drawn=True)
        return {**folders, "train": drawn, "val": drawn}

    def _lists(self) -> dict[str, str]:
        """The lists by split, train first, and those that are not parted yet by their name."""
        paths = [
            path for path in self.tree.files(self.config.splits) if "/" not in path and path.lower()[-4:] == ".txt"
        ]
        names = {path[:-4]: path for path in paths}
        found = {split: names[name] for split, name in folders_by_split(names, self.config.splits).items()}
        found |= {name.lower(): path for name, path in names.items() if name.lower() in _POOLS}
        return {name: _below(self.config.splits, path) for name, path in found.items()}

    def _folders(self) -> dict[str, _Source]:
        """The folders by split, train first, where there are such; test only where it holds label maps."""
        images, labels = self.config.images, self.config.labels
        if self.required != (images, labels):
            around = folders_by_split(
                (name for name in SPLIT_FOLDERS if self.tree.has_folder(_below(name, images))), self.root
            )
            found = {split: _Source(_below(name, images), _below(name, labels)) for split, name in around.items()}
        else:
            inside = [folders_by_split(self._first_folders(folder), folder) for folder in (images, labels)]
            found = {
                split: _Source(_below(images, name), _below(labels, inside[1].get(split, name)))
                for split, name in inside[0].items()
            }
        if "test" in found and not self._find_labels(found["test"], "test"):
            del found["test"]
        return found

    def _first_folders(self, folder: str) -> list[str]:
        return sorted({path.partition("/")[0] for path in self.tree.files(folder) if "/" in path})

    def _pairs(self, source: _Source, split: str) -> Iterator[Pair]:
        """All pairs of `source`, drawn or not."""
        images, labels = self._find_images(source, split), self._find_labels(source, split)
        suffix = self.config.label_suffix
        uris = [storage.join(self.root, _below(folder, "{}")) for folder in (source.images, source.labels)]
        pairs = pair_by_stem(images, labels, f"{uris[0]}.*", f"{uris[1]}{suffix}.png")
        names = self._listed(source)
        if names is None:
            yield from pairs
            return
        by_name = {pair.name: pair for pair in pairs}
        for name in names:
            missing = Pair(name, put_stem(uris[0], name), put_stem(uris[1], f"{name}{suffix}.png"))
            yield by_name.get(name) or missing

    def _find_images(self, source: _Source, split: str) -> dict[str, Entry]:
        found = self.find_files(source.images, IMAGE_SUFFIXES, "image", split)
        suffix = self.config.label_suffix.lower()
        if source.images == source.labels:
            return {stem: entry for stem, entry in found.items() if not stem.lower().endswith(suffix)}
        if source.images == "." or source.labels.startswith(f"{source.images}/"):
            below = source.labels.removeprefix(f"{source.images}/")
            return {stem: entry for stem, entry in found.items() if not stem.startswith(f"{below}/")}
        return found

    def _find_labels(self, source: _Source, split: str) -> dict[str, Entry]:
        suffixes = tuple(f"{self.config.label_suffix}{suffix}" for suffix in LABEL_SUFFIXES)
        return self.find_files(source.labels, suffixes, "label map", split)

    def _listed(self, source: _Source) -> list[str] | None:
        """The names in the list of `source` without the suffixes of files that are there; None without a list."""
        if source.path is None:
            return None
        files = self.tree.files(source.images)
        # CVAT puts names with spaces into quotes.
        paths = (unicodedata.normalize("NFC", line.strip('"')) for line in self.read_list(source.path) or ())
        names = [_stem(path, IMAGE_SUFFIXES) if path in files else path for path in paths]
        if len(set(names)) < len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise UserError(f"{source.path} holds {twice!r} twice; remove one")
        return names


def _find_folders(root: str, config: FolderConfig) -> tuple[str, str]:
    """The folders of images and of label maps, or those of the first split where the folders are inside of splits."""
    tree = FileTree(root)
    if not tree.exists():
        return config.images, config.labels
    around = () if config.images == "." else SPLIT_FOLDERS
    found = next((name for name in (".", *around) if tree.has_plain_folder(_below(name, config.images))), None)
    if found is None:
        # In an archive a folder is found at any depth: train/images would be taken for images.
        found = next((name for name in around if tree.has_folder(_below(name, config.images))), ".")
    return _below(found, config.images), _below(found, config.labels)


def _refuse_other_classes(tree: FileTree, path: str) -> None:
    """Raise UserError where a classes file in the folder of one split is another one in the folder of another."""
    folder, _, name = path.partition("/")
    if split_of(folder) is None or (first := tree.file(path)) is None:
        return
    for other in SPLIT_FOLDERS:
        entry = tree.file(f"{other}/{name}")
        if entry is not None and tree.read(entry) != tree.read(first):
            raise UserError(f"{first.uri} and {entry.uri} name other classes; make them equal, ids included")


def _below(folder: str, name: str) -> str:
    return name if folder in (".", "") else f"{folder.strip('/')}/{name}"


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
