"""How samples are parted into splits: what people call the splits, and the draw of a val split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable
from typing import TypeVar

from pipeline.config import DrawnSplit
from pipeline.errors import UserError, shown

T = TypeVar("T", bound=Hashable)
SPLITS = ("train", "val", "test")
MOST_SHARE = 1.5  # of the fraction that is asked for
# By what folders and lists are called, in lower case.
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_FOLDERS = tuple(name for spelled in _SPLIT_NAMES for name in (spelled, spelled.capitalize()))


def first_repeated(names: Iterable[T]) -> T | None:
    """The first of `names` that was there before; None where each is there once."""
    seen: set[T] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def split_of(name: str) -> str | None:
    """The split that a folder or a list called `name` is of; None where it is of none."""
    return _SPLIT_NAMES.get(name.lower())


def split_in(path: str) -> str | None:
    """The split that a part of `path` is called by: instances_train2017.json, valid/_annotations.coco.json."""
    return next(filter(None, map(split_of, re.split("[^A-Za-z]+", path))), None)


def folders_by_split(names: Iterable[str], where: str) -> dict[str, str]:
    """Those of `names` that are called as splits are, train first; raises UserError for two of one split."""
    found: dict[str, str] = {}
    for name in names:
        split = split_of(name)
        if split is not None and found.setdefault(split, name) != name:
            raise UserError(f"{where} holds {found[split]} and {name}, both of split {split!r}; keep one of the two")
    return {split: found[split] for split in SPLITS if split in found}


def draw_val(names: Iterable[str], config: DrawnSplit, seed: int, section: str) -> set[str]:
    """Those of `names` that a hash draws for val: by the name, or its group, and the seed alone.

    Of a few the hash may draw none, or most: one is always drawn, and never more than half as many again as asked for.
    `section` is the section of the experiment file that `config` is. Raises UserError for a name without a group, and
    where there is one unit alone.
    """
    assert config.val_fraction is not None
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(_unit(name, config.group, section), []).append(name)
    if len(units) == 1:
        (unit,) = units
        what = "image" if config.group is None else "group"
        raise UserError(f"{section}.val_fraction has one {what} to draw from, {shown(unit)}; add others")
    number = {unit: _hash(f"{seed}:{unit}") for unit in units}
    num_drawn = sum(value < config.val_fraction * 2**64 for value in number.values())
    most = min(max(1, round(MOST_SHARE * config.val_fraction * len(units))), len(units) - 1)
    drawn = sorted(units, key=number.__getitem__)[: min(max(num_drawn, 1), most)]
    return {name for unit in drawn for name in units[unit]}


def _unit(name: str, group: str | None, section: str) -> str:
    if group is None:
        return name
    found = re.search(group, name)
    if found is None or found[1] is None:
        raise UserError(
            f"{section}.group {group!r} finds nothing in {shown(name)}; give a pattern that every name holds"
        )
    return found[1]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8])
