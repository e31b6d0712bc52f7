"""Keys of experiment files as earlier releases called them, brought to today's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.errors import UserError

_LOSS_WEIGHTS = {f"{term}_weight": term for term in ("class", "focal", "dice")}


def rename_former_keys(tree: dict[str, Any]) -> list[str]:
    """Rename former keys in a parsed experiment file, in place; a line for each, as `old is new now`.

    Raises UserError for a setting that is given under both names.
    """
    return list(_rename(tree))


def _rename(tree: dict[str, Any]) -> Iterator[str]:
    loss, tune, train = (_section(tree, name) for name in ("loss", "tune", "train"))
    yield from _move(_section(tree, "model"), "model", {"crop": "image_size"})
    yield from _move(loss, "loss", _LOSS_WEIGHTS)
    yield from _move(_section(train, "augmentation"), "train.augmentation", {"recipe": "strength"})
    if "poly_power" in train:
        train.setdefault("schedule", {"name": "poly", "power": train.pop("poly_power")})
        yield "train.poly_power is train.schedule {name: poly, power: ...} now"
    former = {**{name: f"loss.{term}" for name, term in _LOSS_WEIGHTS.items()}, "learning_rate": "train.learning_rate"}
    ranges = {path: tune.pop(name) for name, path in former.items() if name in tune}
    if ranges:
        # What was not given had a range all the same.
        ranges = {"loss.class": [0.3, 3.0], "loss.focal": [5.0, 80.0], "loss.dice": [0.3, 3.0], **ranges}
        found = {path: {"log_uniform": bounds} for path, bounds in ranges.items() if bounds is not None}
        tune["space"] = {**found, **tune.get("space", {})}
        yield "the ranges of tune are tune.space {path: {log_uniform: [low, high]}} now"
    for name, variant in _section(tree, "variants").items():
        if isinstance(variant, dict) and variant.pop("localize_upsampling", False):
            raise UserError(
                f"variants.{name}.localize_upsampling is no more: remove it, and use structure: anchored, which "
                "learns from the first step, or shrunk, which starts at random as published"
            )
        if isinstance(variant, dict) and "learning_rate" in variant:
            own = variant.setdefault("train", {})
            yield from _move(variant, f"variants.{name}", {"learning_rate": "train.learning_rate"})
            own["learning_rate"] = variant.pop("train.learning_rate")
        kind = variant.get("loss") if isinstance(variant, dict) else None
        if isinstance(kind, str):
            del variant["loss"]
            if kind != "mask":
                variant["loss"] = {kind: 1.0}
            yield f"variants.{name}.loss {kind} is a mapping of weights by loss term now"


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _move(section: dict[str, Any], path: str, names: dict[str, str]) -> Iterator[str]:
    for old, new in names.items():
        if old in section:
            if new in section:
                raise UserError(f"{path}.{old} is the former name of {path}.{new}, and both are given; keep the latter")
            section[new] = section.pop(old)
            yield f"{path}.{old} is {path}.{new} now"
