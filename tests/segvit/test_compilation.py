from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from segvit.compilation import Region, compile_loss, compile_regions, warm_up
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.model import SegViT
from segvit.output import SegmentationOutput
from tests.segvit.conftest import MakeModel

# (images, height, width)
FIRST = [(8, 64, 64), (1, 64, 80), (3, 50, 70)]
OTHERS = [(2, 160, 64), (1, 33, 33), (5, 64, 64), (1, 112, 176), (4, 64, 96), (7, 208, 48)]
DEEP = {"out_layers": (3, 7, 11), "drop_path_rate": 0.2}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def train(model: SegViT, steps: int = 2) -> None:
    model.train()
    loss = SegmentationLoss(4)
    for _ in range(steps):
        images, labels = torch.randn(3, 3, 64, 64), torch.randint(0, 4, (3, 64, 64))
        loss(model(images), labels)["total"].backward()
    model.zero_grad()


@torch.no_grad()
def compare(model: SegViT, eager: SegViT, sizes: Iterable[tuple[int, int, int]]) -> None:
    model.eval()
    warm_up(model)
    for batch, height, width in sizes:
        images = torch.randn(batch, 3, height, width)
        found, expected = model(images), eager(images)
        torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("structure", "settings", "frozen", "train_graphs"),
    [
        ("cascade", DEEP, 0, 4),  # a block; a layer whose queries are the table, an inner one, one with a mask
        ("cascade", DEEP, 4, 6),  # and a frozen block, and the first that is not
        ("anchored", {**DEEP, "shrink_at": 4}, 0, 6),  # and the block that leaves out, and those after it
        ("shrunk", {"shrink_at": 2, "out_layers": (1, 3)}, 0, None),
        ("single", {}, 0, None),
    ],
)
def test_compile_regions__no_graph_after_the_first_validation(
    make_model: MakeModel, structure: str, settings: dict[str, Any], frozen: int, train_graphs: int | None
) -> None:
    model = make_model(structure, **settings)
    model.freeze_blocks(frozen)
    eager = copy.deepcopy(model)
    compile_regions(model, "eager")
    assert model.state_dict().keys() == eager.state_dict().keys()
    train(model)
    assert train_graphs in (None, num_graphs())
    compare(model, eager, FIRST)
    known = num_graphs()
    train(model)
    compare(model, eager, OTHERS)
    train(model)
    assert num_graphs() == known
    assert not counters["graph_break"]


def test_compile_regions__gradients_equal_eagers(make_model: MakeModel) -> None:
    model = make_model("anchored", drop_path_rate=0.0, dropout=0.0).train()
    eager = copy.deepcopy(model)
    compile_regions(model, "aot_eager")
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    for one in (model, eager):
        SegmentationLoss(4)(one(images), labels)["total"].backward()
    assert num_graphs() > 0
    for (name, found), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        if expected.grad is not None:
            assert found.grad is not None, name
            assert (found.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("ignored_is_background", [True, False])
def test_compile_loss__any_number_of_masks_in_one_graph(ignored_is_background: bool) -> None:
    eager, compiled = (SegmentationLoss(9, count_ignored_as_background=ignored_is_background) for _ in range(2))
    compile_loss(compiled, "aot_eager")
    for num_masks in (18, 1, 2, 5, 0, 9):
        labels = torch.full((2, 32, 32), 255)
        for index in range(num_masks):
            labels[index // 9, 3 * (index % 9) + 2 : 3 * (index % 9) + 5, index:] = index % 9
        classes, masks = torch.randn(2, 9, 10), torch.randn(2, 9, 4, 4, requires_grad=True)
        assert len(eager.targets(labels).image) == num_masks
        totals = [
            loss(SegmentationOutput(classes, masks, (), (32, 32), (32, 32)), labels)["total"]
            for loss in (eager, compiled)
        ]
        gradients = [torch.autograd.grad(total, masks)[0] for total in totals]
        torch.testing.assert_close(totals[1], totals[0])
        torch.testing.assert_close(gradients[1], gradients[0])
    assert num_graphs() == 1
    assert not counters["graph_break"]


def test_compile_loss__leaves_terms_without_a_fused_function_alone() -> None:
    loss = SegmentationLoss(4, {"class": 1.0, "focal_hard": 3.0, "dice": 5.0})
    compile_loss(loss, "aot_eager")
    masks = torch.randn(2, 4, 4, 4, requires_grad=True)
    output = SegmentationOutput(torch.randn(2, 4, 5), masks, (), (32, 32), (32, 32))
    loss(output, torch.randint(0, 4, (2, 32, 32)))["total"].backward()
    assert num_graphs() == 0


def test_compile_regions__a_copy_runs_compiled_with_weights_of_its_own(make_model: MakeModel) -> None:
    model = make_model()
    compile_regions(model, "eager")
    other = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images).mask_logits
        other.backbone.vit.blocks[0].mlp.fc1.weight.mul_(2)
        assert torch.equal(model(images).mask_logits, before)
        assert not torch.allclose(other(images).mask_logits, before)


def test_region__activations_computed_again() -> None:
    layer = torch.nn.Linear(4, 4)

    def squared(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(module(rows)).square()

    region, rows = Region(squared, "aot_eager"), torch.randn(3, 4, requires_grad=True)
    [expected] = torch.autograd.grad(squared(layer, rows).sum(), rows)
    for _ in range(2):
        [found] = torch.autograd.grad(checkpoint(region, layer, rows, use_reentrant=False).sum(), rows)
        torch.testing.assert_close(found, expected)
    assert num_graphs() == 1


def test_warm_up__leaves_eager_models_and_the_mode_alone(make_model: MakeModel) -> None:
    model = make_model().train()
    warm_up(model)
    assert num_graphs() == 0
    compile_regions(model, "eager")
    warm_up(model)
    assert num_graphs() > 0
    assert model.training
