"""Training on Ray Train: workers run the loop of pipeline.training.loop, Ray restarts and resumes them.

Ray retries what may pass: a process that dies, a node that goes, a collective that breaks. What a person has to
mend (UserError: bad data, a non-finite loss) ends the run at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.causes import one_line
from pipeline.config import RuntimeConfig
from pipeline.errors import UserError, root_cause
from pipeline.records import Checkpoint
from pipeline.shards.shard_check import check_shard_set
from pipeline.storage.names import CONFIG_FILE, HISTORY_FILE, WEIGHTS_FILE
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.live import LIVE, TrainingView
from pipeline.training.train_run import (
    SavedCheckpoint,
    chosen_checkpoint,
    listed_checkpoints,
    repair_run,
    usable_checkpoints,
)
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import StepProgress
from pipeline.workflow.ray_session import wants_gpu
from pipeline.workflow.step_log import current_log, recording
from pipeline.workflow.tracking import MetricLog

REPORT_EVERY_S = 5.0
MAX_WAITING_CHECKPOINTS = 2
START_TIMEOUT_S = 900.0
LOOK_EVERY_S = 0.25
# So often at most, for a run that ends with a damaged checkpoint, or whose leading process dies.
MAX_FITS = 3


class MetricsToTracking(UserCallback):
    """Logs what rank 0 reports; it runs in the controller, on the machine that reaches the tracking server.

    Args:
        log: the MLflow run.
        logged_step: the last step that it has already; a resumed run passes some steps a second time.
        view: shows the run while it goes on.
    """

    def __init__(self, log: MetricLog, logged_step: int = -1, view: TrainingView | None = None) -> None:
        self.log = log
        self.logged_step = logged_step
        self.view = view

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log the metrics of rank 0 at their steps."""
        reported = {name: value for name, value in metrics[0].items() if name != LIVE}
        rows = [*reported.pop("earlier", []), reported]
        if self.view is not None:
            self.view.reported(rows, [one[LIVE] for one in metrics if LIVE in one])
        for row in rows:
            step = int(row["step"])
            values = {name: value for name, value in row.items() if name != "step"}
            if values.get("val_miou", 0.0) < 0:
                del values["val_miou"]
            if step > self.logged_step and values:
                self.log.metrics(values, step)
                self.logged_step = step

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Show that workers failed, from which the run may recover."""
        if self.view is not None and worker_exceptions:
            self.view.failed({rank: one_line(error) for rank, error in worker_exceptions.items()})


class StopOnUserError(UserCallback):
    """Ends the run, whatever `max_failures` says, for what a person has to mend: it would only come again."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the one kind of error that Ray Train does not retry."""
        for error in worker_exceptions.values():
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise ray.train.ControllerError(cause)


def scaling(runtime: RuntimeConfig, cpus: float | None = None) -> ScalingConfig:
    """The workers of one training run, as Ray counts them; `cpus` a worker other than `cpus_per_worker`."""
    resources: dict[str, float] = {"CPU": runtime.cpus_per_worker if cpus is None else cpus}
    use_gpu = wants_gpu(runtime.use_gpu)
    if use_gpu:
        resources["GPU"] = 1
    return ScalingConfig(
        # Ray's type stubs know no range.
        num_workers=runtime.num_workers,  # type: ignore[arg-type]
        use_gpu=use_gpu,
        resources_per_worker=resources,
    )


def look_often() -> None:
    """Have the controllers of the trainers that this process starts look for reports as often as those come.

    A controller takes one report of each worker a look: at Ray's 2 s a run of a few reports ends long after its last
    step.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_EVERY_S))


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the `job`, under a `lease`; it resumes from the run's last whole checkpoint.

    Rows of metrics wait for one another up to `report_every_s`, if that is given; validations are printed unless
    `say_validations` is False; `step_log` is where it is kept what the worker prints.
    """
    with recording(loop_config.get("step_log")):
        _train(loop_config)


def _train(loop_config: dict[str, Any]) -> None:
    # Here, so that the processes that only lead the workers load no model.
    from pipeline.training.loop import run_training

    # Ray would print every report a second time, by loggers that bear the names of its files.
    for name in ("ray.train", None):
        logging.getLogger(name).setLevel(logging.WARNING)
    job = TrainJob.model_validate(loop_config["job"])
    lease: Lease = loop_config["lease"]
    lease.check()
    ray_context = ray.train.get_context()
    context = DistributedContext(
        ray_context.get_world_rank(), ray_context.get_world_size(), ray.train.torch.get_device()
    )
    run_storage = ray_context.get_storage()
    run_uri = _run_uri(run_storage)
    with tempfile.TemporaryDirectory(prefix="segvit-train-") as work:
        uploads = _Uploads(run_storage, Path(work) / "saved", lease)
        try:
            run_training(
                job,
                context,
                uploads.report if job.save_checkpoints else _report_now,
                resume_from=_resume_folder(job, run_uri, context.rank, Path(work)),
                work_folder=uploads.folder,
                run_uri=run_uri,
                report_every_s=loop_config.get("report_every_s", 0.0),
                say_validations=loop_config.get("say_validations", True),
            )
        finally:
            # After an error, too: no upload may lose its files, and its own error would hide the first one.
            uploads.wait(0)


