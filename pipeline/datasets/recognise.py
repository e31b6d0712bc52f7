"""Which layout lies at a place: from names, the heads of JSON files and the file of classes; no image is read."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config import FolderConfig
from pipeline.datasets import archive
from pipeline.datasets.ade20k import ADE20K
from pipeline.datasets.camvid import CamVid
from pipeline.datasets.cityscapes import Cityscapes
from pipeline.datasets.coco_stuff import CocoStuff10K
from pipeline.datasets.paired import PairedDataset
from pipeline.datasets.pascal_context import CONVERTED, DETAIL, PascalContext
from pipeline.datasets.place import LABEL_WORDS, VAL_FRACTION, Place, Recognised, find_class_file, say_drawn
from pipeline.datasets.recognise_objects import find_coco, find_label_studio, find_labelme, find_parquet
from pipeline.datasets.splits import SPLITS, split_of
from pipeline.datasets.tree import FileTree
from pipeline.errors import UserError

LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Of one object each, or colours to look at.
_NO_LABEL_WORDS = re.compile("object|instance|vis|preview|overlay", re.IGNORECASE)
_NAME_SUFFIXES = (
    *("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_l", "_labelids", "_labeltrainids"),
    *("-mask", "-label", "-seg", ".mask", ".label", "_annotation"),
)
_MAX_FOLDERS = 24  # the largest; what they hold is compared pair by pair
_LIST_FOLDERS = ("splits", "ImageSets/Segmentation", "lists", "split", "ImageSets", ".")


def recognise(root: str) -> Recognised:
    """The data set at `root`, a folder, an archive or a URL.

    Raises:
        UserError: Nothing is there, or nothing that is known; three lines say what is there and what is known.
    """
    if not storage.exists(root):
        raise UserError(f"data root {root} does not exist; give the folder or archive that holds the data set")
    place = Place(root)
    for find in _FINDERS:
        found = find(place)
        if found is not None:
            return found
    archives = [path for path in place.files if path.lower().endswith(archive.SUFFIXES)]
    if len(archives) == 1 and not place.images:
        packed = place.files[archives[0]]
        packed.require_file()
        place.tree.boundary.check(packed.uri)
        inside = recognise(packed.uri)
        return inside._replace(why=(f"{archives[0]} holds the data", *inside.why))
    raise UserError(_explain_unknown(place))


def _list_name(name: str) -> str | None:
    """The split, or what is not parted yet, that a list called `name` is of."""
    stem, dot, suffix = name.rpartition(".")
    if suffix.lower() != "txt" or not dot:
        return None
    return split_of(stem) or (stem.lower() if stem.lower() in ("trainval", "default") else None)


class _Published(NamedTuple):
    """A published set, and what its files have that other people's of the same folders have not."""

    dataset: str
    layout: type[PairedDataset]
    is_theirs: Callable[[FileTree], bool]
    remark: str = ""


_PUBLISHED = (
    _Published("ade20k", ADE20K, lambda tree: _any_starts(tree, "images/training", "ADE_train_")),
    _Published("cityscapes", Cityscapes, lambda tree: True),
    _Published("camvid", CamVid, lambda tree: _any_starts(tree, "train", r"\d{4}(TP|R0|E5)_|Seq05VD")),
    _Published(
        "coco_stuff10k",
        CocoStuff10K,
        lambda tree: (
            tree.file("imageLists/train.txt") is not None or _any_starts(tree, "images/train2014", "COCO_train2014_")
        ),
    ),
    _Published(
        "pascal_context_59",
        PascalContext,
        lambda tree: tree.has_folder(CONVERTED) or tree.file(DETAIL) is not None,
        "pascal_context_60 would count the background as a class",
    ),
)


def _any_starts(tree: FileTree, folder: str, names: str) -> bool:
    return any(re.match(names, path.rpartition("/")[2]) for path in islice(tree.files(folder), 100))


def _find_published(place: Place) -> Recognised | None:
    tree = FileTree(place.root, [wrapper for one in _PUBLISHED for wrapper in one.layout.wrappers])
    for one in _PUBLISHED:
        # In archives a folder may be found twice, which tells that it is none of theirs.
        with contextlib.suppress(UserError):
            if all(map(tree.has_folder, one.layout.required)) and one.is_theirs(tree):
                why = f"{', '.join(one.layout.required)} and names in them are those of {one.layout.__name__}"
                return Recognised(place.to_config(one.dataset), (*place.why, why, *filter(None, [one.remark])))
    return None


class _Pairing(NamedTuple):
    """Two folders and the end of label maps' names, with the names that both sides have."""

    images: str
    labels: str
    suffix: str
    names: frozenset[str]
    num_images: int


def _find_folder(place: Place) -> Recognised | None:
    """Images and label maps in all arrangements that `folder` reads."""
    found = max(_pairings(place), key=lambda pairing: len(pairing.names), default=None)
    if found is None:
        return None
    settings: dict[str, Any] = {"images": found.images, "labels": found.labels, "label_suffix": found.suffix}
    folders = [found.images] if found.images == found.labels else [found.images, found.labels]
    shown = " and ".join("the root" if folder == "." else f"{folder}/" for folder in folders)
    alone = found.num_images - len(found.names)
    why = [
        f"{shown} {'hold' if len(folders) > 1 else 'holds'} {len(found.names)} pairs"
        + (f" of NAME and NAME{found.suffix}" if found.suffix else "")
        + (f"; {alone} images have no label map" if alone else "")
    ]
    parted, reason = _find_splits(place, found)
    classes, named = find_class_file(place)
    settings |= parted | classes
    defaults = FolderConfig().model_dump()
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    return Recognised(place.to_config("folder", folder=changed), (*place.why, *why, *reason, *named))


