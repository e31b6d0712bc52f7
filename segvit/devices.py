"""What a GPU can do at best, by its name or the one that PyTorch gives it: matrix products a second, and memory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple


class Peak(NamedTuple):
    """The vendor's figures without sparsity, bf16 with float32 sums: 10^12 operations a second, a multiply-add two."""

    fp32: float
    tf32: float | None
    bf16: float | None
    memory_gib: float
    """What PyTorch tells as the device's total memory, rounded down."""

    def of(self, precision: str) -> float | None:
        """Of products at a precision of training; None where there are no instructions for it."""
        return {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "bf16_params": self.bf16}[precision]


# By the words of a name that tell devices apart. Devices that have no tensor cores for a type have None.
PEAKS: Mapping[str, Peak] = {
    "T4": Peak(8.1, None, None, 14.5),
    "V100 16GB": Peak(15.7, None, None, 15.7),
    "V100 32GB": Peak(15.7, None, None, 31.7),
    "A10": Peak(31.2, 62.5, 125.0, 22.0),
    "A10G": Peak(31.5, 35.0, 70.0, 22.0),
    "A30": Peak(10.3, 82.0, 165.0, 23.5),
    "A40": Peak(37.4, 74.8, 149.7, 44.4),
    "A100 40GB": Peak(19.5, 156.0, 312.0, 39.3),
    "A100 80GB": Peak(19.5, 156.0, 312.0, 79.1),
    "L4": Peak(30.3, 60.0, 121.0, 22.0),
    "L40": Peak(90.5, 90.5, 181.0, 44.3),
    "L40S": Peak(91.6, 183.0, 362.0, 44.3),
    "H100": Peak(66.9, 494.7, 989.4, 79.1),
    "H100 PCIe": Peak(51.2, 378.0, 756.0, 79.1),
    "H100 NVL": Peak(60.0, 417.5, 835.0, 93.0),
    "GH200": Peak(66.9, 494.7, 989.4, 94.5),
    "H200": Peak(66.9, 494.7, 989.4, 139.7),
    "H200 NVL": Peak(60.0, 417.5, 835.0, 139.7),
    "B200": Peak(75.0, 1125.0, 2250.0, 178.3),
    "RTX 3090": Peak(35.6, 35.6, 71.0, 23.5),
    "RTX 4090": Peak(82.6, 82.6, 165.2, 23.5),
    "RTX 5090": Peak(104.8, 104.8, 209.5, 31.3),
    "RTX A5000": Peak(27.8, 55.6, 111.1, 23.5),
    "RTX A6000": Peak(38.7, 77.4, 154.8, 47.4),
    "RTX 6000 Ada": Peak(91.1, 182.1, 364.2, 47.4),
}
# Words that change nothing; with any other one (Laptop, Ti, MIG) it is a device of figures of its own.
_NEUTRAL = re.compile(r"nvidia|tesla|geforce|generation|gpu|\d+gb|hbm\d?e?|sxm\d?|pcie", re.IGNORECASE)


def device_peak(name: str) -> Peak | None:
    """The figures of a device by PyTorch's name (``torch.cuda.get_device_name``); None where they are not known."""
    words = {word.lower() for word in re.split(r"[\s\-/]+", name) if word}
    known = ((set(key.lower().split()), peak) for key, peak in PEAKS.items())
    found = [
        (len(key), peak)
        for key, peak in known
        if key <= words and all(_NEUTRAL.fullmatch(word) for word in words - key)
    ]
    return max(found, default=(0, None), key=lambda one: one[0])[1]


def peak_flops(device_name: str, precision: str) -> float | None:
    """Operations a second of dense matrix products, a multiply-add counting two; None where it is not known.

    Args:
        device_name: As PyTorch gives it.
        precision: ``fp32``, ``tf32``, ``bf16`` or ``bf16_params``.
    """
    peak = device_peak(device_name)
    tera = None if peak is None else peak.of(precision)
    return None if tera is None else tera * 1e12


def memory_bytes(device_name: str) -> int | None:
    """The memory that PyTorch finds on a device of this name, rounded down; None where it is not known."""
    peak = device_peak(device_name)
    return None if peak is None else int(peak.memory_gib * 2**30)


class GPU(NamedTuple):
    """A card to plan for."""

    name: str
    memory_gib: float
    """What a process can have."""
    peak: Peak | None
    """None: its arithmetic is not known."""

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return round(self.memory_gib * 2**30)

    @property
    def has_bf16(self) -> bool:
        """Whether it has bf16 instructions; a card that is not known is taken to have them."""
        return self.peak is None or self.peak.bf16 is not None

    def tera(self, precision: str) -> float | None:
        """10^12 operations a second at a precision, or at fp32 where it has none such; None: not known."""
        return None if self.peak is None else self.peak.of(precision) or self.peak.fp32


def find_gpu(name: str) -> GPU:
    """The card of a name, in any case, with or without spaces and hyphens.

    Raises:
        ValueError: Unknown; with the choices.
    """
    for known, peak in PEAKS.items():
        if _plain(name) in (_plain(known), _plain(known.removesuffix(" 80GB"))):
            return GPU(known, peak.memory_gib, peak)
    close = difflib.get_close_matches(_plain(name), [_plain(known) for known in PEAKS], n=1)
    hint = next((f"; did you mean {known}?" for known in PEAKS if _plain(known) in close), "")
    raise ValueError(f"unknown GPU {name!r}{hint}; choose from {', '.join(PEAKS)}")


def detect_gpu() -> GPU | None:
    """This machine's first GPU, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GPU(properties.name, properties.total_memory / 2**30, device_peak(properties.name))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
