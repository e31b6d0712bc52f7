from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from segvit.checkpoint import load_checkpoint, save_checkpoint
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]
METADATA: dict[str, Any] = {
    "class_names": ["sky", "road", "car", "tree"],
    "palette": [[0, 0, 255], [128, 64, 128], [64, 0, 128], [0, 128, 0]],
    "step": 7,
}


@pytest.mark.parametrize("structure", ["cascade", "shrunk", "anchored"])
def test_checkpoint__round_trip_gives_equal_outputs(tmp_path: Path, make_model: MakeModel, structure: str) -> None:
    model = make_model(structure)
    save_checkpoint(tmp_path / "a" / "b", model, METADATA)
    loaded, metadata = load_checkpoint(tmp_path / "a" / "b")
    images = torch.randn(1, 3, 48, 64)
    for ours, theirs in zip(model(images)[:2], loaded(images)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert metadata == METADATA
    assert loaded.config == model.config
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_save__replaces_an_earlier_checkpoint(tmp_path: Path, make_model: MakeModel) -> None:
    save_checkpoint(tmp_path, make_model("cascade", num_classes=3), {})
    save_checkpoint(tmp_path, make_model("cascade"), METADATA)
    assert load_checkpoint(tmp_path)[0].num_classes == 4


def test_save__killed_between_the_files_leaves_no_checkpoint(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, make_model("cascade"), METADATA)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, make_model("cascade"), METADATA)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_checkpoint(tmp_path)


def test_save__wrapped_model_or_wrong_metadata_is_refused(tmp_path: Path, make_model: MakeModel) -> None:
    model = make_model("cascade")
    with pytest.raises(TypeError, match="takes the SegViT itself, got DataParallel"):
        save_checkpoint(tmp_path, torch.nn.DataParallel(model), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class_names has 1 entries for 4 classes"):
        save_checkpoint(tmp_path, model, {"class_names": ["sky"]})
    with pytest.raises(ValueError, match=r"grey_range \[9, 3\] must be two values, the lower one first"):
        save_checkpoint(tmp_path, model, {"grey_range": [9, 3]})
    assert list(tmp_path.iterdir()) == []


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load__damage_is_named(tmp_path: Path, make_model: MakeModel) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, make_model("cascade"), {})
    edit_config(tmp_path, num_classes=5)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(tmp_path)
    edit_config(tmp_path, num_classes=4, format_version=3)
    with pytest.raises(ValueError, match="has format version 3, this release reads 2"):
        load_checkpoint(tmp_path)
    edit_config(tmp_path, format_version=2)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model.safetensors does not fit"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a checkpoint's configuration"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 10**9}, "num_classes 1000000000 is no number from 1 to 65536"),
        ({"num_classes": "4"}, "num_classes '4' is no number from 1 to 65536"),
        ({"model": []}, "model and metadata are mappings by name"),
        ({"metadata": {"class_names": 3}}, "its metadata are of another form"),
        ({"model.decoder_layers": 10**9}, "decoder_layers must be at most 128, got 1000000000"),
        ({"model.decoder_width": 10**9}, "decoder_width must be at most 65536, got 1000000000"),
        ({"model.image_size": [10**9, 10**9]}, "image_size must be at most 65536 pixels a side"),
        ({"model.backbone_options": {"depth": 10**9}}, "backbone option depth must be at most 128, got 1000000000"),
        ({"model.decoder_width": 60_000}, "does not fit config.json beside it: tensor .* has shape"),
    ],
)
def test_load__a_configuration_that_would_fill_the_memory(
    tmp_path: Path, make_model: MakeModel, changes: dict[str, Any], message: str
) -> None:
    save_checkpoint(tmp_path, make_model("cascade"), METADATA)
    config = json.loads((tmp_path / "config.json").read_text())
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (config[section] if section else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_load__a_configuration_without_end(tmp_path: Path, make_model: MakeModel) -> None:
    save_checkpoint(tmp_path, make_model("cascade"), METADATA)
    long = " " * (1 << 24) + "{}"
    for text, message in (("[" * 100_000, "is not JSON"), (long, "is longer than the 16777216 bytes")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)
