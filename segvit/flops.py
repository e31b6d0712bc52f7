"""Multiply-adds, parameters and activation memory of a configuration, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from segvit.config import ModelConfig
from segvit.inference.scores import semantic_scores
from segvit.model import SegViT, assemble, build_model
from segvit.presets import PRESETS, find_preset

LAYER_NORM_COST = 5  # per element
BILINEAR_COST = 4  # per output element

COUNTED = (
    "One multiply-add counts as one: matrix products, convolutions, both products of attention; LayerNorm 5 per "
    "element, bilinear resizing 4 per output element; other element-wise work is not counted. One image, "
    "evaluation mode, up to the full-resolution class scores."
)
ACTIVATIONS = (
    "Activations: what autograd keeps for the backward pass of one image in training mode, float32, without "
    "parameters, without the loss, with fused attention."
)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one image costs.

    One multiply-add counts as one. Matrix products, convolutions and attention count, LayerNorm as 5 per
    element and bilinear resizing as 4 per output element; other element-wise work is not.
    """

    gflops: float
    """10^9 multiply-adds from the image to its full-resolution class scores."""
    parameters: int
    parts: dict[str, float]
    """`gflops` by part: ``patch_embedding``, ``blocks`` (the rest of the backbone), the decoder's
    `Decoder.parts` in the order they run (``upsampling_1``, ..., ``atm_stage_1``, ...), ``heads`` (the rest of the
    decoder), ``scores``."""
    activation_bytes: int
    """What autograd keeps for the backward pass, see `activation_bytes`."""


@dataclass(frozen=True, slots=True)
class CostAtSize:
    """The `ModelCost` of a preset, or of another model that has a name, at a size."""

    name: str
    size: tuple[int, int]
    """(height, width) in pixels."""
    gflops: float
    published_gflops: float | None
    """The paper's figure, where it has one for this size."""
    parameters: int
    activation_bytes: int
    parts: dict[str, float]


def preset_cost(name: str, size: tuple[int, int] | None = None) -> CostAtSize:
    """Cost of a preset for one image of (height, width) pixels; by default the preset's training crop.

    Raises:
        ValueError: No preset of that name.
    """
    preset = find_preset(name)
    return cost_at(name, preset.model, preset.num_classes, size)


def cost_at(name: str, config: ModelConfig, num_classes: int, size: tuple[int, int] | None = None) -> CostAtSize:
    """Cost of a model for one image of (height, width) pixels, by default its training crop, under a name.

    Where the paper has a figure for that model at that size, it stands beside it.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """
    size = config.image_size if size is None else size
    cost = model_cost(config, num_classes, size)
    published = None
    if size == config.image_size:
        found = (one.published for one in PRESETS.values() if (one.model, one.num_classes) == (config, num_classes))
        published = next((one.gflops for one in found if one), None)
    return CostAtSize(name, size, cost.gflops, published, cost.parameters, cost.activation_bytes, cost.parts)


def model_cost(config: ModelConfig, num_classes: int, size: tuple[int, int]) -> ModelCost:
    """Cost of one image of (height, width) pixels; takes no weights and seconds at most.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """
    model = outline_model(config, num_classes)
    kept = activation_bytes(model, size)
    parts = count_parts(model.eval().requires_grad_(False), size)
    return ModelCost(sum(parts.values()), count_parameters(model), parts, kept)


def model_gflops(config: ModelConfig, num_classes: int, size: tuple[int, int]) -> float:
    """`ModelCost.gflops` alone, in half the time; raises ValueError as `model_cost` does."""
    return sum(count_parts(outline_model(config, num_classes).eval().requires_grad_(False), size).values())


def training_gflops(config: ModelConfig, num_classes: int, size: tuple[int, int], num_frozen_blocks: int = 0) -> float:
    """10^9 multiply-adds of the model for one image of (height, width) pixels in a training step, without the loss.

    Forward and backward as they are: a product that learns and passes a gradient on counts three times, one of a
    frozen block once, the patch embedding, whose images take no gradient, twice. What activation checkpointing
    computes again is not counted.

    Raises:
        ValueError: As `build_model` and `SegViT.freeze_blocks` do.
    """
    model = outline_model(config, num_classes).train()
    model.freeze_blocks(num_frozen_blocks)
    with FlopCounterMode(display=False) as counter:
        features = model.backbone(torch.empty(1, 3, *size, device="meta"))
        predictions = model.decoder(features).predictions
        outputs = [one for prediction in predictions for one in prediction if one is not None]
        torch.autograd.backward(outputs, [torch.empty_like(one) for one in outputs])
    return float(counter.get_total_flops()) / 2e9


