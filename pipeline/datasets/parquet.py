"""Images and label maps in the rows of Parquet files, as Hugging Face's data sets hold them.

A row is a sample. The split of a file, such as data/train-00000-of-00002.parquet, is what its name, or else its folder,
says: train, val or valid or validation, test; where no name says any, all are for train. What a row is called comes
from the path that stands beside the bytes of its image, where all rows of a split have one of their own; otherwise from
the file and the row's number.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.config import ParquetConfig
from pipeline.datasets.archive import Extent
from pipeline.datasets.class_list import ClassList, check_class_list, read_class_list
from pipeline.datasets.folder import ListedIds, default_palette
from pipeline.datasets.paired import refuse_links_out
from pipeline.datasets.parquet_rows import ParquetHead, read_head, read_paths, read_row, refuse_large_groups
from pipeline.datasets.raw import LazySamples, RawPair, RawSample, RejectedSampleError, digest_of, sample_key
from pipeline.datasets.splits import SPLITS, draw_val, split_in
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError
from pipeline.large_files import is_large, shrink_label
from segvit.image_files import DecodeError, orient_label, read_label_picture

_IMAGE_COLUMNS = ("image", "img", "pixel_values")
_LABEL_COLUMNS = ("mask", "label", "labels", "annotation", "segmentation")
_CLASS_FILES = ("id2label.json", "classes.txt")
_PART = re.compile(r"(.*?)-?(\d+)-of-(\d+)")
_MAX_NAME = 200  # characters
_MAX_DEPTH = 16  # of features in features


class Columns(NamedTuple):
    """Those of the pictures."""

    image: str
    label: str


class Parquet:
    """The data set below `root`, a folder or any fsspec location; `seed` draws the fraction."""

    name = "parquet"

    def __init__(self, root: str, config: ParquetConfig, seed: int, linked: Sequence[str] = ()) -> None:
        self.root = root
        self.config = config
        self.seed = seed
        self.tree = FileTree(root, linked=linked)
        files = self.files()
        first = next(iter(files["train"].values()))
        self.columns = find_columns(first, config)
        for entry in (entry for entries in files.values() for entry in entries.values()):
            self._check_file(entry)
        classes, source = find_classes(self.tree, files, self.columns, config.classes)
        self.class_names = classes.names
        self.palette = classes.palette or default_palette(len(classes.names))
        self.listed = ListedIds(classes, source, "data.parquet")
        self.settings = digest_of([[classes.model_dump(mode="json"), self.columns]])[:16]

    def files(self) -> dict[str, dict[str, Entry]]:
        """The files of each split, train first, by their path; raises UserError for none, and for missing parts."""
        return files_by_split(self.tree)

    def splits(self) -> tuple[str, ...]:
        """Train and val, and test where a file is for it; raises UserError where val is missing."""
        files = self.files()
        if "val" not in files and self.config.val_fraction is None:
            raise UserError(
                f"data root {self.root} has no Parquet file for val; set data.parquet.val_fraction to draw it"
            )
        if "val" in files and self.config.val_fraction is not None:
            raise UserError(
                f"data root {self.root} has its own val split, {next(iter(files['val']))}, and "
                f"data.parquet.val_fraction {self.config.val_fraction:g} would draw another; remove val_fraction"
            )
        return tuple(split for split in SPLITS if split in files or split == "val")

    def samples(self, split: str) -> Sequence[RawSample]:
        """The rows of the split's files, in their order."""
        files = self.files()
        is_drawn = "val" not in files and split != "test"
        rows = _Rows(files["train" if is_drawn else split], self.columns, self.settings)
        if not is_drawn:
            return LazySamples(rows.sample, range(len(rows)))
        drawn = draw_val(map(rows.name, range(len(rows))), self.config, self.seed, "data.parquet")
        chosen = (place for place in range(len(rows)) if (rows.name(place) in drawn) == (split == "val"))
        return LazySamples(rows.sample, array("q", chosen))

    def read(self, sample: RawSample) -> RawPair:
        """The image's bytes and the label map as class ids; raises RejectedSampleError."""
        assert sample.image_extent is not None
        refuse_links_out(sample, self.tree)
        stamp = sample.stamp.rsplit(" ", 2)[0]
        image, label = read_row(sample.image_extent.uri, stamp, self.columns, sample.image_extent.offset)
        for picture, where in ((image, sample.image), (label, sample.label)):
            if not picture:
                remedy = "write the picture itself into the file (embed_external_files) or remove the row"
                raise RejectedSampleError(where, "holds no bytes of a picture, at most its path", remedy)
        assert image is not None
        assert label is not None
        try:
            label = shrink_label(label, sample.max_long_side) if is_large(label) else label
            raw = self.listed.of_picture(read_label_picture(label), sample.label)
        except DecodeError as error:
            raise RejectedSampleError(sample.label, str(error), "replace the label map or remove the row") from error
        classes = self.listed.ids.to_classes(raw.values, sample.label)
        return RawPair(image, orient_label(image, classes), raw.index_colours)

    def source_digest(self) -> str:
        """sha256 over the settings and the rows of all splits."""
        rows = [[split, sample.key, sample.stamp] for split in self.splits() for sample in self.samples(split)]
        return digest_of([self.name, *rows])

    def _check_file(self, entry: Entry) -> None:
        missing = [column for column in self.columns if column not in read_head(entry).pictures]
        if missing:
            raise UserError(
                f"{entry.uri} has no pictures in a column {missing[0]!r}, which other files have; it has "
                f"{_say_columns(read_head(entry))}"
            )
        refuse_large_groups(entry)


