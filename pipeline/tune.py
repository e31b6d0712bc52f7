"""The loss-weight search on Ray Tune: Optuna proposes, ASHA stops the hopeless, a trial is a short Ray Train run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import optuna
import ray.train
import ray.train.torch
import ray.tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline import storage
from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.records import LossWeights
from pipeline.shard_check import check_shard_set
from pipeline.train import scaling, train_worker, wants_gpu
from pipeline.trainer import TrainJob, WorkerPlace
from pipeline.training import run_training

TRIAL_CPUS = 0.01
WEIGHTS = ("class_weight", "focal_weight", "dice_weight")


def trial_job(job: TrainJob, tune: TuneConfig, sampled: dict[str, float]) -> TrainJob:
    """`job` shortened to the trial's steps, with the sampled weights and, if it is searched, learning rate."""
    train = job.train.model_copy(
        update={
            "steps": tune.steps,
            "warmup_steps": min(job.train.warmup_steps, tune.steps // 10),
            "validate_every_steps": tune.report_every_steps,
            "learning_rate": sampled.get("learning_rate", job.train.learning_rate),
        }
    )
    loss = job.loss.model_copy(update={name: sampled[name] for name in WEIGHTS})
    return job.model_copy(
        update={
            "variant": "trial " + "/".join(f"{sampled[name]:.3g}" for name in WEIGHTS),
            "train": train,
            "loss": loss,
            "max_val_samples": tune.max_val_samples,
            "save_checkpoints": False,
        }
    )


def run_trial(sampled: dict[str, float], job: TrainJob, tune: TuneConfig) -> None:
    """One trial: a Ray Train run of its own, whose validation scores reach the scheduler as they come."""
    short = trial_job(job, tune, sampled)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    in_process = job.runtime.num_workers == 1
    run_config = ray.train.RunConfig(
        name=f"trial-{ray.tune.get_context().get_trial_id()}",
        callbacks=[] if in_process else [TuneReportCallback()],  # type: ignore[list-item, no-untyped-call]
    )
    TorchTrainer(
        _trial_in_process if in_process else train_worker,
        train_loop_config={"job": short.model_dump(mode="json")},
        # No workers: the loop runs in the trial's own process, which spares starting a second one.
        scaling_config=ScalingConfig(num_workers=0, use_gpu=wants_gpu(job.runtime))
        if in_process
        else scaling(job.runtime, cpus=_cpus_beside_trial(job.runtime.cpus_per_worker)),
        run_config=run_config,
    ).fit()


def _cpus_beside_trial(cpus_per_worker: int) -> float:
    # The trial itself must hold some CPU, and on a machine of few cores the workers need all that there are.
    # Ray takes fractions below 1 only.
    return 1 - TRIAL_CPUS if cpus_per_worker == 1 else cpus_per_worker


def _trial_in_process(loop_config: dict[str, Any]) -> None:
    job = TrainJob.model_validate(loop_config["job"])

    def report(metrics: dict[str, float], _folder: Path | None) -> None:
        # Within a trial's own process Tune is told directly; ray.train.report is refused there.
        if metrics["val_miou"] >= 0:
            ray.tune.report(metrics)

    run_training(job, WorkerPlace(0, 1, ray.train.torch.get_device()), report)


def search_loss_weights(
    job: TrainJob,
    tune: TuneConfig,
    *,
    run_name: str,
    storage_uri: str,
    target_uri: str,
    tracking: dict[str, str],
) -> LossWeights:
    """Search the loss weights (and the learning rate where `tune` gives a range) for the highest val mIoU.

    Args:
        job: the training run whose loss weights are searched.
        tune: ranges and budget.
        run_name: Ray Tune's run name; the same name under the same storage continues a killed search.
        storage_uri: where Ray Tune keeps its state.
        target_uri: folder that receives trials.json.
        tracking: `tracking_uri`, `experiment_name`, `parent_run_id` of the step's run.

    Raises:
        UserError: no trial finished; the message carries the first trial's cause.
    """
    check_shard_set(job.shard_set, ["train", "val"], say=print)
    # Tune's own progress table repeats what the trials print.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuner = _restored_or_new(job, tune, run_name, storage_uri, tracking)
    grid = tuner.fit()
    results = [grid[index] for index in range(len(grid))]
    finished = [result for result in results if result.metrics and "val_miou" in result.metrics]
    if not finished:
        causes = [str(error).strip().splitlines()[-1] for error in grid.errors]
        raise UserError(
            f"all {len(results)} search trials failed; the first one: {causes[0] if causes else 'no result'}"
        )
    best = max(finished, key=_reached_and_score)
    trials = [_trial_row(result, job.train.learning_rate, tune.steps) for result in results]
    trials_uri = storage.join(target_uri, "trials.json")
    storage.publish_json(trials_uri, trials)
    chosen = _trial_row(best, job.train.learning_rate, tune.steps)
    return LossWeights(
        **{name: chosen[name] for name in WEIGHTS},
        learning_rate=chosen["learning_rate"] if tune.learning_rate else None,
        miou=chosen["miou"],
        num_trials=len(trials),
        trials_uri=trials_uri,
    )


def _restored_or_new(
    job: TrainJob, tune: TuneConfig, run_name: str, storage_uri: str, tracking: dict[str, str]
) -> ray.tune.Tuner:
    runtime = job.runtime
    resources: dict[str, float] = {"CPU": TRIAL_CPUS}
    if runtime.num_workers == 1:
        resources = {"CPU": runtime.cpus_per_worker, "GPU": 1 if wants_gpu(runtime) else 0}
    trainable = ray.tune.with_resources(ray.tune.with_parameters(run_trial, job=job, tune=tune), resources)
    path = storage.join(storage_uri, run_name)
    if ray.tune.Tuner.can_restore(path):
        return ray.tune.Tuner.restore(path, trainable=trainable, resume_unfinished=True, restart_errored=True)
    space = {name: ray.tune.loguniform(*getattr(tune, name)) for name in WEIGHTS}
    first = {name: getattr(job.loss, name) for name in WEIGHTS}
    if tune.learning_rate:
        space["learning_rate"] = ray.tune.loguniform(*tune.learning_rate)
        first["learning_rate"] = job.train.learning_rate
    inside = all(_within(first[name], getattr(tune, name)) for name in first)
    return ray.tune.Tuner(
        trainable,
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric="val_miou",
            mode="max",
            num_samples=tune.num_trials,
            max_concurrent_trials=runtime.trials_at_once,
            # The configured weights are the trial to beat.
            search_alg=OptunaSearch(seed=tune.seed, points_to_evaluate=[first] if inside else None),
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=tune.steps,
                grace_period=tune.report_every_steps,
                reduction_factor=tune.reduction_factor,
            ),
        ),
        run_config=ray.tune.RunConfig(
            name=run_name,
            storage_path=storage_uri,
            verbose=0,
            callbacks=[
                MLflowLoggerCallback(
                    tracking_uri=tracking["tracking_uri"],
                    experiment_name=tracking["experiment_name"],
                    tags={"mlflow.parentRunId": tracking["parent_run_id"], "segvit.kind": "trial"},
                )
            ],
        ),
    )


def _reached_and_score(result: ray.tune.Result) -> tuple[float, float]:
    # A trial stopped early may lead by chance; what went further counts first.
    metrics = result.metrics or {}
    return metrics["step"], metrics["val_miou"]


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]


def _trial_row(result: ray.tune.Result, learning_rate: float, steps: int) -> dict[str, Any]:
    metrics, sampled = result.metrics or {}, result.config or {}
    reached = int(metrics.get("step", 0))
    state = "failed" if result.error else ("stopped" if reached < steps else "finished")
    return {
        "trial_id": metrics.get("trial_id", ""),
        **{name: sampled[name] for name in WEIGHTS},
        "learning_rate": sampled.get("learning_rate", learning_rate),
        "miou": metrics.get("val_miou"),
        "steps": reached,
        "state": state,
    }
