"""An ablation's table: its rows, its three files, and how sure its means are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.evaluation.bootstrap import mean_interval
from pipeline.evaluation.per_image import CountTable, ImageCounts, read_counts, write_counts
from pipeline.records import Checkpoint, Evaluation
from pipeline.reports.study import Cell, markdown, page, study_rows, write_study
from segvit.metrics import segmentation_metrics

NUM_IMAGES = 12


def scored(folder: Path, variant: str, seed: int, accuracy: float) -> Cell:
    """A model that is right on that share of the pixels, more or less from image to image."""
    rng = np.random.default_rng(seed)
    images, total = [], np.zeros((2, 2), dtype=np.int64)
    for number in range(NUM_IMAGES):
        right = rng.binomial(100, min(0.99, accuracy + rng.normal(0, 0.05)), size=2)
        matrix = np.array([[right[0], 100 - right[0]], [100 - right[1], right[1]]])
        images.append(ImageCounts.of(f"image-{number:02}", matrix))
        total += matrix
    uri = f"{folder}/{variant}-{seed}"
    digest = write_counts(images, f"{uri}/counts.parquet")
    metrics = segmentation_metrics(total)
    evaluation = Evaluation(
        variant=variant,
        checkpoint_digest=f"{variant}{seed}",
        data_digest="d",
        split="val",
        num_images=NUM_IMAGES,
        miou=metrics.miou,
        macc=metrics.macc,
        aacc=metrics.aacc,
        boundary_iou=None,
        class_names=("a", "b"),
        per_class_iou=tuple(metrics.per_class_iou),
        per_class_accuracy=tuple(metrics.per_class_acc),
        gflops=2.5,
        parameters=1_500_000,
        latency_ms=10.0 + seed,
        cost_size=(32, 32),
        uri=uri,
        counts_digest=digest,
    )
    checkpoint = Checkpoint(
        variant=variant,
        uri=uri,
        digest=f"{variant}{seed}",
        step=40,
        miou=None,
        history_uri=None,
        train_seconds=100.0 + 10 * seed,
        started_from="full" if variant == "shrunk" else None,
    )
    return Cell(seed, checkpoint, evaluation, "random")


def test_study_row__means_over_the_seeds(tmp_path: Path) -> None:
    cells = [scored(tmp_path, "shrunk", seed, 0.7 + 0.1 * seed) for seed in (0, 1)]
    [row] = study_rows({"shrunk": cells})
    assert row.mious == tuple(cell.evaluation.miou for cell in cells)
    assert row.miou == pytest.approx(sum(row.mious) / 2)
    assert row.low < row.miou < row.high
    assert (row.seeds, row.step, row.train_seconds, row.latency_ms) == ((0, 1), 40, 105.0, 10.0)
    assert (row.started_from, row.weights, row.num_images) == ("full", "random", NUM_IMAGES)


def test_mean_interval__one_model_is_as_sure_as_its_images_several_less_where_seeds_differ(tmp_path: Path) -> None:
    tables = [read_counts(scored(tmp_path, "full", seed, 0.6 + 0.2 * seed).evaluation) for seed in (0, 1)]
    # By hand, with another generator: resampled means of images, and of models.
    rng = np.random.default_rng(7)

    def miou(table: CountTable, images: np.ndarray) -> float:
        return float((table.intersection[images].sum(0) / table.union[images].sum(0)).mean())

    draws = [rng.integers(0, NUM_IMAGES, NUM_IMAGES) for _ in range(4000)]
    alone = [miou(tables[0], images) for images in draws]
    assert mean_interval(tables[:1]) == pytest.approx(np.quantile(alone, [0.025, 0.975]), abs=0.005)
    both = [np.mean([miou(tables[model], images) for model in rng.integers(0, 2, 2)]) for images in draws]
    found = mean_interval(tables)
    assert found == pytest.approx(np.quantile(both, [0.025, 0.975]), abs=0.005)
    assert found[1] - found[0] > 1.5 * (np.quantile(alone, 0.975) - np.quantile(alone, 0.025))
    assert mean_interval([tables[0], tables[0]]) == pytest.approx(mean_interval(tables[:1]), abs=0.005)


def test_mean_interval__other_images_are_refused(tmp_path: Path) -> None:
    table = read_counts(scored(tmp_path, "full", 0, 0.7).evaluation)
    other = CountTable(tuple(f"x{key}" for key in table.keys), table.intersection, table.predicted, table.labelled)
    for tables in ([table, other], []):
        with pytest.raises(ValueError, match="must hold the same images, at least one"):
            mean_interval(tables)
    with pytest.raises(ValueError, match="2 models against 1; each needs the other of its seed"):
        mean_interval([table, table], [table])


def test_study_rows__differences_from_the_first_are_paired_by_image_and_seed(tmp_path: Path) -> None:
    cells = {
        name: [scored(tmp_path, name, seed, 0.6 + 0.2 * seed + above) for seed in (0, 1)]
        for name, above in {"first": 0.0, "second": 0.05}.items()
    }
    first, second = study_rows(cells)
    assert (first.difference, first.difference_low, first.difference_high) == (None, None, None)
    assert second.difference == pytest.approx(second.miou - first.miou)
    assert second.difference_low is not None
    assert second.difference_high is not None
    # Seeds differ by 0.2, images by 0.1, but not the difference: by hand, with another generator.
    rng = np.random.default_rng(3)
    tables = {name: [read_counts(cell.evaluation) for cell in row] for name, row in cells.items()}

    def miou(table: CountTable, images: np.ndarray) -> float:
        return float((table.intersection[images].sum(0) / table.union[images].sum(0)).mean())

    found = []
    for _ in range(4000):
        images, models = rng.integers(0, NUM_IMAGES, NUM_IMAGES), rng.integers(0, 2, 2)
        means = [np.mean([miou(tables[name][model], images) for model in models]) for name in ("second", "first")]
        found.append(means[0] - means[1])
    bounds = (second.difference_low, second.difference_high)
    assert bounds == pytest.approx(np.quantile(found, [0.025, 0.975]), abs=0.004)
    assert bounds[1] - bounds[0] < 0.5 * (second.high - second.low)


def test_write_study__the_table_in_three_forms(tmp_path: Path) -> None:
    levels = {"full": 0.85, "shrunk": 0.8}
    rows = study_rows(
        {name: [scored(tmp_path, name, seed, level) for seed in (0, 1)] for name, level in levels.items()}
    )
    target = str(tmp_path / "study")
    digest = write_study("parts <of> shrunk", rows, target)
    content = storage.read_bytes(f"{target}/study.parquet")
    assert digest == storage.file_digest(f"{target}/study.parquet")
    table = pq.read_table(io.BytesIO(content)).to_pylist()
    assert [row["variant"] for row in table] == ["full", "shrunk"]
    assert table[1]["miou"] == rows[1].miou
    assert table[1]["seeds"] == [0, 1]
    text = markdown("parts <of> shrunk", rows)
    assert text == (tmp_path / "study" / "study.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| shrunk")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == f"{rows[1].miou:.3f}"
    assert cells[2] == f"{rows[1].low:.3f} to {rows[1].high:.3f}"
    assert cells[3] == f"{rows[1].difference:+.3f} ({rows[1].difference_low:+.3f} to {rows[1].difference_high:+.3f})"
    assert cells[5:] == ["2.50", "1.50 M", "10.0 ms", "step 40, 105 s, from full", "random"]
    shown = page("parts <of> shrunk", rows)
    assert "parts &lt;of&gt; shrunk" in shown
    assert shown.count("<svg") == 1
    best = "full" if rows[0].miou > rows[1].miou else "shrunk"
    assert f'<th scope="row" class="best">{best}</th>' in shown
