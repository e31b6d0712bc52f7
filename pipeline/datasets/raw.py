"""What every raw data set offers, and the helpers that the layouts share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.archive import Extent
from segvit.image_files import IGNORE_INDEX

MAX_REASON = 600  # characters of what a rejected sample is called, and why
Palette = tuple[tuple[int, int, int], ...]


class RejectedSampleError(Exception):
    """A sample that may not enter the shards: `file` is at fault, for `reason`, and `remedy` helps.

    `unknown`: ids or colours in it that no class has, with their pixels.
    """

    def __init__(self, file: str, reason: str, remedy: str, unknown: Mapping[str, int] | None = None) -> None:
        # Names and labels from a file may be of any length.
        file, reason = _shortened(file), _shortened(reason)
        super().__init__(f"{file} {reason}; {remedy}")
        self.file = file
        self.reason = reason
        self.remedy = remedy
        self.unknown = dict(unknown or {})


def _shortened(text: str) -> str:
    line = " ".join(text.splitlines())
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


@dataclass(frozen=True, slots=True)
class RawSample:
    """One image and its label map, named but not yet read.

    Attributes:
        key: unique in its split and without dots; the sample's name in the shards.
        image: where the image is, as the user knows it.
        label: where the label map is.
        stamp: changes when either file changes.
        image_extent: where the image lies, if it does so inside another file, such as an archive.
        label_extents: of the label map likewise; more than one where it is put together from parts.
        image_bytes: the image's size by its listing; 0 where that does not tell.
        max_long_side: a label map of more pixels than are decoded whole is read at this size.
    """

    key: str
    image: str
    label: str
    stamp: str
    image_extent: Extent | None = None
    label_extents: tuple[Extent, ...] = ()
    image_bytes: int = 0
    max_long_side: int | None = None


class LazySamples(Sequence[RawSample]):
    """Samples that are made when they are asked for: where they lie is many more bytes than their numbers."""

    def __init__(self, make: Callable[[int], RawSample], places: Sequence[int]) -> None:
        self._make = make
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> RawSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RawSample]: ...
    def __getitem__(self, index: int | slice) -> RawSample | Sequence[RawSample]:
        if isinstance(index, slice):
            return LazySamples(self._make, self._places[index])
        return self._make(self._places[index])


Colour = tuple[int, int, int]


class RawPair(NamedTuple):
    """A sample's content.

    Attributes:
        image: the original file, of a format that `segvit.image_files` reads.
        label: (H, W) class ids, 255 where ignored.
        index_colours: where ids are indices into the label file's palette and nothing says which colours they should
            have, those that they have; all files must agree.
    """

    image: bytes
    label: NDArray[np.uint8]
    index_colours: Mapping[int, Colour] = MappingProxyType({})


class RawDataset(Protocol):
    """A labelled data set as its publisher ships it. Instances are picklable and cheap to send to a task."""

    @property
    def name(self) -> str:
        """The name it has in configurations."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id."""

    @property
    def palette(self) -> Palette:
        """RGB colours by class id."""

    def splits(self) -> tuple[str, ...]:
        """The splits that are there, train first; raises UserError where train or val is missing."""

    def samples(self, split: str) -> Sequence[RawSample]:
        """The samples of `split`, always in the same order."""

    def read(self, sample: RawSample) -> RawPair:
        """The content of `sample`; raises RejectedSampleError."""

    def source_digest(self) -> str:
        """sha256 over the settings and all files' names, sizes and times: cheap, and it tells a change."""


def sample_key(name: str) -> str:
    """A shard key for the file `name` without its suffix.

    Dots end a key in WebDataset and slashes make folders: both, and the escape sign itself, are written as
    `%` and two hexadecimal digits, so different names never meet.
    """
    return "".join(f"%{ord(sign):02X}" if sign in "%./" else sign for sign in name)


def digest_of(parts: Iterable[Any]) -> str:
    """sha256 over JSON-able `parts`, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def load_metadata(name: str) -> dict[str, Any]:
    """The packaged metadata of data set `name`: classes, palette, ids."""
    text = resources.files("pipeline.datasets").joinpath(f"{name}.json").read_text(encoding="utf-8")
    return cast("dict[str, Any]", json.loads(text))


class LabelIds:
    """From the ids a publisher writes to class ids.

    `classes` maps raw ids to class ids, `ignored` lists raw ids that mean no class, `rule` says it in words.
    """

    def __init__(self, classes: dict[int, int], ignored: Sequence[int], rule: str) -> None:
        self._rule = rule
        self._table = np.full(1 << 16, -1, dtype=np.int16)
        for raw, class_id in classes.items():
            self._table[raw] = class_id
        self._table[list(ignored)] = IGNORE_INDEX

    def to_classes(self, raw: NDArray[np.integer], file: str) -> NDArray[np.uint8]:
        """(H, W) class ids of the (H, W) `raw` ids in `file`; raises RejectedSampleError for unknown ids."""
        if raw.min(initial=0) < 0 or raw.max(initial=0) >= self._table.size:
            raise self._reject(raw[(raw < 0) | (raw >= self._table.size)], file)
        classes = self._table[raw]
        if (classes < 0).any():
            raise self._reject(raw[classes < 0], file)
        return cast("NDArray[np.uint8]", classes.astype(np.uint8))

    def _reject(self, pixels: NDArray[np.integer], file: str) -> RejectedSampleError:
        unknown, counts = np.unique(pixels, return_counts=True)
        ids = ", ".join(str(value) for value in unknown[:5]) + (", ..." if unknown.size > 5 else "")
        noun = "label id" if unknown.size == 1 else "label ids"
        reason = f"holds {noun} {ids}, outside the class list ({self._rule})"
        found = {str(value): int(count) for value, count in zip(unknown, counts, strict=True)}
        return RejectedSampleError(file, reason, "correct the label map or remove the sample", found)
