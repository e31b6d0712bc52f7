"""What training steps will take of a GPU, before anything starts: memory, time, and the settings that make it fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pipeline.config import ExperimentConfig, RuntimeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.preflight import variant_models
from pipeline.records import Record
from segvit.devices import GPU, detect_gpu, find_gpu
from segvit.training_cost import OPTIMIZER_BYTES, TrainingCost, TrainingSetup

MOST_WORKERS = 64
Changes = dict[str, Any]


class TrainEstimate(Record):
    """A variant's training step on one GPU; bytes and seconds, see `segvit.training_cost.TrainingCost`.

    Attributes:
        needed: peak, with what a GPU reserves and its allocator cannot use.
        gpu: the card; None: only the memory is told.
        gpu_memory: what a process can have of it.
        step_seconds: None without a card, or where its arithmetic is not known.
        changes: settings by path that make it fit, fewest first in the order in which they cost least; empty where it
            fits; None where none of them does, or without a card.
        needed_then: `needed` with these.
    """

    variant: str
    weights: int
    optimizer: int
    gradients: int
    exchange: int
    activations: int
    loss: int
    peak: int
    needed: int
    gpu: str | None = None
    gpu_memory: int | None = None
    step_seconds: float | None = None
    changes: Changes | None = None
    needed_then: int | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the card has what is needed; None without one."""
        return None if self.gpu_memory is None else self.needed <= self.gpu_memory


def choose_gpu(name: str | None) -> GPU | None:
    """The card of that name, or this machine's own, if it has one; raises UserError for an unknown name."""
    try:
        return detect_gpu() if name is None else find_gpu(name)
    except ValueError as error:
        raise UserError(f"--gpu: {error}") from None


def estimate_training(config: ExperimentConfig, variants: Collection[str], gpu: GPU | None) -> list[TrainEstimate]:
    """An estimate for each of the variants; takes seconds a model, and no memory for weights.

    Raises:
        UserError: Settings that do not fit one another, or no data to tell the classes.
    """
    costs: dict[str, TrainingCost] = {}
    estimates: list[TrainEstimate] = []
    if not variants:
        return estimates
    for name, (model, num_classes) in variant_models(config).items():
        train = config.variant_settings(name).train
        if name not in variants or not train.steps:
            continue
        key = repr((model, num_classes, train.freeze_blocks))
        if key not in costs:
            costs[key] = TrainingCost(model, num_classes, train.freeze_blocks)
        estimates.append(estimate_step(name, costs[key], train, config.runtime, gpu))
    return estimates


def estimate_step(
    variant: str, cost: TrainingCost, train: TrainConfig, runtime: RuntimeConfig, gpu: GPU | None
) -> TrainEstimate:
    """The estimate of one model's training step."""
    setup = setup_of(train, runtime, {}, gpu)
    memory = cost.memory(setup)
    estimate = TrainEstimate(variant=variant, needed=memory.needed, **memory._asdict())
    if gpu is None:
        return estimate
    found = fitting_changes(cost, train, runtime, gpu)
    return estimate.model_copy(
        update={
            "gpu": gpu.name,
            "gpu_memory": gpu.memory_bytes,
            "step_seconds": cost.seconds(setup, gpu) if gpu.peak is not None else None,
            "changes": found,
            "needed_then": None if found is None else cost.memory(setup_of(train, runtime, found, gpu)).needed,
        }
    )


def setup_of(train: TrainConfig, runtime: RuntimeConfig, changes: Changes, gpu: GPU | None) -> TrainingSetup:
    """How a GPU takes part in a step of these settings, changed; of the fewest workers, which have most images each."""
    workers = changes.get("runtime.num_workers", runtime.min_workers)
    accumulation_steps = changes.get("train.accumulation_steps", train.accumulation_steps)
    precision = changes.get("train.precision", train.precision)
    return TrainingSetup(
        num_images=-(-train.batch_size // (accumulation_steps * workers)),
        accumulation_steps=accumulation_steps,
        precision=precision if gpu is None or gpu.has_bf16 or precision == "tf32" else "fp32",
        activation_checkpointing=changes.get("train.activation_checkpointing", train.activation_checkpointing),
        num_workers=workers,
        sharded=changes.get("runtime.sharding", runtime.sharding) == "full",
        optimizer_bytes=OPTIMIZER_BYTES.get(train.optimizer.name, OPTIMIZER_BYTES["adamw"])
        + 4 * (train.ema_decay is not None),
    )


def fitting_changes(cost: TrainingCost, train: TrainConfig, runtime: RuntimeConfig, gpu: GPU) -> Changes | None:
    """Settings that make the step fit the card: none where it fits, None where these do not help.

    They are tried one upon the other, what costs least first; those that turn out not to be needed are left out.
    """

    def fits(changes: Changes) -> bool:
        return cost.memory(setup_of(train, runtime, changes, gpu)).needed <= gpu.memory_bytes

    found = next((changes for changes in _growing_changes(train, runtime, gpu) if fits(changes)), None)
    if found is None:
        return None
    for path in reversed(tuple(found)):
        fewer = {one: value for one, value in found.items() if one != path}
        if _is_valid(train, runtime, fewer) and fits(fewer):
            found = fewer
    return found


def _growing_changes(train: TrainConfig, runtime: RuntimeConfig, gpu: GPU) -> Iterator[Changes]:
    changes: Changes = {}
    yield changes
    if train.precision in ("fp32", "tf32") and gpu.has_bf16:
        changes = changes | {"train.precision": "bf16"}
        yield changes
    if not train.activation_checkpointing:
        changes = changes | {"train.activation_checkpointing": True}
        yield changes
    for steps in range(train.accumulation_steps + 1, train.batch_size // runtime.min_workers + 1):
        if train.batch_size % steps == 0:
            changes = changes | {"train.accumulation_steps": steps}
            yield changes
    if train.precision != "bf16_params" and runtime.sharding == "none" and gpu.has_bf16:
        yield changes | {"train.precision": "bf16_params"}
    workers = max(runtime.min_workers, 2)
    while workers <= min(MOST_WORKERS, train.batch_size):
        steps = max(one for one in range(1, train.batch_size // workers + 1) if train.batch_size % one == 0)
        spread = {"runtime.sharding": "full", "runtime.num_workers": workers, "train.accumulation_steps": steps}
        yield changes | spread
        workers *= 2


def _is_valid(train: TrainConfig, runtime: RuntimeConfig, changes: Changes) -> bool:
    """Whether shares have several workers, and every worker an image."""
    workers = changes.get("runtime.num_workers", runtime.min_workers)
    steps = changes.get("train.accumulation_steps", train.accumulation_steps)
    in_shares = changes.get("runtime.sharding", runtime.sharding) == "full"
    return bool(train.batch_size >= workers * steps and (in_shares or "runtime.num_workers" not in changes))
