"""Batches on their way to a GPU: copied beside the step that runs, from memory that the GPU reads by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pipeline.shards.loader import Batch
from segvit.losses.segmentation_loss import LossTargets


def prefetch(
    batches: Iterable[Batch], device: torch.device, targets_of: Callable[[Tensor], LossTargets] | None = None
) -> Iterator[Batch]:
    """The batches, on the device, with the targets of their labels where it is told how; a CPU's as they are.

    A GPU copies a batch in a stream of its own while it computes what it was given before; the step that takes the
    batch waits for it on the device, not in this process. How many masks there are to compare, which this process has
    to know, is told in that stream too, so that nothing waits for the step before.
    """
    if device.type != "cuda":
        yield from batches
        return
    # Before the step's own kernels, for this process waits for the number of masks.
    copies = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(copies):
            images, labels = (
                (part if part.is_pinned() else part.pin_memory()).to(device, non_blocking=True)
                for part in (batch.images, batch.labels)
            )
            targets = None if targets_of is None else targets_of(labels)
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(copies)
        for part in (images, labels, *(targets or ())):
            # Its memory is not used again before the step is through with it.
            part.record_stream(steps)
        yield batch._replace(images=images, labels=labels, targets=targets)
