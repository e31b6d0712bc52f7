from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.file import load_config
from pipeline.config.former import rename_former_keys
from pipeline.errors import UserError

FORMER = """
name: old
data: {dataset: digits}
model: {backbone: vit_tiny_patch16_224, crop: [48, 64]}
variants:
  full: {structure: cascade, out_layers: [1, 3], loss: mask}
  linear: {structure: linear, loss: cross_entropy, learning_rate: 3.0e-5, localize_upsampling: false}
loss: {class_weight: 1.0, focal_weight: 20.0, dice_weight: 5.0}
train:
  {steps: 4, batch_size: 4, warmup_steps: 1, poly_power: 2.0, validate_every_steps: 2, checkpoint_every_steps: 2,
   augmentation: {recipe: strong}}
tune: {num_trials: 2, dice_weight: [1.0, 6.0], learning_rate: [1.0e-5, 1.0e-3]}
"""


def test_load_config__a_file_of_an_earlier_release(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(FORMER)
    config = load_config(file)
    assert config.model.fields == {"backbone": "vit_tiny_patch16_224", "image_size": [48, 64]}
    assert config.loss.weights == {"class": 1.0, "focal": 20.0, "dice": 5.0}
    assert config.variants["full"].loss is None
    assert config.variants["linear"].loss == {"cross_entropy": 1.0}
    assert (config.train.schedule.name, config.train.schedule.options) == ("poly", {"power": 2.0})
    assert config.train.augmentation.scale_range == (0.1, 2.0)
    assert {path: one.log_uniform for path, one in config.tune.space.items()} == {
        "loss.class": (0.3, 3.0),
        "loss.focal": (5.0, 80.0),
        "loss.dice": (1.0, 6.0),
        "train.learning_rate": (1e-5, 1e-3),
    }
    notes = capsys.readouterr().err.splitlines()
    assert f"note: {file}: model.crop is model.image_size now; the former name is still read" in notes
    assert config.variants["linear"].train == {"learning_rate": 3e-5}
    assert (
        f"note: {file}: variants.linear.learning_rate is variants.linear.train.learning_rate now; the former"
        in "".join(notes)
    )
    assert len(notes) == 10


def test_rename_former_keys__a_start_that_is_no_more_is_refused_with_what_to_use() -> None:
    tree = {"variants": {"shrunk": {"structure": "shrunk", "localize_upsampling": True}}}
    with pytest.raises(UserError, match=r"^variants.shrunk.localize_upsampling is no more: .* use structure: anchored"):
        rename_former_keys(tree)


def test_rename_former_keys__todays_names_are_left_alone_and_both_are_refused() -> None:
    tree: dict[str, Any] = {"loss": {"dice": 4.0}, "model": {"image_size": [32, 32]}}
    assert rename_former_keys(tree) == []
    assert tree == {"loss": {"dice": 4.0}, "model": {"image_size": [32, 32]}}
    with pytest.raises(UserError, match=r"model.crop is the former name of model.image_size, and both are given"):
        rename_former_keys({"model": {"image_size": [32, 32], "crop": [48, 48]}})
