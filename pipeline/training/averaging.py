"""Averages of a run's weights: one that moves along while training, and one of the best that were validated.

Names are those of the model's trainable parameters; what is frozen has no average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pipeline.training.sharding import placed_like
from segvit.optim import whole

Weights = dict[str, Tensor]


class MovingAverage:
    """An exponential moving average of the trainable weights, on their device, in float32 or more.

    Args:
        model: What is averaged; its weights are where the average starts.
        decay: What the average keeps of itself a step. After few steps it keeps less, (1 + step) / (10 + step), so
            that it does not stay where training began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: Weights = {
            name: parameter.detach().clone(memory_format=torch.preserve_format)
            for name, parameter in trainable(model).items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [parameter.detach() for parameter in trainable(model).values()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1.0 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the average."""
        for name, weight in weights.items():
            self.weights[name].copy_(placed_like(weight, self.weights[name]))


class BestWeights:
    """The weights of the best validations of a run, on the CPU.

    Args:
        number: How many are kept.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.kept: list[tuple[float, Weights]] = []

    def offer(self, miou: float, weights: Mapping[str, Tensor]) -> None:
        """Keep these weights if they are among the best; of equals, the later ones."""
        if len(self.kept) == self.number and miou < self.kept[-1][0]:
            return
        copies = {name: whole(weight.detach()).to("cpu", copy=True) for name, weight in weights.items()}
        self.kept.insert(sum(one > miou for one, _ in self.kept), (miou, copies))
        del self.kept[self.number :]

    def mean(self) -> Weights:
        """The mean of what is kept (Model Soups, arXiv 2203.05482, uniform)."""
        sets = [weights for _, weights in self.kept]
        return {name: torch.stack([one[name] for one in sets]).mean(0) for name in sets[0]}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The model with other trainable weights meanwhile; None: its own."""
    if weights is None:
        yield
        return
    parameters = trainable(model)
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    put(model, weights)
    try:
        yield
    finally:
        put(model, own)


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set trainable weights, in place."""
    parameters = trainable(model)
    for name, weight in weights.items():
        parameters[name].copy_(placed_like(weight, parameters[name]))
