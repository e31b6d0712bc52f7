from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from segvit.model import SegViT
from segvit.optim import parameter_groups

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
