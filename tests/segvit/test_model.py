from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from segvit.flops import activation_bytes
from segvit.inference.scores import semantic_scores
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.model import SegViT, build_model
from segvit.presets import find_preset

MakeModel = Callable[..., SegViT]
STRUCTURES = ["cascade", "single", "naive_qd", "shrunk", "anchored"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 50)])
def test_forward__any_size(make_model: MakeModel, structure: str, size: tuple[int, int]) -> None:
    model = make_model(structure)
    output = model(torch.randn(2, 3, *size))
    patches = (-(-size[0] // 16), -(-size[1] // 16))
    grid = (-(-patches[0] // 2), -(-patches[1] // 2)) if structure == "naive_qd" else patches
    stride = 32 if structure == "naive_qd" else 16
    assert output.mask_logits.shape == (2, 4, *grid)
    assert output.class_logits.shape == (2, 4, 5)
    assert output.image_size == size
    assert output.padded_size == (grid[0] * stride, grid[1] * stride)
    assert len(output.auxiliary) == 1
    assert semantic_scores(output, size).shape == (2, 4, *size)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradient_step__lowers_the_loss_and_reaches_every_parameter(make_model: MakeModel, structure: str) -> None:
    model = make_model(structure)  # evaluation mode: no dropout noise between the two losses
    images, labels = torch.randn(2, 3, 48, 64), torch.randint(0, 4, (2, 48, 64))
    loss = SegmentationLoss(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = loss(model(images), labels)["total"]
    before.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    assert loss(model(images), labels)["total"].item() < before.item()


@pytest.mark.parametrize("structure", ["cascade", "shrunk", "anchored"])
def test_freeze_blocks__no_gradient_and_evaluation_mode_through_train(make_model: MakeModel, structure: str) -> None:
    model = make_model(structure, drop_path_rate=0.5)
    model.freeze_blocks(3)
    model.train()
    vit = model.backbone.vit
    assert not vit.blocks[2].training
    assert not vit.blocks[2].drop_path2.training
    assert vit.blocks[3].training
    assert model.decoder.training

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    output = model(torch.randn(2, 3, 64, 64))
    SegmentationLoss(4)(output, torch.randint(0, 4, (2, 64, 64)))["total"].backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {
        name
        for name in before
        if name.startswith(tuple(f"backbone.vit.blocks.{index}." for index in range(3)))
        or name.startswith(("backbone.vit.patch_embed", "backbone.vit.cls_token", "backbone.vit.pos_embed"))
    }
    assert frozen == expected
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == frozen


def test_freeze_blocks__frozen_part_keeps_no_graph(make_model: MakeModel) -> None:
    model = make_model("cascade")
    saved: list[torch.Tensor] = []
    images = torch.randn(1, 3, 64, 64)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def graph_tensors(num_blocks: int) -> int:
        saved.clear()
        model.freeze_blocks(num_blocks)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.backbone(images)
        return len(saved)

    assert graph_tensors(0) > graph_tensors(2) > graph_tensors(4) == 0


def test_freeze_blocks__zero_unfreezes(make_model: MakeModel) -> None:
    model = make_model("cascade").train()
    model.freeze_blocks(2)
    model.freeze_blocks(0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.backbone.vit.blocks[0].training


def test_freeze_blocks__too_many(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="cannot freeze 5 blocks of vit_tiny_patch16_224; use 0 to 4"):
        make_model("cascade").freeze_blocks(5)


def test_normalize__uses_the_backbones_mean_and_deviation(make_model: MakeModel) -> None:
    images = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    half = make_model().normalize(images)  # augreg weights: mean and deviation 0.5
    torch.testing.assert_close(half.flatten(), torch.tensor([-1.0, -0.5 / 127.5, 1.0]))
    dinov2 = make_model(backbone="vit_small_patch14_dinov2", image_size=(28, 28)).normalize(images)
    expected = [(0 - 0.485) / 0.229, (127 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(dinov2.flatten(), torch.tensor(expected))


def test_shrunk__default_downsampling_is_at_a_third_of_the_depth(make_model: MakeModel) -> None:
    assert make_model("shrunk", shrink_at=None).backbone.shrink_at == 4


@pytest.mark.parametrize(
    "settings", [{"out_layers": (11,)}, {"out_layers": (1, 11)}, {"shrink_queries": "convolution"}]
)
def test_shrunk__one_upsampling_layer_a_feature(make_model: MakeModel, settings: dict[str, Any]) -> None:
    model = make_model("shrunk", **settings)
    decoder: Any = model.decoder
    assert len(decoder.upsampling) == len(settings.get("out_layers", (3, 11)))
    output = model(torch.randn(1, 3, 48, 64))
    assert output.mask_logits.shape == (1, 4, 3, 4)
    SegmentationLoss(4)(output, torch.randint(0, 4, (1, 48, 64)))["total"].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_build_model__by_a_presets_name() -> None:
    with torch.device("meta"):
        model = build_model("ade20k_vit_large_shrunk", num_classes=7)
    assert model.config == find_preset("ade20k_vit_large_shrunk").model
    assert model.num_classes == 7
    with pytest.raises(ValueError, match="unknown preset 'ade20k_vit_lage'; did you mean ade20k_vit_large"):
        build_model("ade20k_vit_lage", num_classes=7)


def test_shrunk__query_table_is_resized_for_another_grid(make_model: MakeModel) -> None:
    """A constant table stays constant under resizing, so every grid query starts alike."""
    model = make_model("shrunk")
    decoder: Any = model.decoder
    torch.nn.init.ones_(decoder.grid_queries.weight)
    seen: list[torch.Tensor] = []
    decoder.upsampling[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.randn(1, 3, 48, 96))
    torch.testing.assert_close(seen[0], torch.ones(1, 3 * 6, 96))


def test_geometry__padding_does_not_shift_masks(make_model: MakeModel) -> None:
    """Masks of an image and of the same image padded by hand agree where both have pixels."""
    model = make_model("single")
    images = torch.randn(1, 3, 40, 64)
    padded = torch.nn.functional.pad(images, (0, 0, 0, 8))
    scores = semantic_scores(model(images), (40, 64))
    torch.testing.assert_close(scores, semantic_scores(model(padded), (48, 64))[:, :, :40])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_forward__float64_stays_float64(make_model: MakeModel, structure: str) -> None:
    model = make_model(structure)
    images = torch.randn(1, 3, 48, 80)  # another grid than the stored one
    single, double = model(images), model.double()(images.double())
    torch.testing.assert_close(double.mask_logits, single.mask_logits.double(), rtol=1e-3, atol=1e-5)
    scores = semantic_scores(double, (48, 80))
    terms = SegmentationLoss(4)(double, torch.randint(0, 4, (1, 48, 80)))
    assert {scores.dtype, double.class_logits.dtype, *(term.dtype for term in terms.values())} == {torch.float64}


@pytest.mark.parametrize("structure", ["cascade", "shrunk", "anchored"])
def test_compile__whole_forward_is_one_graph(make_model: MakeModel, structure: str) -> None:
    model = make_model(structure)
    model.freeze_blocks(2)
    images = torch.randn(1, 3, 48, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).mask_logits, model(images).mask_logits)
    model.train()
    assert compiled(images).mask_logits.isfinite().all()  # with dropout, one graph too
    torch._dynamo.reset()


CHECKPOINTED: dict[str, dict[str, Any]] = {
    "cascade": {},
    "shrunk": {},
    "anchored": {},
    "beit": {"backbone": "beit_base_patch16_224"},
    "rotary": {"backbone": "eva02_tiny_patch14_224", "image_size": (56, 56)},
    "swin": {"backbone": "swin_tiny_patch4_window7_224", "out_layers": (1, 3)},
}


@pytest.mark.parametrize("num_frozen", [0, 1])
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_set_grad_checkpointing__same_loss_and_gradients(make_model: MakeModel, case: str, num_frozen: int) -> None:
    structure = case if case in ("shrunk", "anchored") else "cascade"
    model = make_model(structure, drop_path_rate=0.5, dropout=0.2, **CHECKPOINTED[case]).train()
    model.freeze_blocks(num_frozen)
    images = torch.randn(2, 3, *model.config.image_size)
    labels = torch.randint(0, 4, (2, *model.config.image_size))
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        loss = SegmentationLoss(4)(model(images), labels)["total"]
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        found.append((loss.item(), gradients, torch.rand(1).item()))
    (loss_without, without, next_without), (loss_with, with_it, next_with) = found
    assert (loss_with, next_with) == (loss_without, next_without)
    assert with_it.keys() == without.keys()
    for name, gradient in without.items():
        assert torch.equal(with_it[name], gradient), name


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_set_grad_checkpointing__keeps_less_of_trained_blocks_alone(make_model: MakeModel, backbone: str) -> None:
    with torch.device("meta"):
        model = make_model(backbone=backbone)
    kept = {}
    for num_frozen in (0, 1):
        model.freeze_blocks(num_frozen)
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            kept[num_frozen, enable] = activation_bytes(model, (64, 64))
    assert kept[0, True] < 0.6 * kept[0, False]
    assert kept[1, True] < kept[1, False]


def test_set_grad_checkpointing__compiled(make_model: MakeModel) -> None:
    backbone = make_model().train().backbone
    images, gradients = torch.randn(2, 3, 64, 64), []
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    for enable, forward in ((False, backbone), (True, compiled)):
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        total: torch.Tensor = torch.stack([feature.tokens.square().mean() for feature in forward(images)]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        gradients.append(backbone.get_parameter("vit.blocks.0.attn.qkv.weight").grad)
    assert gradients[0] is not None
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
