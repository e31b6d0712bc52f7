"""Two drivers run the same flow at once: every step must be executed once, one version registered, one alias set.

    python -m tests.faults.race_drivers [--shared 10] [--separate 10] [--seed 0]

`--shared` races are between two drivers of one Ray cluster, `--separate` between drivers with a cluster each; all
share one MLflow server and one workspace. The second driver starts up to `LONGEST_HEAD_START_S` after the first.
Every flow registers a model and sets an alias; every fifth also promotes it, which takes half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.workflow.tracking import Tag, Tracking
from tests.faults.processes import PYTHONPATH, REPOSITORY
from tests.faults.toy_flow import EXECUTED, OUTPUTS, PROMOTE, STEPS
from tests.faults.tracking_server import TrackingServer
from tests.tiny_model import make_tiny_model

LONGEST_HEAD_START_S = 2.0
STEP_SECONDS = (0.0, 0.05, 0.3)
PROMOTE_EVERY = 5


class Driver:
    """A process that runs flows one after another, as it is told."""

    def __init__(self, folder: Path, uri: str, environment: dict[str, str], number: int) -> None:
        self._log = folder / f"driver-{number}.log"
        self._ray_folder = tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True)
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.toy_flow", str(folder), uri, self._ray_folder.name],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, line: str) -> None:
        """Hand over a line of work."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, word: str) -> str:
        """The rest of the next line that begins with a word of ours; raises SystemExit where it is another one."""
        assert self.process.stdout is not None
        line = ""
        for line in self.process.stdout:
            first, _, rest = line.strip().partition(" ")
            if first == word:
                return rest
            if first == "FAILED":
                break
        raise SystemExit(f"driver {self.process.pid} gave no {word}: {line}{self._log.read_text()[-3000:]}")

    def end(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)
        self.process.kill()
        self._ray_folder.cleanup()


@contextlib.contextmanager
def cluster(shared: bool) -> Iterator[dict[str, str]]:
    """The environment that leads drivers to one cluster, up meanwhile, or each to one of its own."""
    if not shared:
        yield {}
        return
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["PYTHONPATH"] = PYTHONPATH
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            yield {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        finally:
            ray.shutdown()


def check(folder: Path, tracking: Tracking, name: str, run_ids: set[str], *, promoted: bool) -> None:
    """Raise SystemExit unless the flows `run_ids` finished and everything was done exactly once in all of them."""
    wanted = [*STEPS, PROMOTE] if promoted else list(STEPS)
    executed = sorted((folder / f"{name}.executed").read_text().split())
    if executed != sorted(EXECUTED):
        raise SystemExit(f"{name}: executed {executed}, not each of {sorted(EXECUTED)} once")
    runs = list(tracking.runs(f"tags.`{Tag.FLOW}` = '{name}'"))
    done = sorted(run.data.tags[Tag.LABEL] for run in runs if Tag.DONE in run.data.tags)
    if done != sorted(wanted):
        raise SystemExit(f"{name}: recorded as done {done}, not each of {sorted(wanted)} once")
    flows = {run.info.run_id: run.info.status for run in runs if run.data.tags[Tag.KIND] == "flow"}
    if flows != dict.fromkeys(run_ids, "FINISHED"):
        raise SystemExit(f"{name}: flow runs {flows}")
    steps = [(run.data.tags[Tag.LABEL], run.info.status) for run in runs if run.data.tags[Tag.KIND] == "step"]
    if sorted(steps) != sorted([(label, "FINISHED") for label in wanted] * len(run_ids)):
        raise SystemExit(f"{name}: step runs {steps}")
    outputs = {run.data.tags[Tag.LABEL]: run for run in runs if Tag.DONE in run.data.tags}
    for label, expected in OUTPUTS.items():
        record = json.loads(tracking.read_text(outputs[label].info.run_id, "record.json") or "{}")
        files = [path.name for path in Path(record["uri"]).parent.iterdir()]
        if (Path(record["uri"]).read_text(), files) != (expected, ["text.txt"]):
            raise SystemExit(f"{name}: {label} left {files} with {Path(record['uri']).read_text()!r}")
    expected_aliases = {"candidate": 1, "champion": 1} if promoted else {"candidate": 1}
    versions = [int(one.version) for one in tracking.client().search_model_versions(f"name = '{name}'")]
    aliases = tracking.client().get_registered_model(name).aliases
    if versions != [1] or {alias: int(version) for alias, version in aliases.items()} != expected_aliases:
        raise SystemExit(f"{name}: versions {versions}, aliases {aliases}")


def main() -> None:
    """Run all races and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=int, default=10)
    parser.add_argument("--separate", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    races = 0
    with tempfile.TemporaryDirectory(prefix="race") as name:
        folder = Path(name)
        for record in make_tiny_model(folder):
            (folder / f"{type(record).__name__}.json").write_text(record.to_json())
        with TrackingServer(folder / "server") as server:
            tracking = Tracking(server.uri)
            for kind, count in (("shared", options.shared), ("separate", options.separate)):
                if not count:
                    continue
                with cluster(kind == "shared") as environment, contextlib.ExitStack() as ends:
                    drivers = []
                    for number in range(2):
                        drivers.append(Driver(folder, server.uri, environment, number))
                        ends.callback(drivers[-1].end)
                    for driver in drivers:
                        driver.expect("READY")
                    for number in range(count):
                        race, seconds = f"{kind}-{number}", rng.choice(STEP_SECONDS)
                        promoted = number % PROMOTE_EVERY == 1
                        # Often at once: a head start of zero is the narrowest race.
                        head_start = rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, LONGEST_HEAD_START_S)])
                        begun = time.monotonic()
                        for driver, delay in zip(rng.sample(drivers, 2), (0.0, head_start), strict=True):
                            driver.ask(f"{race} {delay:.3f} {seconds} {int(promoted)}")
                        run_ids = {driver.expect("ENDED") for driver in drivers}
                        check(folder, tracking, race, run_ids, promoted=promoted)
                        races += 1
                        took = time.monotonic() - begun
                        print(f"{race}: head start {head_start:.2f} s, steps of {seconds} s: once each, {took:.1f} s")
                        sys.stdout.flush()
    print(f"{races} races, every step executed once, one version and its aliases each")


if __name__ == "__main__":
    main()
