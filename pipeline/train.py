"""Training on Ray Train: workers run the loop of pipeline.training, Ray restarts and resumes them."""

from __future__ import annotations

import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.config import RuntimeConfig
from pipeline.errors import UserError, root_cause
from pipeline.records import Checkpoint
from pipeline.shard_check import check_shard_set
from pipeline.tracking import MetricLog
from pipeline.trainer import HISTORY_FILE, TrainJob, WorkerPlace
from pipeline.training import run_training

PUBLISHED_FILES = ("model.safetensors", "config.json")


class MetricsToTracking(UserCallback):
    """Logs what rank 0 reports; it runs in the controller, on the machine that reaches the tracking server."""

    def __init__(self, log: MetricLog) -> None:
        self.log = log

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log the metrics of rank 0 at their step."""
        row = dict(metrics[0])
        step = int(row.pop("step"))
        if row.get("val_miou", 0.0) < 0:
            del row["val_miou"]
        self.log.metrics(row, step)


def scaling(runtime: RuntimeConfig, cpus: float | None = None) -> ScalingConfig:
    """The workers of one training run, as Ray counts them; `cpus` a worker other than `cpus_per_worker`."""
    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker if cpus is None else cpus}
    use_gpu = wants_gpu(runtime)
    if use_gpu:
        resources["GPU"] = 1
    return ScalingConfig(num_workers=runtime.num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def wants_gpu(runtime: RuntimeConfig) -> bool:
    """`use_gpu`, or whether the cluster has a GPU where it is left open; raises UserError for one it lacks."""
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0  # type: ignore[no-untyped-call]
    if runtime.use_gpu and not has_gpu:
        raise UserError("runtime.use_gpu is true but this cluster has no GPU; set it to false or add GPU workers")
    return has_gpu if runtime.use_gpu is None else runtime.use_gpu


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; resumes from the run's latest checkpoint when there is one."""
    # It prints every report a second time.
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    job = TrainJob.model_validate(loop_config["job"])
    context = ray.train.get_context()
    place = WorkerPlace(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    checkpoint = ray.train.get_checkpoint()

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        saved = ray.train.Checkpoint.from_directory(str(folder)) if folder is not None else None
        ray.train.report(metrics, checkpoint=saved)
        _remove_folder(folder)

    with ExitStack() as stack:
        resume = Path(stack.enter_context(checkpoint.as_directory())) if checkpoint is not None else None
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segvit-train-")))
        run_training(job, place, report, resume_from=resume, work_folder=work)


def _remove_folder(folder: Path | None) -> None:
    if folder is not None:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def train_variant(job: TrainJob, *, run_name: str, storage_uri: str, target_uri: str, log: MetricLog) -> Checkpoint:
    """Train `job` on the cluster and publish the chosen checkpoint to `target_uri`.

    Args:
        job: what to train.
        run_name: Ray Train's run name; the same name under the same storage resumes.
        storage_uri: where Ray Train keeps its checkpoints while it runs.
        target_uri: folder to publish to.
        log: where metrics go.

    Raises:
        UserError: training failed; the message is the worker's own cause in one line.
    """
    # Here, not in the workers: none of them waits in a collective for another one's check.
    check_shard_set(job.shard_set, ["train", "val"], say=print)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job.model_dump(mode="json")},
        scaling_config=scaling(job.runtime),
        # Ray's type stubs know only the former RunConfig.
        run_config=RunConfig(  # type: ignore[call-arg]
            name=run_name,
            storage_path=storage_uri,
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="val_miou"),
            failure_config=FailureConfig(max_failures=job.runtime.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[MetricsToTracking(log)],  # type: ignore[list-item]
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = root_cause(error)
        raise UserError(f"training of {job.variant} failed: {cause}") from error
    return publish_result(job, result, target_uri)


def publish_result(job: TrainJob, result: ray.train.Result, target_uri: str) -> Checkpoint:
    """Publish the best or the last checkpoint of a finished run, as `train.keep` says, with the whole history."""
    assert result.checkpoint is not None, "the last step always saves a checkpoint"
    chosen, metrics = result.checkpoint, result.metrics or {}
    if job.train.keep == "best" and result.best_checkpoints:
        chosen, metrics = max(result.best_checkpoints, key=lambda pair: float(pair[1]["val_miou"]))
    with (
        result.checkpoint.as_directory() as last,
        chosen.as_directory() as source,
        tempfile.TemporaryDirectory(prefix="segvit-publish-") as folder,
    ):
        for name in PUBLISHED_FILES:
            (Path(folder) / name).write_bytes((Path(source) / name).read_bytes())
        history = (Path(last) / HISTORY_FILE).read_text()
        (Path(folder) / HISTORY_FILE).write_text(history)
        digest = storage.file_digest(str(Path(folder) / "model.safetensors"))
        storage.publish_folder(folder, target_uri)
        seconds = storage.read_json(str(Path(last) / "state.json"))["train_seconds"]
    return Checkpoint(
        variant=job.variant,
        uri=target_uri,
        digest=digest,
        step=int(metrics["step"]),
        miou=float(metrics["val_miou"]),
        history_uri=storage.join(target_uri, HISTORY_FILE),
        train_seconds=float(seconds),
    )
