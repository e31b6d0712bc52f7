"""One trial of the search: a short training run that continues from its last checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.tune
import torch
from ray.train import FailureConfig, LoggingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.causes import one_line
from pipeline.config import RuntimeConfig, TuneConfig
from pipeline.errors import UserError
from pipeline.storage.names import HISTORY_FILE
from pipeline.training.checkpoint_files import damage_of
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.train import REPORT_EVERY_S, StopOnUserError, look_often, scaling, train_worker
from pipeline.training.train_run import repair_run
from pipeline.tuning.proposals import METRIC, STEP
from pipeline.tuning.record import TrialUris, remove_folder, trial_name
from pipeline.tuning.space import values_text
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.progress import Pace
from pipeline.workflow.ray_session import wants_gpu
from pipeline.workflow.step_log import recording

TRIAL_CPUS = 0.01
LATEST_FILE = "latest.json"
NUMBER, VALUES, CAUSE = "trial", "values", "cause"


def in_process(runtime: RuntimeConfig) -> bool:
    """Whether a trial trains in its own process: one worker needs no second one, which takes 15 s to start."""
    return runtime.num_workers == 1


def trial_resources(runtime: RuntimeConfig) -> dict[str, float]:
    """What a trial's own process takes of the cluster; with several workers, those take the rest."""
    if in_process(runtime):
        return {"CPU": runtime.cpus_per_worker, "GPU": 1 if wants_gpu(runtime.use_gpu) else 0}
    return {"CPU": TRIAL_CPUS}


def trial_job(job: TrainJob, tune: TuneConfig, number: int, values: Mapping[str, Any]) -> TrainJob:
    """`job` shortened to the trial's steps, with the sampled values; raises UserError where they do not fit."""
    train = job.settings.train
    shortened = {
        "train.steps": tune.steps,
        "train.warmup_steps": min(train.warmup_steps, tune.steps // 10),
        "train.validate_every_steps": tune.report_every_steps,
        "train.checkpoint_every_steps": tune.report_every_steps,
    }
    try:
        settings = job.settings.with_values(shortened | dict(values))
    except ValueError as error:
        raise UserError(f"its values ({values_text(values)}) do not fit the variant: {error}") from error
    return job.model_copy(
        update={
            "variant": f"trial {trial_name(number)}",
            "settings": settings,
            "hold_out": tune.hold_out,
            "max_val_samples": tune.max_val_samples,
        }
    )


def run_trial(sampled: dict[str, Any], job: TrainJob, tune: TuneConfig, uris: TrialUris) -> None:
    """What Ray Tune runs: train with the values of `sampled`, from the trial's last checkpoint where it has one.

    A failure of the training is reported as the trial's last result; only the death of the process, or a search
    that another process has taken over, reaches Ray Tune as an error.
    """
    with recording(uris.step_log):
        _run_trial(sampled, job, tune, uris)


def _run_trial(sampled: dict[str, Any], job: TrainJob, tune: TuneConfig, uris: TrialUris) -> None:
    number = int(sampled[NUMBER])
    try:
        short = trial_job(job, tune, number, sampled[VALUES])
        if in_process(job.runtime):
            _train_here(short, uris, number)
        else:
            _train_on_workers(short, tune, uris, number)
    except LeaseLost:
        raise
    except Exception as error:
        ray.tune.report({STEP: 0.0, METRIC: -1.0, CAUSE: one_line(error)})


def _train_here(job: TrainJob, uris: TrialUris, number: int) -> None:
    # Here, so that the process that leads the search loads no model. The search prints the scores, with the best one.
    from pipeline.training.loop import run_training

    folder_uri = uris.trial_uri(number)
    with tempfile.TemporaryDirectory(prefix="segvit-trial-") as folder:
        resume = _fetch_checkpoint(folder_uri, Path(folder) / "resume")
        if resume is not None:
            _report_again(str(resume))

        # Between scores, the search only shows how far the trial is.
        pace = Pace(REPORT_EVERY_S)

        def report(metrics: dict[str, float], checkpoint: Path | None) -> None:
            if checkpoint is not None:
                uris.lease.check()
                _publish_checkpoint(checkpoint, folder_uri)
                _remove_local(checkpoint)
            # Told last: what the search has heard of, the trial can continue from.
            if metrics[METRIC] >= 0 or pace.is_due():
                ray.tune.report({STEP: metrics[STEP], METRIC: metrics[METRIC]})

        # Ray hides the GPUs that a process has not asked for.
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        run_training(
            job,
            DistributedContext(0, 1, device),
            report,
            resume_from=resume,
            work_folder=Path(folder) / "work",
            say_validations=False,
        )


def _train_on_workers(job: TrainJob, tune: TuneConfig, uris: TrialUris, number: int) -> None:
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    uris.lease.check()
    run_uri = storage.join(uris.train_uri, uris.train_name(number))
    checkpoints = repair_run(run_uri, "last", uris.lease)
    if checkpoints:
        _report_again(checkpoints[-1].uri)
        if checkpoints[-1].step >= tune.steps:
            return
    look_often()
    TorchTrainer(
        train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "lease": uris.lease,
            "step_log": uris.step_log,
            "say_validations": False,
        },
        scaling_config=scaling(job.runtime, cpus=_cpus_beside_trial(job.runtime.cpus_per_worker)),
        # Ray's type stubs know only the former RunConfig.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=uris.train_name(number),
            storage_path=uris.train_uri,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=tune.trial_retries),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[TuneReportCallback(), StopOnUserError()],  # type: ignore[list-item, no-untyped-call]
        ),
    ).fit()


