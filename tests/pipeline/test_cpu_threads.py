from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.cpu_threads import cgroup_quota, set_cpu_threads, usable_cores


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("", None), ("1 0", None), ("-1 100000", None)]
)
def test_cgroup_quota__version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_quota(tmp_path) == quota


def test_cgroup_quota__version_1(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == 3.0


def test_usable_cores__affinity_and_quota_rounded_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert usable_cores(tmp_path) == 4
    for text, cores in (("150000 100000", 2), ("20000 100000", 1), ("900000 100000", 4)):
        (tmp_path / "cpu.max").write_text(text)
        assert usable_cores(tmp_path) == cores


def test_set_cpu_threads__no_more_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cpu_threads.usable_cores", lambda: 2)
    lines: list[str] = []
    assert (set_cpu_threads(1, lines.append), torch.get_num_threads(), lines) == (1, 1, [])
    assert (set_cpu_threads(6, lines.append), torch.get_num_threads()) == (2, 2)
    assert lines == [
        "runtime.cpus_per_worker 6 exceeds the 2 CPU cores that the worker may use; it computes with 2 threads, "
        "lower runtime.cpus_per_worker to 2"
    ]