class _Rows:
    """The rows of the files of one split, counted through; `settings` are part of every sample's stamp."""

    def __init__(self, files: Mapping[str, Entry], columns: Columns, settings: str) -> None:
        self.columns = columns
        self.settings = settings
        self.paths = list(files)
        self.entries = list(files.values())
        self.heads = [read_head(entry) for entry in self.entries]
        self.firsts = [0]
        for head in self.heads:
            self.firsts.append(self.firsts[-1] + head.num_rows)
        self.names = self._names_of_pictures()

    def __len__(self) -> int:
        return self.firsts[-1]

    def name(self, place: int) -> str:
        """What the row is called, without a suffix."""
        if self.names is not None:
            return self.names[place]
        file, row = self._find(place)
        return f"{self.paths[file].removesuffix('.parquet')}/{row:06d}"

    def sample(self, place: int) -> RawSample:
        """The row as a sample."""
        file, row = self._find(place)
        entry, head = self.entries[file], self.heads[file]
        group = head.group_of(row)
        num_bytes = head.group_bytes[group] // (head.starts[group + 1] - head.starts[group])
        return RawSample(
            key=sample_key(self.name(place)),
            image=f"{entry.uri}#{row}/{self.columns.image}",
            label=f"{entry.uri}#{row}/{self.columns.label}",
            stamp=f"{entry.stamp} {row} {self.settings}",
            image_extent=Extent(entry.uri, row, num_bytes, num_bytes, "row"),
            image_bytes=num_bytes,
        )

    def _find(self, place: int) -> tuple[int, int]:
        """The number of the file, and that of the row in it."""
        file = bisect.bisect_right(self.firsts, place) - 1
        return file, place - self.firsts[file]

    def _names_of_pictures(self) -> list[str] | None:
        """Of all rows, by the paths of their images; None unless each has one of its own."""
        names: list[str] = []
        for entry in self.entries:
            paths = read_paths(entry, self.columns.image) or [None]
            if not all(path and path.isprintable() and len(path) <= _MAX_NAME for path in paths):
                return None
            names += [_stem(path) for path in paths if path]
        return names if len(names) == len(self) == len(set(names)) else None


def _stem(path: str) -> str:
    path = unicodedata.normalize("NFC", path.replace("\\", "/").strip("/"))
    return path.rpartition(".")[0] or path


def files_by_split(tree: FileTree) -> dict[str, dict[str, Entry]]:
    """The Parquet files below the root of `tree` by split, train first, and by path.

    Raises UserError for none, for those without a split beside others, and where parts of a split are missing.
    """
    if not tree.exists():
        raise UserError(f"data root {tree.root} does not exist; set data.root to the folder with the Parquet files")
    files = {path: entry for path, entry in tree.files(".").items() if path.lower().endswith(".parquet")}
    found: defaultdict[str | None, dict[str, Entry]] = defaultdict(dict)
    for path, entry in files.items():
        folder, _, name = path.rpartition("/")
        found[split_in(name) or split_in(folder)][path] = entry
    if len(found) > 1 and None in found:
        other = next(iter(found[None].values())).uri
        raise UserError(f"{other} has no split in its name, and other files have; rename it, or take it away")
    if None in found:
        found["train"] = found.pop(None)
    if "train" not in found:
        there = f"Parquet files of {', '.join(sorted(map(str, found)))} alone" if found else "no Parquet file"
        raise UserError(f"data root {tree.root} has {there}; add those for train, such as data/train.parquet")
    _refuse_missing_parts(files)
    return {split: found[split] for split in SPLITS if split in found}


