from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from segvit.backbones.plain import pad_to_multiple
from segvit.config import ModelConfig
from segvit.inference import export
from segvit.inference.export import export_onnx, export_program, replace_pair
from segvit.inference.predict import semantic_labels
from segvit.model import SegViT, build_model
from segvit.output import SegmentationOutput

MakeModel = Callable[..., SegViT]
SIZE = (50, 75)  # not square, not whole patches, not the configured size
GRID = (4, 5)
NUM_CLASSES = 3
METADATA: dict[str, Any] = {
    "class_names": ["sky", "Straße", "car"],
    "palette": [[0, 0, 255], [9, 8, 7], [0, 1, 2]],
    "step": 7,
}


class Exported(NamedTuple):
    model: SegViT
    program: ExportedProgram
    path: Path


class ColourModel(SegViT):
    """Finds the strongest colour of each patch, so that label maps have many borders."""

    def forward(self, images: Tensor) -> SegmentationOutput:
        masks = nn.functional.avg_pool2d(pad_to_multiple(images, 16), 16)
        classes = 8 * torch.eye(3, 4, device=images.device).expand(images.shape[0], -1, -1)
        return SegmentationOutput(classes, masks, (), SIZE, (16 * GRID[0], 16 * GRID[1]))


def tiny_config(structure: str, **settings: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"backbone": "test_vit", "image_size": (64, 64), "decoder_layers": 1}
    return ModelConfig(structure=structure, **sizes | settings)