def _run_uri(run_storage: Any) -> str:
    path, scheme = str(run_storage.experiment_fs_path), str(run_storage.storage_filesystem.type_name)
    return path if scheme == "local" else f"{scheme}://{path}"


def _report_now(metrics: dict[str, Any], _folder: Path | None) -> None:
    ray.train.report(metrics)


class _Uploads:
    """Reports in the background: neither a slow upload nor Ray's slow collection of reports stops training.

    Args:
        run_storage: Ray's own.
        folder: where checkpoints are written; one is removed as soon as it is uploaded.
        lease: without it nothing is uploaded.
    """

    def __init__(self, run_storage: Any, folder: Path, lease: Lease) -> None:
        self.folder = folder
        self._lease = lease
        self._storage = run_storage
        self._num_waiting = 0
        self._uploaded = threading.Condition()

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        """Hand over metrics and a checkpoint folder."""
        checkpoint = None
        if folder is not None:
            self._lease.check()
            self.wait(MAX_WAITING_CHECKPOINTS - 1)
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=self._upload,
        )
        if folder is not None:
            # Only now: a report that fails uploads nothing, and one that is quick has taken its count off before.
            with self._uploaded:
                self._num_waiting += 1

    def wait(self, num_waiting: int) -> None:
        """Wait until at most so many checkpoints are not uploaded; Ray ends this process where an upload fails."""
        with self._uploaded:
            self._uploaded.wait_for(lambda: self._num_waiting <= num_waiting)

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        self._lease.check()
        # Ray may try again with the same folder, so it goes only after success.
        uploaded: ray.train.Checkpoint = self._storage.persist_current_checkpoint(checkpoint, name)
        shutil.rmtree(checkpoint.path, ignore_errors=True)
        with self._uploaded:
            self._num_waiting -= 1
            self._uploaded.notify_all()
        return uploaded


def _resume_folder(job: TrainJob, run_uri: str, rank: int, work: Path) -> Path | None:
    """A local folder of the run's last whole checkpoint, the same one on all ranks; None: from the start."""
    uri = None
    if rank == 0:
        # Whether the best one is still there matters only when one is published.
        usable = usable_checkpoints(run_uri, listed_checkpoints(run_uri) or (), "last")
        last = usable[-1] if usable else _state_to_go_on_from(job)
        uri = last.uri if last else None
        if last:
            print(f"{job.variant}  goes on after step {last.step}", flush=True)
    uri = ray.train.collective.broadcast_from_rank_zero(uri)
    if uri is None:
        return None
    return storage.fetch_folder(uri, work / "resumed")


def _state_to_go_on_from(job: TrainJob) -> SavedCheckpoint | None:
    """The last state of the training that the job continues, None where it continues none; UserError if it is gone."""
    if job.goes_on_from is None:
        return None
    names = listed_checkpoints(job.goes_on_from) or ()
    found = [one for one in usable_checkpoints(job.goes_on_from, names, "last") if one.finished]
    if not found:
        raise UserError(
            f"{job.variant} cannot go on from step {job.train.continue_after}: {job.goes_on_from} holds no whole state "
            "of it any more (`segvit clean` removes those of finished trainings); leave train.continue_after out to "
            "train in one go"
        )
    return found[-1]


