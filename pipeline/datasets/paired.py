"""What the layouts of files have in common: an image file and a label map file a sample, below one tree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets import archive
from pipeline.datasets.archive import Extent, ExtentError
from pipeline.datasets.boundary import OutsideError
from pipeline.datasets.raw import (
    LabelIds,
    Palette,
    RawPair,
    RawSample,
    RejectedSampleError,
    digest_of,
    load_metadata,
    sample_key,
)
from pipeline.datasets.tree import Entry, FileTree
from pipeline.errors import UserError, shown
from pipeline.large_files import is_large, shrink_label
from segvit.image_files import DecodeError, LabelPicture, decode_label, orient_label

# Of files that are meant to be images. Those of formats that are not read are listed to be rejected, not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".mpo"),
    *(".tif", ".tiff", ".bmp", ".gif", ".webp", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".pgm"),
)


class Pair(NamedTuple):
    """A sample by name; a file that is not there keeps the uri where it should be, as a string."""

    name: str  # without suffix
    image: Entry | str
    label: Entry | str


class PairedDataset(ABC):
    """A data set of image and label files. A subclass says what it is called, and finds the pairs."""

    layout: str  # in a few words, for messages
    wrappers: tuple[str, ...] = ()  # folders that the publisher puts around it
    required: tuple[str, ...] = ()  # folders without which it cannot be
    is_whole: bool = True  # whether these hold all of it
    settings: str = ""  # a digest of those that shape label maps: part of every sample's stamp

    def __init__(
        self,
        name: str,
        root: str,
        classes: Sequence[str],
        palette: Palette,
        ids: LabelIds,
        linked: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.root = root
        self.class_names = tuple(classes)
        self.palette = palette
        self.ids = ids
        self.tree = FileTree(root, self.wrappers, self.required if self.is_whole else (), linked)

    def splits(self) -> tuple[str, ...]:
        """Train and val; raises UserError where a folder of theirs is missing."""
        self.require(self.required)
        return ("train", "val")

    def samples(self, split: str) -> Sequence[RawSample]:
        """All images and label maps of `split` by name; one without the other too, to be rejected."""
        return [to_sample(pair, self.settings) for pair in self.find_pairs(split)]

    def read(self, sample: RawSample) -> RawPair:
        """The image file's bytes and the label map as class ids; raises RejectedSampleError."""
        refuse_links_out(sample, self.tree)
        image = read_image(sample)
        try:
            raw = self.read_ids(sample)
        except DecodeError as error:
            raise RejectedSampleError(sample.label, str(error), "replace the file or remove the sample") from error
        return RawPair(image, orient_label(image, self.to_classes(raw.values, sample.label)), raw.index_colours)

    def read_ids(self, sample: RawSample) -> LabelPicture:
        """The label map's ids; `index_colours` are kept where only other files can tell whether they are right."""
        return LabelPicture("grey", self.decode_label(sample))

    def decode_label(self, sample: RawSample) -> NDArray[np.integer]:
        """(H, W) ids as the publisher writes them; raises DecodeError and RejectedSampleError."""
        return decode_label(read_label(sample)[0])

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """(H, W) class ids of the ids in `file`; raises RejectedSampleError."""
        return self.ids.to_classes(raw, file)

    def source_digest(self) -> str:
        """sha256 over names, sizes and times of the files of all splits."""
        rows = [[split, sample.key, sample.stamp] for split in self.splits() for sample in self.samples(split)]
        return digest_of([self.name, *rows])

    @abstractmethod
    def find_pairs(self, split: str) -> Iterable[Pair]:
        """The pairs of `split`, always in the same order."""

    def require(self, folders: Iterable[str]) -> None:
        """Raise UserError where one of `folders` is not there."""
        if not self.tree.exists():
            raise UserError(f"data root {self.root} does not exist; set data.root to the {self._title} folder")
        missing = [folder for folder in folders if not self.tree.has_folder(folder)]
        if missing:
            raise self.incomplete(f"no folder {', '.join(missing)}")

    def incomplete(self, what: str) -> UserError:
        """The error for a root that has `what`, such as "no folder images"."""
        return UserError(f"data root {self.root} has {what}; the {self._title} layout is {self.layout}")

    def find_files(self, folder: str, suffix: str | tuple[str, ...], what: str, split: str) -> dict[str, Entry]:
        """The files below `folder` that end in `suffix`, in any case, by the path before it.

        `what` they are, such as "image", goes into the UserError for two of one name.
        """
        found: dict[str, Entry] = {}
        for path, entry in self.tree.files(folder).items():
            for ending in (suffix,) if isinstance(suffix, str) else suffix:
                if not path.lower().endswith(ending.lower()):
                    continue
                stem = path[: -len(ending)]
                if stem in found:
                    raise UserError(f"{entry.uri}: another {what} in split {split!r} has this name; rename one")
                found[stem] = entry
        return found

    def read_list(self, path: str) -> list[str] | None:
        """The lines of the list file at `path`, without empty ones; None where there is none.

        Raises UserError for a line that is there twice, and for one that leads out of the data set.
        """
        entry = self.tree.file(path)
        if entry is None:
            return None
        lines = split_lines(decode_text(self.tree.read(entry), entry.uri), entry.uri)
        for line in lines:
            refuse_outside(line, entry.uri)
        return lines

    @property
    def _title(self) -> str:
        return type(self).__name__


