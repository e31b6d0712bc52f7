"""Layouts whose objects or pictures lie in files of their own: COCO's, labelme's, Label Studio's, and Parquet."""

from __future__ import annotations

import re
from typing import Any

from pipeline.datasets.coco import read_index
from pipeline.datasets.label_studio import read_tasks
from pipeline.datasets.parquet import files_by_split, find_classes, find_columns
from pipeline.datasets.parquet_rows import read_head
from pipeline.datasets.place import CLASS_FILES, VAL_FRACTION, Place, Recognised, find_class_file, say_drawn
from pipeline.datasets.splits import SPLITS, split_in, split_of

_COCO_HEAD = re.compile(r'\s*\{\s*"(info|licenses|images|annotations|categories|type)"\s*:')
_LABEL_STUDIO_HEADS = (
    re.compile(r"\A\s*\[\s*\{"),
    re.compile(r'"annotations"\s*:\s*\['),
    re.compile(r'"(completed_by|was_cancelled|result|file_upload|drafts|predictions)"\s*:'),
)
_LABELME_HEAD = re.compile(r'"(shapes|imagePath)"\s*:')


def find_coco(place: Place) -> Recognised | None:
    """JSON files of COCO's, one a split or one alone."""
    files = [path for path in place.files if path.lower().endswith(".json") and _COCO_HEAD.match(place.read_head(path))]
    # COCO has captions and key points beside the objects.
    files = [path for path in files if "instances" in path.lower()] or files
    found: dict[str, str] = {}
    for path in files:
        split = split_in(path)
        if split is not None:
            found.setdefault(split, path)
    if "train" in found:
        images = {split: _image_folder(place, split) for split in found}
        one = images["train"] if len(set(images.values())) == 1 else None
        settings: dict[str, Any] = {"annotations": found, "images": one or images}
    elif len(files) == 1:
        found = {"train": files[0]}
        settings = {"annotations": files[0], "images": _image_folder(place, None)}
    else:
        return None
    why = list(place.why)
    for path in found.values():
        index = read_index(place.files[path])
        num_classes = len(index.categories) - len(index.groups)
        num_objects = int(index.starts[-1])
        why.append(f"{path} lists {len(index.images)} images, {num_objects} objects and {num_classes} categories")
    if "val" not in found:
        settings["val_fraction"] = VAL_FRACTION
        why.append(say_drawn("coco"))
    return Recognised(place.to_config("coco", coco=settings), tuple(why))


def _image_folder(place: Place, split: str | None) -> str:
    """The folder of the images of `split`, or of all: images, or else the root."""
    folders = {path.rpartition("/")[0] for path in place.images}
    own = sorted(folder for folder in folders if split is not None and split_in(folder) == split)
    if own:
        return min(own, key=len)
    return "images" if any(f"{folder}/".startswith("images/") for folder in folders) else "."


def find_labelme(place: Place) -> Recognised | None:
    """JSON files of labelme's beside images."""
    stems = {path.rpartition(".")[0] for path in place.images}
    beside = [path for path in place.files if path.lower().endswith(".json") and path.rpartition(".")[0] in stems]
    if not beside or not any(_LABELME_HEAD.search(place.read_head(path)) for path in beside[:5]):
        return None
    settings: dict[str, Any] = {}
    why = [*place.why, f"{len(beside)} of {len(stems)} images have a JSON file of labelme's beside them"]
    if any(name in place.files for name in CLASS_FILES):
        classes, named = find_class_file(place)
        settings |= classes
        why += named
    names = {split for path in beside if "/" in path and (split := split_of(path.partition("/")[0]))}
    if {"train", "val"} <= names:
        why.append(f"folders part them into {', '.join(split for split in SPLITS if split in names)}")
    else:
        settings["val_fraction"] = VAL_FRACTION
        why.append(say_drawn("labelme"))
    return Recognised(place.to_config("labelme", labelme=settings), tuple(why))


def find_label_studio(place: Place) -> Recognised | None:
    """One JSON file of Label Studio's tasks."""
    heads = {path: place.read_head(path) for path in place.files if path.lower().endswith(".json")}
    files = [path for path, head in heads.items() if all(pattern.search(head) for pattern in _LABEL_STUDIO_HEADS)]
    if len(files) != 1:
        return None
    index = read_tasks(place.files[files[0]])
    settings: dict[str, Any] = {"tasks": files[0], "images": _image_folder(place, None), "val_fraction": VAL_FRACTION}
    why = [*place.why, f"{files[0]} holds {len(index.paths)} annotated tasks of Label Studio's"]
    if any(name in place.files for name in CLASS_FILES):
        classes, named = find_class_file(place)
        settings |= classes
        why += named
    why.append(say_drawn("label_studio"))
    return Recognised(place.to_config("label_studio", label_studio=settings), tuple(why))


def find_parquet(place: Place) -> Recognised | None:
    """Parquet files with pictures in their rows."""
    paths = [path for path in place.files if path.lower().endswith(".parquet")]
    if not paths or not read_head(place.files[paths[0]]).pictures:
        return None
    files = files_by_split(place.tree)
    settings = {} if "val" in files else {"val_fraction": VAL_FRACTION}
    config = place.to_config("parquet", parquet=settings)
    columns = find_columns(place.files[paths[0]], config.parquet)
    num_rows = {split: sum(read_head(entry).num_rows for entry in entries.values()) for split, entries in files.items()}
    shown = ", ".join(f"{number} of {split}" for split, number in num_rows.items())
    classes, source = find_classes(place.tree, files, columns, None)
    why = [
        *place.why,
        f"{len(paths)} Parquet files hold rows with pictures in {columns.image} and {columns.label}: {shown}",
        *([] if "val" in files else [say_drawn("parquet")]),
        f"{source} names {len(classes.names)} classes",
    ]
    return Recognised(config, tuple(why))
