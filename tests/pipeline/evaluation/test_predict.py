from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segvit
from pipeline.errors import UserError
from pipeline.evaluation.predict import predict_images
from pipeline.training.job import TrainJob
from pipeline.training.trainer import build_job_model

NAMES = [f"class {index}" for index in range(11)]
PALETTE = [[20 * index, 255 - 20 * index, 128] for index in range(11)]


@pytest.fixture
def checkpoint(make_job: Callable[..., TrainJob], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    segvit.save_checkpoint(
        tmp_path / "checkpoint", build_job_model(make_job()), {"class_names": NAMES, "palette": PALETTE}
    )
    return tmp_path / "checkpoint"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_predict_images__label_png_holds_class_ids_and_overlay_has_a_legend(
    checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    [written] = predict_images(checkpoint, [photo], tmp_path / "out")
    model, _ = segvit.load_checkpoint(checkpoint)
    with Image.open(photo) as image:
        expected = segvit.predict(model, np.asarray(image)).numpy()
    with Image.open(written.labels) as labels:
        assert labels.mode == "P"
        assert (np.asarray(labels) == expected).all()
    with Image.open(written.overlay) as overlay:
        assert overlay.width >= 70
        assert overlay.height > 50
    assert sum(written.classes.values()) == pytest.approx(1.0)
    assert set(written.classes) == {NAMES[index] for index in np.unique(expected)}


def test_predict_images__refuses_to_replace_unless_told(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    list(predict_images(checkpoint, [photo], tmp_path / "out"))
    with pytest.raises(UserError, match="exists; give --overwrite"):
        list(predict_images(checkpoint, [photo], tmp_path / "out"))
    assert len(list(predict_images(checkpoint, [photo], tmp_path / "out", overwrite=True))) == 1


def test_predict_images__bad_images(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image at"):
        list(predict_images(checkpoint, [tmp_path / "none.png"], tmp_path / "out"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match="cannot be read as an image"):
        list(predict_images(checkpoint, [tmp_path / "text.png"], tmp_path / "out"))
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "photo.png"
    twin.write_bytes(photo.read_bytes())
    with pytest.raises(UserError, match="two images are named photo"):
        list(predict_images(checkpoint, [photo, twin], tmp_path / "out"))
