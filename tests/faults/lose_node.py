"""A node is lost for good while an elastic run trains on two: it must go on with one, on the same global batches.

    python -m tests.faults.lose_node [--steps 20] [--lost-at 8]

Two Ray nodes of one core on this machine, runtime.num_workers [1, 2], no dropout. Fails where the run does not end,
a step sees another number of samples, or the loss curve is not that of one undisturbed process up to rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.records import Checkpoint
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.workflow import ray_session
from pipeline.workflow.lease import take_lease
from pipeline.workflow.tracking import MetricLog, Tracking
from tests.faults.kill_training import history, make_job, prepare
from tests.jobs import with_settings

TOLERANCE = 1e-3
SLOW_STEP_S = 0.5
NODE_TRIES = 5


def noting_worker(folder: str) -> Callable[[dict[str, Any]], None]:
    """`train_worker` that notes start, world size and samples of each step."""

    def worker(loop_config: dict[str, Any]) -> None:
        from pipeline.training.train import train_worker
        from pipeline.training.trainer import Trainer

        train_step = Trainer.train_step

        def step(self: Trainer, batches: Any) -> Any:
            # Slow enough for the node to go in the middle.
            time.sleep(SLOW_STEP_S)
            context, samples = self.context, sum(len(batch.keys) for batch in batches)
            with (Path(folder) / "steps").open("a") as file:
                file.write(f"{os.getpid()} {context.rank} {context.world_size} {self.state.step + 1} {samples}\n")
            return train_step(self, batches)

        Trainer.train_step = step  # type: ignore[method-assign]
        train_worker(loop_config)

    return worker


def steps_seen(folder: Path) -> list[list[int]]:
    """Rows of process, rank, world size, step, samples."""
    file = folder / "steps"
    return [[int(value) for value in line.split()] for line in file.read_text().splitlines()] if file.exists() else []


def two_nodes(temporary: str) -> tuple[Any, Any]:
    """A cluster of two nodes, and the second one."""
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
    for tries_left in reversed(range(NODE_TRIES)):
        cluster = Cluster()
        try:
            cluster.add_node(**node, temp_dir=temporary, include_dashboard=False)
            return cluster, cluster.add_node(**node)
        except Exception as error:
            # Ray gives a node 30 s to come up, which is little on a busy machine.
            cluster.shutdown()  # type: ignore[no-untyped-call]
            if not tries_left:
                raise
            print(f"a node did not start ({error}); trying again", flush=True)
    raise AssertionError


def train_on_nodes(job: TrainJob, folder: Path, lost_at: int, temporary: str) -> Checkpoint:
    """Train on two nodes, one of which goes when a step is reached."""
    cluster, second = two_nodes(temporary)
    options = {"address": cluster.address, "logging_level": logging.ERROR}
    ray_session.start(lambda: options)
    tracking = Tracking(f"sqlite:///{folder}/mlflow.db", "faults", str(folder / "artifacts"))
    run_id = tracking.client().create_run(tracking.experiment_id()).info.run_id
    log, worker = MetricLog(tracking, run_id), noting_worker(str(folder))

    def lose_second() -> None:
        while not any(row[3] >= lost_at for row in steps_seen(folder)):
            time.sleep(0.1)
        print(f"step {lost_at}: the second node goes", flush=True)
        cluster.remove_node(second, allow_graceful=False)

    def task() -> Checkpoint:
        from pipeline.training import train

        setattr(train, "train_worker", worker)  # noqa: B010
        return train.train_variant(
            job,
            run_name="run",
            storage_uri=f"{folder}/ray",
            target_uri=f"{folder}/published",
            lease=take_lease(f"{folder}/lease", "training"),
            log=log,
        )

    threading.Thread(target=lose_second, daemon=True).start()
    try:
        record: Checkpoint = ray_session.get(ray_session.submit(task, name="train", max_retries=0))
    finally:
        ray_session.stop()
        cluster.shutdown()
    return record


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lost-at", type=int, default=8)
    options = parser.parse_args()
    folder, temporary = Path(tempfile.mkdtemp(prefix="lose-node-")), tempfile.mkdtemp(prefix="ln", dir="/tmp")
    job = make_job(prepare(folder / "shards"), (1, 2), options.steps)
    job = with_settings(job, model={"dropout": 0.0, "drop_path_rate": 0.0})
    place = DistributedContext(0, 1, torch.device("cpu"))
    run_training(job, place, lambda *_: None, log=lambda _: None, work_folder=folder / "alone")
    train_on_nodes(job, folder, options.lost_at, temporary)
    # A step that was trained twice, on two workers and again on one, has two rows of its own.
    samples: dict[tuple[int, int], int] = defaultdict(int)
    for _, _, world_size, step, count in steps_seen(folder):
        samples[step, world_size] += count
    sizes = {step: {world for number, world in samples if number == step} for step, _ in samples}
    rows = history(folder / "alone" / f"step-{options.steps:08d}")
    lines = (folder / "published/history.jsonl").read_text().splitlines()
    others = [json.loads(line) for line in lines]
    pairs = [(row, other) for row, other in zip(rows, others, strict=True) if "total" in row]
    if [row["step"] for row, _ in pairs] != list(range(1, options.steps + 1)):
        raise SystemExit("the history has gaps")
    first_alone = min(step for step, worlds in sizes.items() if 1 in worlds)
    # Of the step in flight only one of the two may have been noted.
    in_flight = (max(step for step, worlds in sizes.items() if 2 in worlds), 2)
    bad = {key: count for key, count in samples.items() if count != job.train.batch_size and key != in_flight}
    if bad or sizes[1] != {2} or sizes[options.steps] != {1}:
        raise SystemExit(f"samples a step {bad}, workers a step {dict(sizes)}")
    largest = max(abs(row["total"] - other["total"]) / row["total"] for row, other in pairs)
    print(
        f"two workers to step {in_flight[0]}, one from step "
        f"{first_alone} on; {job.train.batch_size} samples at every step; largest relative difference of the loss "
        f"to one undisturbed process {largest:.1e}"
    )
    if largest > TOLERANCE:
        raise SystemExit("the curve is another one")
    shutil.rmtree(folder)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
