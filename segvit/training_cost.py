"""What a training step takes of a GPU, estimated: memory by its parts, and time; on the meta device, without weights.

The parts are sums over parameters and what autograd keeps, see `TrainingCost`; docs/benchmarks.md compares them with
measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segvit.config import ModelConfig
from segvit.devices import GPU
from segvit.flops import activation_bytes, count_parameters, count_parts, outline_model
from segvit.losses.mask_maps import NUM_BUFFERS
from segvit.losses.mask_terms import QUEUED_ELEMENTS

OPTIMIZER_BYTES = MappingProxyType({"adamw": 8, "lion": 4, "muon": 4})
"""State of an optimizer, a trained parameter."""
FLOAT32_PRECISIONS = ("fp32", "tf32")
SHARE_OF_PEAK = MappingProxyType({"fp32": 0.5, "tf32": 0.25, "bf16": 0.25, "bf16_params": 0.25})
"""Of a GPU's peak, assumed: what ViT-L at 640 pixels reached in bf16 and not compiled (docs/benchmarks.md), and ViT-S
in fp32."""
RESERVED_BYTES = 1_000_000_000
"""The CUDA context and libraries' work space."""
FRAGMENTATION = 0.05
"""Share of the memory that the allocator cannot use."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How one GPU takes part in a training step."""

    num_images: int
    """In one micro-batch of this GPU."""
    accumulation_steps: int = 1
    precision: str = "fp32"
    """``fp32``; ``bf16``, autocast; ``bf16_params``, a copy of the parameters in bf16 and masters in fp32."""
    activation_checkpointing: bool = False
    num_workers: int = 1
    sharded: bool = False
    """Whether parameters, gradients and optimizer state are in shares over the workers; all precisions but ``fp32``
    then gather and compute in bf16."""
    optimizer_bytes: int = OPTIMIZER_BYTES["adamw"]
    """Of state a trained parameter; an average of the weights takes 4 more."""


class TrainingMemory(NamedTuple):
    """Bytes of one GPU at the fullest moment of a step."""

    weights: int
    optimizer: int
    gradients: int
    """Of the whole step; at the fullest moment there may be none yet."""
    exchange: int
    """Gradients in the buckets that ranks exchange; of shares, what is gathered of parameters and gradients."""
    activations: int
    """What autograd keeps, autocast's copies of weights, and what is made again of a checkpointed block."""
    loss: int
    """Maps of full resolution, while masks are compared."""
    peak: int

    @property
    def needed(self) -> int:
        """The memory that a GPU must have: the peak, what it reserves, and what its allocator cannot use."""
        return round(self.peak / (1 - FRAGMENTATION)) + RESERVED_BYTES


