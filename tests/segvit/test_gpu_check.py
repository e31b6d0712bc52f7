from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
# As on a machine that has neither Ray nor MLflow.
WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("ray", "mlflow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_gpu_check__in_miniature_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(SCRIPT)]
    command += ["--device", "cpu", "--tiny", "--batch", "2", "--json", str(tmp_path / "found.json")]
    # The part "memory" is bench_memory.py, which has a miniature of its own.
    command += ["--parts", "training", "inference", "latency", "loader", "decode", "camvid"]
    ended = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert {
        "training eager",
        "training compiled",
        "inference eager",
        "inference compiled",
        "loader",
        "decode cpu core",
        "camvid full seed 0",
        "camvid shrunk seed 0",
    } <= set(rows)
    printed = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert {line.pop("row"): line for line in printed} == rows
    assert 0 <= rows["camvid full seed 0"]["val_miou"] <= 1
    assert found["device"] == "CPU"
    assert "mfu" not in rows["training compiled"]
    assert 0 <= rows["loader"]["wait_share"] <= 1
    step = rows["training eager"]
    assert abs(step["images_per_s"] * step["step_ms"] / 1e3 - 2) < 1e-9
    assert "met" not in ended.stdout.splitlines()[-1]


def test_table__marks() -> None:
    table = runpy.run_path(str(SCRIPT))["table"]
    rows = {"training compiled": {"mfu": 0.52, "images_per_s": 210.0}, "loader": {"wait_share": 0.03}}
    assert table(rows).splitlines() == [
        "| | mfu | images_per_s | wait_share | mark |",
        "|---|---|---|---|---|",
        "| training compiled | 0.52 | 210 |  | mfu >= 0.5: met |",
        "| loader |  |  | 0.03 | wait_share < 0.02: missed |",
    ]
