from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from segvit.inference.precision import in_precision, keep_for_precision
from segvit.inference.predict import predict
from segvit.model import SegViT

MakeModel = Callable[..., SegViT]


@pytest.mark.parametrize("arguments", [{}, {"mode": "slide", "crop": 48}, {"scales": (0.5, 1.0), "flip": True}])
def test_predict__in_bf16_is_under_autocast_where_the_device_has_it(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    model = make_model("cascade")
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    types: list[torch.dtype] = []
    mlp = cast("torch.nn.Module", model.backbone.blocks[0].mlp)
    mlp.register_forward_hook(lambda _module, _inputs, output: types.append(output.dtype))

    def in_bf16(has_bf16: bool) -> torch.Tensor:
        types.clear()
        monkeypatch.setattr("segvit.inference.precision.has_bf16", lambda _device: has_bf16)
        return predict(model, image, precision="bf16", **arguments)

    own = predict(model, image, **arguments)
    assert torch.equal(in_bf16(False), own)
    assert set(types) == {torch.float32}
    assert (in_bf16(True) == own).float().mean().item() > 0.9
    assert set(types) == {torch.bfloat16}
    types.clear()
    with torch.autocast("cpu", torch.bfloat16):
        predict(model, image, **arguments)
    assert set(types) == {torch.bfloat16}  # without a precision the caller's autocast stays


def test_predict__unknown_precision_is_refused(make_model: MakeModel) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="unknown precision 'fp8' of a prediction; use 'bf16', or None"):
        predict(make_model("cascade"), image, precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["cascade", "single", "shrunk", "anchored", "naive_qd", "linear"])
@torch.no_grad()
def test_keep_for_precision__predicts_the_same_to_the_bit(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, structure: str
) -> None:
    monkeypatch.setattr("segvit.inference.precision.has_bf16", lambda _device: True)
    finer = {"mask_upsampling": 2} if structure in ("cascade", "anchored") else {}
    model = make_model(structure, **finer)
    images = torch.randn(2, 3, 64, 80)
    with in_precision(model, "bf16"):
        expected = model(images)
    size = sum(parameter.nbytes for parameter in model.parameters())
    keep_for_precision(model, "bf16")
    assert sum(parameter.nbytes for parameter in model.parameters()) < 0.6 * size
    assert {parameter.dtype for parameter in model.backbone.vit.blocks[0].norm1.parameters()} == {torch.float32}
    with in_precision(model, "bf16"):
        found = model(images)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    if expected.class_logits is not None:
        assert torch.equal(found.class_logits, expected.class_logits)


def test_keep_for_precision__nothing_changes_without_bf16(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("cascade")
    keep_for_precision(model, None)
    monkeypatch.setattr("segvit.inference.precision.has_bf16", lambda _device: False)
    keep_for_precision(model, "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
