"""The parameter groups that optimizers get (SegViT, arXiv 2210.05844), and the optimizers that are built in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim.lion import Lion
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from segvit.bf16 import has_bf16
from segvit.model import SegViT

Groups = list[dict[str, Any]]

# Coefficients of five steps of the iteration, each the best for where the one before leads.
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def adamw(
    groups: Groups, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), the published optimizer."""
    return torch.optim.AdamW(groups, betas=_pair(betas), eps=eps, fused=fused)


def lion(groups: Groups, betas: Sequence[float] = (0.9, 0.99)) -> torch.optim.Optimizer:
    """Lion (arXiv 2302.06675), half of AdamW's memory; wants a third to a tenth of its learning rate."""
    return Lion(groups, betas=_pair(betas))


def muon(
    groups: Groups, momentum: float = 0.95, steps: int = 5, betas: Sequence[float] = (0.9, 0.95), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Muon, see `Muon`."""
    return Muon(groups, momentum=momentum, steps=steps, betas=_pair(betas), eps=eps)


class Muon(torch.optim.Optimizer):
    """Muon for weights of linear layers, with updates of AdamW's size (arXiv 2502.16982); AdamW for all the rest.

    The momentum of a matrix is made orthogonal by timm's Newton-Schulz iteration; matrices of one shape go through it
    together. Embeddings, biases, norms and convolutions are no maps between spaces, which Muon is for.

    Args:
        groups: Those of `parameter_groups`; their learning rates are AdamW's in size.
        momentum: Of the gradients, Nesterov's.
        steps: Of the iteration.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    def __init__(self, groups: Groups, momentum: float, steps: int, betas: tuple[float, float], eps: float) -> None:
        if not 0.0 <= momentum < 1.0 or steps < 1:
            raise ValueError(f"momentum must be in [0, 1) and steps >= 1, got {momentum} and {steps}")
        apart = []
        for group in groups:
            for is_linear in (True, False):
                params = [one for one, flag in zip(group["params"], group["linear"], strict=True) if flag == is_linear]
                if params:
                    apart.append({**group, "params": params, "is_linear": is_linear})
        super().__init__(apart, {"momentum": momentum, "steps": steps})
        others = [group for group in self.param_groups if not group["is_linear"]]
        # Over the same groups and the same state, so that both see one learning rate and are saved as one.
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps, fused=True) if others else None
        if self._adamw is not None:
            self._adamw.param_groups = others
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step along the gradients."""
        assert closure is None, "closures are not evaluated"
        if self._adamw is not None:
            self._adamw.step()
        for group in self.param_groups:
            if group["is_linear"]:
                self._step_linear(group)

    def _step_linear(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1.0 - group["momentum"])
            ahead = weight.grad.lerp(state["momentum"], group["momentum"])
            by_shape.setdefault(weight.shape, []).append((weight, ahead))
        for (rows, columns), members in by_shape.items():
            rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            updates = orthogonalized(torch.stack([whole(update) for _, update in members]), group["steps"])
            for (weight, _), update in zip(members, updates.to(members[0][0].dtype), strict=True):
                weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                weight.add_(like(weight, update), alpha=-rate)


def orthogonalized(matrices: Tensor, steps: int) -> Tensor:
    """The matrices (M, rows, columns) with all singular values near 1, in bf16 where the device has it."""
    dtype = torch.bfloat16 if has_bf16(matrices.device) else torch.float32
    return zeropower_via_newtonschulz(matrices, steps, list(NEWTON_SCHULZ), dtype=dtype)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a share; a collective call where it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, values: Tensor) -> Tensor:
    """Values placed as the parameter is."""
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements)


def _pair(betas: Sequence[float]) -> tuple[float, float]:
    first, second = betas
    return float(first), float(second)


def parameter_groups(
    model: SegViT,
    learning_rate: float,
    weight_decay: float,
    decoder_lr_multiplier: float = 10.0,
    layer_decay: float = 1.0,
) -> Groups:
    """Groups for an optimizer: backbone, backbone norms without weight decay, decoder at a higher rate.

    Frozen parameters are left out, and so is a group that would be empty.

    Args:
        model: The model, after any `freeze_blocks`.
        learning_rate: Of the backbone; with `layer_decay`, of its last block.
        weight_decay: Of all but the backbone's norms; the decoder's norms are decayed.
        decoder_lr_multiplier: The decoder's learning rate over the backbone's.
        layer_decay: Learning rate of each backbone block, or stage, over that of the one after it; the embeddings
            count as the block before the first (arXiv 2106.08254). Below 1, every block has groups of its own.

    Returns:
        Dicts with ``name``, ``params``, ``lr``, ``weight_decay``, and ``linear``: of each parameter, whether it is the
        weight of a linear layer.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    backbone = [(name, parameter) for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    last = max((block_index(name) for name, _ in model.backbone.named_parameters()), default=-1)
    groups: Groups = []
    blocks = sorted({block_index(name) for name, _ in backbone}) if layer_decay < 1.0 else [None]
    for block in blocks:
        own = [(name, one) for name, one in backbone if block is None or block_index(name) == block]
        rate = learning_rate * (1.0 if block is None else layer_decay ** (last - block))
        suffix = "" if block is None else f".{'embeddings' if block < 0 else block}"
        for kind, norms, decay in (("backbone", False, weight_decay), ("backbone_norms", True, 0.0)):
            params = [parameter for name, parameter in own if is_norm(name) == norms]
            groups.append({"name": kind + suffix, "params": params, "lr": rate, "weight_decay": decay})
    decoder = [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]
    decoder_lr = learning_rate * decoder_lr_multiplier
    groups.append({"name": "decoder", "params": decoder, "lr": decoder_lr, "weight_decay": weight_decay})
    weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return [group | {"linear": [id(one) in weights for one in group["params"]]} for group in groups if group["params"]]


def block_index(parameter_name: str) -> int:
    """The backbone block, or stage of a hierarchical one, that a parameter belongs to; -1 for the embeddings."""
    found = re.search(r"(?:^|\.)(?:blocks\.|layers_|layers\.)(\d+)\.", parameter_name)
    return int(found[1]) if found else -1


def is_norm(parameter_name: str) -> bool:
    """Whether a backbone parameter belongs to a normalisation (timm: norm1, q_norm, norm_pre, ...)."""
    return any("norm" in module for module in parameter_name.split(".")[:-1])


def clip_gradients(groups: Groups, max_norm: float, *, per_group: bool) -> torch.Tensor:
    """Clip gradients to a norm, of all parameters together or of every group by itself; the norm before, of all.

    Args:
        groups: Of an optimizer.
        max_norm: The largest 2-norm that is left.
        per_group: Whether `max_norm` is each group's own, so that a decoder with large gradients leaves the
            backbone's as they are.
    """
    if not per_group:
        return nn.utils.clip_grad_norm_([one for group in groups for one in group["params"]], max_norm)
    norms = [nn.utils.clip_grad_norm_(group["params"], max_norm) for group in groups]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
