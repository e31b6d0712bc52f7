"""Optimizers by name, and the parameter groups that they get (SegViT, arXiv 2210.05844).

A package adds an optimizer by an entry point of group ``segvit.optimizers`` whose value is a function of the groups of
`parameter_groups` and of options with defaults; it returns a `torch.optim.Optimizer`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import timm.optim
import torch
from torch import nn

from segvit.model import SegViT
from segvit.registry import Registry, nearest_first

Groups = list[dict[str, Any]]

OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry(
    "optimizer",
    "segvit.optimizers",
    {"adamw": "segvit.optim:adamw", "lion": "segvit.optim:lion", "muon": "segvit.optim:muon"},
)


def adamw(
    groups: Groups, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8, fused: bool = True
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), the published optimizer."""
    return torch.optim.AdamW(groups, betas=_pair(betas), eps=eps, fused=fused)


def lion(groups: Groups, betas: Sequence[float] = (0.9, 0.99)) -> torch.optim.Optimizer:
    """Lion (arXiv 2302.06675), half of AdamW's memory; wants a third to a tenth of its learning rate."""
    return timm.optim.Lion(groups, betas=_pair(betas))


def muon(
    groups: Groups, momentum: float = 0.95, nesterov: bool = True, betas: Sequence[float] = (0.9, 0.95)
) -> torch.optim.Optimizer:
    """Muon for weights of linear layers, updates scaled to AdamW's size (arXiv 2502.16982); AdamW for the rest.

    Embeddings, biases and norms are no maps between spaces, which Muon is for.
    """
    apart = []
    for group in groups:
        linear = group["linear"]
        for is_linear in (True, False):
            params = [one for one, flag in zip(group["params"], linear, strict=True) if flag == is_linear]
            if params:
                apart.append({**group, "params": params, "use_fallback": not is_linear})
    return timm.optim.Muon(apart, momentum=momentum, nesterov=nesterov, betas=_pair(betas))


def _pair(betas: Sequence[float]) -> tuple[float, float]:
    first, second = betas
    return float(first), float(second)


def build_optimizer(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """The named optimizer over these groups.

    Args:
        name: Of an optimizer in `OPTIMIZERS`.
        groups: Those of `parameter_groups`.
        options: Of the optimizer, such as `betas`.

    Raises:
        ValueError: Unknown optimizer or option, or one that breaks a rule.
    """
    make = OPTIMIZERS.get(name)
    known = list(inspect.signature(make).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        choices = f"choose from {', '.join(nearest_first(unknown[0], known))}" if known else "it has none"
        raise ValueError(f"unknown option {', '.join(unknown)} of optimizer {name}; {choices}")
    try:
        return make(groups, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer {name} takes no {options}: {error}") from None


def optimizer_problem(name: str, options: dict[str, Any]) -> str | None:
    """Why there is no such optimizer with these options; None where there is."""
    weight = nn.Parameter(torch.zeros(1, 1))
    try:
        group = {"name": "backbone", "params": [weight], "lr": 1e-3, "weight_decay": 0.0, "linear": [True]}
        build_optimizer(name, [group], **options)
    except ValueError as error:
        return str(error)
    return None


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
    return torch.linalg.vector_norm(torch.stack(norms))
