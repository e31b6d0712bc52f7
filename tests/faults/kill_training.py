"""kill -9 of training at random steps: the resumed run must give the undisturbed one's curve and weights.

    python -m tests.faults.kill_training [--kills 5] [--seed 0] [--workers 1 2] [--steps 24]

Killed is a Train worker, a loader process, Ray's controller, or the driver with its whole Ray; before or after the
optimizer's step, during validation, while a checkpoint is written or uploaded. Dropout, drop path and accumulation
are on. Fails for a difference above 1e-6 anywhere in loss terms, learning rates, scores, weights or optimizer
moments, for a curve in MLflow with gaps, repeats or other values, and for a process that outlives a kill by half a
minute.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from safetensors.torch import load_file

from pipeline.config import DataConfig, DigitsConfig, RuntimeConfig
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.training import train as train_module
from pipeline.training.job import TrainJob
from pipeline.workflow import ray_session
from pipeline.workflow.lease import take_lease
from pipeline.workflow.tracking import MetricLog, Tracking
from tests.faults.processes import MARK, PYTHONPATH, REPOSITORY, command_line, marked_processes, wait_until_gone
from tests.jobs import tiny_job, with_settings

TOLERANCE = 1e-6
VALIDATE_EVERY, SAVE_EVERY = 8, 5
# Ray gives itself 30 s to come up, which is little on a busy machine; then a driver starts again.
NO_RAY, RAY_TRIES = 75, 6
CLOCKS = ("images_per_s", "seconds", "data_wait_share")
PHASES = ("before_step", "after_step", "validate", "save", "upload")


class Kill(NamedTuple):
    """Who is killed when; `phase` lasts from the step on until it comes."""

    number: int
    step: int
    phase: str
    target: str
    rank: int


def make_job(shard_set: ShardSet, workers: int | tuple[int, int], steps: int, **runtime: Any) -> TrainJob:
    """A job of four transformer blocks with everything random on."""
    job = tiny_job(
        shard_set,
        steps=steps,
        batch_size=8,
        accumulation_steps=2,
        warmup_steps=4,
        validate_every_steps=VALIDATE_EVERY,
        checkpoint_every_steps=SAVE_EVERY,
    )
    job = with_settings(job, model={"dropout": 0.2, "drop_path_rate": 0.2})
    settings = RuntimeConfig(num_workers=workers, log_every_steps=1, max_failures=-1, **runtime)
    return job.model_copy(update={"runtime": settings})


def prepare(folder: Path) -> ShardSet:
    """Forty training and six validation scenes of 96 pixels."""
    from pipeline.shards.prepare import prepare_shards

    digits = DigitsConfig(num_train=40, num_val=6, image_size=96)
    config = DataConfig(dataset="digits", samples_per_shard=8, digits=digits)
    return prepare_shards(config, str(folder), progress=lambda _line: None)


def killing_worker(kills: Sequence[Kill], markers: str) -> Callable[[dict[str, Any]], None]:
    """`train_worker` with kills built in; a marker file for each that has happened."""

    def worker(loop_config: dict[str, Any]) -> None:
        import ray.train
        from ray.train.v2._internal.execution.storage import StorageContext

        import segvit
        from pipeline.storage.names import WEIGHTS_FILE
        from pipeline.training.train import train_worker
        from pipeline.training.trainer import Trainer

        rank = ray.train.get_context().get_world_rank()
        now = {"step": 0}

        def strike(phase: str) -> None:
            for kill in kills:
                marker = Path(markers) / str(kill.number)
                if (kill.phase, kill.rank) != (phase, rank) or now["step"] < kill.step or marker.exists():
                    continue
                # Earlier ones first, so that each strikes at its own step.
                if any(not (Path(markers) / str(one.number)).exists() for one in kills if one.step < kill.step):
                    continue
                marker.write_text(str(now["step"]))
                if kill.target == "driver":
                    # The parent sees the marker and kills everything.
                    time.sleep(600)
                elif kill.target == "loader":
                    psutil.Process().children()[0].kill()
                elif kill.target == "controller":
                    controller_of(os.environ[MARK]).kill()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        train_step, validate = Trainer.train_step, Trainer.validate
        save_checkpoint, persist = segvit.save_checkpoint, StorageContext.persist_current_checkpoint

        def struck_step(self: Trainer, batches: Any) -> Any:
            now["step"] = self.state.step + 1
            strike("before_step")
            terms = train_step(self, batches)
            strike("after_step")
            return terms

        def struck_validate(self: Trainer) -> dict[str, float]:
            strike("validate")
            return validate(self)

        def struck_save(folder: Any, *rest: Any) -> None:
            save_checkpoint(folder, *rest)
            strike("save")

        def struck_upload(self: Any, checkpoint: Any, name: str) -> Any:
            half = Path(self.experiment_fs_path) / name
            half.mkdir()
            shutil.copy(Path(checkpoint.path) / WEIGHTS_FILE, half)
            strike("upload")
            return persist(self, checkpoint, name)

        for owner, replacement in (
            (Trainer, {"train_step": struck_step, "validate": struck_validate}),
            (segvit, {"save_checkpoint": struck_save}),
            (StorageContext, {"persist_current_checkpoint": struck_upload}),
        ):
            for name, function in replacement.items():
                setattr(owner, name, function)
        train_worker(loop_config)

    return worker


def controller_of(mark: str) -> psutil.Process:
    """The process of Ray Train that leads the workers of a driver's cluster."""
    for process in marked_processes(mark):
        if "TrainController" in command_line(process):
            return process
    raise SystemExit("there is no Train controller")


