"""kill -9 of every kind of process at random instants of a whole flow: each rerun must complete as if undisturbed.

    python -m tests.faults.kill_flow [--kills 60] [--seed 0] [--keep DIR]

A flow of nine steps, from raw images to a promoted model, is run until it ends, and one process of it is killed at
a random instant of each step: the driver, the process of a step, a trial's, a training worker, the raylet, Ray's
global control service, or all of the local cluster at once. Then the same command is given again. For every kill it
is shown that what is visible on storage and in the registry is complete, that nothing listens beyond loopback, and
that no process outlives the driver by half a minute; for every rerun that each step has been finished once and not
executed again, and that the registry and the published files are those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.numpy import load_file

from pipeline.registry.models import list_models
from pipeline.shards.shard_check import check_shard_set
from pipeline.storage import PARTIAL
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.faults.processes import MARK, REPOSITORY, command_line, marked_processes, require_loopback, wait_until_gone

NAME = "kills"
EXPERIMENT: dict[str, Any] = {
    "name": NAME,
    "data": {
        "dataset": "digits",
        "samples_per_shard": 4,
        "digits": {"num_train": 12, "num_val": 6, "image_size": 96},
    },
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "weights": "random",
        "image_size": [48, 64],
        "decoder_layers": 1,
        "dropout": 0.1,
    },
    "variants": {"full": {"structure": "cascade", "out_layers": [1, 3]}},
    "train": {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_steps": 1,
        "validate_every_steps": 3,
        "checkpoint_every_steps": 2,
    },
    "tune": {"num_trials": 2, "steps": 4, "report_every_steps": 2, "max_val_samples": 2},
    "evaluate": {"num_examples": 1, "latency_repeats": 1},
    # Six scenes do not show all digits.
    "promote": {"unmeasured_classes": "allow"},
    "runtime": {"num_workers": 1, "trials_at_once": 1, "log_every_steps": 1},
}
STEPS = (
    *("prepare", "fetch_backbone", "tune", "train/full", "evaluate/full", "register/full"),
    *("rescore/champion", "promote", "report"),
)
# What is to be killed, and what the command lines of such processes begin with; the driver is known by its number.
KINDS: dict[str, tuple[str, ...]] = {
    "driver": (),
    "step's process": tuple(f"ray::{label}" for label in STEPS),
    "trial": ("ray::run_trial", "ray::ImplicitFunc"),
    "training worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker"),
    "training controller": ("ray::TrainController",),
    "raylet": ("raylet",),
    "control service": ("gcs_server",),
    "cluster": ("ray::", "raylet", "gcs_server"),
}
ONLY_IN = {"trial": ("tune",), "training worker": ("train/full",), "training controller": ("train/full",)}
LINE = re.compile(r"\[\d+\] (?P<label>\S+)  (?P<state>\w+)")
FLOW_LIMIT_S = 900
DRIVER_LIMIT_S = 180


class Flow:
    """One `segvit run` of the experiment in `workspace`, and its processes; in `environment`, where it is given."""

    def __init__(self, config: Path, workspace: Path, environment: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.started = time.monotonic()
        self.moments: dict[str, float] = {}
        self.states: dict[str, str] = {}
        self.lines: list[str] = []
        own = {MARK: self.mark, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(config), "--workspace", str(workspace)],
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {}), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            found = LINE.match(line)
            if found:
                self.states[found["label"]] = found["state"]
                self.moments[f"{found['label']} {found['state']}"] = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the driver is gone."""
        return self.process.poll() is not None

    def wait_for(self, label: str) -> bool:
        """Wait until the step `label` has begun; False where an earlier one failed or the driver ended before."""
        while self.states.get(label) not in ("running", "done", "reused"):
            if self.ended or self.states.get(label) is not None:
                return False
            if time.monotonic() - self.started > FLOW_LIMIT_S:
                raise SystemExit(f"the flow hangs before {label}:\n" + self.tail())
            time.sleep(0.02)
        return True

    def wait_for_end(self, limit_s: float) -> int:
        """The driver's exit code, when neither it nor a process of it is left."""
        try:
            code = self.process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the driver hangs:\n{self.tail()}") from None
        wait_until_gone(self.mark)
        self._reader.join(timeout=10)
        return code

    def kill(self, kind: str) -> int:
        """SIGKILL to the processes of `kind`; how many there were."""
        if kind == "driver":
            self.process.kill()
            return 1
        beginnings = KINDS[kind]
        wanted = [process for process in marked_processes(self.mark) if command_name(process).startswith(beginnings)]
        for process in wanted:
            process.kill()
        return len(wanted)

    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.lines[-30:])


