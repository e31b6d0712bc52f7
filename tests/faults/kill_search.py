"""kill -9 of a search at random instants: each rerun must choose and record what an undisturbed one does.

    python -m tests.faults.kill_search [--kills 10] [--seed 0] [--trials 4]

Killed are, in turn: the driver, a trial's process, the process of the step, the raylet, everything at once. A rerun is
on a new local Ray, at another address. For every kill it is shown that no process outlives the driver by half a minute,
that trials which had ended are not run again, that the others go on behind their last checkpoint, and that scores,
decisions, the choice and the trials' runs in MLflow are those of an undisturbed search.
"""

from __future__ import annotations

import argparse
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
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pipeline.tuning.record import SearchRecord, trial_name
from pipeline.tuning.trial import LATEST_FILE
from pipeline.workflow.tracking import Tracking
from tests.faults.processes import MARK, PYTHONPATH, REPOSITORY, command_line, marked_processes, wait_until_gone

NUM_STEPS = 4
KINDS = ("driver", "trial", "step", "raylet", "cluster")
LIMIT_S = 900
CHILD = f"""
import json, sys
from pipeline import steps
from pipeline.config import DataConfig, DigitsConfig, LossConfig, RuntimeConfig, TrainConfig, TuneConfig
from pipeline.config import VariantSettings
from pipeline.workflow.tracking import Tracking
from pipeline.workflow.flow import Flow
from segvit.config import ModelConfig

workspace, num_trials = sys.argv[1], int(sys.argv[2])
digits = DigitsConfig(num_train=12, num_val=6, image_size=96)
model = ModelConfig(
    backbone="vit_tiny_patch16_224", image_size=(48, 64), structure="cascade", out_layers=(1, 3), decoder_layers=1
)
train = TrainConfig(
    steps=9, batch_size=4, learning_rate=1e-3, warmup_steps=0, validate_every_steps=9, checkpoint_every_steps=9
)
settings = VariantSettings(model=model.to_dict(), loss=LossConfig(), train=train)
search = TuneConfig(
    num_trials=num_trials,
    steps={NUM_STEPS},
    report_every_steps=1,
    max_val_samples=2,
    reduction_factor=2,
    space={{
        "loss.dice": {{"log_uniform": [0.3, 3.0]}},
        "train.learning_rate": {{"log_uniform": [1e-4, 1e-2]}},
        "model.decoder_layers": {{"int_uniform": [1, 2]}},
        "train.augmentation.scale_range": {{"choice": [[0.5, 2.0], [0.9, 1.1]]}},
    }},
)
flow = Flow(
    workspace,
    Tracking.for_workspace(workspace),
    "search",
    runtime=RuntimeConfig(trials_at_once=1, log_every_steps=1),
    on_event=lambda event: print("EVENT", event.label, event.state.value, event.message or "", flush=True),
)
with flow:
    shards = flow.step(steps.prepare, DataConfig(dataset="digits", samples_per_shard=6, digits=digits), "source")
    backbone = flow.step(steps.fetch_backbone, model.backbone, "random", {{}})
    found = flow.step(steps.tune, shards, backbone, settings, search)
    print("CHOSEN", flow.result(found).model_dump_json(), flush=True)
"""
TRIAL_PID = re.compile(r"\(run_trial pid=(\d+)\)")
STEP_LINE = re.compile(r"(?P<label>trial \d+)  step (?P<step>\d+)/\d+  loss")


class Search:
    """One process that runs the flow in `workspace`, and all that it starts."""

    def __init__(self, workspace: Path, num_trials: int) -> None:
        self.mark = uuid.uuid4().hex
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(workspace), str(num_trials)],
            cwd=REPOSITORY,
            env=os.environ | {MARK: self.mark, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
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

    def wait_for(self, text: str) -> bool:
        """Wait until a line with `text` is printed; False where the process ends before."""
        deadline = time.monotonic() + LIMIT_S
        while not any(text in line for line in self.lines):
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"no {text!r} within {LIMIT_S} s\n" + self.tail())
            time.sleep(0.05)
        return True

    def kill(self, kind: str) -> bool:
        """SIGKILL to what `kind` names; False where there is no such process now."""
        victims = self._victims(kind)
        for victim in victims:
            with suppress(psutil.Error):
                victim.kill()
        return bool(victims)

    def _victims(self, kind: str) -> list[psutil.Process]:
        everything = marked_processes(self.mark)
        commands = {one.pid: command_line(one) for one in everything}
        match kind:
            case "cluster":
                return everything
            case "driver":
                return [one for one in everything if one.pid == self.process.pid]
            case "step":
                return [one for one in everything if commands[one.pid].startswith("ray::tune")]
            case "raylet":
                return [one for one in everything if commands[one.pid].split(" ")[0].endswith("/raylet")]
        # A trial's process is called idle while its thread trains; the newest worker may be one that is about to.
        told = [int(pid) for line in self.lines for pid in TRIAL_PID.findall(line)][-1:]
        workers = [one for one in everything if commands[one.pid].startswith("ray::IDLE")]
        trials = [one for one in workers if one.pid in told]
        return trials or sorted(workers, key=lambda one: one.create_time())[-1:]

    def end(self) -> None:
        """Wait for the driver, then for all that it started; raises SystemExit where something stays."""
        try:
            self.process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the driver hangs\n{self.tail()}") from None
        self._reader.join(timeout=5)
        wait_until_gone(self.mark)

    def tail(self) -> str:
        """The last lines printed."""
        return "\n".join(self.lines[-40:])

    @property
    def chosen(self) -> dict[str, Any]:
        """The record of the search; raises SystemExit where there is none."""
        found = [line for line in self.lines if line.startswith("CHOSEN ")]
        if self.process.returncode != 0 or not found:
            raise SystemExit(f"the search ended with {self.process.returncode}\n{self.tail()}")
        return dict(json.loads(found[0].removeprefix("CHOSEN ")))


