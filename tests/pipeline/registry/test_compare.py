from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import segvit
from pipeline import storage
from pipeline.config import EvaluateConfig, RuntimeConfig
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import evaluate_part
from pipeline.evaluation.per_image import write_counts
from pipeline.records import ShardSet
from pipeline.registry import store
from pipeline.registry.compare import compare_versions
from pipeline.reports.comparison_page import PAGE, write_comparison
from pipeline.storage.names import COUNTS_FILE
from pipeline.workflow.tracking import Tracking
from segvit.metrics import segmentation_metrics

NAMES = tuple([str(digit) for digit in range(10)] + ["background"])
PALETTE = [[20 * index, 255 - 20 * index, 128] for index in range(11)]


class Scored(NamedTuple):
    """Two registered versions of random weights, scored on six images; what was counted of each."""

    tracking: Tracking
    name: str
    parts: tuple[Any, Any]


@pytest.fixture(scope="module")
def scored(store_uri: str, trained: Any, digits_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    place = tmp_path_factory.mktemp("scored")
    tracking = Tracking(store_uri, f"test-{uuid.uuid4().hex[:12]}", str(place / "mlartifacts"))
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        settings = segvit.ModelConfig(
            backbone="vit_tiny_patch16_224", image_size=(48, 64), out_layers=(1, 3), decoder_layers=1
        )
        model = segvit.build_model(settings, 11).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = place / f"model{seed}"
        segvit.save_checkpoint(folder / "checkpoint", model, {"class_names": list(NAMES), "palette": PALETTE})
        config = EvaluateConfig(num_examples=1)
        part = evaluate_part(str(folder / "checkpoint"), digits_shards, config, 0, 1, RuntimeConfig())
        metrics = segmentation_metrics(part.confusion.matrix)
        digest = storage.file_digest(str(folder / "checkpoint/model.safetensors"))
        store.register_model(
            tracking,
            tracking.experiment,
            trained.checkpoint.model_copy(update={"uri": str(folder / "checkpoint"), "digest": digest}),
            trained.scored(
                metrics.miou,
                checkpoint_digest=digest,
                data_digest=digits_shards.splits["val"].digest,
                uri=str(folder),
                num_images=6,
                class_names=NAMES,
                per_class_iou=tuple(None if np.isnan(iou) else iou for iou in metrics.per_class_iou),
                per_class_accuracy=(None,) * 11,
                counts_digest=write_counts(part.counts, str(folder / COUNTS_FILE)),
            ),
            digits_shards,
            run_id=tracking.client().create_run(tracking.experiment_id()).info.run_id,
            flow_run_id="flow",
        )
        parts.append(part)
    return Scored(tracking, tracking.experiment, (parts[0], parts[1]))


@contextmanager
def tag_changed(scored: Scored, key: str, value: str) -> Iterator[None]:
    """Another value of a tag of version 2 for a while."""
    was = store.version_tags(scored.tracking, scored.name, 2)[key]
    store.set_version_tags(scored.tracking, scored.name, 2, {key: value})
    try:
        yield
    finally:
        store.set_version_tags(scored.tracking, scored.name, 2, {key: was})


def test_compare_versions__figures_are_those_of_the_evaluations(scored: Scored) -> None:
    comparison = compare_versions(scored.tracking, scored.name, 1, 2)
    mious = [segmentation_metrics(part.confusion.matrix).miou for part in scored.parts]
    assert comparison.difference == pytest.approx(mious[1] - mious[0], abs=1e-15)
    assert comparison.interval.low <= comparison.difference <= comparison.interval.high
    assert comparison.interval.resamples == 10_000
    by_image = [{score.key: score.miou for score in part.scores} for part in scored.parts]
    change = {key: by_image[1][key] - by_image[0][key] for key in by_image[0]}
    assert comparison.wins == sum(value > 0 for value in change.values())
    assert comparison.losses == sum(value < 0 for value in change.values())
    assert comparison.wins + comparison.losses + comparison.ties == 6
    ranked = sorted(change.items(), key=lambda item: -item[1])
    for found, expected in ((comparison.gains, ranked), (comparison.drops, ranked[::-1])):
        wanted = [item for item in expected[:4] if item[1] * expected[0][1] > 0]
        assert [image.key for image in found] == [key for key, _ in wanted]
        assert [image.difference for image in found] == pytest.approx([value for _, value in wanted])
    back = compare_versions(scored.tracking, scored.name, 2, 1)
    assert [(image.key, -image.difference) for image in back.gains + back.drops] == [
        (image.key, image.difference) for image in comparison.drops + comparison.gains
    ]
    assert len(comparison.gains + comparison.drops) >= 2
    assert (back.wins, back.losses) == (comparison.losses, comparison.wins)
    per_class = [segmentation_metrics(part.confusion.matrix).per_class_iou for part in scored.parts]
    assert len(comparison.classes) == 11
    for row, before, after in zip(comparison.classes, *per_class, strict=True):
        if row.difference is None:
            assert np.isnan(before) or np.isnan(after)
        else:
            assert row.difference == pytest.approx(after - before)


def test_compare_versions__what_cannot_be_compared(scored: Scored) -> None:
    tracking, name = scored.tracking, scored.name
    with pytest.raises(UserError, match="version 1 is named twice; name two versions to compare"):
        compare_versions(tracking, name, 1, 1)
    with pytest.raises(UserError, match=rf"model {name} has no version 7 in "):
        compare_versions(tracking, name, 1, 7)
    evaluation = store.get_version(tracking, name, 2).evaluation
    elsewhere = evaluation.model_copy(update={"data_digest": "f" * 64})
    with (
        tag_changed(scored, store.EVALUATION, elsewhere.to_json()),
        pytest.raises(UserError, match=r"^version 1 was scored on data \w{8}, ") as raised,
    ):
        compare_versions(tracking, name, 1, 2)
    assert str(raised.value).endswith(
        "version 2 on data ffffffff: not comparable; score it like the other: "
        f"segvit evaluate models:/{name}/1 models:/{name}/2"
    )
    counts = Path(evaluation.uri) / COUNTS_FILE
    content = counts.read_bytes()
    counts.write_bytes(content[:-1] + b"\0")
    with pytest.raises(UserError, match=r"no counts of single images: .* has changed; run its flow again"):
        compare_versions(tracking, name, 1, 2)
    counts.write_bytes(content)


def test_write_comparison__pictures_show_image_truth_and_both_predictions(scored: Scored, tmp_path: Path) -> None:
    comparison = compare_versions(scored.tracking, scored.name, 1, 2)
    written = write_comparison(scored.tracking, comparison, tmp_path / "out")
    assert written.note is None
    assert len(written.files) == 1 + len(comparison.gains) + len(comparison.drops)
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count('<img src="data:image/png;base64,') == len(written.files) - 1
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert f"mIoU {comparison.difference:+.4f}" in page
    chosen = (comparison.gains + comparison.drops)[0]
    examples = [
        example for part in scored.parts for example in (*part.best, *part.worst) if example.score.key == chosen.key
    ]
    with Image.open(written.files[1]) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert pixels.shape[1] >= 4 * 96 + 3 * 6
    if examples:
        image = examples[0].image
        assert (pixels[20:116, :96] == image).all()
        assert (pixels[20:116, 102:198] == segvit.overlay(image, examples[0].label, PALETTE)).all()
    # Recounting what the pictures show gives the figures beside them.
    for place, version in enumerate((comparison.first, comparison.second)):
        model, _ = segvit.load_checkpoint(Path(version.evaluation.uri) / "checkpoint")
        assert version.version == place + 1
        left = 2 * 102 + place * 102
        image = pixels[20:116, :96].astype(np.uint8)
        predicted = segvit.predict(model, image).numpy()
        assert (pixels[20:116, left : left + 96] == segvit.overlay(image, predicted, PALETTE)).all()


def test_write_comparison__replaces_nothing_unless_told(scored: Scored, tmp_path: Path) -> None:
    comparison = compare_versions(scored.tracking, scored.name, 1, 2)
    write_comparison(scored.tracking, comparison, tmp_path / "out")
    with pytest.raises(UserError, match=r"compare.html exists; choose another folder or use --overwrite"):
        write_comparison(scored.tracking, comparison, tmp_path / "out")
    write_comparison(scored.tracking, comparison, tmp_path / "out", overwrite=True)


def test_write_comparison__without_the_shard_set_says_so(scored: Scored, tmp_path: Path) -> None:
    comparison = compare_versions(scored.tracking, scored.name, 1, 2)
    shards = ShardSet.from_json(store.version_tags(scored.tracking, scored.name, 2)[store.SHARD_SET])
    gone = shards.model_copy(update={"uri": str(tmp_path / "gone")})
    with tag_changed(scored, store.SHARD_SET, gone.to_json()):
        written = write_comparison(scored.tracking, comparison, tmp_path / "out")
    assert written.files == [tmp_path / "out" / PAGE]
    assert written.note is not None
    assert written.note.startswith(f"no pictures: no shard set at {tmp_path / 'gone'}: manifest.json is missing")
    assert "no pictures: no shard set at" in (tmp_path / "out" / PAGE).read_text()