def outline_model(config: ModelConfig, num_classes: int) -> SegViT:
    """The model on the meta device: names and shapes without weights; raises ValueError as `build_model` does."""
    with torch.device("meta"), WithoutInitialization():
        return build_model(config, num_classes)


def count_parameters(model: nn.Module) -> int:
    """Numbers that training learns or keeps frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_parts(model: SegViT, size: tuple[int, int]) -> dict[str, float]:
    """10^9 multiply-adds of each part of a frozen model on the meta device, for one image of (height, width) pixels."""
    features, backbone = count(model.backbone, torch.empty(1, 3, *size, device="meta"))
    decoded, decoder = count(model.decoder, features)
    _, scores = count(semantic_scores, assemble(decoded, size), size)
    names = [name for name, _ in model.backbone.named_modules()]
    embedding = backbone.of(name for name in names if name.endswith(("patch_embed.proj", "patch_embed.norm")))
    parts = {"patch_embedding": embedding, "blocks": backbone.total - embedding}
    for label, kind in model.config.decoder.parts.items():
        names = [name for name, module in model.decoder.named_modules() if isinstance(module, kind)]
        parts |= {f"{label}_{number}": decoder.of([name]) for number, name in enumerate(names, start=1)}
    heads = decoder.total - sum(list(parts.values())[2:])
    return parts | {"heads": heads, "scores": scores.total}


class Count:
    """10^9 multiply-adds of a call: all of them, and those inside modules of given names."""

    def __init__(self, counter: FlopCounterMode, run: object) -> None:
        # The counter takes two operations for a multiply-add.
        self._by_module = {name: sum(ops.values()) / 2e9 for name, ops in counter.get_flop_counts().items()}
        self._root = type(run).__name__
        self.total = counter.get_total_flops() / 2e9

    def of(self, names: Iterable[str]) -> float:
        """Those inside the modules of these names below the module that ran."""
        return sum(self._by_module.get(f"{self._root}.{name}", 0.0) for name in names)


def count(run: Callable[..., Any], *inputs: Any) -> tuple[Any, Count]:
    """The result of a call, and what it costs."""
    # Costs per element are given doubled, as the counter takes two operations for a multiply-add.
    formulas = {
        torch.ops.aten.native_layer_norm: per_output_element(2 * LAYER_NORM_COST),
        torch.ops.aten.upsample_bilinear2d: per_output_element(2 * BILINEAR_COST),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = run(*inputs)
    return result, Count(counter, run)


def per_output_element(cost: int) -> Callable[..., int]:
    """A counting formula: `cost` times the elements of the (first) output."""

    def formula(*_: Any, out_shape: Any, **__: Any) -> int:
        shape = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return cost * prod(shape)

    return formula


def activation_bytes(model: nn.Module, size: tuple[int, int], num_images: int = 1) -> int:
    """Bytes that autograd keeps for the backward pass of images of (height, width) pixels.

    Counted at the end of a forward pass in training mode, in the model's type, before any loss: every storage
    that a saved tensor lies in, once and whole, parameters and buffers excluded. Attention is counted as fused
    kernels keep it: queries, keys, values, output, and one number a query and head; dropout outside attention
    keeps its mask in the type of its input. The model's mode is as before afterwards.

    Args:
        model: A model on the meta device, where nothing is computed; on others the pass runs for real.
        size: (height, width) in pixels.
        num_images: In one batch.
    """
    was_training = model.training
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their storages' addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    some = next(model.parameters())
    images = torch.empty(num_images, 3, *size, device=some.device, dtype=some.dtype)
    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), FusedAttention():
            output = model.train()(images)
    finally:
        model.train(was_training)
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


class WithoutInitialization(TorchFunctionMode):
    """Within it, tensors on the meta device, which hold no values, are not initialised: most of the building time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what only sets values, pass on everything else."""
        if func in INITIALIZERS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


INITIALIZERS = frozenset(
    getattr(Tensor, name) for name in ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")
)


class FusedAttention(TorchFunctionMode):
    """Within it, attention keeps for the backward pass what fused kernels keep, on every device.

    The meta device has no fused kernel: there, the similarity of all queries and keys would be kept.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace attention, pass on everything else."""
        if func is F.scaled_dot_product_attention:
            return _KeptByFusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _KeptByFusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # Laid out so that joining the heads is a view, as fused kernels do.
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        log_sum = query.new_empty(query.shape[:-1])
        ctx.save_for_backward(query, key, value, output, log_sum)
        return output
