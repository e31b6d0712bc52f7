from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segvit
from pipeline.config import EvaluateConfig, InferenceConfig, RuntimeConfig
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import _compare_ranges, check_classes, evaluate_part, write_evaluation_folder
from pipeline.records import Checkpoint, ShardSet
from pipeline.training.job import TrainJob
from pipeline.training.trainer import build_job_model
from segvit.metrics import ConfusionMatrix
from tests.pipeline.conftest import Trained

NAMES = [str(digit) for digit in range(10)] + ["background"]
PALETTE = [[20 * index, 255 - 20 * index, 128] for index in range(11)]


@pytest.fixture
def checkpoint(make_job: Callable[..., TrainJob], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = build_job_model(make_job())
    with torch.no_grad():  # far enough from the initialisation that predictions vary over the image
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    segvit.save_checkpoint(tmp_path / "checkpoint", model, {"class_names": NAMES, "palette": PALETTE})
    return tmp_path / "checkpoint"


def test_evaluate_part__parts_add_up_to_the_whole(checkpoint: Path, digits_shards: ShardSet) -> None:
    config, runtime = EvaluateConfig(num_examples=2), RuntimeConfig()
    whole = evaluate_part(str(checkpoint), digits_shards, config, 0, 1, runtime)
    parts = [evaluate_part(str(checkpoint), digits_shards, config, rank, 4, runtime) for rank in range(4)]
    merged = ConfusionMatrix(11)
    for part in parts:
        merged.merge(part.confusion)
    assert (merged.matrix == whole.confusion.matrix).all()
    assert merged.matrix.sum() == 6 * 96 * 96
    assert sorted(score.key for part in parts for score in part.scores) == sorted(score.key for score in whole.scores)
    assert len(whole.scores) == 6
    counts = {one.key: one for part in parts for one in part.counts}
    assert sum(one.intersection.sum() for one in counts.values()) == np.diag(whole.confusion.matrix).sum()
    for one in whole.counts:
        assert (one.labelled == counts[one.key].labelled).all()
        assert one.labelled.sum() == one.predicted.sum() == 96 * 96


def test_evaluate_part__keeps_the_best_and_the_worst(checkpoint: Path, digits_shards: ShardSet) -> None:
    config = EvaluateConfig(num_examples=2)
    part = evaluate_part(str(checkpoint), digits_shards, config, 0, 1, RuntimeConfig())
    ranked = sorted(part.scores, key=lambda score: score.miou)
    assert {example.score.miou for example in part.worst} == {score.miou for score in ranked[:2]}
    assert {example.score.miou for example in part.best} == {score.miou for score in ranked[-2:]}
    model, _ = segvit.load_checkpoint(checkpoint)
    for example in part.probe:
        assert (segvit.predict(model, example.image).numpy() == example.predicted).all()


def test_evaluate_part__predicts_as_configured(checkpoint: Path, digits_shards: ShardSet) -> None:
    inference = InferenceConfig(mode="slide", crop=(48, 64), stride=(32, 32), scales=(1.0, 1.5), flip=True)
    config = EvaluateConfig(num_examples=1, inference=inference)
    part = evaluate_part(str(checkpoint), digits_shards, config, 0, 1, RuntimeConfig())
    model, _ = segvit.load_checkpoint(checkpoint)
    options = inference.options()
    assert options == {"mode": "slide", "crop": [48, 64], "stride": [32, 32], "scales": [1.0, 1.5], "flip": True}
    [first, *_] = part.probe
    expected = segvit.predict(model, first.image, **options).numpy()
    assert (first.predicted == expected).all()
    assert (segvit.predict(model, first.image).numpy() != expected).any()


def test_write_evaluation_folder__files_hold_what_was_counted(
    checkpoint: Path, digits_shards: ShardSet, tmp_path: Path
) -> None:
    config = EvaluateConfig(num_examples=1)
    part = evaluate_part(str(checkpoint), digits_shards, config, 0, 1, RuntimeConfig())
    examples = {"best": part.best, "worst": part.worst}
    (tmp_path / "out").mkdir()
    write_evaluation_folder(
        tmp_path / "out", part.confusion, part.scores, examples, part.probe, class_names=NAMES, palette=PALETTE
    )
    confusion = json.loads((tmp_path / "out" / "confusion.json").read_text())
    assert np.array(confusion["matrix"]).sum() == 6 * 96 * 96
    listed = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert [one["kind"] for one in listed] == ["best", "worst"]
    for one in listed:
        for picture in ("image", "truth", "prediction"):
            with Image.open(tmp_path / "out" / one[picture]) as image:
                assert image.size == (96, 96)
    labels = np.load(tmp_path / "out" / "probe" / "labels.npy", allow_pickle=False)
    assert (labels == np.stack([example.predicted for example in part.probe])).all()


def test_check_classes__other_classes_are_refused() -> None:
    full = Checkpoint.model_construct(variant="full")
    config = {"num_classes": 3, "metadata": {"class_names": ["zero", "one", "two"]}}
    check_classes(full, config, "digits", ["zero", "one", "two"])
    check_classes(full, {"num_classes": 2, "metadata": {}}, "digits", ["any", "names"])
    with pytest.raises(UserError, match=r"^full tells 3 classes apart, digits has 2; score it on the data set that"):
        check_classes(full, config, "digits", ["zero", "one"])
    with pytest.raises(UserError, match=r"^class 1 of full is 'one', of digits 'two'; score it on data with the same"):
        check_classes(full, config, "digits", ["zero", "two", "one"])


def test_compare_ranges__another_grey_range_is_said(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for own, theirs in ((None, [0, 9]), ([0, 9], None), ([0, 9], [0, 9])):
        _compare_ranges(trained.checkpoint, own, {"name": "data", "grey_range": theirs})
    assert capsys.readouterr().out == ""
    _compare_ranges(trained.checkpoint, [0, 9], {"name": "data", "grey_range": [1, 9.5]})
    said = "full was trained on images whose values 0 to 9 became 0 to 255; in data it is 1 to 9.5; data.grey_range"
    assert said in capsys.readouterr().out
