"""Arrays of a large JSON file, element by element, with their places."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets import json_stream
from pipeline.datasets.json_stream import as_text, read_elements, read_items
from tests.examples import num_examples

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=num_examples(25), deadline=None)
@given(
    content=st.dictionaries(st.text(max_size=5), VALUES | st.lists(VALUES, max_size=6), max_size=5),
    indent=st.sampled_from([None, 2]),
    chunk=st.sampled_from([1, 3, 64, 1 << 20]),
)
def test_read_elements__all_values_and_their_bytes(content: dict[str, Any], indent: int | None, chunk: int) -> None:
    data = json.dumps(content, indent=indent, ensure_ascii=True).encode()
    before = json_stream.CHUNK_BYTES
    json_stream.CHUNK_BYTES = chunk
    try:
        elements = list(read_elements(io.BytesIO(data)))
    finally:
        json_stream.CHUNK_BYTES = before
    expected = [(key, value) for key, values in content.items() if isinstance(values, list) for value in values]
    assert [(element.key, element.value) for element in elements] == expected
    for element in elements:
        assert json.loads(data[element.offset : element.offset + element.size]) == element.value


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b'{"a": [1, 2', b'{"a" 1}', b'{"a": [1}', b'{"a": [1 2]', b'{"a": nonsense}']
)
def test_read_elements__damage_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        list(read_elements(io.BytesIO(data)))


def test_read_elements__an_endless_value_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_ELEMENT_BYTES", 1000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 100)
    file = io.BytesIO(b'{"a": ["' + b"x" * 100_000)
    with pytest.raises(ValueError, match="is no JSON or exceeds"):
        list(read_elements(file))
    assert file.tell() < 5000


def test_read_items__of_the_outermost_array_and_their_bytes() -> None:
    values = [{"a": [1, 2]}, [], "x", 3]
    data = json.dumps(values, indent=1).encode()
    items = list(read_items(io.BytesIO(data)))
    assert [item.value for item in items] == values
    assert [json.loads(data[item.offset : item.offset + item.size]) for item in items] == values
    with pytest.raises(ValueError, match=r"byte 0 is '\{' and should be '\['"):
        list(read_items(io.BytesIO(b"{}")))


def test_as_text__half_a_character_is_replaced() -> None:
    assert as_text("a\ud800b") == "a?b"
    assert as_text("\u00e4") == "\u00e4"
    assert as_text("\u00c3\u00a4") == "\u00e4"
