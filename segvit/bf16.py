"""Whether a device multiplies matrices in bf16 by instructions of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Instructions that multiply bf16 matrices, of x86 and of ARM.
_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there; emulated, as on a CPU without instructions, it is six times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older releases of PyTorch cannot tell; then the processor is taken to have none.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(name)) for name in _CPU_BF16)
