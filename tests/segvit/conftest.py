from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from segvit.config import ModelConfig
from segvit.model import SegViT, build_model

MakeModel = Callable[..., SegViT]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> MakeModel:
    """Build a small model in evaluation mode; settings override the small defaults."""

    def make(structure: str = "cascade", num_classes: int = 4, **settings: Any) -> SegViT:
        defaults: dict[str, Any] = {
            "backbone": "vit_tiny_patch16_224",
            "image_size": (64, 64),
            "out_layers": {"single": (3,), "naive_qd": None, "shrunk": None, "linear": (3,)}.get(structure, (1, 3)),
            "decoder_layers": 2,
        }
        if structure in ("naive_qd", "shrunk"):
            defaults["shrink_at"] = 4
        if structure == "anchored":
            defaults["shrink_at"] = 2
        return build_model(ModelConfig(structure=structure, **defaults | settings), num_classes).eval()

    return make
