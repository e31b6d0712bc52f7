from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from segvit.model import SegViT
from segvit.optim import Muon, clip_gradients, orthogonalized, parameter_groups
from segvit.optimizers import OPTIMIZERS, build_optimizer, optimizer_problem

MakeModel = Callable[..., SegViT]


def one_group(*params: torch.nn.Parameter, linear: bool = True, **settings: float) -> list[dict[str, object]]:
    return [{"params": list(params), "lr": 0.1, "weight_decay": 0.0, "linear": [linear] * len(params), **settings}]


@pytest.mark.parametrize("name", OPTIMIZERS.builtins)
def test_build_optimizer__every_one_lowers_a_models_loss(make_model: MakeModel, name: str) -> None:
    torch.manual_seed(0)
    model = make_model("cascade")
    rate = 1e-4 if name == "lion" else 1e-3
    optimizer = build_optimizer(name, parameter_groups(model, rate, 0.01, decoder_lr_multiplier=1.0))
    images = torch.randn(2, 3, 64, 64)
    target = torch.randn_like(model(images).mask_logits)
    losses = []
    for _ in range(8):
        loss = (model(images).mask_logits - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("muonn", {}, "unknown optimizer 'muonn'; choose from muon, adamw, lion"),
        ("lion", {"eps": 1.0}, "unknown option eps of optimizer lion; choose from betas"),
        ("adamw", {"betas": [2.0, 0.9]}, "optimizer adamw takes no {'betas': [2.0, 0.9]}: Invalid beta"),
        ("adamw", {"betas": [0.9]}, "optimizer adamw takes no {'betas': [0.9]}"),
        ("muon", {"momentum": 1.0}, "momentum must be in [0, 1) and steps >= 1, got 1.0 and 5"),
    ],
)
def test_optimizer_problem__names_what_is_wrong(name: str, options: dict[str, object], message: str) -> None:
    assert message in str(optimizer_problem(name, options))
    assert optimizer_problem("muon", {"steps": 3}) is None


def test_orthogonalized__singular_values_near_one_and_the_same_directions() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 24, 16)
    result = orthogonalized(matrices, 5).float()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    torch.testing.assert_close(left.mT @ result @ right.mT, torch.diag_embed(singular), atol=0.35, rtol=0.0)


def test_muon__first_step_by_hand() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 4))
    before = weight.detach().clone()
    optimizer = build_optimizer("muon", one_group(weight, weight_decay=0.5))
    weight.grad = torch.randn(8, 4)
    momentum = 0.05 * weight.grad
    ahead = weight.grad + 0.95 * (momentum - weight.grad)
    optimizer.step()
    update = orthogonalized(ahead[None], 5)[0].float()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8**0.5 * update
    torch.testing.assert_close(weight.detach(), expected)


def test_muon__what_is_no_linear_weight_is_adamws_at_the_groups_rate() -> None:
    bias, twin = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = build_optimizer("muon", one_group(bias, linear=False), betas=(0.9, 0.999))
    plain = build_optimizer("adamw", one_group(twin))
    for step in range(3):
        for one, parameter in ((optimizer, bias), (plain, twin)):
            one.param_groups[0]["lr"] = 0.1 / (1 + step)
            parameter.grad = torch.full((5,), 1.0 + step)
            one.step()
    torch.testing.assert_close(bias.detach(), twin.detach(), rtol=0.0, atol=0.0)
    assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_muon__takes_linear_layers_and_leaves_queries_and_convolutions(make_model: MakeModel) -> None:
    model = make_model("cascade")
    optimizer = build_optimizer("muon", parameter_groups(model, 1e-3, 0.01))
    assert isinstance(optimizer, Muon)
    taken = {id(one) for group in optimizer.param_groups if group["is_linear"] for one in group["params"]}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert taken == linear
    assert id(model.decoder.class_queries[0].weight) not in taken  # type: ignore[index, union-attr]


def test_parameter_groups__layer_decay_by_block(make_model: MakeModel) -> None:
    model = make_model("cascade")
    depth = len(model.backbone.vit.blocks)
    groups = {group["name"]: group for group in parameter_groups(model, 1e-4, 0.01, layer_decay=0.5)}
    assert groups[f"backbone.{depth - 1}"]["lr"] == pytest.approx(1e-4)
    assert groups["backbone.0"]["lr"] == pytest.approx(1e-4 * 0.5 ** (depth - 1))
    assert groups["backbone_norms.0"]["weight_decay"] == 0.0
    assert groups["backbone.embeddings"]["lr"] == pytest.approx(1e-4 * 0.5**depth)
    assert groups["decoder"]["lr"] == pytest.approx(1e-3)
    grouped = [id(one) for group in groups.values() for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in model.parameters() if one.requires_grad)


def test_clip_gradients__together_or_by_group() -> None:
    def groups() -> list[dict[str, object]]:
        small, large = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
        small.grad, large.grad = torch.tensor([0.6, 0.8]), torch.tensor([30.0, 40.0])
        return [{"params": [small]}, {"params": [large]}]

    together, by_group = groups(), groups()
    norms = [clip_gradients(one, 5.0, per_group=flag) for one, flag in ((together, False), (by_group, True))]
    assert [float(norm) for norm in norms] == pytest.approx([2501.0**0.5] * 2)
    left = [[float(one.grad.norm()) for group in some for one in group["params"]] for some in (together, by_group)]  # type: ignore[attr-defined]
    assert left[0] == pytest.approx([5 / 2501.0**0.5, 250 / 2501.0**0.5], rel=1e-4)
    assert left[1] == pytest.approx([1.0, 5.0], rel=1e-4)