def command_name(process: psutil.Process) -> str:
    """What it runs: a program's name without its folder, or what Ray calls a worker."""
    line = command_line(process)
    return line if line.startswith("ray::") else Path(line.partition(" ")[0]).name


def store(workspace: Path) -> Tracking:
    """The tracking store of a workspace."""
    return Tracking.for_workspace(str(workspace))


def registry_state(workspace: Path) -> list[dict[str, Any]]:
    """What the registry says, without times and the names of runs."""
    kept = {"version", "aliases", "variant", "miou", "checkpoint_digest", "data_digest", "promoted", "reason"}
    return [version.model_dump(include=kept) for version in list_models(store(workspace))]


def published(workspace: Path) -> Counter[str]:
    """Files of every step, without the fingerprints in their paths."""
    files = (path.relative_to(workspace).parts for path in workspace.rglob("*") if path.is_file())
    return Counter(
        "/".join((parts[0], *parts[2:])) for parts in files if parts[0] in {label.split("/")[0] for label in STEPS}
    )


def check_visible(workspace: Path) -> None:
    """Raise SystemExit where something incomplete looks complete."""

    def outputs(step: str) -> list[Path]:
        folder = workspace / step
        return [path for path in folder.iterdir() if PARTIAL not in path.name] if folder.is_dir() else []

    try:
        for folder in outputs("prepare"):
            if (folder / "manifest.json").exists():
                check_shard_set(str(folder))
        for folder in outputs("fetch_backbone"):
            assert not list(folder.iterdir()) or load_file(folder / "backbone.safetensors")
        for folder in outputs("tune"):
            if (folder / "trials.json").exists():
                assert len(json.loads((folder / "trials.json").read_text())) >= EXPERIMENT["tune"]["num_trials"]
        for folder in outputs("train"):
            if (folder / "model.safetensors").exists():
                assert load_file(folder / "model.safetensors")
                assert json.loads((folder / "config.json").read_text())
                history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
                losses = [int(row["step"]) for row in history if "total" in row]
                assert losses == list(range(1, EXPERIMENT["train"]["steps"] + 1)), losses
        for folder in outputs("evaluate"):
            assert json.loads((folder / "confusion.json").read_text())
        for folder in outputs("report"):
            page = folder / "report.html"
            assert not page.exists() or page.read_text().rstrip().endswith("</html>")
        tracking = store(workspace)
        if tracking.exists():
            for version in list_models(tracking):
                place = tracking.client().get_model_version_download_uri(NAME, str(version.version))
                assert load_file(Path(place.removeprefix("file://")) / "artifacts/checkpoint/model.safetensors")
    except (AssertionError, OSError, ValueError) as error:
        raise SystemExit(f"something incomplete is visible: {type(error).__name__}: {error}") from error


def check_executed_once(workspace: Path) -> None:
    """Raise SystemExit where a step has been executed after it had finished, or is shown as running still."""
    tracking = store(workspace)
    runs = list(tracking.runs(f"tags.`{Tag.KIND}` = 'step'", order_by="attributes.start_time ASC"))
    done = {run.data.tags[Tag.DONE]: run for run in runs if Tag.DONE in run.data.tags}
    labels = Counter(run.data.tags[Tag.LABEL] for run in runs if Tag.DONE in run.data.tags)
    if labels != Counter(STEPS):
        raise SystemExit(f"steps that finished, and how often: {dict(labels)}")
    for run in runs:
        finished = done.get(run.data.tags.get(Tag.FINGERPRINT, ""))
        late = finished is not None and run.info.start_time > finished.info.end_time
        if late and run.data.tags[Tag.STATE] not in (RunState.REUSED, RunState.SKIPPED):
            raise SystemExit(f"{run.data.tags[Tag.LABEL]} was executed again: {run.data.tags}")
    running = [run.data.tags.get(Tag.LABEL, "?") for run in tracking.runs("attributes.status = 'RUNNING'")]
    if running:
        raise SystemExit(f"shown as running after the end: {running}")


def check_alike(workspace: Path, expected: list[dict[str, Any]], files: Counter[str]) -> None:
    """Raise SystemExit unless a flow that was disturbed left what an undisturbed one did: its registry, its files."""
    check_visible(workspace)
    check_executed_once(workspace)
    found = registry_state(workspace)
    if found != expected:
        raise SystemExit(f"the registry differs from the undisturbed one:\n{found}\n{expected}")
    if published(workspace) != files:
        raise SystemExit(f"files differ: {published(workspace) - files} or {files - published(workspace)}")


def last_cause(workspace: Path) -> str:
    """The cause on the newest flow's run."""
    flows = store(workspace).first_runs(f"tags.`{Tag.KIND}` = 'flow'", 1)
    return flows[0].data.tags.get(Tag.ERROR, "") if flows else "no flow ran"


