"""JSON from elsewhere ends in a value or one ValueError."""

from __future__ import annotations

import pytest

from pipeline.storage.json_text import MAX_VALUES, parse_json


def test_parse_json__bounds_of_depth_values_and_digits() -> None:
    assert parse_json(b'{"a": [1, NaN]}')["a"][0] == 1
    for deep in (b"[" * 1_000_000, b'{"a":' * 1_000_000):
        with pytest.raises(ValueError, match="nested too deep"):
            parse_json(deep)
    with pytest.raises(ValueError, match="Exceeds the limit"):
        parse_json(b"9" * 10_000_000)
    many = b"[" + b"0," * MAX_VALUES + b"0]"
    with pytest.raises(ValueError, match=f"about {MAX_VALUES + 1} values, more than the {MAX_VALUES} allowed"):
        parse_json(many)
    with pytest.raises(ValueError, match=f"more than the {MAX_VALUES} allowed"):
        parse_json(many.decode())
