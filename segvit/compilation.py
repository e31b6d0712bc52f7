"""Compiling what a model repeats, its backbone blocks and decoder layers: layers of one kind share compiled code.

Training compiles for its one shape. Inference compiles for any number of images and tokens, so that images of many
sizes are predicted without compiling anew; what needs a gradient tells which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor

from segvit.attention import LayerStack
from segvit.backbones.plain import PlainBackbone
from segvit.backbones.timm_blocks import query_block, run_block
from segvit.inference.predict import evaluating
from segvit.losses.mask_terms import compare_masks
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.model import SegViT

# Patches of the images that inference is compiled with.
WARM_UP_GRID = (7, 11)
# One graph each for kinds of layers, with and without gradient of their input or masks, one image or several.
MAX_GRAPHS = 64


class Region:
    """A function that is compiled, with gradients for the shapes that it gets, without for any number of rows.

    Args:
        function: Of tensors and modules, whose parameters its compiled code takes as inputs.
        backend: torch.compile's.
    """

    def __init__(self, function: Callable[..., Any], backend: str | Callable[..., Any]) -> None:
        self.train = torch.compile(function, backend=backend, dynamic=False)
        self.infer = torch.compile(function, backend=backend, dynamic=True)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The function's result."""
        if torch.is_grad_enabled():
            return self.train(*inputs, **options)
        # A view of a parameter asks for a gradient even here, which would be another kind of input.
        detached = (one.detach() if isinstance(one, Tensor) else one for one in inputs)
        return self.infer(*detached, **options)


def compile_regions(model: SegViT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the model's blocks and decoder layers be compiled when they first run, see also `warm_up`.

    Modules, parameters and their names stay as they are. Of a hierarchical backbone nothing is compiled.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # A block's gradients fill a bucket of DDP, so there is nothing to split a graph for.
    torch._dynamo.config.optimize_ddp = False
    if isinstance(model.backbone, PlainBackbone):
        model.backbone.compiled = {function: Region(function, backend) for function in (run_block, query_block)}
    for module in model.decoder.modules():
        if isinstance(module, LayerStack):
            module.run_layer = Region(LayerStack.run_layer, backend)  # type: ignore[method-assign]


def compile_loss(loss: SegmentationLoss, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the comparison of masks be compiled when it first runs, for images of one size that show any classes."""
    compiled = torch.compile(compare_masks, backend=backend)

    def compare(
        logits: Tensor, labels: Tensor, image: Tensor, class_index: Tensor, resizing: Any, *others: Any
    ) -> list[tuple[Tensor, Tensor | None]]:
        # One mask would be a kind of its own.
        if len(logits) == 1:
            return compare_masks(logits, labels, image, class_index, resizing, *others)
        for by_mask in (logits, image, class_index):
            torch._dynamo.maybe_mark_dynamic(by_mask, 0)
        return compiled(logits, labels, image, class_index, resizing, *others)

    if all(term.fused is not None for term in loss.terms.values() if term.compares == "masks"):
        loss.compare_masks = compare


def is_compiled(model: SegViT) -> bool:
    """Whether `compile_regions` found anything in the model."""
    stacks = [module for module in model.decoder.modules() if isinstance(module, LayerStack)]
    return bool(getattr(model.backbone, "compiled", None)) or any(isinstance(one.run_layer, Region) for one in stacks)


@torch.no_grad()
def warm_up(model: SegViT) -> None:
    """Compile inference, of one image and of several, where the model is compiled; nothing is left to compile then.

    To be called under the autocast of the predictions; the model's mode is as before afterwards. A second time it
    costs two small images.
    """
    if not is_compiled(model):
        return
    height, width = (cells * model.backbone.patch_size for cells in WARM_UP_GRID)
    images = torch.zeros(2, 3, height, width, dtype=model.mean.dtype, device=model.mean.device)
    # Sizes that are equal here are not taken for equal ever after.
    shapes: Any = torch.fx.experimental._config
    with evaluating(model), shapes.patch(use_duck_shape=False):
        model(images)
        model(images[:1])