def child(folder: Path, temporary: str) -> None:
    """One driver: trains what `folder` says to its end, in a task as flows do."""
    settings = json.loads((folder / "settings.json").read_text())
    options = {
        "address": "local",
        "num_cpus": RuntimeConfig.model_validate(settings["job"]["runtime"]).max_workers,
        "dashboard_host": "127.0.0.1",
        "logging_level": logging.ERROR,
        "object_store_memory": 100 << 20,
        "_temp_dir": temporary,
    }
    try:
        ray_session.start(lambda: options)
    except UserError as error:
        print(error, flush=True)
        sys.exit(NO_RAY)
    ray_session.get(ray_session.submit(train_in_task, folder, name="train", max_retries=0))
    ray_session.stop()


def train_in_task(folder: Path) -> None:
    """What the driver's task does; its result is the file ended.json."""
    settings = json.loads((folder / "settings.json").read_text())
    job = TrainJob.model_validate(settings["job"])
    kills = [Kill(*kill) for kill in settings["kills"]]
    tracking = Tracking(f"sqlite:///{folder.parent}/mlflow.db", "faults", str(folder / "artifacts"))
    run = tracking.client().create_run(tracking.experiment_id())
    setattr(train_module, "train_worker", killing_worker(kills, str(folder / "markers")))  # noqa: B010
    record = train_module.train_variant(
        job,
        run_name="run",
        storage_uri=str(folder / "ray"),
        target_uri=str(folder / "published"),
        lease=take_lease(str(folder / "lease"), "training"),
        log=MetricLog(tracking, run.info.run_id),
    )
    curves = {
        name: [[metric.step, metric.value] for metric in tracking.client().get_metric_history(run.info.run_id, name)]
        for name in ("total", "val_miou")
    }
    (folder / "ended.json").write_text(json.dumps({"record": record.model_dump(mode="json"), "curves": curves}))


