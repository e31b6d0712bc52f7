"""A place where raw data may lie, listed once, and what tells that a layout was found there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config import DataConfig
from pipeline.datasets import archive
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.paired import IMAGE_SUFFIXES
from pipeline.datasets.splits import split_of
from pipeline.datasets.tree import Entry, FileTree

VAL_FRACTION = 0.2  # where nothing says what is val
# Folders that hold label maps have one of these in their name, those that hold images have none.
LABEL_WORDS = re.compile("label|mask|annot|^anno?s?_|^ann$|^anns$|gt|segm|target", re.IGNORECASE)
CLASS_FILES = (
    *("labelmap.txt", "classes.txt", "labels.txt", "class_names.txt", "_classes.csv", "class_dict.csv", "classes.csv"),
    *("classes.json", "classes.yaml", "classes.yml", "id2label.json", "labels.json", "data.yaml", "dataset.yaml"),
)


class Recognised(NamedTuple):
    """A layout that was found.

    Attributes:
        config: reads it; `root` may be a folder below the one that was asked for.
        why: what tells so, a line each.
    """

    config: DataConfig
    why: tuple[str, ...]


class Place:
    """All files of a root, by their path below the folder that holds all the images."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.why: tuple[str, ...] = ()
        self.tree = FileTree(root)
        self.files: Mapping[str, Entry] = self.tree.files(".")
        wrapper = _wrapper(self.files)
        if wrapper:
            self.files = {
                path.removeprefix(wrapper): file for path, file in self.files.items() if path.startswith(wrapper)
            }
            self.why = (f"all lies in {wrapper}",)
            if not archive.is_archive(root):
                self.root = storage.join(root, wrapper)
                self.tree = FileTree(self.root)
        self.images = [path for path in self.files if path.lower().endswith(IMAGE_SUFFIXES)]

    def read_head(self, path: str, num_bytes: int = 1 << 12) -> str:
        """The first characters of the text at `path`, as they are a byte each; raises UserError."""
        entry = self.files[path]
        if entry.extents:
            return self.tree.read(entry)[:num_bytes].decode("latin-1")
        entry.require_file()
        self.tree.boundary.check(entry.uri)
        with storage.open_uri(entry.uri) as file:
            return bytes(file.read(num_bytes)).decode("latin-1")

    def to_config(self, dataset: str, **settings: Any) -> DataConfig:
        """The section `data` that reads what lies here."""
        return DataConfig.model_validate({"dataset": dataset, "root": self.root, **settings})


def _wrapper(files: Mapping[str, Entry]) -> str:
    """The folders around all images, with a slash at the end, that are none of the layout itself."""
    images = [path.split("/")[:-1] for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    around = list[str]()
    while images and all(len(folders) > len(around) for folders in images):
        name = images[0][len(around)]
        below = [folders[: len(around) + 1] for folders in images]
        is_layout = split_of(name) or LABEL_WORDS.search(name) or re.match("ima?ge?s?|jpegimages", name, re.IGNORECASE)
        if is_layout or any(folders != below[0] for folders in below):
            break
        around.append(name)
    # What lies beside may name or part the data: then the root is where it is.
    while around and not all(path.startswith("/".join(around) + "/") or _says_nothing(path) for path in files):
        around.pop()
    return "".join(f"{name}/" for name in around)


def _says_nothing(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.startswith(("readme", "licen", "citation")) or name.endswith(
        (".md", ".pdf", ".html", *archive.SUFFIXES)
    )


def say_drawn(section: str = "folder") -> str:
    """The line for data that do not say what is val; `section` is that of the layout in the experiment file."""
    together = f"data.{section}.group keeps frames of one video together"
    return f"nothing says what is val: {VAL_FRACTION:.0%} are drawn ({together})"


def find_class_file(place: Place) -> tuple[dict[str, Any], list[str]]:
    """The settings for the file that names the classes, and what it says."""
    inside = sorted(
        path for path in place.files if split_of(path.partition("/")[0]) == "train" and path.count("/") == 1
    )
    for wanted in CLASS_FILES:
        for path in (wanted, *inside):
            if path in place.files and path.rpartition("/")[2] == wanted:
                classes = read_class_list(place.tree, path)
                colours = " with colours" if classes.palette is not None else ""
                return {"classes": path}, [f"{path} names {len(classes.names)} classes{colours}"]
    return {}, ["nothing names the classes: write classes.txt, a name a line in the order of their ids"]
