from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets.digits import Digits
from pipeline.shards.balance import count_classes, repeat_factors
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import ShardReader
from pipeline.shards.shards import ShardSetError

SCENES = DigitsConfig(num_train=14, num_val=5)


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    config = DataConfig(dataset="digits", samples_per_shard=4, digits=SCENES)
    prepare_shards(config, str(tmp_path), progress=lambda _: None)
    return ShardReader(str(tmp_path))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shards.balance.BATCH_ROWS", 3)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("split", "count"), [("train", 14), ("val", 5)])
def test_count_classes__equals_the_label_maps(reader: ShardReader, split: str, count: int) -> None:
    labels = [Digits(SCENES, seed=0).scene(split, number)[1] for number in range(count)]
    counts = count_classes(reader, split)
    assert counts.num_images == count
    assert counts.num_pixels == sum(label.size for label in labels)
    for number in range(11):
        assert counts.pixels[number] == sum(int((label == number).sum()) for label in labels)
        assert counts.images[number] == sum(bool((label == number).any()) for label in labels)
    assert counts.ignored_pixels == sum(int((label == 255).sum()) for label in labels)


def rewrite_class_pixels(reader: ShardReader, rows: list[list[int]]) -> None:
    file = Path(reader.uri) / "index.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("class_pixels")
    column = pa.array(rows, table.schema.field("class_pixels").type)
    pq.write_table(table.set_column(place, table.schema.field("class_pixels"), column), file)


@pytest.mark.usefixtures("small_batches")
def test_repeat_factors__are_those_of_the_formula(reader: ShardReader) -> None:
    rows = np.zeros((19, 11), dtype=int)
    rows[:13, 0] = 9  # class 0 in all train images but the last, which has none
    rows[:7, 1] = 1  # class 1 in half of them: at the threshold
    rows[2, 2] = 5  # class 2 in one of 14
    rows[[2, 3], 3] = 5  # class 3 in two
    rows[14:, 4] = 5  # in val only
    rewrite_class_pixels(reader, rows.tolist())
    expected = np.ones(14)
    expected[2], expected[3] = np.sqrt(0.5 * 14), np.sqrt(0.5 * 14 / 2)
    np.testing.assert_allclose(repeat_factors(reader, "train", 0.5), expected)
    np.testing.assert_array_equal(repeat_factors(reader, "train", 0.01), np.ones(14))


def test_count_classes__refuses_other_classes(reader: ShardReader) -> None:
    rewrite_class_pixels(reader, [[1] * 10] * 19)
    with pytest.raises(ShardSetError, match=r"index\.parquet has not 11 classes a sample; prepare"):
        count_classes(reader, "train")