def _refuse_missing_parts(files: Mapping[str, Entry]) -> None:
    """Raise UserError where not all of the files are there that NAME-00000-of-00002.parquet says there are."""
    parts: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    uris: dict[tuple[str, int], str] = {}
    for path, entry in files.items():
        part = _PART.fullmatch(path[: -len(".parquet")])
        if part is not None:
            of = (part[1], int(part[3]))
            parts[of].add(int(part[2]))
            uris.setdefault(of, entry.uri)
    for (name, count), numbers in parts.items():
        missing = next((number for number in range(count) if number not in numbers), None)
        if missing is not None:
            raise UserError(f"{uris[name, count]} is one of {count} parts, and part {missing} is missing; fetch it")


def find_columns(entry: Entry, config: ParquetConfig) -> Columns:
    """The columns that `config` names, or that are called as such columns are; raises UserError."""
    head = read_head(entry)

    def find(wanted: str | None, usual: Sequence[str], setting: str) -> str:
        found = [column for column in head.pictures if column == wanted or (not wanted and column.lower() in usual)]
        if len(found) == 1:
            return found[0]
        several = (
            f"pictures in {', '.join(found)}" if found else f"no pictures in a column {wanted or ', '.join(usual)}"
        )
        raise UserError(f"{entry.uri} has {several}; set data.parquet.{setting} to one of {_say_columns(head)}")

    return Columns(find(config.image, _IMAGE_COLUMNS, "image"), find(config.label, _LABEL_COLUMNS, "label"))


def _say_columns(head: ParquetHead) -> str:
    """All columns, those of pictures first."""
    others = [f"{name} ({kind})" for name, kind in head.columns.items() if name not in head.pictures]
    return ", ".join([*(f"{name} (pictures)" for name in head.pictures), *others])


def find_classes(
    tree: FileTree, files: Mapping[str, Mapping[str, Entry]], columns: Columns, path: str | None
) -> tuple[ClassList, str]:
    """The classes, and what names them: the file `path`, one beside the data, or the files' metadata.

    Raises UserError where nothing does.
    """
    entries = {name: entry for split in files.values() for name, entry in split.items()}
    folders = ("", *sorted({f"{name.rpartition('/')[0]}/" for name in entries if "/" in name}))
    beside = (f"{folder}{name}" for folder in folders for name in _CLASS_FILES)
    path = path or next((one for one in beside if tree.file(one) is not None), None)
    if path is not None:
        return read_class_list(tree, path), path
    first, *others = entries.values()
    names = _names_in_metadata(first, columns)
    for entry in others:
        if _names_in_metadata(entry, columns) != names:
            raise UserError(f"{first.uri} and {entry.uri} name other classes; make them equal, or write id2label.json")
    if names is None:
        raise UserError(
            f"nothing names the classes of {tree.root}: write id2label.json or classes.txt beside the data, or set "
            "data.parquet.classes"
        )
    return check_class_list({"names": names}, first.uri), "the metadata of the files"


def _names_in_metadata(entry: Entry, columns: Columns) -> list[str] | None:
    """The names of the one list of classes that is of pixels: of the label column, or of several classes an image.

    A single class an image is of the image as a whole.
    """
    features = read_head(entry).features
    own = list(_class_labels(features.get(columns.label), True))
    found = own or [names for feature in features.values() for names in _class_labels(feature, False)]
    return found[0] if found and all(names == found[0] for names in found) else None


def _class_labels(feature: Any, is_of_pixels: bool, depth: int = 0) -> Iterator[list[str]]:
    """The names of all ClassLabels in `feature` that are in a sequence or `is_of_pixels`."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(feature, list):
        for inner in feature:
            yield from _class_labels(inner, True, depth + 1)
    elif isinstance(feature, dict):
        names, kind = feature.get("names"), feature.get("_type")
        if kind == "ClassLabel" and isinstance(names, list):
            if is_of_pixels:
                yield names
            return
        for inner in feature.values():
            yield from _class_labels(inner, is_of_pixels or kind in ("Sequence", "List", "LargeList"), depth + 1)
