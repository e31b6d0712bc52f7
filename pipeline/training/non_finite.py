"""A loss or gradient that is not finite: noticed on all ranks at once, and the batch that caused it kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.loader import Batch

FOLDER = "non_finite"
MAX_NAMED_KEYS = 6
_NEVER = 1 << 62


class FiniteWatch:
    """Remembers the first step whose loss or gradient was not finite, on the device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), _NEVER, dtype=torch.int64, device=device)
        self._values = torch.zeros(0, device=device)
        self._names: tuple[str, ...] = ()

    def note(self, step: int, terms: Mapping[str, Tensor], gradient_norm: Tensor) -> None:
        """Take in a step: this rank's loss terms, `total` among them, and the norm of the common gradient."""
        self._names = (*terms, "gradient_norm")
        values = torch.stack([value.detach().float() for value in (*terms.values(), gradient_norm)])
        if not len(self._values):
            self._values = torch.zeros_like(values)
        now = (self._first == _NEVER) & ~(torch.isfinite(terms["total"]) & torch.isfinite(gradient_norm))
        self._values = torch.where(now, values, self._values)
        self._first = torch.where(now, step, self._first)

    def first_step(self, world_size: int) -> int | None:
        """The first such step on any rank, the same answer on all; a collective call."""
        first = self._first.clone()
        if world_size > 1:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        return None if int(first) == _NEVER else int(first)

    @property
    def values(self) -> dict[str, float]:
        """Loss terms and gradient norm of that step on this rank; zeros where it saw nothing."""
        return dict(zip(self._names, self._values.tolist(), strict=True))


class RankReport(NamedTuple):
    """What a rank knows of the step that went wrong."""

    rank: int
    values: dict[str, float]
    keys: tuple[str, ...]
    uri: str | None


def stop_training(
    step: int,
    values: dict[str, float],
    batches: Sequence[Batch],
    *,
    rank: int,
    world_size: int,
    run_uri: str | None,
) -> NoReturn:
    """Keep the batch below `run_uri`, if given, and end training; a collective call.

    Kept are the shares of ranks whose own loss is not finite, of all ranks where only the gradient is not: a
    safetensors file each, `images` (B, 3, H, W) and `labels` (B, H, W) uint8, keys, step, rank and loss terms in
    its metadata.

    Raises:
        UserError: always, the same one on every rank.
    """
    own = RankReport(rank, values, tuple(key for batch in batches for key in batch.keys), None)
    reports = _from_all_ranks(own, world_size)
    culprits = [one for one in reports if not math.isfinite(one.values["total"])] or reports
    if run_uri is not None:
        culprits = [one._replace(uri=batch_uri(run_uri, step, one.rank)) for one in culprits]
        for one in culprits:
            if one.rank == rank:
                assert one.uri is not None
                storage.publish_bytes(one.uri, _packed(step, own, batches))
        if world_size > 1:
            # The first error ends all processes; a slower one's file would be lost.
            dist.barrier()
    raise UserError(non_finite_message(step, culprits))


def batch_uri(run_uri: str, step: int, rank: int) -> str:
    """Where a rank's share of a batch is kept."""
    return storage.join(run_uri, FOLDER, f"step-{step:08d}-rank-{rank}.safetensors")


def non_finite_message(step: int, culprits: Sequence[RankReport]) -> str:
    """The error in one line: value, rule, remedy, URI of the batch, keys."""
    first = culprits[0]
    if math.isfinite(first.values["total"]):
        norm, total = first.values["gradient_norm"], first.values["total"]
        lead = f"the gradient's norm is {norm} at step {step}, the loss {total:.6g}"
    else:
        terms = [name for name, value in first.values.items() if not math.isfinite(value)]
        named = ", ".join(name for name in terms if name not in ("total", "gradient_norm"))
        lead = f"the loss is {first.values['total']} at step {step}" + (f" (in {named})" if named else "")
    kept = ", ".join(one.uri for one in culprits if one.uri is not None)
    keys = [key for one in culprits for key in one.keys]
    more = f" and {len(keys) - MAX_NAMED_KEYS} more" if len(keys) > MAX_NAMED_KEYS else ""
    return (
        f"{lead}; both must be finite. Lower train.learning_rate or use precision fp32, and look at the batch"
        + (f" kept in {kept}" if kept else "")
        + f": {', '.join(keys[:MAX_NAMED_KEYS])}{more}"
    )


def _packed(step: int, report: RankReport, batches: Sequence[Batch]) -> bytes:
    tensors = {
        "images": torch.cat([batch.images for batch in batches]),
        "labels": torch.cat([batch.labels for batch in batches]),
    }
    metadata = {
        "step": str(step),
        "rank": str(report.rank),
        "keys": json.dumps(report.keys),
        "terms": json.dumps({name: str(value) for name, value in report.values.items()}),
    }
    return save(tensors, metadata)


def _from_all_ranks(own: RankReport, world_size: int) -> list[RankReport]:
    if world_size == 1:
        return [own]
    reports: list[RankReport | None] = [None] * world_size
    dist.all_gather_object(reports, own)
    return [one for one in reports if one is not None]
