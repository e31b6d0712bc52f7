"""Parameters, gradients and optimizer state in shares over the ranks (FSDP2), and whole again for a checkpoint.

W ranks. Each keeps 1/W of every parameter as a DTensor; a block is whole only while it computes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from timm.models.beit import Block as BeitBlock
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from segvit.backbones.timm_blocks import compute_query_block
from segvit.flops import outline_model
from segvit.inference.predict import evaluating
from segvit.model import SegViT
from segvit.optim import whole


def shard_model(model: SegViT, device: torch.device, param_dtype: torch.dtype | None = None) -> None:
    """Shard the model over all ranks, in place: each backbone block, then the rest; a collective call.

    Blocks come to `device` one by one, so that a model on the CPU may be larger than the device.

    Args:
        model: After `freeze_blocks`; its optimizer is made afterwards.
        device: This rank's.
        param_dtype: The type that blocks are gathered and compute in; the shares stay as they are, and gradients are
            summed in float32. None: the parameters' own.
    """
    ensure_process_group(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None)
    # Positions stay in float32; tokens have the type already.
    of_blocks = replace(policy, cast_forward_inputs=False)
    for block in model.backbone.blocks:
        if isinstance(block, BeitBlock):
            continue  # its table of positions is read outside the block
        block.query_forward = partial(compute_query_block, block)  # type: ignore[assignment]
        fully_shard(block, mesh=mesh, mp_policy=of_blocks)
        register_fsdp_forward_method(block, "query_forward")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # Nothing changes the predictions in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model.to(device)


def ensure_process_group(device: torch.device) -> None:
    """Make a group of this process alone, where it is in none."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was called with the model."""
    return isinstance(model, FSDPModule)


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor, whole and the same on all ranks, on the device of `other`, and in shares where that one is."""
    if isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(other.device)
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def load_weights(model: SegViT, state: Mapping[str, Tensor]) -> None:
    """Load whole weights, the same on all ranks, into a model that may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: placed_like(tensor, own[name]) for name, tensor in state.items()})


def whole_weights(weights: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """All of weights that may be in shares, for ranks that `keep` them; a collective call where they are."""
    gathered: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        one = whole(tensor.detach())
        if keep:
            gathered[name] = one.cpu() if isinstance(tensor, DTensor) else one
    return gathered


def whole_model(model: SegViT, *, keep: bool = True) -> SegViT:
    """The model itself, or of a sharded one a copy on the CPU with all weights; a collective call.

    The copy is for writing: its buffers that no file holds have no values. Ranks that do not `keep` it get no weights.
    """
    if not is_sharded(model):
        return model
    copy = outline_model(model.config, model.num_classes)
    copy.load_state_dict(whole_weights(model.state_dict(), keep=keep), strict=keep, assign=True)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return copy


@contextlib.contextmanager
def uneven_forwards(model: SegViT) -> Iterator[None]:
    """Within it, without gradients, ranks may run different numbers of forward passes; a collective call.

    A forward pass gathers parameters from all ranks, so a rank that is done runs passes of its own until all are.
    """
    if not is_sharded(model):
        yield
        return

    def any_goes_on(here: bool) -> bool:
        flag = torch.tensor(float(here), device=model.mean.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    hook = model.register_forward_pre_hook(lambda _module, _inputs: any_goes_on(True) and None, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    with evaluating(model), torch.no_grad():
        while any_goes_on(False):
            model(torch.zeros(1, 3, *model.config.image_size, device=model.mean.device))
    # What lies outside the blocks stays whole after a pass without a backward one.
    model.reshard()  # type: ignore[operator]
