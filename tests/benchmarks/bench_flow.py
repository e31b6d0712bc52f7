"""What a flow costs beside its steps: cached flows, overhead a step, hundreds of steps, on sqlite and on a server.

    python -m tests.benchmarks.bench_flow [--store sqlite|server|both] [--fan 480] [--chain 20]

Each figure is printed beside its mark; exits with 1 where one misses.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.records import Report
from pipeline.workflow.graph import Graph
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import Tracking
from tests.faults.tracking_server import TrackingServer

REPOSITORY = Path(__file__).resolve().parents[2]
CACHED_MARK_S = 5.0
STEP_MARKS_S = {"sqlite": 0.5, "server": 1.0}
COUNTED_RUNS = 3


@step(version=1)
def link(context: StepContext, number: int, before: Report | None = None) -> Report:
    """A step that does nothing but leave an empty output."""
    target = Path(context.output_uri("out.txt"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()
    return Report(uri=str(target), digest=f"{number} {before.digest if before else ''}"[:40])


def recipe(flow: Graph, chain: int, fan: int) -> None:
    """`chain` steps one after the other, then `fan` steps beside each other."""
    last = None
    for number in range(chain):
        last = flow.step(link, number, last, label=f"chain-{number}")
    for number in range(fan):
        flow.step(link, number, last, label=f"fan-{number}")


def run_flow(workspace: str, tracking: Tracking, chain: int, fan: int) -> None:
    """One flow, in this process; prints its seconds without Ray's start, whether Ray was loaded, peak MiB."""
    from pipeline.workflow import ray_session
    from pipeline.workflow.flow import Flow

    if os.environ.get("BENCH_COLD"):
        ray_session.start(ray_session.default_options)
    begun = time.monotonic()
    with Flow(workspace, tracking, "bench") as flow:
        recipe(flow, chain, fan)
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"FIGURES {seconds:.3f} {'ray' in sys.modules} {peak:.0f}")


def measure(workspace: Path, tracking: Tracking, chain: int, fan: int, *, cold: bool) -> tuple[float, float, bool, int]:
    """Seconds of the flow itself and of its whole process, whether Ray was loaded, and the driver's peak MiB."""
    code = (
        f"from tests.benchmarks.bench_flow import Tracking, run_flow; "
        f"run_flow({str(workspace)!r}, {tracking!r}, {chain}, {fan})"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | ({"BENCH_COLD": "1"} if cold else {})
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    figures = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES")).split()
    return float(figures[1]), seconds, figures[2] == "True", int(figures[3])


@contextmanager
def store(kind: str, folder: Path) -> Iterator[Tracking]:
    """A fresh store of the kind, gone afterwards."""
    if kind == "sqlite":
        yield Tracking.for_workspace(str(folder))
        return
    with TrackingServer(folder) as server:
        yield Tracking(server.uri)


def main() -> None:
    """Measure and print; exit with 1 for a missed mark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "server", "both"), default="both")
    parser.add_argument("--chain", type=int, default=20)
    parser.add_argument("--fan", type=int, default=480)
    options = parser.parse_args()
    missed = False

    def say(what: str, value: float, mark: float | None, note: str = "") -> None:
        nonlocal missed
        missed |= mark is not None and value > mark
        verdict = f"mark {mark:.1f} s  {'ok' if value <= mark else 'MISSED'}" if mark is not None else ""
        print(f"{what:<50} {value:8.3f} s  {verdict}  {note}", flush=True)

    for kind in ("sqlite", "server") if options.store == "both" else (options.store,):
        with tempfile.TemporaryDirectory(prefix="bf", dir="/tmp") as name:
            folder = Path(name)
            with store(kind, folder) as tracking:
                # The first flow of a store makes its tables, and the workers import MLflow: not a step's cost.
                measure(folder, tracking, 1, 0, cold=True)
                seconds, _, _, _ = measure(folder / "a", tracking, options.chain, 0, cold=True)
                say(f"{kind}: a step of a chain of {options.chain}", seconds / options.chain, STEP_MARKS_S[kind])
                cached = [measure(folder / "a", tracking, options.chain, 0, cold=False) for _ in range(COUNTED_RUNS)]
                loaded = any(one[2] for one in cached)
                missed |= loaded
                whole = min(one[1] for one in cached)
                say(f"{kind}: all {options.chain} cached, whole process", whole, CACHED_MARK_S, "Ray loaded" * loaded)
                if options.fan:
                    count = options.chain + options.fan
                    seconds, _, _, peak = measure(folder / "b", tracking, options.chain, options.fan, cold=True)
                    say(f"{kind}: a step of {count}", seconds / count, STEP_MARKS_S[kind], f"driver {peak} MiB")
                    _, whole, _, peak = measure(folder / "b", tracking, options.chain, options.fan, cold=False)
                    say(f"{kind}: all {count} cached, whole process", whole, None, f"{peak} MiB")
    sys.exit(missed)


if __name__ == "__main__":
    main()