def pair_by_stem(
    images: Mapping[str, Entry], labels: Mapping[str, Entry], image_uri: str, label_uri: str
) -> Iterator[Pair]:
    """Pairs of equal stem, sorted; what has no partner is paired with a uri (`{}` is the stem)."""
    for stem in sorted(images.keys() | labels.keys()):
        yield Pair(stem, images.get(stem) or put_stem(image_uri, stem), labels.get(stem) or put_stem(label_uri, stem))


def refuse_outside(path: str, source: str) -> None:
    """Raise UserError for a `path` in the file `source` that leads out of the folder it is looked for in."""
    parts = path.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or "\0" in path or "://" in path or "::" in path:
        raise UserError(f"{source} names {shown(path)}, a path that leads out of the data set; correct or remove it")


def refuse_links_out(sample: RawSample, tree: FileTree) -> None:
    """Raise RejectedSampleError where a file of `sample` leads out of the root of `tree`, now that it is read."""
    image = sample.image if sample.image_extent is None else sample.image_extent.uri
    labels = {extent.uri for extent in sample.label_extents} or {sample.label}
    for uri in (image, *labels):
        try:
            tree.boundary.check(uri)
        except OutsideError as error:
            raise RejectedSampleError(uri, error.reason, error.remedy) from error


def put_stem(uri: str, stem: str) -> str:
    """`uri` with `stem` at its last `{}`; a path may hold braces of its own."""
    before, _, after = uri.rpartition("{}")
    return f"{before}{stem}{after}"


def read_image(sample: RawSample) -> bytes:
    """The image file of `sample`; raises RejectedSampleError."""
    return _read(sample.image, "image", sample.image_extent)


def read_label(sample: RawSample) -> list[bytes]:
    """The files or parts of files that make the label map of `sample`; raises RejectedSampleError and DecodeError."""
    files = [_read(sample.label, "label map", extent) for extent in sample.label_extents or (None,)]
    return [shrink_label(file, sample.max_long_side) if is_large(file) else file for file in files]


def decode_text(data: bytes, uri: str) -> str:
    """Text in UTF-8, with or without a byte order mark; raises UserError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is no UTF-8 text; save it as UTF-8") from error


def split_lines(text: str, uri: str) -> list[str]:
    """Lines without surrounding space and without empty ones; raises UserError for a line that is there twice."""
    # Not splitlines(), which also cuts at signs that names may hold.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    seen: set[str] = set()
    for line in lines:
        if line in seen:
            raise UserError(f"{uri} holds {shown(line)} twice; remove one")
        seen.add(line)
    return lines


def classes_and_palette(name: str) -> tuple[tuple[str, ...], Palette]:
    """Class names and colours from the packaged metadata of `name`."""
    metadata = load_metadata(name)
    return tuple(metadata["classes"]), tuple((red, green, blue) for red, green, blue in metadata["palette"])


def to_sample(pair: Pair, settings: str) -> RawSample:
    """`pair` as a sample whose stamp holds `settings`, too."""
    image, label = (Entry(file, "None") if isinstance(file, str) else file for file in pair[1:])
    return RawSample(
        key=sample_key(pair.name),
        image=image.uri,
        label=label.uri,
        stamp=" ".join(filter(None, (image.stamp, label.stamp, settings))),
        image_extent=image.extents[0] if image.extents else None,
        label_extents=label.extents,
        image_bytes=image.num_bytes,
    )


def _read(uri: str, what: str, extent: Extent | None) -> bytes:
    try:
        return archive.read_file(uri) if extent is None else archive.read_extent(extent)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"is missing: there is no such {what}"
        raise RejectedSampleError(uri, reason, "add it or remove the sample") from error
    except ExtentError as error:
        raise RejectedSampleError(uri, str(error), error.remedy) from error
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise RejectedSampleError(uri, reason, "check the file and its permissions") from error
