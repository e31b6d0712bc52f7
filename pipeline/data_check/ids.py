"""What label maps hold where nothing names the classes: the ids or colours that a classes file has to name."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

import numpy as np

from pipeline.config import DataConfig
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError
from pipeline.shards.shards import evenly_spaced
from segvit.image_files import DecodeError, read_label_picture

NUM_READ = 32
_MOST_LISTED = 24
_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")


def ids_in_use(config: DataConfig) -> str | None:
    """A line about some label maps of a `folder` data set; None where none can be read."""
    folder, tree = config.folder, FileTree(config.root or "", linked=config.linked_folders)
    files = [
        entry
        for path, entry in tree.files(".").items()
        if path.lower().endswith(tuple(f"{folder.label_suffix}{suffix}".lower() for suffix in _SUFFIXES))
        and (folder.labels in (".", "") or folder.labels in (str(one) for one in _folders(path)))
    ]
    found: Counter[str] = Counter()
    num_read = 0
    for number in evenly_spaced(len(files), NUM_READ).tolist():
        try:
            picture = read_label_picture(tree.read(files[number]))
        except (DecodeError, UserError):
            continue
        num_read += 1
        for value in np.unique(picture.values).tolist():
            is_colour = picture.kind == "colours"
            found[str([value >> 16, value >> 8 & 255, value & 255]) if is_colour else str(value)] += 1
    if not found:
        return None
    ordered = sorted(found, key=lambda value: (len(value), value))
    more = f" and {len(ordered) - _MOST_LISTED} more" if len(ordered) > _MOST_LISTED else ""
    return f"{num_read} label maps that were read hold {', '.join(ordered[:_MOST_LISTED])}{more}"


def _folders(path: str) -> list[PurePosixPath]:
    """The folders around a file, each as it lies below the root or below the folder of a split."""
    parents = list(PurePosixPath(path).parents)
    return [*parents, *(PurePosixPath(*one.parts[1:]) for one in parents)]