class Plan:
    """Which kind of process is to be killed in which step: all pairs before any comes again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.counts: Counter[tuple[str, str]] = Counter()
        self._kinds: Counter[str] = Counter()

    def choose(self, label: str) -> str:
        """The kind that this step, and then all steps, have seen least."""
        possible = [kind for kind in KINDS if label in ONLY_IN.get(kind, STEPS)]
        return min(possible, key=lambda kind: (self.counts[label, kind], self._kinds[kind], self._rng.random()))

    def note(self, label: str, kind: str) -> None:
        """Count a kill."""
        self.counts[label, kind] += 1
        self._kinds[kind] += 1


def run_undisturbed(config: Path, workspace: Path) -> tuple[float, dict[str, float]]:
    """Seconds of the whole, and of each step."""
    flow = Flow(config, workspace)
    if flow.wait_for_end(FLOW_LIMIT_S):
        raise SystemExit(f"the undisturbed flow failed:\n{flow.tail()}")
    seconds = {
        label: flow.moments[f"{label} done"] - flow.moments.get(f"{label} running", flow.started) for label in STEPS
    }
    return time.monotonic() - flow.started, seconds


def disturb(
    config: Path, workspace: Path, targets: list[str], seconds: dict[str, float], plan: Plan, rng: random.Random
) -> int:
    """Run the flow with a kill in each of the steps `targets`, to its end; the number of kills."""
    kills = 0
    flow: Flow | None = None
    for label in targets:
        kind = plan.choose(label)
        if flow is None or flow.ended:
            flow = Flow(config, workspace)
        if not flow.wait_for(label):
            # What was killed before took the flow with it, or failed the step for good.
            flow.wait_for_end(FLOW_LIMIT_S)
            flow = Flow(config, workspace)
            if not flow.wait_for(label):
                raise SystemExit(f"the rerun ended before {label}:\n{flow.tail()}")
        require_loopback(flow.mark)
        moment = rng.uniform(0, seconds[label])
        time.sleep(moment)
        while not (count := flow.kill(kind)) and not flow.ended and flow.states[label] == "running":
            time.sleep(0.05)
        if not count:
            if flow.ended:
                continue
            # The step was quicker; whatever runs now is as good.
            kind = "driver"
            flow.kill(kind)
        kills += 1
        plan.note(label, kind)
        if kind in ("driver", "raylet", "control service", "cluster"):
            code = flow.wait_for_end(DRIVER_LIMIT_S)
            if kind != "driver" and code == 0 and flow.states.get("report") != "done":
                raise SystemExit(f"the driver ended well without its cluster:\n{flow.tail()}")
        check_visible(workspace)
        print(f"kill {sum(plan.counts.values())}: {kind} in {label}, {moment:.1f} s after its start", flush=True)
    assert flow is not None, "there is a step to kill in"
    if flow.wait_for_end(FLOW_LIMIT_S):
        print(f"the disturbed flow ended with: {last_cause(workspace)}", flush=True)
        flow = Flow(config, workspace)
        if flow.wait_for_end(FLOW_LIMIT_S):
            raise SystemExit(f"the flow does not complete any more: {last_cause(workspace)}\n{flow.tail()}")
    return kills


def main() -> None:
    """Disturb flows until there were `--kills` kills, and compare each with the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave the undisturbed flow's workspace in this folder")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    plan = Plan(rng)
    with contextlib.ExitStack() as stack:
        # Short, for the names of Ray's sockets.
        folder = options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="kf", dir="/tmp"))
        config, reference = Path(folder) / "kills.yaml", Path(folder) / "reference"
        config.write_text(yaml.safe_dump(EXPERIMENT))
        total, seconds = run_undisturbed(config, reference)
        check_visible(reference)
        check_executed_once(reference)
        expected, files = registry_state(reference), published(reference)
        print(f"undisturbed: {total:.0f} s, {len(expected)} version, {sum(files.values())} files", flush=True)
        kills = episodes = 0
        while kills < options.kills:
            left = options.kills - kills
            targets = sorted(rng.sample(STEPS, min(left, len(STEPS))), key=STEPS.index)
            workspace = Path(folder) / f"workspace-{episodes}"
            kills += disturb(config, workspace, targets, seconds, plan, rng)
            episodes += 1
            check_alike(workspace, expected, files)
            print(f"flow {episodes}: completed, the same registry and files, every step finished once", flush=True)
            shutil.rmtree(workspace)
    kinds = Counter[str]()
    for (_, kind), count in plan.counts.items():
        kinds[kind] += count
    print(", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    print(f"{kills} kills in {episodes} flows, every one completed, nothing finished was executed again, no orphan")


if __name__ == "__main__":
    main()
