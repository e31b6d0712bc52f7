"""Memory and peak arithmetic of common GPUs, from their makers' data sheets."""

from __future__ import annotations

import difflib
from typing import NamedTuple


class GPU(NamedTuple):
    """A card; the arithmetic is dense, bf16 with float32 sums."""

    name: str
    memory_gib: float
    """What a process can have."""
    bf16_tflops: float
    """0: it has no bf16 instructions."""
    fp32_tflops: float
    """0, as the other: not known."""

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return round(self.memory_gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("T4", 14.6, 0.0, 8.1),
        GPU("V100", 31.7, 0.0, 15.7),
        GPU("A10", 22.0, 125.0, 31.2),
        GPU("A100", 79.2, 312.0, 19.5),
        GPU("A100-40GB", 39.4, 312.0, 19.5),
        GPU("L4", 22.0, 121.0, 30.3),
        GPU("L40S", 44.4, 362.0, 91.6),
        GPU("H100", 79.1, 989.0, 67.0),
        GPU("H200", 139.8, 989.0, 67.0),
        GPU("B200", 178.0, 2250.0, 75.0),
        GPU("RTX 3090", 23.5, 71.0, 35.6),
        GPU("RTX 4090", 23.5, 165.2, 82.6),
        GPU("RTX 5090", 31.3, 209.5, 104.8),
    )
}


def find_gpu(name: str) -> GPU:
    """The card of a name, in any case, with or without spaces and hyphens; raises ValueError with the choices."""
    for known, gpu in GPUS.items():
        if _plain(known) == _plain(name):
            return gpu
    close = difflib.get_close_matches(_plain(name), [_plain(known) for known in GPUS], n=1)
    hint = next((f"; did you mean {known}?" for known in GPUS if _plain(known) in close), "")
    raise ValueError(f"unknown GPU {name!r}{hint}; choose from {', '.join(GPUS)}")


def detect_gpu() -> GPU | None:
    """This machine's first GPU, its arithmetic by its name (0 where that is not known), or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return of_device(properties.name, properties.total_memory)


def of_device(name: str, memory_bytes: int) -> GPU:
    """The card that its driver calls so, with the memory that it has."""
    words = _plain(name)
    # The longest name: an L40S is no L4.
    found = max((known for known in GPUS if _plain(known) in words), key=len, default=None)
    known = GPUS[found] if found is not None else GPU(name, 0.0, 0.0, 0.0)
    return known._replace(name=name, memory_gib=memory_bytes / 2**30)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
