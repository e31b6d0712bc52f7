from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.per_image import ImageCounts, read_counts, write_counts
from pipeline.storage.names import COUNTS_FILE
from segvit.metrics import segmentation_metrics

NUM_CLASSES = 5


def matrices(number: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Confusion matrices of images in which two classes occur, another two each time."""
    rng = np.random.default_rng(number)
    found = {}
    for image in range(number):
        matrix = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
        some = rng.choice(NUM_CLASSES, 2, replace=False)
        matrix[np.ix_(some, some)] = rng.integers(0, 9000, (2, 2))
        found[f"image {number - image:02d}"] = matrix
    found["all ignored"] = np.zeros((NUM_CLASSES, NUM_CLASSES), np.int64)
    return found


def stored(folder: Path, trained: Any, counted: dict[str, Any]) -> Any:
    digest = write_counts([ImageCounts.of(*one) for one in counted.items()], str(folder / COUNTS_FILE))
    names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    return trained.scored(0.5, uri=str(folder), class_names=names, counts_digest=digest)


def test_counts__are_read_as_they_were_counted(trained: Any, tmp_path: Path) -> None:
    counted = matrices(20)
    table = read_counts(stored(tmp_path, trained, counted))
    assert table.keys == tuple(sorted(counted))
    for row, key in enumerate(table.keys):
        matrix = counted[key]
        assert (table.intersection[row] == np.diag(matrix)).all()
        assert (table.labelled[row] == matrix.sum(1)).all()
        assert (table.predicted[row] == matrix.sum(0)).all()
    rows = pq.read_metadata(tmp_path / COUNTS_FILE).num_rows
    assert rows == sum((matrix.sum(0) + matrix.sum(1) > 0).sum() for matrix in counted.values()) <= 40


def test_scores__of_images_and_of_all_are_those_of_their_confusion_matrices(trained: Any, tmp_path: Path) -> None:
    counted = matrices(6)
    table = read_counts(stored(tmp_path, trained, counted))
    expected = [segmentation_metrics(counted[key]).miou for key in table.keys]
    assert table.image_mious() == pytest.approx(expected, nan_ok=True)
    assert np.isnan(table.image_mious()[table.keys.index("all ignored")])
    whole = segmentation_metrics(np.sum(list(counted.values()), axis=0))
    assert table.class_ious() == pytest.approx(whole.per_class_iou, nan_ok=True)


def test_counts__nothing_scored_at_all(trained: Any, tmp_path: Path) -> None:
    table = read_counts(stored(tmp_path, trained, {}))
    assert (table.keys, table.intersection.shape) == ((), (0, NUM_CLASSES))


def test_read_counts__tells_what_cannot_be_used(trained: Any, tmp_path: Path) -> None:
    evaluation = stored(tmp_path, trained, matrices(3))
    file = tmp_path / COUNTS_FILE
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"no counts of single images: .*counts.parquet has changed; run its flow"):
        read_counts(evaluation)
    file.unlink()
    with pytest.raises(UserError, match=r"no counts of single images: .*counts.parquet is gone; run its flow again"):
        read_counts(evaluation)
    earlier = evaluation.model_copy(update={"counts_digest": ""})
    with pytest.raises(UserError, match=r"it was made by a release that kept no counts of single images; run its flow"):
        read_counts(earlier)