def train_variant(
    job: TrainJob,
    *,
    run_name: str,
    storage_uri: str,
    target_uri: str,
    lease: Lease,
    log: MetricLog,
    progress: StepProgress | None = None,
) -> Checkpoint:
    """Train `job` on the cluster and publish the chosen checkpoint to `target_uri`.

    A run that was trained to its end before is only published.

    Args:
        job: what to train.
        run_name: Ray Train's run name; the same name under the same storage resumes.
        storage_uri: where Ray Train keeps its checkpoints while it runs.
        target_uri: folder to publish to.
        lease: the right to write to both.
        log: where metrics go.
        progress: where to tell how far it is.

    Raises:
        UserError: training failed; the message is the worker's own cause in one line.
        LeaseLost: another execution has taken the run over.
    """
    run_uri = storage.join(storage_uri, run_name)
    for fits_left in reversed(range(MAX_FITS + 1)):
        saved = repair_run(run_uri, job.train.keep, lease)
        logged_step = _fill_metrics(log, saved[-1]) if saved else -1
        # Of states that earlier releases wrote, the step alone tells.
        if saved and (saved[-1].finished or saved[-1].step == job.train.steps):
            lease.check()
            return publish_checkpoint(job, saved, target_uri)
        if not fits_left:
            break
        if not saved:
            _state_to_go_on_from(job)
        # Here, not in the workers: none of them waits in a collective for another one's check.
        check_shard_set(job.shard_set, ["train", "val"], log=print)
        try:
            view = _view(job, progress, saved) if progress is not None else None
            _fit(job, run_name, storage_uri, lease, MetricsToTracking(log, logged_step, view))
        except ray.exceptions.RayActorError as error:
            print(f"{job.variant}  the process that leads the workers died ({type(error).__name__})", flush=True)
    raise UserError(
        f"training of {job.variant} ended {MAX_FITS} times without a whole last checkpoint in {run_uri}; "
        "look for a full or failing disk, or for processes killed for want of memory"
    )


def _view(job: TrainJob, progress: StepProgress, saved: Sequence[SavedCheckpoint]) -> TrainingView:
    last = saved[-1] if saved else None
    scores = (last.val_miou, last.best_miou) if last else (-1.0, -1.0)
    view = TrainingView(progress, job.train.steps, *scores)
    view.begin(last.step if last else 0)
    return view


def _fit(job: TrainJob, run_name: str, storage_uri: str, lease: Lease, metrics: MetricsToTracking) -> None:
    if isinstance(job.runtime.num_workers, int):
        # Another step may have the cores for minutes; Ray's minute would end in a traceback, and then again.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    look_often()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "lease": lease,
            "report_every_s": REPORT_EVERY_S,
            "step_log": current_log(),
        },
        scaling_config=scaling(job.runtime),
        # Ray's type stubs know only the former RunConfig.
        run_config=RunConfig(  # type: ignore[call-arg]
            name=run_name,
            storage_path=storage_uri,
            # The best ones, and always the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=job.train.keep_checkpoints, checkpoint_score_attribute="val_miou"
            ),
            failure_config=FailureConfig(max_failures=job.runtime.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[metrics, StopOnUserError()],  # type: ignore[list-item]
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = root_cause(getattr(error, "controller_failure", error))
        raise UserError(f"training of {job.variant} failed: {cause}") from error


def _fill_metrics(log: MetricLog, last: SavedCheckpoint) -> int:
    """Log what a run lacks of the history before a checkpoint; the last step that it has then."""
    try:
        client = log.tracking.client()
        known = {
            name: {metric.step for metric in client.get_metric_history(log.run_id, name)}
            for name in ("learning_rate", "val_miou")
        }
        rows = [row for row in _history(last) if int(row["step"]) not in known[_row_kind(row)]]
        log.tracking.log_history(log.run_id, rows)
        return max([last.step, *known["learning_rate"], *known["val_miou"]])
    except Exception as error:
        logging.getLogger(__name__).warning("the metrics before step %d were not logged: %s", last.step, error)
        return last.step


def _row_kind(row: Mapping[str, float]) -> str:
    return "val_miou" if "val_miou" in row else "learning_rate"


def _history(checkpoint: SavedCheckpoint) -> list[dict[str, float]]:
    lines = storage.read_bytes(storage.join(checkpoint.uri, HISTORY_FILE)).decode().splitlines()
    return [json.loads(line) for line in lines]


def publish_checkpoint(job: TrainJob, saved: Sequence[SavedCheckpoint], target_uri: str) -> Checkpoint:
    """Publish the best or the last checkpoint of a finished run, as `train.keep` says, with the whole history."""
    chosen, last = chosen_checkpoint(saved, job.train.keep), saved[-1]
    with tempfile.TemporaryDirectory(prefix="segvit-publish-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        for source, name in ((chosen, WEIGHTS_FILE), (chosen, CONFIG_FILE), (last, HISTORY_FILE)):
            fetched = storage.fetch_file(storage.join(source.uri, name), scratch)
            (folder / name).write_bytes(fetched.read_bytes())
        digest = storage.file_digest(str(folder / WEIGHTS_FILE))
        storage.publish_folder(folder, target_uri, last=CONFIG_FILE)
    return Checkpoint(
        variant=job.variant,
        uri=target_uri,
        digest=digest,
        step=chosen.step,
        miou=chosen.val_miou,
        history_uri=storage.join(target_uri, HISTORY_FILE),
        train_seconds=last.train_seconds,
        started_from=job.start.origin if job.start else None,
    )
