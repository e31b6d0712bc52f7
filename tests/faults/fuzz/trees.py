"""Mutations of JSON and YAML: of the tree that a text stands for, and of the text itself."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

from tests.faults.mutations import flip_bits, overwrite, splice, truncate

EXTREMES: tuple[Any, ...] = (
    *(2**31 - 1, -(2**31), 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, -1, 0, 1, 255, 256, 65536, 10**9),
    *(float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e-320, 0.5, True, False, None),
    *("", "0", "x" * 5000, "../../etc/passwd", "/etc/passwd", "a\0b", "a::file:///etc/passwd", "\ud800", "😀", "C:\\x"),
    *([], {}, [[]], [{}], [1, 2, 3], {"size": [1, 1], "counts": "0"}, [[0, 0, 9, 9, 0, 9]], [2**62] * 4),
)
NUMBERS = ("9" * 6000, "-1", "1e999", "NaN", "Infinity", "0.1e308", "9223372036854775807", "4611686018427387904")


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of `tree` with one to three of its nodes replaced, removed, doubled, moved or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return tree
        parent, key = rng.choice(places)
        match rng.choice(["replace", "replace", "replace", "remove", "double", "move", "nest", "grow"]):
            case "replace":
                parent[key] = copy.deepcopy(rng.choice(EXTREMES))
            case "remove":
                del parent[key]
            case "double" if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case "move":
                other, at = rng.choice(places)
                if other is not parent:
                    parent[key] = copy.deepcopy(other[at]) if _is_there(other, at) else None
            case "nest":
                parent[key] = [parent[key]] if rng.random() < 0.5 else {"x": parent[key]}
            case "grow" if isinstance(parent[key], str | list):
                parent[key] = parent[key] * rng.choice([2, 50, 2000])
    return tree


def mutate_json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What was changed, and the text."""
    match rng.choice(
        ["tree"] * 5 + ["number", "number", "deep", "twice", "truncated", "bits", "overwritten", "splice"]
    ):
        case "tree":
            return "tree", json.dumps(mutate_tree(json.loads(data), rng)).encode("utf-8", "surrogatepass")
        case "number":
            return "number", _replace_number(data, rng)
        case "deep":
            depth = rng.choice([50, 1100, 100_000, 1_000_000])
            deep = rng.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth])
            return "deep", _replace_value(data, deep, rng)
        case "twice":
            keys = re.findall(rb'"\w+": ?', data)
            return "key twice", data.replace(b"{", b"{" + rng.choice(keys or [b'"a":']) + b"-1,", 1)
        case "truncated":
            return "truncated", truncate(data, rng)
        case "bits":
            return "bits flipped", flip_bits(data, rng)
        case "overwritten":
            return "overwritten", overwrite(data, rng)
    return "spliced", splice(data, rng)


def _replace_number(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return data
    place = rng.choice(found)
    return data[: place.start()] + rng.choice(NUMBERS).encode() + data[place.end() :]


def _replace_value(data: bytes, value: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb'(?<=[:\[,])\s*("[^"]*"|-?\d+(\.\d+)?)', data))
    if not found:
        return value
    place = rng.choice(found)
    return data[: place.start()] + value + data[place.end() :]


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Each node but the outermost, as what holds it and the key there."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *_places(node[key])]]


def _is_there(parent: Any, key: Any) -> bool:
    return key in parent if isinstance(parent, dict) else key < len(parent)
