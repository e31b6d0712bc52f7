"""What training writes to be able to go on: weights, optimizer, random state, history, and sums of all of it.

One folder, written by rank 0 alone, so that its last file, the sums, vouches for all the others. No pickle.
The weights are those that were found best when it was written: what is published needs no more. Where these are an
average, the weights that training goes on with lie beside them. W ranks when it was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import segvit
from pipeline.storage.names import HISTORY_FILE
from pipeline.training.averaging import BestWeights, MovingAverage, put, swapped, trainable
from pipeline.training.checkpoint_files import (
    AVERAGE_FILE,
    BEST_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    TRAINED_FILE,
    write_sums,
)
from pipeline.training.sharding import load_weights, placed_like
from segvit.optim import whole


@dataclass
class TrainState:
    """How far training is.

    Attributes:
        val_miou: of this very step; -1 where it was not validated.
        finished: whether training ends with this step.
        history: rows of metrics, each with its `step`.
    """

    step: int = 0
    best_miou: float = -1.0
    val_miou: float = -1.0
    train_seconds: float = 0.0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


_SCALARS = ("step", "best_miou", "val_miou", "train_seconds", "finished")


@dataclass
class Averages:
    """The averages of a run's weights, as far as its settings ask for them."""

    moving: MovingAverage | None = None
    best: BestWeights | None = None


def save_training(
    folder: Path,
    model: segvit.SegViT,
    moments: Mapping[str, Tensor],
    state: TrainState,
    rng: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    moving: Mapping[str, Tensor] | None = None,
    best: BestWeights | None = None,
    chosen: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint to the new folder, its sums last.

    `moments` is what `gather_moments` gave, `rng` what `gather_rng` gave, `moving` the weights of the moving average;
    `metadata` is kept with the weights, which are the `chosen` ones where these are not the model's own.
    """
    with swapped(model, chosen):
        segvit.save_checkpoint(folder, model, metadata)
    if chosen is not None:
        save_weights(folder / TRAINED_FILE, trainable(model))
    if moving is not None:
        save_weights(folder / AVERAGE_FILE, moving)
    if best is not None and best.kept:
        kept = enumerate(best.kept)
        sets = {f"{index}:{name}": one for index, (_, weights) in kept for name, one in weights.items()}
        scores = torch.tensor([miou for miou, _ in best.kept], dtype=torch.float64)
        save_weights(folder / BEST_FILE, {**sets, "miou": scores})
    save_file(dict(moments), folder / OPTIMIZER_FILE)
    save_file(dict(rng), folder / RNG_FILE)
    (folder / HISTORY_FILE).write_text("".join(json.dumps(row) + "\n" for row in state.history))
    (folder / STATE_FILE).write_text(json.dumps({name: getattr(state, name) for name in _SCALARS}))
    write_sums(folder)


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Tensors by name, as safetensors."""
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)


def load_training(
    folder: Path,
    model: segvit.SegViT,
    optimizer: torch.optim.Optimizer,
    rank: int,
    device: torch.device,
    averages: Averages | None = None,
) -> TrainState:
    """Put model, optimizer, averages and this rank's random generators into the state that the folder holds."""
    weights, _ = segvit.load_checkpoint(folder)
    load_weights(model, weights.state_dict())
    if (folder / TRAINED_FILE).exists():
        put(model, load_file(folder / TRAINED_FILE))
    _load_averages(folder, averages or Averages(), model)
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / OPTIMIZER_FILE).items():
        name, _, moment = key.rpartition(":")
        # Its count of steps, too: the fused AdamW wants all of its state beside the parameter.
        kept = value.item() if value.dtype == torch.bool else placed_like(value, parameters[name])
        optimizer.state[parameters[name]][moment] = kept
    _restore_rng(load_file(folder / RNG_FILE), rank, device)
    history = [json.loads(line) for line in (folder / HISTORY_FILE).read_text().splitlines()]
    return TrainState(history=history, **json.loads((folder / STATE_FILE).read_text()))


def gather_moments(model: segvit.SegViT, optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Tensor]:
    """The optimizer's state on the CPU, by ``parameter:entry``, whole where it is sharded; a collective call.

    Ranks that do not `keep` it get nothing.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            # Some optimizers keep flags and counts beside tensors.
            gathered = whole(torch.as_tensor(value).detach())
            if keep:
                moments[f"{names[id(parameter)]}:{key}"] = gathered.cpu().contiguous()
    return moments


def _load_averages(folder: Path, averages: Averages, model: segvit.SegViT) -> None:
    if averages.moving is not None:
        # Without a file, as after a change of the setting, the average starts from the weights as they are now.
        file = folder / AVERAGE_FILE
        averages.moving.load(load_file(file) if file.exists() else trainable(model))
    if averages.best is not None and (folder / BEST_FILE).exists():
        sets = load_file(folder / BEST_FILE)
        scores = sets.pop("miou").tolist()
        # The best last, so that of equals those that were ahead are so again.
        for index, miou in reversed(list(enumerate(scores))):
            prefix = f"{index}:"
            own = {name.removeprefix(prefix): one for name, one in sets.items() if name.startswith(prefix)}
            averages.best.offer(miou, own)


def gather_rng(world_size: int, device: torch.device) -> dict[str, Tensor]:
    """The states of all ranks' random generators, (W, bytes) uint8 each; a collective call."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: _from_all_ranks(state, world_size, device) for name, state in states.items()}


def _from_all_ranks(state: Tensor, world_size: int, device: torch.device) -> Tensor:
    if world_size == 1:
        return state[None]
    parts = [torch.empty_like(state, device=device) for _ in range(world_size)]
    dist.all_gather(parts, state.to(device))
    return torch.stack(parts).cpu()


def _restore_rng(states: Mapping[str, Tensor], rank: int, device: torch.device) -> None:
    # Ranks that were not there when it was written keep the generators they started with.
    if rank >= len(states["cpu"]):
        return
    # Copies: PyTorch reads the state from where its tensor's storage starts, and crashes on a row of a larger one.
    torch.set_rng_state(states["cpu"][rank].clone())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][rank].clone(), device)
