"""Which layout lies at a place: from names, the heads of JSON files and the file of classes; no image is read."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config import DataConfig, FolderConfig
from pipeline.datasets import archive
from pipeline.datasets.ade20k import ADE20K
from pipeline.datasets.camvid import CamVid
from pipeline.datasets.cityscapes import Cityscapes
from pipeline.datasets.class_list import read_class_list
from pipeline.datasets.coco import read_index
from pipeline.datasets.coco_stuff import CocoStuff10K
from pipeline.datasets.label_studio import read_tasks
from pipeline.datasets.paired import IMAGE_SUFFIXES, PairedDataset
from pipeline.datasets.parquet import files_by_split, find_classes, find_columns
from pipeline.datasets.parquet_rows import read_head
from pipeline.datasets.pascal_context import CONVERTED, DETAIL, PascalContext
from pipeline.datasets.splits import SPLITS, split_in, split_of
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError

VAL_FRACTION = 0.2  # where nothing says what is val
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
# Folders that hold label maps have one of these in their name, those that hold images have none.
_LABEL_WORDS = re.compile("label|mask|annot|^anno?s?_|^ann$|^anns$|gt|segm|target", re.IGNORECASE)
# Of one object each, or colours to look at.
_NO_LABEL_WORDS = re.compile("object|instance|vis|preview|overlay", re.IGNORECASE)
_NAME_SUFFIXES = (
    *("_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_gt", "_l", "_labelids", "_labeltrainids"),
    *("-mask", "-label", "-seg", ".mask", ".label", "_annotation"),
)
_MAX_FOLDERS = 24  # the largest; what they hold is compared pair by pair
_LIST_FOLDERS = ("splits", "ImageSets/Segmentation", "lists", "split", "ImageSets", ".")
_CLASS_FILES = (
    *("labelmap.txt", "classes.txt", "labels.txt", "class_names.txt", "_classes.csv", "class_dict.csv", "classes.csv"),
    *("classes.json", "classes.yaml", "classes.yml", "id2label.json", "labels.json", "data.yaml", "dataset.yaml"),
)
_COCO_HEAD = re.compile(r'\s*\{\s*"(info|licenses|images|annotations|categories|type)"\s*:')
_LABEL_STUDIO_HEADS = (
    re.compile(r"\A\s*\[\s*\{"),
    re.compile(r'"annotations"\s*:\s*\['),
    re.compile(r'"(completed_by|was_cancelled|result|file_upload|drafts|predictions)"\s*:'),
)
_LABELME_HEAD = re.compile(r'"(shapes|imagePath)"\s*:')


class Recognised(NamedTuple):
    """A layout that was found.

    Attributes:
        config: reads it; `root` may be a folder below the one that was asked for.
        why: what tells so, a line each.
    """

    config: DataConfig
    why: tuple[str, ...]


def recognise(root: str) -> Recognised:
    """The data set at `root`, a folder, an archive or a URL.

    Raises:
        UserError: Nothing is there, or nothing that is known; three lines say what is there and what is known.
    """
    if not storage.exists(root):
        raise UserError(f"data root {root} does not exist; give the folder or archive that holds the data set")
    place = _Place(root)
    for find in _FINDERS:
        found = find(place)
        if found is not None:
            return found
    archives = [path for path in place.files if path.lower().endswith(archive.SUFFIXES)]
    if len(archives) == 1 and not place.images:
        inside = recognise(place.files[archives[0]].uri)
        return inside._replace(why=(f"{archives[0]} holds the data", *inside.why))
    raise UserError(_explain_unknown(place))


class _Place:
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
        """The first characters of the text at `path`, as they are a byte each."""
        entry = self.files[path]
        if entry.extents:
            return self.tree.read(entry)[:num_bytes].decode("latin-1")
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
        is_layout = split_of(name) or _LABEL_WORDS.search(name) or re.match("ima?ge?s?|jpegimages", name, re.IGNORECASE)
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


def _find_published(place: _Place) -> Recognised | None:
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


def _find_folder(place: _Place) -> Recognised | None:
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
    classes, named = _find_classes(place)
    settings |= parted | classes
    defaults = FolderConfig().model_dump()
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    return Recognised(place.to_config("folder", folder=changed), (*place.why, *why, *reason, *named))


def _pairings(place: _Place) -> Iterator[_Pairing]:
    """All pairs of folders that have names in common."""
    labels = [path for path in place.images if path.lower().endswith(LABEL_SUFFIXES)]
    sizes = Counter(folder for path in place.images for folder in _folders_of(path))
    folders = sorted(folder for folder, _ in sizes.most_common(_MAX_FOLDERS))
    image_folders = [folder for folder in folders if not _LABEL_WORDS.search(folder)]
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


def _find_splits(place: _Place, pairing: _Pairing) -> tuple[dict[str, Any], list[str]]:
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
        return {"splits": folder, "val_fraction": VAL_FRACTION}, [f"{where} lists them", _say_drawn()]
    what = f"folders part them into {', '.join(folders)}" if folders else "nothing parts them"
    return {"val_fraction": VAL_FRACTION}, [what, _say_drawn()]


def _say_drawn(section: str = "folder") -> str:
    together = f"data.{section}.group keeps frames of one video together"
    return f"nothing says what is val: {VAL_FRACTION:.0%} are drawn ({together})"


def _lists(place: _Place, path: str, pairing: _Pairing) -> bool:
    """Whether the first line of the list at `path` names an image."""
    line = next((line.strip().strip('"') for line in place.read_head(path).splitlines() if line.strip()), "")
    return line in pairing.names or line.rpartition(".")[0] in pairing.names


def _find_classes(place: _Place) -> tuple[dict[str, Any], list[str]]:
    """The settings for the file that names the classes, and what it says."""
    inside = sorted(
        path for path in place.files if split_of(path.partition("/")[0]) == "train" and path.count("/") == 1
    )
    for wanted in _CLASS_FILES:
        for path in (wanted, *inside):
            if path in place.files and path.rpartition("/")[2] == wanted:
                classes = read_class_list(place.tree, path)
                colours = " with colours" if classes.palette is not None else ""
                return {"classes": path}, [f"{path} names {len(classes.names)} classes{colours}"]
    return {}, ["nothing names the classes: write classes.txt, a name a line in the order of their ids"]


def _find_coco(place: _Place) -> Recognised | None:
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
        why.append(_say_drawn("coco"))
    return Recognised(place.to_config("coco", coco=settings), tuple(why))


def _image_folder(place: _Place, split: str | None) -> str:
    """The folder of the images of `split`, or of all: images, or else the root."""
    folders = {path.rpartition("/")[0] for path in place.images}
    own = sorted(folder for folder in folders if split is not None and split_in(folder) == split)
    if own:
        return min(own, key=len)
    return "images" if any(f"{folder}/".startswith("images/") for folder in folders) else "."


def _find_labelme(place: _Place) -> Recognised | None:
    """JSON files of labelme's beside images."""
    stems = {path.rpartition(".")[0] for path in place.images}
    beside = [path for path in place.files if path.lower().endswith(".json") and path.rpartition(".")[0] in stems]
    if not beside or not any(_LABELME_HEAD.search(place.read_head(path)) for path in beside[:5]):
        return None
    settings: dict[str, Any] = {}
    why = [*place.why, f"{len(beside)} of {len(stems)} images have a JSON file of labelme's beside them"]
    if any(name in place.files for name in _CLASS_FILES):
        classes, named = _find_classes(place)
        settings |= classes
        why += named
    names = {split for path in beside if "/" in path and (split := split_of(path.partition("/")[0]))}
    if {"train", "val"} <= names:
        why.append(f"folders part them into {', '.join(split for split in SPLITS if split in names)}")
    else:
        settings["val_fraction"] = VAL_FRACTION
        why.append(_say_drawn("labelme"))
    return Recognised(place.to_config("labelme", labelme=settings), tuple(why))


