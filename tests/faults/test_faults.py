"""The short forms of the fault runs; the long ones are in the modules' own words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run(module: str, *options: str) -> str:
    command = [sys.executable, "-m", f"tests.faults.{module}", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_kill_prepare__reruns_are_identical() -> None:
    # The second of them is on Ray.
    line = run("kill_prepare", "--kills", "2", "--seed", "1")
    assert line == "2 kills, every rerun byte-identical, no stray file, no orphan process"


def test_fuzz_inputs__quarantine_or_one_clear_error() -> None:
    assert re.fullmatch(r"60 inputs, 0 bad, peak memory \d+ MiB", run("fuzz_inputs", "--inputs", "60"))


def test_kill_search__rerun_chooses_what_the_undisturbed_search_does() -> None:
    # The driver, once.
    line = run("kill_search", "--kills", "1", "--trials", "2", "--seed", "3")
    assert line == "1 kills, every rerun identical, no ended trial run again, no orphan process"
