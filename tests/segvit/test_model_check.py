from __future__ import annotations

from typing import Any

import pytest
import torch

from segvit.config import ModelConfig
from segvit.model import build_model
from segvit.model_check import model_problems

SMALL: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "image_size": (64, 96)}
SWIN: dict[str, Any] = {"backbone": "swin_tiny_patch4_window7_224", "image_size": (64, 96), "decoder_heads": 12}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"image_size": (64, 100)}, "image_size 100 is not a multiple of vit_tiny_patch16_224's patch size 16; use 96"),
        ({"image_size": (8, 64)}, "image_size 8 is not a multiple of vit_tiny_patch16_224's patch size 16; use 16"),
        ({"out_layers": (5, 12)}, "out_layers (5, 12) do not fit vit_tiny_patch16_224; its blocks are 0 to 11"),
        (
            {"structure": "shrunk", "shrink_at": 12},
            "shrink_at 12 does not fit vit_tiny_patch16_224; use a block from 1",
        ),
        ({"decoder_width": 100}, "decoder_width 100 is not a multiple of decoder_heads 3"),
        ({"decoder_width": 96, "input_projection": False}, "decoder_width 96 is not the features' 192, 192, 192"),
        (
            {"backbone": "vit_tiny_patch61_224"},
            "unknown backbone 'vit_tiny_patch61_224'; did you mean vit_tiny_patch16",
        ),
        ({"backbone": "vit_tiny_patch16_224.none"}, "unknown backbone 'vit_tiny_patch16_224.none': Invalid pretrained"),
        ({"backbone": "resnet18"}, "backbone resnet18 is a ResNet, not a plain VisionTransformer"),
        ({"backbone_options": {"num_heads": 5}}, "backbone_options {'num_heads': 5} do not fit vit_tiny_patch16_224"),
        (SWIN | {"structure": "shrunk"}, "structure 'shrunk' downsamples inside a plain ViT"),
        (SWIN | {"class_token": False}, "class_token False has no meaning for swin_tiny_patch4_window7_224"),
        (SWIN | {"out_layers": (2, 4)}, "out_layers (2, 4) do not fit swin_tiny_patch4_window7_224; its stages are 0"),
        (SWIN | {"image_size": (64, 80)}, "image_size 80 is not a multiple of swin_tiny_patch4_window7_224's last str"),
    ],
)
def test_model_problems__what_building_refuses_too(settings: dict[str, Any], problem: str) -> None:
    config = ModelConfig(**SMALL | settings)
    found = model_problems(config, 3)
    assert len(found) == 1
    assert found[0].startswith(problem)
    with torch.device("meta"), pytest.raises(ValueError) as refused:  # noqa: PT011
        build_model(config, 3)
    assert str(refused.value) == found[0]


def test_model_problems__all_at_once() -> None:
    config = ModelConfig(**SMALL | {"image_size": (64, 100)}, out_layers=(5, 12), decoder_heads=5)
    problems = model_problems(config, 0, freeze_blocks=13, loss={"dcie": 1.0})
    assert [text.partition(" ")[0] for text in problems] == [
        *("num_classes", "unknown", "image_size", "out_layers", "decoder_width", "freeze_blocks")
    ]


def test_model_problems__what_would_train_in_vain() -> None:
    late = ModelConfig(**SMALL, structure="naive_qd", shrink_at=4, out_layers=(3,))
    assert model_problems(late, 3) == [
        "shrink_at 4 lies after the last of out_layers (3,), so that nothing would be downsampled; "
        "read block 4 or a later one"
    ]
    config = ModelConfig(**SMALL, out_layers=(1, 3))
    assert model_problems(config, 3, freeze_blocks=4) == []
    assert model_problems(config, 3, freeze_blocks=5) == [
        "freeze_blocks 5 does not fit vit_tiny_patch16_224, which runs 4 blocks; use 0 to 4"
    ]
    assert model_problems(ModelConfig(**SWIN), 3, freeze_blocks=5) == [
        "freeze_blocks 5 does not fit swin_tiny_patch4_window7_224, which runs 4 stages; use 0 to 4"
    ]


def test_model_problems__loss_against_the_structure() -> None:
    linear = ModelConfig(**SMALL, structure="linear")
    [problem] = model_problems(linear, 3, loss={"dice": 1.0})
    assert problem.startswith("structure linear: loss term dice compares masks, which a structure without masks")
    assert model_problems(linear, 3, loss={"cross_entropy": 1.0}) == []
