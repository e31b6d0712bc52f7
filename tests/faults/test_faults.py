"""The short forms of the fault runs; the long ones are in the modules' own words."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import FlowRun
from tests.faults.fuzz.readers import READERS
from tests.faults.processes import REPOSITORY

pytestmark = pytest.mark.timeout(1200)


def run(module: str, *options: str) -> str:
    command = [sys.executable, "-m", f"tests.faults.{module}", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_kill_flow__reruns_end_as_if_undisturbed(flow_run: FlowRun) -> None:
    assert flow_run.said == "1 kills in 1 flows, every one completed, nothing finished was executed again, no orphan"


def test_kill_prepare__reruns_are_identical() -> None:
    # The second of them is on Ray.
    line = run("kill_prepare", "--kills", "2", "--seed", "1")
    assert line == "2 kills, every rerun byte-identical, no stray file, no orphan process"


def test_fuzz_inputs__are_read_or_refused_in_one_line() -> None:
    line = run("fuzz_inputs", "--inputs", str(3 * len(READERS)))
    assert re.fullmatch(rf"{3 * len(READERS)} inputs over {len(READERS)} readers, 0 bad, peak memory \d+ MiB", line)


def test_strike_flow__ends_in_time_and_is_marked_for_what_it_was() -> None:
    line = run("strike_flow", "--strikes", "2", "--seed", "1")
    assert re.fullmatch(
        r"2 strikes, every process ended in time \(slowest \d+\.\d s\), none left behind: .*finished.*", line
    )


def test_race_drivers__everything_once() -> None:
    line = run("race_drivers", "--shared", "1", "--separate", "1")
    assert line == "2 races, every step executed once, one version and its aliases each"


def test_lost_server__the_flow_does_not_notice() -> None:
    line = run("lost_server", "--outages", "1", "--outage", "5")
    assert line == "1 outages of 5 s, every flow finished, every step executed once"


def test_full_disk__one_line_nothing_half_published_and_a_complete_rerun() -> None:
    line = run("full_disk")
    if line == "no mount namespace":
        pytest.skip("this machine permits no mount of a small disk")
    assert line == "full disk: every failure one line, nothing half-published, every rerun complete"