def _cpus_beside_trial(cpus_per_worker: int) -> float:
    # The trial itself must hold some CPU, and on a machine of few cores the workers need all that there are.
    # Ray takes fractions below 1 only.
    return 1 - TRIAL_CPUS if cpus_per_worker == 1 else cpus_per_worker


def _report_again(checkpoint_uri: str) -> None:
    """Report the scores up to the checkpoint: the search may have died before it heard of the last one."""
    for step, miou in history_scores(storage.read_bytes(storage.join(checkpoint_uri, HISTORY_FILE)).decode()):
        ray.tune.report({STEP: float(step), METRIC: miou})


def history_scores(history: str) -> Iterator[tuple[int, float]]:
    """Step and mIoU of every validation in a history's text."""
    for line in history.splitlines():
        row: dict[str, Any] = json.loads(line)
        if row.get(METRIC, -1.0) >= 0:
            yield int(row[STEP]), float(row[METRIC])


def _publish_checkpoint(checkpoint: Path, folder_uri: str) -> None:
    """Make `checkpoint` the one to continue from; the file that names it comes last, then the former one goes."""
    storage.publish_folder(checkpoint, storage.join(folder_uri, checkpoint.name))
    storage.publish_json(storage.join(folder_uri, LATEST_FILE), {"folder": checkpoint.name})
    for name in storage.list_names(folder_uri):
        if name not in (LATEST_FILE, checkpoint.name):
            remove_folder(storage.join(folder_uri, name))


def _fetch_checkpoint(folder_uri: str, local: Path) -> Path | None:
    """The trial's last checkpoint on this machine; None where it has none or a byte of it has changed."""
    try:
        name = str(storage.read_json(storage.join(folder_uri, LATEST_FILE))["folder"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        print(f"{LATEST_FILE} in {folder_uri} cannot be read ({error}); starting the trial anew", flush=True)
        return None
    uri = storage.join(folder_uri, name)
    damage = damage_of(uri)
    if damage is not None:
        print(f"checkpoint {uri} is not used: {damage}; starting the trial anew", flush=True)
        return None
    local.mkdir()
    return storage.fetch_folder(uri, local)


def _remove_local(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
