"""SIGTERM and Ctrl-C at random instants of a command, from its first import to its last write.

    python -m tests.faults.strike_flow [--strikes 60] [--seed 0]

A command of the real entry point runs a flow of three steps on a local Ray. It is struck at a random instant, now and
then twice. Each time it is shown that the process ends within ten seconds, not by a crash, and leaves none behind, that
the run, if there was one by then, is marked as finished or killed, with its steps, or as abandoned where the machine
had no time to do more than end; and at last that the command, left alone, completes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

from pipeline import storage
from pipeline.records import Report
from pipeline.workflow import runs
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.faults.processes import MARK, PYTHONPATH, REPOSITORY, command_line, marked_processes

END_LIMIT_S = 10.0
GONE_LIMIT_S = 5.0
WHOLE_LIMIT_S = 300.0


@step(version=1)
def write(context: StepContext, text: str, before: Report | None = None) -> Report:
    """A file with `text` in it."""
    time.sleep(0.3)
    storage.publish_bytes(context.output_uri("text.txt"), text.encode())
    return Report(uri=context.output_uri("text.txt"), digest=text if before is None else before.digest + text)


def toy(folder: str, name: str) -> None:
    """Run the flow `name` in `folder`."""
    from pipeline.workflow import ray_session
    from pipeline.workflow.flow import Flow

    def options() -> dict[str, object]:
        return ray_session.default_options() | {"include_dashboard": False, "num_cpus": 2}

    with Flow(folder, Tracking.for_workspace(folder), name, {"name": name}, ray_options=options) as flow:
        first = flow.step(write, f"{name} a", label="first")
        for label in ("second", "third"):
            flow.step(write, label, first, label=label)
    print("DONE", flush=True)


class Command:
    """One run of the command in a process group of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mark = uuid.uuid4().hex
        self.output = (folder / f"{name}.txt").open("w+")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.strike_flow", "--child", str(folder / "space"), name],
            cwd=REPOSITORY,
            env=os.environ | {MARK: self.mark, "PYTHONUNBUFFERED": "1", "PYTHONPATH": PYTHONPATH},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Whoever starts this in the background may be deaf to Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def text(self) -> str:
        """What it has printed."""
        self.output.seek(0)
        return self.output.read()

    def strike(self, number: signal.Signals, again_after_s: float | None) -> float:
        """Send the signal, once more after a while where it is given; seconds until the process ended."""
        struck = time.monotonic()
        self.process.send_signal(number)
        if again_after_s is not None:
            time.sleep(again_after_s)
            self.process.send_signal(number)
        try:
            self.process.wait(timeout=END_LIMIT_S + 20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"the process does not end:\n{self.text()}") from None
        return time.monotonic() - struck

    def check_nothing_left(self) -> None:
        """Raise SystemExit where a process of it lives on."""
        deadline = time.monotonic() + GONE_LIMIT_S
        while left := marked_processes(self.mark):
            if time.monotonic() > deadline:
                raise SystemExit(f"left behind: {[command_line(one) for one in left]}\n{self.text()}")
            time.sleep(0.1)


def check_marked(tracking: Tracking, name: str) -> str:
    """The state of the flow's run, "no run" where there is none; raises SystemExit where it is not true."""
    found = list(tracking.first_runs(f"tags.`{Tag.FLOW}` = '{name}' and tags.`{Tag.KIND}` = 'flow'", 2))
    if not found:
        return "no run"
    (run,) = found
    if run.info.status == "RUNNING":
        runs.mark_abandoned(tracking)
    tree = runs.run_tree(tracking, run.info.run_id)
    states = [one.state for one in tree.steps]
    if RunState.RUNNING in (tree.run.state, *states):
        raise SystemExit(f"the run of {name} is left as {tree.run.state}, its steps as {states}")
    complete = [RunState.DONE] * 3
    if tree.run.state == RunState.FINISHED and states != complete:
        raise SystemExit(f"the run of {name} is marked as finished, its steps are {states}")
    if tree.run.state not in (RunState.FINISHED, RunState.KILLED, RunState.ABANDONED):
        raise SystemExit(f"the run of {name} is marked as {tree.run.state}: {tree.run.error}")
    return tree.run.state


def run_strikes(strikes: int, seed: int, folder: Path) -> str:
    """Strike so often; what was seen, in one line."""
    choice = random.Random(seed)
    tracking = Tracking.for_workspace(str(folder / "space"))
    seconds = 0.0
    states: Counter[str] = Counter()
    slowest = 0.0
    for strike in range(-1, strikes):
        name = f"flow{strike + 1}"
        command = Command(folder, name)
        if strike < 0:
            command.process.wait(timeout=WHOLE_LIMIT_S)
            if command.process.returncode != 0 or "DONE" not in command.text():
                raise SystemExit(f"undisturbed, the command fails:\n{command.text()}")
            seconds = time.monotonic() - command.started
        else:
            time.sleep(choice.uniform(0, seconds))
            number = choice.choice((signal.SIGTERM, signal.SIGINT))
            again_after_s = choice.choice((None, None, 0.0, choice.uniform(0, 2)))
            struck_after = time.monotonic() - command.started
            if command.process.poll() is None:
                took = command.strike(number, again_after_s)
                slowest = max(slowest, took)
                if command.process.returncode in (-signal.SIGSEGV, -signal.SIGABRT):
                    raise SystemExit(f"struck after {struck_after:.2f} s it crashed:\n{command.text()}")
                if took > END_LIMIT_S:
                    raise SystemExit(
                        f"struck after {struck_after:.2f} s it took {took:.1f} s to end:\n{command.text()}"
                    )
        command.check_nothing_left()
        state = check_marked(tracking, name)
        states[state] += 1
        if strike >= 0:
            print(f"{name}: struck by {number.name} after {struck_after:.2f} of {seconds:.2f} s: {state}", flush=True)
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"{strikes} strikes, every process ended in time (slowest {slowest:.1f} s), none left behind: {told}"


def main() -> None:
    """Run as asked on the command line."""
    if sys.argv[1:2] == ["--child"]:
        from flows import cli

        cli.app.command("toy")(toy)
        cli.main(["toy", *sys.argv[2:]])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strikes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="segvit-strikes-") as folder:
        print(run_strikes(options.strikes, options.seed, Path(folder)))


if __name__ == "__main__":
    main()