class Driver:
    """A process that trains, with a Ray of its own."""

    def __init__(self, folder: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = tempfile.mkdtemp(prefix="kt", dir="/tmp")
        self.log = (folder / "log.txt").open("a")
        environment = {
            MARK: self.mark,
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.kill_training", "--child", str(folder), self.temporary],
            env=os.environ | environment,
            cwd=REPOSITORY,
            stdout=self.log,
            stderr=self.log,
        )

    def kill(self) -> None:
        """SIGKILL to the driver and all of its Ray at once."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + 30
        while left := marked_processes(self.mark):
            for process in left:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            if time.monotonic() > deadline:
                raise SystemExit(f"processes outlived a SIGKILL: {left}")
            time.sleep(0.1)
        self.close()

    def close(self) -> None:
        """Nothing of it may be left."""
        self.log.close()
        wait_until_gone(self.mark)
        shutil.rmtree(self.temporary, ignore_errors=True)


def drive(folder: Path, marker: Path | None) -> int:
    """Run a driver to its end, or kill it when the marker appears; its exit status."""
    driver = Driver(folder)
    while driver.process.poll() is None and not (marker is not None and marker.exists()):
        time.sleep(0.05)
    if driver.process.poll() is None:
        driver.kill()
        return 0
    driver.close()
    status = driver.process.wait()
    if status != NO_RAY and (status or marker is not None):
        raise SystemExit(f"the driver ended with {status}: {(folder / 'log.txt').read_text()}")
    return status


def train_to_the_end(folder: Path, job: TrainJob, kills: Sequence[Kill]) -> dict[str, Any]:
    """Train with kills, a new driver after each one that was killed; what the last one gave back."""
    (folder / "markers").mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"job": job.model_dump(mode="json"), "kills": kills}))
    of_driver = [kill for kill in kills if kill.target == "driver"]
    for kill in [*of_driver, None]:
        marker = None if kill is None else folder / "markers" / str(kill.number)
        tries_left = RAY_TRIES
        while drive(folder, marker) == NO_RAY:
            tries_left -= 1
            if not tries_left:
                raise SystemExit(f"Ray did not start {RAY_TRIES} times")
    missing = [kill for kill in kills if not (folder / "markers" / str(kill.number)).exists()]
    if missing:
        raise SystemExit(f"these kills never struck: {missing}")
    return dict(json.loads((folder / "ended.json").read_text()))


def last_checkpoint(folder: Path, steps: int) -> Path:
    """The checkpoint of the last step."""
    for state in sorted((folder / "ray/run").glob("checkpoint_*/state.json"), reverse=True):
        if json.loads(state.read_text())["step"] == steps:
            return state.parent
    raise SystemExit(f"{folder} has no checkpoint of step {steps}")


def history(checkpoint: Path) -> list[dict[str, float]]:
    """The rows of a checkpoint's history, without clocks."""
    rows = [json.loads(line) for line in (checkpoint / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


def largest_difference(undisturbed: Path, disturbed: Path) -> dict[str, float]:
    """By kind of number: losses and rates, weights, optimizer moments; raises SystemExit for other rows or names."""
    rows, others = history(undisturbed), history(disturbed)
    if [sorted(row) for row in rows] != [sorted(row) for row in others]:
        raise SystemExit(f"the histories have other rows: {rows} and {others}")
    found = {
        "history": max(abs(row[name] - other[name]) for row, other in zip(rows, others, strict=True) for name in row)
    }
    for kind, name in (("weights", "model"), ("moments", "optimizer")):
        one, two = load_file(undisturbed / f"{name}.safetensors"), load_file(disturbed / f"{name}.safetensors")
        if one.keys() != two.keys():
            raise SystemExit(f"{name}.safetensors holds other tensors")
        found[kind] = max(float((one[key].double() - two[key].double()).abs().max()) for key in one)
    return found


def check_curves(ended: dict[str, Any], rows: list[dict[str, float]]) -> None:
    """MLflow must hold each row once, as the history has it."""
    for name, curve in ended["curves"].items():
        expected = [[row["step"], row[name]] for row in rows if name in row]
        if sorted(curve) != expected:
            raise SystemExit(f"MLflow's {name} is {curve}, the history's {expected}")


def draw_kills(rng: random.Random, count: int, workers: int, steps: int) -> list[Kill]:
    """Random steps and phases, each target in turn; loader processes exist with one worker only."""
    targets = ["worker", "driver", "loader" if workers == 1 else "controller"]
    kills = []
    for number, step in enumerate(sorted(rng.sample(range(2, steps), count))):
        target = targets[number % len(targets)]
        phase = "before_step" if target == "loader" else rng.choice(PHASES)
        rank = 0 if phase in ("save", "upload") else rng.randrange(workers)
        # Those phases do not come after every step, but do come at the last.
        kills.append(Kill(number, step, phase, target, rank))
    return kills


def main() -> None:
    """Run undisturbed and disturbed and print the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), options.child[1])
        return
    rng = random.Random(options.seed)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="kill-training-") as folder:
        shard_set = prepare(Path(folder) / "shards")
        for workers in options.workers:
            job = make_job(shard_set, workers, options.steps, loader_workers=int(workers == 1))
            kills = draw_kills(rng, options.kills, workers, options.steps)
            places = [Path(folder) / f"{name}-{workers}" for name in ("undisturbed", "disturbed")]
            begun = time.monotonic()
            train_to_the_end(places[0], job, [])
            seconds = [time.monotonic() - begun]
            ended = train_to_the_end(places[1], job, kills)
            seconds.append(time.monotonic() - begun - seconds[0])
            checkpoints = [last_checkpoint(place, options.steps) for place in places]
            found = largest_difference(*checkpoints)
            check_curves(ended, history(checkpoints[1]))
            for kill in kills:
                struck = (places[1] / "markers" / str(kill.number)).read_text()
                print(f"{workers} workers: {kill.target} (rank {kill.rank}) killed at step {struck}, {kill.phase}")
            print(
                f"{workers} workers: {len(kills)} kills, largest differences "
                + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
                + f"; {seconds[0]:.0f} s undisturbed, {seconds[1]:.0f} s with kills",
                flush=True,
            )
            worst = max(worst, *found.values())
            if worst > TOLERANCE:
                raise SystemExit(f"the resumed run differs by {worst:.1e}")
    print(f"{options.kills * len(options.workers)} kills, largest difference {worst:.1e}, MLflow's curves whole")


if __name__ == "__main__":
    main()
