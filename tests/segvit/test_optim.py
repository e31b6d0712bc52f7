from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from segvit.model import SegViT
from segvit.optim import parameter_groups, poly_lambda

MakeModel = Callable[..., SegViT]


def test_parameter_groups__rates_decay_and_membership(make_model: MakeModel) -> None:
    model = make_model("shrunk")
    model.freeze_blocks(3)
    groups = parameter_groups(model, learning_rate=2e-5, weight_decay=0.01)
    values = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert values == {
        "backbone": (2e-5, 0.01),
        "backbone_norms": (2e-5, 0.0),
        "decoder": (pytest.approx(2e-4), 0.01),
    }
    owner = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            expected = None
        elif name.startswith("decoder."):
            expected = "decoder"
        else:
            expected = "backbone_norms" if ".norm" in name else "backbone"
        assert owner.get(id(parameter)) == expected, name
    norms = next(group["params"] for group in groups if group["name"] == "backbone_norms")
    assert len(norms) == (12 - 3) * 4
    torch.optim.AdamW(groups)


def test_parameter_groups__fully_frozen_backbone_leaves_the_decoder(make_model: MakeModel) -> None:
    model = make_model("cascade")
    model.freeze_blocks(4)
    assert [group["name"] for group in parameter_groups(model, 1e-4, 0.01)] == ["decoder"]


def test_poly_lambda__published_schedule() -> None:
    factor = poly_lambda(warmup_steps=100, total_steps=1000, power=1.0)
    assert factor(0) == pytest.approx(1e-6)
    assert factor(50) == pytest.approx(0.95 * (0.5 + 0.5e-6))
    assert factor(100) == pytest.approx(0.9)
    assert factor(500) == pytest.approx(0.5)
    assert factor(1000) == factor(2000) == 0.0


def test_poly_lambda__power_and_no_warmup() -> None:
    factor = poly_lambda(warmup_steps=0, total_steps=10, power=2.0)
    assert [factor(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.25, 0.0])


def test_poly_lambda__warmup_longer_than_training() -> None:
    with pytest.raises(ValueError, match="warmup_steps 20 must be between 0 and total_steps 10"):
        poly_lambda(20, 10, 1.0)
