"""Starting a model from a trained one of another structure or size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import segvit
from segvit.backbones.feature_map import resize_positions
from segvit.backbones.positions import resize_bias_table

SMALL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": (64, 96),
    "decoder_layers": 1,
    "backbone_options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
}


def model(structure: str = "cascade", num_classes: int = 3, **settings: Any) -> segvit.SegViT:
    layers = {"cascade": (1, 3), "anchored": (1, 3), "shrunk": (0, 3), "linear": (1, 3)}[structure]
    shrinking = {"shrink_at": 2} if structure in ("anchored", "shrunk") else {}
    config = segvit.ModelConfig(**{**SMALL, "structure": structure, "out_layers": layers, **shrinking, **settings})
    built = segvit.build_model(config, num_classes)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.1)
    return built


def test_take_weights__anchored_takes_all_of_a_cascade() -> None:
    own, source = model("anchored"), model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    taken = segvit.take_weights(own, source)
    theirs = source.state_dict()
    assert set(taken.taken) == set(theirs)
    assert all(torch.equal(own.state_dict()[name], theirs[name]) for name in taken.taken)
    assert {".".join(name.split(".")[:2]) for name in taken.new} == {"decoder.upsampling"}
    assert all(torch.equal(own.state_dict()[name], before[name]) for name in taken.new)
    assert taken.summary() == (
        f"backbone and decoder taken ({len(theirs)} tensors), new: decoder.upsampling (1 tensor)"
    )


def test_take_weights__another_structure_takes_the_backbone() -> None:
    own, source = model("shrunk"), model()
    taken = segvit.take_weights(own, source)
    assert all(name.startswith("backbone.") for name in taken.taken)
    assert torch.equal(own.backbone.vit.blocks[2].mlp.fc1.weight, source.backbone.vit.blocks[2].mlp.fc1.weight)
    assert taken.summary().startswith(f"backbone taken ({len(taken.taken)} tensors), new: decoder.grid_queries (1 ten")


def test_take_weights__continued_training_takes_everything() -> None:
    own, source = model(), model()
    taken = segvit.take_weights(own, source)
    assert taken.new == ()
    assert taken.summary() == f"backbone and decoder taken ({len(taken.taken)} tensors), nothing new"
    images = torch.randn(1, 3, 64, 96)
    assert torch.equal(own.eval()(images).mask_logits, source.eval()(images).mask_logits)


def test_take_weights__other_classes_and_depth() -> None:
    own, source = model(num_classes=5, out_layers=(1, 2)), model()
    taken = segvit.take_weights(own, source)
    assert {name.partition(".")[2].partition(".")[0] for name in taken.new} == {"class_queries", "class_head"}
    # A backbone that runs further than the other's keeps its own later blocks.
    longer = segvit.take_weights(model(), model(out_layers=(0, 1)))
    assert {".".join(name.split(".")[1:4]) for name in longer.new} == {"vit.blocks.2", "vit.blocks.3"}


@pytest.mark.parametrize("structure", ["cascade", "anchored", "linear", "shrunk"])
def test_take_weights__classes_are_found_by_name(structure: str) -> None:
    own, source = model(structure, num_classes=4), model(structure)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    taken = segvit.take_weights(own, source, ["sky", "car", "road", "tram"], ["road", "tree", "sky"])
    assert (taken.classes, taken.new_classes, taken.new) == (("sky", "road"), ("car", "tram"), ())
    after, theirs = own.state_dict(), source.state_dict()
    by_class = [name for name in theirs if theirs[name].shape != after[name].shape]
    assert len(by_class) == (2 if structure == "linear" else 3)
    for name in by_class:
        assert torch.equal(after[name][[0, 2]], theirs[name][[2, 0]]), name
        assert torch.equal(after[name][[1, 3]], before[name][[1, 3]]), name
        assert torch.equal(after[name][4:], theirs[name][3:]), name
    assert taken.summary().endswith("nothing new; classes by name: taken sky, road; 2 new")


def test_take_weights__as_many_classes_of_other_names_are_not_taken_for_the_same() -> None:
    own, source = model(), model()
    head = own.state_dict()["decoder.class_head.weight"].clone()
    for theirs in (["x", "y", "z"], []):
        taken = segvit.take_weights(own, source, ["a", "b", "c"], theirs)
        assert torch.equal(own.state_dict()["decoder.class_head.weight"], head)
        assert set(taken.new) == {"decoder.class_head.weight", "decoder.class_head.bias"} | {
            name for name in own.state_dict() if "class_queries" in name
        }
        assert taken.summary().endswith("; classes by name: none taken; 3 new")
    turned = segvit.take_weights(own, source, ["a", "b", "c"], ["c", "b", "a"])
    assert turned.new_classes == ()
    assert torch.equal(
        own.state_dict()["decoder.class_head.weight"], source.state_dict()["decoder.class_head.weight"][[2, 1, 0, 3]]
    )


def test_take_weights__positions_of_another_grid_are_resized() -> None:
    own, source = model(image_size=(96, 96)), model()
    segvit.take_weights(own, source)
    expected = resize_positions(source.backbone.vit.pos_embed, (4, 6), (6, 6), 1)
    torch.testing.assert_close(own.backbone.vit.pos_embed, expected)


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "vit_small_patch16_rope_mixed_224", "swin_tiny_patch4_window7_224"]
)
def test_take_weights__every_family_at_another_size(name: str) -> None:
    layers = (0, 1) if name.startswith("swin") else (1, 3)
    options = {} if name.startswith("swin") else SMALL["backbone_options"]
    own, source = (
        model(backbone=name, backbone_options=options, out_layers=layers, image_size=size, drop_path_rate=0.0)
        for size in ((128, 64), (64, 64))
    )
    taken = segvit.take_weights(own, source)
    assert taken.new == ()
    assert sum(torch.equal(own.state_dict()[key], value) for key, value in source.state_dict().items()) > 20


def test_take_weights__windows_of_smaller_stages_are_resized() -> None:
    """At 128 x 64 pixels the windows of Swin's third stage are 7 x 4, at 64 x 64 they are 4 x 4."""
    own, source = (
        model(
            backbone="swin_tiny_patch4_window7_224", backbone_options={"depth": 1}, out_layers=(0, 2), image_size=size
        )
        for size in ((64, 64), (128, 64))
    )
    assert segvit.take_weights(own, source).new == ()
    key = "backbone.vit.layers.2.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(own.state_dict()[key], resize_bias_table(source.state_dict()[key], (7, 4), (4, 4)))


def test_take_weights__another_backbone_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^this model cannot start from the other: its backbone is vit_tiny_patch16_224 "
        r"with \{.*\}, not vit_small_patch16_224 with \{.*\}; start from a model of the same backbone$",
    ):
        segvit.take_weights(model(backbone="vit_small_patch16_224"), model())