def _find_label_studio(place: _Place) -> Recognised | None:
    """One JSON file of Label Studio's tasks."""
    heads = {path: place.read_head(path) for path in place.files if path.lower().endswith(".json")}
    files = [path for path, head in heads.items() if all(pattern.search(head) for pattern in _LABEL_STUDIO_HEADS)]
    if len(files) != 1:
        return None
    index = read_tasks(place.files[files[0]])
    settings: dict[str, Any] = {"tasks": files[0], "images": _image_folder(place, None), "val_fraction": VAL_FRACTION}
    why = [*place.why, f"{files[0]} holds {len(index.paths)} annotated tasks of Label Studio's"]
    if any(name in place.files for name in _CLASS_FILES):
        classes, named = _find_classes(place)
        settings |= classes
        why += named
    why.append(_say_drawn("label_studio"))
    return Recognised(place.to_config("label_studio", label_studio=settings), tuple(why))


def _find_parquet(place: _Place) -> Recognised | None:
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
        *([] if "val" in files else [_say_drawn("parquet")]),
        f"{source} names {len(classes.names)} classes",
    ]
    return Recognised(config, tuple(why))


_FINDERS: tuple[Callable[[_Place], Recognised | None], ...] = (
    _find_published,
    _find_folder,
    _find_coco,
    _find_labelme,
    _find_label_studio,
    _find_parquet,
)
KNOWN = (
    "images and label maps as PNG (folders, split folders, one folder with _mask, VOC, CVAT, Roboflow); "
    "COCO's JSON, labelme's and Label Studio's JSON, Parquet; ade20k, camvid, cityscapes, coco_stuff10k, pascal_context"
)


def _explain_unknown(place: _Place) -> str:
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
