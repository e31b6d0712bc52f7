"""A data set of one's own: images/, labels/ and a file that names the classes.

The label map of images/a/b.jpg is labels/a/b.png: same path, any suffix of either kind, in any case. A class's id is
its position in the classes file, unless that gives `ids`. The splits are splits/train.txt and splits/val.txt (and
test.txt, if there), a path below images/ a line, with or without suffix; or, with `val_fraction`, drawn by a hash of
each name, so that adding images moves none of the others.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline import storage
from pipeline.config import FolderConfig, Section
from pipeline.datasets.paired import IMAGE_SUFFIXES, Pair, PairedDataset, decode_text, pair_by_stem, split_lines
from pipeline.datasets.raw import LabelIds, Palette, digest_of
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from segvit.image_files import IGNORE_INDEX

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")


class ClassList(Section):
    """The content of a classes file; `ids` are those in the label maps, by default 0, 1, 2, ..."""

    names: tuple[str, ...] = Field(min_length=1, max_length=IGNORE_INDEX)
    palette: tuple[tuple[int, int, int], ...] | None = None
    ids: tuple[int, ...] | None = None
    ignore_ids: tuple[int, ...] = (IGNORE_INDEX,)

    @model_validator(mode="after")
    def _fits(self) -> ClassList:
        if len(set(self.names)) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"names holds {', '.join(twice)} more than once; rename one")
        for name in ("palette", "ids"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.names)} names; give one a name")
        if any(not 0 <= level <= 255 for colour in self.palette or () for level in colour):
            raise ValueError("palette levels are 0 to 255")
        raw = self.raw_ids()
        if any(not 0 <= number <= 65535 for number in (*raw, *self.ignore_ids)):
            raise ValueError("ids and ignore_ids are 0 to 65535")
        if len(set(raw)) < len(raw):
            raise ValueError("ids holds an id twice; give each class its own")
        both = sorted(set(raw) & set(self.ignore_ids))
        if both:
            raise ValueError(f"ignore_ids holds {both[0]}, the id of class {self.names[raw.index(both[0])]!r}")
        return self

    def raw_ids(self) -> tuple[int, ...]:
        """The id of each class in the label maps."""
        return self.ids if self.ids is not None else tuple(range(len(self.names)))


class Folder(PairedDataset):
    """The data set below `root`, a folder, an archive or any fsspec location; `seed` draws the fraction."""

    def __init__(self, root: str, config: FolderConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.required = (config.images, config.labels)
        self.layout = f"{config.images}/NAME.jpg with {config.labels}/NAME.png and {config.classes}"
        classes = read_classes(FileTree(root), config.classes)
        raw_ids = classes.raw_ids()
        ignored = ", ".join(map(str, classes.ignore_ids)) or "none"
        listed = f"0-{len(raw_ids) - 1}" if classes.ids is None else "the ids of"
        self.settings = digest_of([classes.model_dump(mode="json")])[:16]
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
            yield by_name.get(name) or Pair(name, uris[0].format(name), uris[1].format(f"{name}.png"))

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


def read_classes(tree: FileTree, path: str) -> ClassList:
    """The classes file at `path`: names a line, or JSON or YAML by its suffix; raises UserError."""
    if not tree.exists():
        raise UserError(f"data root {tree.root} does not exist; set data.root to the folder with {path}")
    entry = tree.file(path)
    if entry is None:
        raise UserError(
            f"data root {tree.root} has no {path}; write one class name a line into it, in the order of their ids, "
            "or set data.folder.classes"
        )
    text = decode_text(tree.read(entry), entry.uri)
    try:
        if not path.lower().endswith((".json", ".yaml", ".yml")):
            content: Any = {"names": split_lines(text, entry.uri)}
        else:
            # JSON is YAML but for tabs; json.loads also says better where the mistake is.
            content = json.loads(text) if path.lower().endswith(".json") else yaml.safe_load(text)
        return ClassList.model_validate({"names": content} if isinstance(content, list) else content)
    except ValidationError as error:
        problems = "; ".join(
            ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
            for item in error.errors()[:5]
        )
        raise UserError(f"{entry.uri}: {problems}; it holds names and, if wanted, palette, ids, ignore_ids") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{entry.uri} cannot be read ({' '.join(str(error).split())}); correct it") from error


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
