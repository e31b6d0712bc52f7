"""What training writes to be able to go on: weights, optimizer, random state, history, and sums of all of it.

One folder, written by rank 0 alone, so that its last file, the sums, vouches for all the others. No pickle.
W ranks when it was written.
"""

from __future__ import annotations

import hashlib
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
from pipeline import storage
from pipeline.storage.names import CONFIG_FILE, HISTORY_FILE, WEIGHTS_FILE
from pipeline.training.sharding import load_weights, placed_like, whole

OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"
SUMS_FILE = "sums.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, OPTIMIZER_FILE, RNG_FILE, STATE_FILE, HISTORY_FILE)


@dataclass
class TrainState:
    """How far training is.

    Attributes:
        val_miou: of this very step; -1 where it was not validated.
        history: rows of metrics, each with its `step`.
    """

    step: int = 0
    best_miou: float = -1.0
    val_miou: float = -1.0
    train_seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def save_training(
    folder: Path,
    model: segvit.SegViT,
    moments: Mapping[str, Tensor],
    state: TrainState,
    rng: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write a checkpoint to the new folder, its sums last.

    `moments` is what `gather_moments` gave, `rng` what `gather_rng` gave; `metadata` is kept with the weights.
    """
    segvit.save_checkpoint(folder, model, metadata)
    save_file(dict(moments), folder / OPTIMIZER_FILE)
    save_file(dict(rng), folder / RNG_FILE)
    (folder / HISTORY_FILE).write_text("".join(json.dumps(row) + "\n" for row in state.history))
    scalars = {name: getattr(state, name) for name in ("step", "best_miou", "val_miou", "train_seconds")}
    (folder / STATE_FILE).write_text(json.dumps(scalars))
    (folder / SUMS_FILE).write_text(json.dumps({name: _sha256(folder / name) for name in FILES}))


def load_training(
    folder: Path,
    model: segvit.SegViT,
    optimizer: torch.optim.Optimizer,
    rank: int,
    device: torch.device,
) -> TrainState:
    """Put model, optimizer and this rank's random generators into the state that the folder holds."""
    weights, _ = segvit.load_checkpoint(folder)
    load_weights(model, weights.state_dict())
    parameters = dict(model.named_parameters())
    for key, value in load_file(folder / OPTIMIZER_FILE).items():
        name, _, moment = key.rpartition(":")
        # Its count of steps, too: the fused AdamW wants all of its state beside the parameter.
        optimizer.state[parameters[name]][moment] = placed_like(value, parameters[name])
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
            gathered = whole(value.detach())
            if keep:
                moments[f"{names[id(parameter)]}:{key}"] = gathered.cpu().contiguous()
    return moments


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


def damage_of(uri: str) -> str | None:
    """Why the checkpoint folder at `uri` is not what training wrote, or None; reads all of it."""
    try:
        sums = storage.read_json(storage.join(uri, SUMS_FILE))
    except FileNotFoundError:
        return f"{SUMS_FILE} is missing"
    except ValueError:
        return f"{SUMS_FILE} is damaged"
    if not isinstance(sums, dict) or set(sums) != set(FILES):
        return f"{SUMS_FILE} is damaged"
    for name in FILES:
        try:
            found = storage.file_digest(storage.join(uri, name))
        except FileNotFoundError:
            return f"{name} is missing"
        if found != sums[name]:
            return f"{name} has another sha256 than when it was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