class TrainingCost:
    """Memory and time of a model's training steps.

    With n parameters, t of them trained, W workers, S = W where parameters are in shares and 1 elsewhere, k the state
    of the optimizer a parameter, bytes are:

    - weights 4 n / S, and 2 n more for a whole copy in bf16;
    - gradients 4 t / S; optimizer k t / S;
    - exchange, over several workers: 4 t (2 t of bf16_params); of shares: c (r + 4 b), with c = 4 in fp32 and 2 in
      bf16, r the parameters outside the blocks, b a block's: two are gathered at a time, and their gradients made;
    - activations: what autograd keeps of each image (`segvit.flops.activation_bytes`), counted under autocast's own
      rules of types, with its copies of weights; with checkpointing, of each trained block its input, and one block's
      all, and the copies, 2 t, until the forward pass ends;
    - loss: (2 + 4) maps in float32 and one of labels in int64, of 2^24 pixels at most;
    - peak: weights, optimizer, exchange, and the larger of both ends of the backward pass: at first activations and
      one of the loss's maps, the block that is made again, and autocast's copies, and with accumulation the gradients
      of earlier micro-batches; at last the gradients.

    Args:
        config: The model.
        num_classes: Its number of classes.
        freeze_blocks: Of the backbone, as in `SegViT.freeze_blocks`.

    Raises:
        ValueError: The configuration does not fit the backbone.
    """

    def __init__(self, config: ModelConfig, num_classes: int, freeze_blocks: int = 0) -> None:
        self.config = config
        self.num_classes = num_classes
        self.model = outline_model(config, num_classes)
        self.model.freeze_blocks(freeze_blocks)
        self.num_parameters = count_parameters(self.model)
        self.num_trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        blocks = self.model.backbone.blocks
        self._of_blocks = [count_parameters(block) for block in blocks]
        trained = [block for block in blocks if any(p.requires_grad for p in block.parameters())]
        self._num_trained_blocks = max(len(trained), 1)
        self._trained_share = len(trained) / len(blocks)
        self._activations = cache(self._count_activations)

    def memory(self, setup: TrainingSetup) -> TrainingMemory:
        """The memory of one GPU."""
        shares = setup.num_workers if setup.sharded else 1
        half_copy = setup.precision == "bf16_params" and not setup.sharded
        weights = (4 * self.num_parameters) // shares + 2 * self.num_parameters * half_copy
        optimizer = setup.optimizer_bytes * self.num_trained // shares
        gradients = 4 * self.num_trained // shares
        exchange = self._exchange(setup)
        kind = "bf16_params" if setup.sharded and setup.precision not in FLOAT32_PRECISIONS else setup.precision
        of_image, fixed = self._activations(kind, setup.activation_checkpointing)
        again, copies = 0, 0
        if setup.activation_checkpointing:
            # Without checkpointing the backward pass keeps them; so they are among `fixed`.
            copies = 2 * self.num_trained if kind == "bf16" else 0
            again = setup.num_images * (self._activations(kind, False)[0] - of_image) // self._num_trained_blocks
        activations = fixed + setup.num_images * of_image
        loss = self._loss_maps(setup.num_images)
        earlier = gradients if setup.accumulation_steps > 1 else 0
        fullest = max(activations + max(loss, again, copies) + earlier, gradients + again)
        peak = weights + optimizer + exchange + fullest
        return TrainingMemory(weights, optimizer, gradients, exchange, activations + again, loss, peak)

    def _exchange(self, setup: TrainingSetup) -> int:
        width = 4 if setup.precision in FLOAT32_PRECISIONS else 2
        if setup.sharded:
            rest = self.num_parameters - sum(self._of_blocks)
            return width * (rest + 4 * max(self._of_blocks))
        if setup.num_workers == 1:
            return 0
        return (2 if setup.precision == "bf16_params" else 4) * self.num_trained

    def _loss_maps(self, num_images: int) -> int:
        pixels = prod(self.config.image_size)
        num_masks = min(num_images * self.num_classes, max(1, QUEUED_ELEMENTS // pixels))
        return num_masks * pixels * (4 * (2 + NUM_BUFFERS) + 8)

    def _count_activations(self, precision: str, checkpointing: bool) -> tuple[int, int]:
        """Bytes of each image, and those that do not depend on their number."""
        model = self.model.to(torch.bfloat16 if precision == "bf16_params" else torch.float32)
        model.set_grad_checkpointing(checkpointing)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            one, two = (self._kept(model, count) for count in (1, 2))
        return two - one, 2 * one - two

    def _kept(self, model: nn.Module, num_images: int) -> int:
        with MetaAutocast():  # of one forward pass: it remembers weights
            return activation_bytes(model, self.config.image_size, num_images)

    @cached_property
    def _gflops(self) -> dict[str, float]:
        """10^9 multiply-adds of each part's forward pass in training, for one image."""
        parts = count_parts(
            outline_model(self.config, self.num_classes).eval().requires_grad_(False), self.config.image_size
        )
        return {name: value for name, value in parts.items() if name != "scores"}

    def flops(self, setup: TrainingSetup) -> float:
        """Floating-point operations of one GPU's optimizer step: forward, and twice that backward where it trains.

        A multiply-add is two; what checkpointing computes again counts.
        """
        blocks = self._gflops["blocks"] * self._trained_share
        frozen = self._gflops["blocks"] - blocks
        gflops = 3 * sum(self._gflops.values()) - 2 * frozen + blocks * setup.activation_checkpointing
        return 2e9 * gflops * setup.num_images * setup.accumulation_steps

    def seconds(self, setup: TrainingSetup, gpu: GPU) -> float:
        """Seconds of an optimizer step on the GPU, at `SHARE_OF_PEAK`; without loading, validation and exchange."""
        precision = setup.precision if gpu.has_bf16 or setup.precision == "tf32" else "fp32"
        tera = gpu.tera(precision)
        assert tera is not None, "a card of known arithmetic"
        return self.flops(setup) / (tera * 1e12 * SHARE_OF_PEAK[precision])


class MetaAutocast(TorchFunctionMode):
    """Within it and torch's autocast, tensors on the meta device get the types of bf16 autocast on a GPU.

    torch's own knows no meta device; its switch for the CPU is taken, which `segvit.output.full_precision` turns off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Matrix products in bf16, norms in float32, everything else as it comes."""
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in IN_BF16:
                args, kwargs = self._cast(args), dict(zip(kwargs, self._cast(tuple(kwargs.values())), strict=True))
            elif func in IN_FLOAT32:
                args = tuple(one.float() if isinstance(one, Tensor) else one for one in args)
        return func(*args, **kwargs)

    def _cast(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            self._in_bf16(one) if isinstance(one, Tensor) and one.is_floating_point() else one for one in values
        )

    def _in_bf16(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.bfloat16()
        # Weights are cast once a forward pass.
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor.bfloat16()
        return self._weights[id(tensor)]


IN_BF16 = frozenset(
    {
        F.linear,
        torch.conv2d,
        F.conv2d,
        torch.matmul,
        torch.bmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        F.scaled_dot_product_attention,
    }
)
IN_FLOAT32 = frozenset(
    {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax, Tensor.log, Tensor.sum}
)
