"""Starting from a published checkpoint: what is told by its tensors, and what by the model that starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import segvit
from segvit.weights.published_start import read_published_start

SMALL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": (64, 64),
    "out_layers": (1, 3),
    "decoder_layers": 1,
    "class_token": False,
    "backbone_options": {"embed_dim": 48, "depth": 4, "num_heads": 3},
}


def config(**settings: Any) -> segvit.ModelConfig:
    return segvit.ModelConfig(**{**SMALL, **settings})


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, segvit.SegViT]:
    torch.manual_seed(0)
    model = segvit.build_model(config(), 3).eval()
    contents = {"meta": {"CLASSES": ("sky", "road", "tree")}, "state_dict": segvit.published_state_dict(model)}
    torch.save(contents, tmp_path / "cascade.pth")
    return tmp_path / "cascade.pth", model


def test_read_published_start__another_structure_and_crop(published: tuple[Path, segvit.SegViT]) -> None:
    path, model = published
    asked = config(image_size=(96, 64), structure="anchored", shrink_at=2)
    found = read_published_start(path, asked)
    assert (found.config.structure, found.config.image_size) == ("cascade", (64, 64))
    assert (found.config.backbone, found.config.out_layers) == ("vit_tiny_patch16_224", (1, 3))
    assert found.class_names == ("sky", "road", "tree")
    built = found.build().state_dict()
    assert all(torch.equal(built[name], value) for name, value in model.state_dict().items())
    assert segvit.take_weights(segvit.build_model(asked, 3), found.build()).new == (
        "decoder.upsampling.corrections.0.weight",
    )


@pytest.mark.parametrize("meta", [{}, {"CLASSES": ["a"]}, {"CLASSES": ["a", "a", "b"]}, {"dataset_meta": 3}])
def test_read_published_start__without_names_no_class_is_known(
    tmp_path: Path, published: tuple[Path, segvit.SegViT], meta: dict[str, Any]
) -> None:
    torch.save({"meta": meta, "state_dict": segvit.published_state_dict(published[1])}, tmp_path / "other.pth")
    assert read_published_start(tmp_path / "other.pth", config()).class_names == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"backbone_options": {"embed_dim": 96, "depth": 4, "num_heads": 3}},
            "its backbone has width 48, 4 blocks and patches of 16 pixels, vit_tiny_patch16_224 has width 96",
        ),
        (
            {"backbone": "swin_tiny_patch4_window7_224", "backbone_options": {}, "class_token": True},
            "its backbone is a plain ViT, not swin_tiny_patch4_window7_224",
        ),
        ({"image_size": (32, 128)}, "its 16 patches may be of a crop of 64 x 64 or 32 x 128; load it with"),
    ],
)
def test_read_published_start__misfits(
    published: tuple[Path, segvit.SegViT], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_published_start(published[0], config(**settings))