def tiny_model(structure: str, **settings: Any) -> SegViT:
    """A model whose every weight, bias and position matters."""
    model = build_model(tiny_config(structure, **settings), NUM_CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def some_images(batch: int) -> Tensor:
    """Coarse blobs, not noise, so that patches differ."""
    coarse = torch.randint(0, 256, (batch, 3, 5, 7), dtype=torch.uint8)
    return nn.functional.interpolate(coarse, size=SIZE, mode="nearest")


@pytest.fixture(scope="module", params=["cascade", "shrunk", "anchored"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported from training mode, with the first block frozen."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"shrink_at": 2} if request.param == "shrunk" else {"out_layers": (0, 2)}
    if request.param == "anchored":
        settings |= {"shrink_at": 1, "keep_edges": 0.1, "keep_unlike": 0.2}
    model = tiny_model(request.param, **settings).train()
    model.freeze_blocks(1)
    modes = [module.training for module in model.modules()]
    path = tmp_path_factory.mktemp("export") / "new" / "model.onnx"
    program = export_program(model, SIZE)
    with pytest.MonkeyPatch.context() as patch:
        # Traced once, for tracing takes the most time.
        patch.setattr(export, "export_program", lambda *_, **__: program)
        export_onnx(model, path, SIZE, METADATA)
    assert [module.training for module in model.modules()] == modes
    return Exported(model.eval(), program, path)


def eager(model: SegViT, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        output = model(model.normalize(images))
    assert output.class_logits is not None
    labels = semantic_labels(output)
    return {"class_logits": output.class_logits, "mask_logits": output.mask_logits, "labels": labels}


def run_onnx(path: Path, images: Tensor) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def code(program: ExportedProgram) -> str:
    return str(program.graph_module.print_readable(print_output=False))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in ("class_logits", "mask_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert found["labels"].dtype == torch.int64
    assert found["labels"].shape == expected["labels"].shape
    assert (found["labels"] == expected["labels"]).float().mean() > 0.999


@pytest.mark.parametrize("batch", [1, 3])
def test_export__program_and_onnx_equal_eager(exported: Exported, batch: int) -> None:
    images = some_images(batch)
    expected = eager(exported.model, images)
    assert expected["labels"].shape == (batch, *SIZE)
    assert expected["mask_logits"].shape == (batch, NUM_CLASSES, *GRID)
    assert_same(exported.program.module()(images), expected)
    assert_same(run_onnx(exported.path, images), expected)


def test_export_onnx__file_is_valid_alone_and_described(exported: Exported) -> None:
    assert [file.name for file in exported.path.parent.iterdir()] == ["model.onnx"]
    onnx.checker.check_model(str(exported.path), full_check=True)
    model = onnx.load(str(exported.path))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == METADATA
    [images] = model.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dimensions = images.type.tensor_type.shape.dim
    assert [dimension.dim_param or dimension.dim_value for dimension in dimensions] == ["batch", 3, *SIZE]
    assert [output.type.tensor_type.shape.dim[0].dim_param for output in model.graph.output] == ["batch"] * 3
    assert str(Path(__file__).parents[3]).encode() not in exported.path.read_bytes()


@pytest.fixture
def small_model() -> SegViT:
    """One block, one decoder layer: quick to export."""
    return tiny_model("cascade", out_layers=(0,))


@pytest.fixture
def colour_model() -> ColourModel:
    return ColourModel(tiny_config("cascade", out_layers=(0,)), NUM_CLASSES).eval()


def test_export_program__without_labels_makes_no_map_of_pixels(small_model: SegViT) -> None:
    images = some_images(2)
    program = export_program(small_model, SIZE, with_labels=False)
    expected = eager(small_model, images)
    found = program.module()(images)
    assert list(found) == ["class_logits", "mask_logits"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert "upsample_bilinear" not in code(program)


def test_export__label_maps_equal_eager_at_their_borders(tmp_path: Path, colour_model: ColourModel) -> None:
    images = some_images(3)
    expected = eager(colour_model, images)
    assert expected["labels"].flatten().bincount().min() > 0.2 * expected["labels"].numel()
    program = export_program(colour_model, SIZE)
    assert "upsample_bilinear" in code(program)
    assert_same(program.module()(images), expected)
    export_onnx(colour_model, tmp_path / "model.onnx", SIZE)
    assert_same(run_onnx(tmp_path / "model.onnx", images), expected)


def test_export_onnx__linear_head_on_attention_with_a_mask_has_no_class_logits(tmp_path: Path) -> None:
    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    model = tiny_model("linear", backbone="beitv2_base_patch16_224", backbone_options=sizes, out_layers=(0,))
    images = some_images(1)
    with torch.no_grad():
        output = model(model.normalize(images))
    path = tmp_path / "model.onnx"
    export_onnx(model, path, SIZE)
    found = run_onnx(path, images)
    assert list(found) == ["mask_logits", "labels"]
    torch.testing.assert_close(found["mask_logits"], output.mask_logits, rtol=1e-4, atol=1e-4)
    assert (found["labels"] == semantic_labels(output)).float().mean() > 0.999


def test_export_onnx__weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, small_model: SegViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    images = some_images(2)
    monkeypatch.setattr(export, "SINGLE_FILE_MAX_BYTES", 1000)
    export_onnx(small_model, path, SIZE, with_labels=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(path))
    torch.testing.assert_close(
        run_onnx(path, images)["mask_logits"], eager(small_model, images)["mask_logits"], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("names", [["model.onnx"], ["model.onnx", "model.onnx.data"]])
def test_replace_pair__no_file_of_an_earlier_export_stays(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "new").mkdir()
    for name in ("model.onnx", "model.onnx.data", *(f"new/{name}" for name in names)):
        (tmp_path / name).write_text(name)
    replace_pair(tmp_path / "new" / "model.onnx", tmp_path / "model.onnx")
    (tmp_path / "new").rmdir()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {name: f"new/{name}" for name in names}


def test_export_onnx__failed_write_keeps_the_earlier_file(
    tmp_path: Path, colour_model: ColourModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)

        def save(self, destination: Path, external_data: bool) -> None:
            destination.write_bytes(b"half")
            raise OSError("no space left")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: FullDisk())
    with pytest.raises(OSError, match="no space left"):
        export_onnx(colour_model.train(), path, SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"earlier"
    assert colour_model.training


@pytest.mark.parametrize("write", [export_program, lambda model, size: export_onnx(model, "unused.onnx", size)])
def test_export__what_cannot_be_exported_is_named(write: Callable[..., object], small_model: SegViT) -> None:
    with pytest.raises(TypeError, match="export takes the SegViT itself, got DataParallel; pass the wrapped module"):
        write(nn.DataParallel(small_model), SIZE)
    with pytest.raises(ValueError, match=r"at least 1 pixel, got \(0, 75\)"):
        write(small_model, (0, 75))
    with pytest.raises(ValueError, match=r"at least 1 pixel, got \(50,\)"):
        write(small_model, (50,))
    with pytest.raises(ValueError, match=r"float32 weights, got torch.float16; call model.float\(\) first"):
        write(small_model.half(), SIZE)


def test_export_onnx__wrong_metadata_is_refused_before_anything_is_written(tmp_path: Path, small_model: SegViT) -> None:
    with pytest.raises(ValueError, match="class_names has 1 entries for 3 classes"):
        export_onnx(small_model, tmp_path / "model.onnx", SIZE, {"class_names": ["sky"]})
    with pytest.raises(TypeError, match="not JSON serializable"):
        export_onnx(small_model, tmp_path / "model.onnx", SIZE, {"step": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_export_onnx__missing_extra_is_named(
    tmp_path: Path, small_model: SegViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'segvit-pipeline\[export\]'"):
        export_onnx(small_model, tmp_path / "model.onnx", SIZE)
