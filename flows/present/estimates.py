"""How estimates of training steps look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from flows.present.runs import size_text
from pipeline.estimate import TrainEstimate

ASSUMED = (
    "Estimates: parts of the peak, not all at one moment; needed: the peak with 1 GB and 5 % that cannot be used. The "
    "time is the least: a quarter of the card's arithmetic in bf16, half of it in fp32, without loading, validation "
    "and exchange; small models wait for the launching of kernels."
)


def estimates_view(estimates: Sequence[TrainEstimate]) -> Group:
    """Memory and time of each variant's training step, and what makes a misfit fit."""
    gpu, memory = estimates[0].gpu, estimates[0].gpu_memory
    card = f", {gpu} ({size_text(memory)})" if gpu and memory else ""
    table = Table(title=f"Training step on each GPU{card}", title_justify="left")
    table.add_column("variant", overflow="fold")
    for heading in ("weights", "optimizer", "gradients", "exchange", "activations", "loss", "needed", "step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in estimates:
        parts = (one.weights, one.optimizer, one.gradients, one.exchange, one.activations, one.loss, one.needed)
        seconds = "" if one.step_seconds is None else f"{one.step_seconds * 1e3:.3g} ms"
        table.add_row(one.variant, *(size_text(part) for part in parts), seconds)
    return Group(table, *(misfit_text(one) for one in estimates if one.fits is False), ASSUMED)


def misfit_text(estimate: TrainEstimate) -> str:
    """What a variant needs, and what would make it fit, in a line."""
    assert estimate.gpu_memory is not None, "a card that is known"
    lead = f"{estimate.variant} needs {size_text(estimate.needed)} of {size_text(estimate.gpu_memory)} and does not fit"
    if estimate.changes is None or estimate.needed_then is None:
        return f"{lead}, in bf16, checkpointed and sharded neither; take a larger card, or a smaller model or crop"
    settings = " ".join(f"--set {path}={_as_yaml(value)}" for path, value in estimate.changes.items())
    return f"{lead}; it fits ({size_text(estimate.needed_then)}) with {settings}"


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
