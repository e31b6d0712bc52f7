"""Images and a label file each in folders, with the splits as label tools and people leave them.

The label file of images/a/b.jpg is labels/a/b.png, or labels/a/b_mask.png with a `label_suffix`: same path, any suffix
of either kind, in any case. The splits are what the first of these says that is there:
- the lists splits/train.txt and splits/val.txt (and test.txt, if there), a path below images/ a line, with or without
  suffix; ImageSets/Segmentation of VOC and of CVAT is such a folder;
- folders: images/train with labels/train, or train/images with train/labels, likewise val and, if it has labels, test;
- `val_fraction`, which draws val by a hash of each name, so that adding images moves none of the others. It draws from
  all images, from a list that is not parted yet, or from the folder for train where none is for val; never from test.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline import storage
from pipeline.config import SplitFoldersConfig
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, pair_by_stem, put_stem
from pipeline.datasets.splits import SPLIT_FOLDERS, SPLITS, draw_val, first_repeated, folders_by_split
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError, shown

# Lists of images that are not parted into train and val yet.
_POOLS = ("trainval", "default")


class Source(NamedTuple):
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


class SplitFolders(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction.

    A subclass says which suffixes label files have, the first of them being the usual one.
    """

    label_suffixes: tuple[str, ...]
    section: str  # of the experiment file, for messages
    arrangement: SplitFoldersConfig
    seed: int

    def arrange(self, root: str, config: SplitFoldersConfig, seed: int, linked: Sequence[str]) -> FileTree:
        """Note where things are, before the classes are known; the files, to read these from."""
        self.arrangement, self.seed = config, seed
        self.required = _find_folders(root, config, linked)
        return FileTree(root, (), self.required, linked)

    def splits(self) -> tuple[str, ...]:
        """Train and val, and test where it is there; raises UserError where folders or lists are missing."""
        super().splits()
        sources = self.sources()
        first_seen: dict[str, str] = {}
        for split, source in sources.items():
            for name in self._listed(source) or () if not source.is_drawn else ():
                if first_seen.setdefault(name, split) != split:
                    raise UserError(f"{name!r} is in the lists of {first_seen[name]} and of {split}; keep one")
        return tuple(sources)

    def find_pairs(self, split: str) -> Iterator[Pair]:
        """The pairs of the split's list, in its order, or those of its folders or that are drawn for it, by name."""
        source = self.sources()[split]
        pairs = [pair for pair in self.all_pairs(source, split) if pair.name not in source.without]
        if not source.is_drawn:
            yield from pairs
            return
        drawn = draw_val([pair.name for pair in pairs], self.arrangement, self.seed, self.section)
        yield from (pair for pair in pairs if (pair.name in drawn) == (split == "val"))

    def sources(self) -> dict[str, Source]:
        """Of each split, train first; raises UserError where train or val has none."""
        config, lists = self.arrangement, self._lists()
        whole = Source(config.images, config.labels)
        if config.val_fraction is None and {"train", "val"} <= lists.keys():
            return {split: whole._replace(path=lists[split]) for split in SPLITS if split in lists}
        folders = self._folders()
        if folders:
            return self._sources_in(folders)
        if config.val_fraction is None:
            missing = [f"{config.splits}/{split}.txt" for split in ("train", "val") if split not in lists]
            raise UserError(
                f"data root {self.root} has no {', '.join(missing)}; add it, or set {self.section}.val_fraction to "
                f"draw the val split from {', '.join(lists.values()) or 'all images'}"
            )
        pool = next((lists[name] for name in _POOLS if name in lists), None)
        if pool is None and "val" not in lists:
            pool = lists.get("train")
        test = {"test": whole._replace(path=lists["test"])} if "test" in lists else {}
        of_test = frozenset(name for source in test.values() for name in self._listed(source) or ())
        drawn = whole._replace(path=pool, is_drawn=True, without=of_test)
        return {"train": drawn, "val": drawn, **test}

    def _sources_in(self, folders: dict[str, Source]) -> dict[str, Source]:
        """`folders`, with val drawn from train where that is wanted and there is none; raises UserError."""
        fraction = self.arrangement.val_fraction
        there = ", ".join(source.images for source in folders.values())
        if fraction is not None and "val" in folders:
            raise UserError(
                f"data root {self.root} has its own val split, {folders['val'].images}, and "
                f"{self.section}.val_fraction {fraction:g} would draw another; remove val_fraction"
            )
        if "train" not in folders or (fraction is None and "val" not in folders):
            split = "val" if "train" in folders else "train"
            remedy = f", or set {self.section}.val_fraction to draw val from train" if split == "val" else ""
            raise UserError(f"data root {self.root} has {there} and no such folder for {split}; add it{remedy}")
        if fraction is None:
            return folders
        drawn = folders["train"]._replace(is_drawn=True)
        return {**folders, "train": drawn, "val": drawn}

    def _lists(self) -> dict[str, str]:
        """The lists by split, train first, and those that are not parted yet by their name."""
        paths = [
            path for path in self.tree.files(self.arrangement.splits) if "/" not in path and path.lower()[-4:] == ".txt"
        ]
        names = {path[:-4]: path for path in paths}
        found = {split: names[name] for split, name in folders_by_split(names, self.arrangement.splits).items()}
        found |= {name.lower(): path for name, path in names.items() if name.lower() in _POOLS}
        return {name: below(self.arrangement.splits, path) for name, path in found.items()}

    def _folders(self) -> dict[str, Source]:
        """The folders by split, train first, where there are such; test only where it holds label maps."""
        images, labels = self.arrangement.images, self.arrangement.labels
        if self.required != (images, labels):
            around = folders_by_split(
                (name for name in SPLIT_FOLDERS if self.tree.has_folder(below(name, images))), self.root
            )
            found = {split: Source(below(name, images), below(name, labels)) for split, name in around.items()}
        else:
            inside = [folders_by_split(self._first_folders(folder), folder) for folder in (images, labels)]
            found = {
                split: Source(below(images, name), below(labels, inside[1].get(split, name)))
                for split, name in inside[0].items()
            }
        if "test" in found and not self.find_labels(found["test"], "test"):
            del found["test"]
        return found

    def _first_folders(self, folder: str) -> list[str]:
        return sorted({path.partition("/")[0] for path in self.tree.files(folder) if "/" in path})

    def all_pairs(self, source: Source, split: str) -> Iterator[Pair]:
        """All pairs of `source`, drawn or not."""
        images, labels = self._find_images(source, split), self.find_labels(source, split)
        ending = self.arrangement.label_suffix + self.label_suffixes[0]
        uris = [storage.join(self.root, below(folder, "{}")) for folder in (source.images, source.labels)]
        pairs = pair_by_stem(images, labels, f"{uris[0]}.*", f"{uris[1]}{ending}")
        names = self._listed(source)
        if names is None:
            yield from pairs
            return
        by_name = {pair.name: pair for pair in pairs}
        for name in names:
            missing = Pair(name, put_stem(uris[0], name), put_stem(uris[1], f"{name}{ending}"))
            yield by_name.get(name) or missing

    def _find_images(self, source: Source, split: str) -> dict[str, Entry]:
        found = self.find_files(source.images, IMAGE_SUFFIXES, "image", split)
        suffix = self.arrangement.label_suffix.lower()
        if source.images == source.labels:
            if not suffix:
                return found
            return {stem: entry for stem, entry in found.items() if not stem.lower().endswith(suffix)}
        if source.images == "." or source.labels.startswith(f"{source.images}/"):
            below = source.labels.removeprefix(f"{source.images}/")
            return {stem: entry for stem, entry in found.items() if not stem.startswith(f"{below}/")}
        return found

    def find_labels(self, source: Source, split: str) -> dict[str, Entry]:
        """The label files of `source` by the name of their image."""
        suffixes = tuple(f"{self.arrangement.label_suffix}{suffix}" for suffix in self.label_suffixes)
        return self.find_files(source.labels, suffixes, "label map", split)

    def _listed(self, source: Source) -> list[str] | None:
        """The names in the list of `source` without the suffixes of files that are there; None without a list."""
        if source.path is None:
            return None
        files = self.tree.files(source.images)
        # CVAT puts names with spaces into quotes.
        paths = (unicodedata.normalize("NFC", line.strip('"')) for line in self.read_list(source.path) or ())
        names = [_stem(path, IMAGE_SUFFIXES) if path in files else path for path in paths]
        twice = first_repeated(names)
        if twice is not None:
            raise UserError(f"{source.path} holds {shown(twice)} twice; remove one")
        return names


def _find_folders(root: str, config: SplitFoldersConfig, linked: Sequence[str]) -> tuple[str, str]:
    """The folders of images and of label maps, or those of the first split where the folders are inside of splits."""
    tree = FileTree(root, linked=linked)
    if not tree.exists():
        return config.images, config.labels
    around = () if config.images == "." else SPLIT_FOLDERS
    found = next((name for name in (".", *around) if tree.has_plain_folder(below(name, config.images))), None)
    if found is None:
        # In an archive a folder is found at any depth: train/images would be taken for images.
        found = next((name for name in around if tree.has_folder(below(name, config.images))), ".")
    return below(found, config.images), below(found, config.labels)


def below(folder: str, name: str) -> str:
    """The path `name` below `folder`, which may be the root."""
    return name if folder in (".", "") else f"{folder.strip('/')}/{name}"


def _stem(path: str, suffixes: tuple[str, ...]) -> str:
    suffix = next((suffix for suffix in suffixes if path.lower().endswith(suffix)), "")
    return path[: len(path) - len(suffix)]
