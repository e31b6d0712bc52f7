from __future__ import annotations

import pytest

from segvit.devices import GPU, PEAKS, find_gpu, memory_bytes, peak_flops


@pytest.mark.parametrize(
    ("name", "tera", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 79.1),
        ("NVIDIA H100 PCIe", 756.0, 79.1),
        ("NVIDIA H100 NVL", 835.0, 93.0),
        ("NVIDIA H200", 989.4, 139.7),
        ("NVIDIA A100-SXM4-40GB", 312.0, 39.3),
        ("NVIDIA A100 80GB PCIe", 312.0, 79.1),
        ("NVIDIA A10", 125.0, 22.0),
        ("NVIDIA A10G", 70.0, 22.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 23.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 47.4),
    ],
)
def test_peak__of_names_as_drivers_give_them(name: str, tera: float, gib: float) -> None:
    assert peak_flops(name, "bf16") == pytest.approx(tera * 1e12)
    assert memory_bytes(name) == int(gib * 2**30)


def test_peak__by_precision() -> None:
    found = [peak_flops("NVIDIA H100 80GB HBM3", kind) for kind in ("fp32", "tf32")]
    assert found == pytest.approx([66.9e12, 494.7e12])
    assert peak_flops("Tesla T4", "fp32") == 8.1e12
    assert peak_flops("Tesla T4", "bf16") is None


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100X", "", "cpu"]
)
def test_peak__another_device_is_not_taken_for_a_known_one(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert memory_bytes(name) is None


def test_peaks__lower_precision_is_never_slower() -> None:
    for name, peak in PEAKS.items():
        assert peak.fp32 <= (peak.tf32 or peak.fp32) <= (peak.bf16 or peak.tf32 or peak.fp32), name


@pytest.mark.parametrize(
    ("name", "known"), [("h100", "H100"), ("rtx4090", "RTX 4090"), ("A100-40gb", "A100 40GB"), ("a100", "A100 80GB")]
)
def test_find_gpu__in_any_spelling(name: str, known: str) -> None:
    gpu = find_gpu(name)
    assert (gpu.name, gpu.peak, gpu.memory_gib) == (known, PEAKS[known], PEAKS[known].memory_gib)


def test_find_gpu__unknown() -> None:
    with pytest.raises(ValueError, match=r"^unknown GPU 'H1000'; did you mean H100\?; choose from T4, V100 16GB, "):
        find_gpu("H1000")


def test_gpu__operations_at_a_precision_that_it_has_or_at_fp32() -> None:
    kinds = ("fp32", "tf32", "bf16", "bf16_params")
    assert [find_gpu("L4").tera(kind) for kind in kinds] == [30.3, 60.0, 121.0, 121.0]
    assert [find_gpu("T4").tera(kind) for kind in kinds] == [8.1] * 4
    assert (find_gpu("T4").has_bf16, find_gpu("L4").has_bf16) == (False, True)
    unknown = GPU("another", 40.0, None)
    assert (unknown.tera("bf16"), unknown.has_bf16, unknown.memory_bytes) == (None, True, 40 * 2**30)
