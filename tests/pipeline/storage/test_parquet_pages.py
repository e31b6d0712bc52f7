"""The lengths of Parquet's pages are known before Arrow unpacks them."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage.parquet_pages import ParquetPages


def packed(table: pa.Table, **settings: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "settings", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False, "compression": "gzip"}]
)
def test_refuse_long__counts_what_arrow_counts(settings: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"a": [rng.bytes(300) for _ in range(4000)], "b": list(range(4000)), "c": [[1, 2]] * 4000})
    data = packed(table, row_group_size=1500, **settings)
    pages, footer = ParquetPages(io.BytesIO(data)), pq.ParquetFile(io.BytesIO(data)).metadata
    for group in range(3):
        # Arrow counts the heads, too.
        length = footer.row_group(group).total_byte_size
        pages.refuse_long(group, length)
        with pytest.raises(ValueError, match="allowed once they are unpacked"):
            pages.refuse_long(group, int(0.9 * length))
        pages.refuse_long(group, footer.row_group(group).column(1).total_uncompressed_size, 1)
    with pytest.raises(ValueError, match="it has no row group 3"):
        pages.refuse_long(3, 1)


def test_refuse_long__whatever_the_footer_says() -> None:
    table = pa.table({"image": pa.array([bytes(1 << 26)], pa.binary())})
    data = bytearray(packed(table, compression="zstd", use_dictionary=False, write_statistics=False))
    footer = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    for length in (footer.total_byte_size, footer.column(0).total_uncompressed_size):
        said = signed(length)
        place = data.rfind(said)
        # Of as many bytes: 2.
        data[place : place + len(said)] = b"\x84" + b"\x80" * (len(said) - 2) + b"\0"
    assert pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).total_byte_size == 2
    with pytest.raises(ValueError, match="its pages have more than the 1048576 bytes allowed once they are unpacked"):
        ParquetPages(io.BytesIO(data)).refuse_long(0, 1 << 20)


def signed(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it."""
    rest, parts = 2 * number, []
    while rest > 127:
        parts.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*parts, rest])


def test_damage__is_a_value_error() -> None:
    good = packed(pa.table({"a": [b"x" * 100] * 10}))
    rng = np.random.default_rng(1)
    for _ in range(500):
        data = bytearray(good)
        for place in rng.integers(len(data) - 200, len(data), 3):
            data[place] = rng.integers(256)
        try:
            ParquetPages(io.BytesIO(data)).refuse_long_in_all(1 << 20)
        except ValueError:
            continue