def _pairings(place: Place) -> Iterator[_Pairing]:
    """All pairs of folders that have names in common."""
    labels = [path for path in place.images if path.lower().endswith(LABEL_SUFFIXES)]
    sizes = Counter(folder for path in place.images for folder in _folders_of(path))
    folders = sorted(folder for folder, _ in sizes.most_common(_MAX_FOLDERS))
    image_folders = [folder for folder in folders if not LABEL_WORDS.search(folder)]
    for image_folder in (*image_folders, "."):
        images = _names_in(image_folder, place.images)
        label_folders = [folder for folder in folders if folder not in image_folders]
        for label_folder in (*(folder for folder in label_folders if not _NO_LABEL_WORDS.search(folder)), image_folder):
            maps = _names_in(label_folder, labels)
            for suffix in ("", *_NAME_SUFFIXES) if label_folder != image_folder else _NAME_SUFFIXES:
                ends = {name: name[: len(name) - len(suffix)] for name in maps if name.lower().endswith(suffix)}
                common = images & set(ends.values())
                if not common:
                    continue
                spelled = next(name[len(stem) :] for name, stem in ends.items() if stem in common)
                own = images - set(ends) if label_folder == image_folder else images
                if image_folder == "." and label_folder != ".":
                    own = {name for name in own if not name.startswith(f"{label_folder}/")}
                yield _Pairing(image_folder, label_folder, spelled, frozenset(common), len(own))


def _folders_of(path: str) -> list[str]:
    """The folders that may be those of a layout: the first one, and the second inside one of a split."""
    folders = path.split("/")[:-1]
    return folders[: 2 if folders and split_of(folders[0]) else 1]


def _names_in(folder: str, paths: Sequence[str]) -> set[str]:
    """Names, without suffix, of what lies below `folder`, with the split that it is of in front."""
    names = set()
    for path in paths:
        parts = path.rpartition(".")[0].split("/")
        if folder == ".":
            inner = parts
        elif parts[0] == folder:
            inner = parts[1:]
        elif len(parts) > 2 and split_of(parts[0]) and parts[1] == folder:
            inner = [parts[0], *parts[2:]]
        else:
            continue
        split = split_of(inner[0]) if len(inner) > 1 else None
        names.add("/".join([split, *inner[1:]] if split else inner))
    return names


def _find_splits(place: Place, pairing: _Pairing) -> tuple[dict[str, Any], list[str]]:
    """The settings that part the pairs, and why."""
    folders = [split for split in SPLITS if any(name.startswith(f"{split}/") for name in pairing.names)]
    if "val" in folders:
        lack = "" if "train" in folders else "; none is for train"
        return {}, [f"folders part them into {', '.join(folders)}{lack}"]
    for folder in _LIST_FOLDERS:
        prefix = "" if folder == "." else f"{folder}/"
        lists = {
            name: path
            for path in place.files
            if path.startswith(prefix) and (name := _list_name(path[len(prefix) :])) and _lists(place, path, pairing)
        }
        if not lists or folders:
            continue
        where = ", ".join(sorted(lists.values()))
        if {"train", "val"} <= lists.keys():
            return {"splits": folder}, [f"{where} part them"]
        return {"splits": folder, "val_fraction": VAL_FRACTION}, [f"{where} lists them", say_drawn()]
    what = f"folders part them into {', '.join(folders)}" if folders else "nothing parts them"
    return {"val_fraction": VAL_FRACTION}, [what, say_drawn()]


def _lists(place: Place, path: str, pairing: _Pairing) -> bool:
    """Whether the first line of the list at `path` names an image."""
    line = next((line.strip().strip('"') for line in place.read_head(path).splitlines() if line.strip()), "")
    return line in pairing.names or line.rpartition(".")[0] in pairing.names


_FINDERS: tuple[Callable[[Place], Recognised | None], ...] = (
    _find_published,
    _find_folder,
    find_coco,
    find_labelme,
    find_label_studio,
    find_parquet,
)
KNOWN = (
    "images and label maps as PNG (folders, split folders, one folder with _mask, VOC, CVAT, Roboflow); "
    "COCO's JSON, labelme's and Label Studio's JSON, Parquet; ade20k, camvid, cityscapes, coco_stuff10k, pascal_context"
)


def _explain_unknown(place: Place) -> str:
    """What lies there, in three lines at most."""
    counts = Counter(
        (path.rpartition(".")[2].lower() if "." in path.rpartition("/")[2] else "", path.rpartition("/")[0])
        for path in place.files
    )
    there = [
        f"{number} {f'.{suffix}' if suffix else 'without suffix'} in {f'{folder}/' if folder else 'the root'}"
        for (suffix, folder), number in counts.most_common(6)
    ]
    more = f" and {len(counts) - 6} more kinds" if len(counts) > 6 else ""
    return (
        f"no known layout lies at {place.root}; it holds {', '.join(there) or 'no file'}{more}\n"
        f"known are: {KNOWN}\n"
        "give label maps the names of their images, or set data.dataset and its settings yourself"
    )
