"""JSON from elsewhere, parsed within bounds: neither its depth nor the number of its values can end the process."""

from __future__ import annotations

import json
from typing import Any

# Each takes up to 100 bytes as an object: a gigabyte at most, and far more than one image's annotations.
MAX_VALUES = 1 << 23


def parse_json(data: bytes | str) -> Any:
    """The content of a JSON text; raises ValueError, also for one that is nested too deep or has too many values."""
    refuse_many_values(data)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def refuse_many_values(data: bytes | str) -> None:
    """Raise ValueError where a JSON text holds more than MAX_VALUES, by the signs that part and open them."""
    if isinstance(data, bytes):
        num_values = data.count(b",") + data.count(b"[") + data.count(b"{")
    else:
        num_values = data.count(",") + data.count("[") + data.count("{")
    if num_values > MAX_VALUES:
        raise ValueError(f"it holds about {num_values} values, more than the {MAX_VALUES} allowed")
