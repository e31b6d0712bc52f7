from __future__ import annotations

import pytest

from segvit.gpus import GPUS, find_gpu, of_device


@pytest.mark.parametrize(("name", "known"), [("h100", "H100"), ("rtx4090", "RTX 4090"), ("A100-40gb", "A100-40GB")])
def test_find_gpu__in_any_spelling(name: str, known: str) -> None:
    assert find_gpu(name) == GPUS[known]


def test_find_gpu__unknown() -> None:
    with pytest.raises(ValueError, match=r"^unknown GPU 'H1000'; did you mean H100\?; choose from T4, V100, A10, "):
        find_gpu("H1000")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("Some Other Card", 0.0),
    ],
)
def test_of_device__arithmetic_by_name_and_its_own_memory(name: str, tflops: float) -> None:
    gpu = of_device(name, 40 * 2**30)
    assert (gpu.name, gpu.memory_gib, gpu.bf16_tflops, gpu.memory_bytes) == (name, 40.0, tflops, 40 * 2**30)
