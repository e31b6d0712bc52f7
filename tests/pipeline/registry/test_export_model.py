from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import segvit
from pipeline import storage
from pipeline.errors import UserError
from pipeline.registry import export_model as module
from pipeline.registry.export_model import export_model
from segvit.inference.parity import Parity, measure_parity

METADATA: dict[str, Any] = {
    "class_names": ["sky", "Straße", "car"],
    "palette": [[0, 0, 255], [9, 8, 7], [0, 1, 2]],
    "step": 7,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, one decoder layer: quick to export."""
    torch.manual_seed(0)
    config = segvit.ModelConfig(backbone="test_vit", image_size=(64, 48), out_layers=(0,), decoder_layers=1)
    model = segvit.build_model(config, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    folder = tmp_path_factory.mktemp("exported") / "checkpoint"
    segvit.save_checkpoint(folder, model, METADATA)
    return folder


def expected_metadata(checkpoint: Path, size: list[int]) -> dict[str, Any]:
    model, _ = segvit.load_checkpoint(checkpoint)
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return {
        **METADATA,
        "image_size": size,
        "normalization": {"mean": mean, "std": std, "scale": 1 / 255},
        "model_version": "models:/street/3",
        "checkpoint_digest": storage.file_digest(str(checkpoint / "model.safetensors")),
    }


def test_export_model__onnx_holds_what_its_outputs_mean(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "street.onnx"
    exported = export_model(checkpoint, "models:/street/3", "onnx", path)
    assert exported.files == (str(path),)
    assert [file.name for file in path.parent.iterdir()] == ["street.onnx"]
    assert exported.equal_labels >= 0.999
    assert exported.max_difference < 1e-3 * exported.max_logit
    model = onnx.load(str(path))
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found == exported.metadata == expected_metadata(checkpoint, [64, 48])
    [images] = model.graph.input
    dimensions = images.type.tensor_type.shape.dim
    assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == ["batch", 3, 64, 48]


def test_export_model__torch_program_is_read_with_its_metadata(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "street.pt2"
    exported = export_model(checkpoint, "models:/street/3", "torch", path, image_size=(50, 75))
    assert [file.name for file in tmp_path.iterdir()] == ["street.pt2"]
    extra: dict[str, Any] = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["metadata.json"]) == exported.metadata == expected_metadata(checkpoint, [50, 75])
    images = torch.randint(0, 256, (3, 3, 50, 75), dtype=torch.uint8)
    model, _ = segvit.load_checkpoint(checkpoint)
    assert (program(images)["labels"] == segvit.predict_batch(model, images)).float().mean() > 0.999


@pytest.mark.parametrize("existing", [False, True])
def test_export_model__what_computes_something_else_is_not_published(
    checkpoint: Path, tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_weights(model: segvit.SegViT, path: Path, size: tuple[int, int], metadata: Mapping[str, Any]) -> None:
        path.write_bytes(b"another model")

    def run(images: Tensor) -> dict[str, Tensor]:
        model, _ = segvit.load_checkpoint(checkpoint)
        with torch.no_grad():
            output = model(model.normalize(images))
        assert output.class_logits is not None
        logits = {"class_logits": output.class_logits + 0.1, "mask_logits": output.mask_logits}
        return {**logits, "labels": segvit.semantic_labels(output)}

    path = tmp_path / "street.onnx"
    if existing:
        path.write_bytes(b"earlier")
    monkeypatch.setattr(segvit, "export_onnx", other_weights)
    monkeypatch.setattr(module, "onnx_runner", lambda _: run)
    with pytest.raises(UserError, match=r"differ by up to 0.1, 100.000% of labels are equal; no file is left"):
        export_model(checkpoint, None, "onnx", path, overwrite=True)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == (
        [("street.onnx", b"earlier")] if existing else []
    )


def test_export_model__mistakes_leave_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.onnx").write_bytes(b"earlier")
    with pytest.raises(UserError, match=r"there.onnx exists; give --overwrite to replace it, or another --out"):
        export_model(checkpoint, None, "onnx", tmp_path / "there.onnx")
    with pytest.raises(UserError, match="no checkpoint in"):
        export_model(tmp_path, None, "onnx", tmp_path / "new.onnx")
    for missing in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(UserError, match=r"cannot be exported: .*pip install 'segvit-pipeline\[export\]'$"):
                export_model(checkpoint, None, "onnx", tmp_path / "new.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["there.onnx"]


def test_parity__limits_are_those_of_rounding(checkpoint: Path) -> None:
    assert Parity(max_difference=0.009, max_logit=10.0, equal_labels=0.9991).holds
    assert not Parity(max_difference=0.011, max_logit=10.0, equal_labels=1.0).holds
    assert not Parity(max_difference=0.0, max_logit=10.0, equal_labels=0.998).holds
    assert not Parity(max_difference=float("inf"), max_logit=10.0, equal_labels=1.0).holds
    model, _ = segvit.load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"the program gives .*\(1, 3, 2, 2\).*, the model"):
        measure_parity(model, lambda _: {"mask_logits": torch.zeros(1, 3, 2, 2)}, (64, 48))