class Progress:
    """What a search has on storage: ended trials, and the step behind which each other one goes on."""

    def __init__(self, workspace: Path) -> None:
        self.ended: set[str] = set()
        self.behind: dict[str, int] = {}
        for folder in workspace.glob("tune/*/trials"):
            for trial in SearchRecord.load(str(folder)).trials.values():
                label = f"trial {trial_name(trial.number)}"
                if trial.state != "running":
                    self.ended.add(label)
                elif (latest := folder / trial_name(trial.number) / LATEST_FILE).is_file():
                    self.behind[label] = int(json.loads(latest.read_text())["folder"].rpartition("-")[2])

    def check(self, lines: list[str]) -> int:
        """How many training steps `lines` tell of; raises SystemExit where one of them was not needed."""
        steps = [found for line in lines if (found := STEP_LINE.search(line))]
        for found in steps:
            if found["label"] in self.ended or int(found["step"]) <= self.behind.get(found["label"], 0):
                raise SystemExit(f"executed again: {found[0]}")
        return len(steps)


def outcome(workspace: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """What must be the same after any kill; raises SystemExit for a trial's run that is wrong in MLflow."""
    trials = json.loads(Path(chosen["trials_uri"]).read_text())
    for trial in trials:
        del trial["seconds"], trial["attempts"]
    runs = list(Tracking.for_workspace(str(workspace)).runs("tags.`segvit.kind` = 'trial'"))
    scores = sorted(
        (run.data.tags["segvit.trial"], run.info.status, round(run.data.metrics["val_miou"], 9)) for run in runs
    )
    folder = Path(chosen["trials_uri"]).parent / "trials"
    left = [path.name for path in folder.iterdir() if path.is_dir()] + [str(path) for path in workspace.glob("ray/*")]
    if left:
        raise SystemExit(f"a finished search leaves {left}")
    choice = {name: chosen[name] for name in ("variant", "values", "miou", "num_trials")}
    return {"trials": trials, "runs": scores, "choice": choice}


def main() -> None:
    """Run all kills and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, default=4)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="ks", dir="/tmp") as folder:
        undisturbed = Search(Path(folder) / "undisturbed", options.trials)
        undisturbed.wait_for("EVENT tune running")
        begun = time.monotonic()
        undisturbed.end()
        duration = time.monotonic() - begun
        expected = outcome(Path(folder) / "undisturbed", undisturbed.chosen)
        num_steps = Progress(Path(folder) / "none").check(undisturbed.lines)
        print(f"undisturbed: {duration:.1f} s, {num_steps} steps, choice {expected['choice']}", flush=True)
        kills = round_number = 0
        while kills < options.kills:
            workspace = Path(folder) / f"round-{round_number}"
            round_number += 1
            told, steps = [], 0
            for _ in range(min(rng.choice([1, 2, 3]), options.kills - kills)):
                progress, search = Progress(workspace), Search(workspace, options.trials)
                if search.wait_for("EVENT tune running"):
                    kind, moment = KINDS[kills % len(KINDS)], rng.uniform(0, 0.9 * duration)
                    deadline = time.monotonic() + moment
                    while time.monotonic() < deadline and search.process.poll() is None:
                        time.sleep(0.02)
                    # The process may just be between two trials.
                    while search.process.poll() is None and not search.kill(kind):
                        time.sleep(0.02)
                    if search.process.poll() is None or kind in ("driver", "cluster"):
                        kills += 1
                        told.append(f"{kind} after {moment:.1f} s")
                search.end()
                if kind not in ("trial", "step"):
                    steps += progress.check(search.lines)
            progress, search = Progress(workspace), Search(workspace, options.trials)
            search.end()
            last = progress.check(search.lines)
            if outcome(workspace, search.chosen) != expected:
                raise SystemExit(f"{told}: another outcome\n{outcome(workspace, search.chosen)}\n{expected}")
            kept = f"{len(progress.ended)} trials kept, {last} steps in the last run"
            print(f"kill {kills}: {'; '.join(told) or 'none in time'}: {kept}: identical", flush=True)
            shutil.rmtree(workspace)
    print(f"{kills} kills, every rerun identical, no ended trial run again, no orphan process")


if __name__ == "__main__":
    main()
