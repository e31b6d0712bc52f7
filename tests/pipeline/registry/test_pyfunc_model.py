"""The loader script of a registered model, without MLflow's packing: what it makes of files."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import segvit
from pipeline.registry.pyfunc_model import SegmentationModel, UnusableInputError
from segvit.grey_range import scale_values
from tests.pipeline.conftest import Trained


def answer_of(checkpoint: Path, file: bytes) -> Any:
    """What the model in `checkpoint` says to an image file."""
    context: Any = SimpleNamespace(artifacts={"checkpoint": str(checkpoint)})
    model = SegmentationModel()
    model.load_context(context)
    return model.predict(context, np.array([file], object))


def file_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def deep() -> np.ndarray:
    """A thermal image, 16 bits."""
    return (29_000 + 8 * np.random.default_rng(0).integers(0, 256, (32, 48))).astype(np.uint16)


def test_predict__sixteen_bits_are_scaled_as_in_training(trained: Trained, deep: np.ndarray, tmp_path: Path) -> None:
    model, metadata = segvit.load_checkpoint(trained.checkpoint.uri)
    segvit.save_checkpoint(tmp_path / "checkpoint", model, metadata | {"grey_range": [29_000, 31_040]})
    eight = scale_values(deep, (29_000, 31_040))
    folder = tmp_path / "checkpoint"
    assert answer_of(folder, file_of(deep)) == answer_of(folder, file_of(eight))


def test_predict__sixteen_bits_to_a_model_of_eight_are_refused(trained: Trained, deep: np.ndarray) -> None:
    with pytest.raises(UnusableInputError, match="image 0 has more than 8 bits a channel, and no grey range says"):
        answer_of(Path(trained.checkpoint.uri), file_of(deep))


@pytest.mark.parametrize("kind", ["TIFF", "BMP"])
def test_predict__other_formats_give_what_png_gives(trained: Trained, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    folder = Path(trained.checkpoint.uri)
    assert answer_of(folder, file_of(pixels, kind)) == answer_of(folder, file_of(pixels))
    with pytest.raises(UnusableInputError, match="image 0 is GIF, none of JPEG, PNG, TIFF, WebP and BMP; convert it"):
        answer_of(folder, file_of(pixels, "GIF"))
