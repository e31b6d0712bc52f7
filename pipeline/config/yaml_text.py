"""YAML from elsewhere, parsed within bounds: neither its length, its depth nor its aliases can end the process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# Far above any experiment or list of classes: PyYAML reads a megabyte in three seconds.
MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 50
# With all aliases written out.
MAX_VALUES = 1 << 17
MAX_BITS = 64


def read_yaml(path: str | Path) -> Any:
    """The content of the YAML file at `path`; raises OSError, and ValueError as `parse_yaml` does."""
    with Path(path).open(encoding="utf-8") as file:
        return parse_yaml(file.read(MAX_CHARACTERS + 1))


def parse_yaml(text: str) -> Any:
    """The content of a YAML text; raises ValueError for what is none, and for one beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than the {MAX_CHARACTERS} characters allowed")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than the {MAX_DEPTH} levels allowed") from error
    # Of types that are made of scalars: a date in the 13th month, a number of too many digits.
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"a value cannot be read ({' '.join(str(error).split())})") from error
    _Counter().count(content, 0)
    return content


class _Counter:
    def __init__(self) -> None:
        self.num_values = 0

    def count(self, node: Any, depth: int) -> None:
        """Raise ValueError where there is more below `node` than the bounds allow; what holds itself has no end."""
        self.num_values += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than the {MAX_DEPTH} levels allowed")
        if self.num_values > MAX_VALUES:
            raise ValueError(f"it holds more than the {MAX_VALUES} values allowed, its aliases written out")
        if isinstance(node, int) and node.bit_length() > MAX_BITS:
            raise ValueError(f"it holds a whole number of {node.bit_length()} bits, more than the {MAX_BITS} allowed")
        for inner in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
            self.count(inner, depth + 1)
