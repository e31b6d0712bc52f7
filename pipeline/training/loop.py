"""The training loop of one worker: it is told its rank and where to report; Ray is not needed to run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.config import TrainConfig
from pipeline.cpu_threads import set_cpu_threads
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.log import Reporter, TrainingLog
from pipeline.training.non_finite import stop_training
from pipeline.training.prefetch import prefetch
from pipeline.training.train_checkpoint import TrainState
from pipeline.training.trainer import Trainer
from pipeline.training.utilisation import utilisation_per_image


def run_training(
    job: TrainJob,
    context: DistributedContext,
    report: Reporter,
    resume_from: Path | None = None,
    log: Callable[[str], None] = print,
    work_folder: Path | None = None,
    run_uri: str | None = None,
    report_every_s: float = 0.0,
    say_validations: bool = True,
) -> TrainState:
    """Train to the job's last step, reporting, validating and checkpointing on the way.

    Args:
        job: what to train.
        context: this worker.
        report: receives metrics and, on rank 0, checkpoint folders; called equally often on every rank.
        resume_from: checkpoint folder to continue from.
        log: prints a progress line (rank 0 only), not more than one every few seconds.
        work_folder: where checkpoint folders are written before they are reported; needed if they are saved.
        run_uri: the run's folder in storage, which receives a batch that makes the loss non-finite.
        report_every_s: the most that rows of metrics wait for a report that comes anyway.
        say_validations: whether `log` gets a line for each validation, too.

    Raises:
        UserError: the loss or its gradient is not finite; on all ranks at the same step.
    """
    if context.device.type == "cpu":
        set_cpu_threads(job.runtime.cpus_per_worker, log if context.rank == 0 else lambda _: None)
    else:
        # Collectives of Python objects take the current device.
        torch.cuda.set_device(context.device)
    trainer = Trainer(job, context, resume_from)
    train, state = job.train, trainer.state
    if state.finished and state.step < train.steps and job.goes_on_from is not None:
        # Of the shorter training; its best checkpoint is none of this run's.
        state.finished, state.best_miou = False, -1.0
    if context.rank == 0 and trainer.precision != train.precision:
        kind = train.precision.removesuffix("_params")
        log(f"{job.variant}  in {trainer.precision}: this {context.device.type} has no {kind} instructions")
    if context.rank == 0 and trainer.taken is not None and job.start is not None:
        log(f"{job.variant}  starts from {job.start.origin} (step {job.start.step}): {trainer.taken.summary()}")
        if trainer.fitted is not None:
            before, after = trainer.fitted
            log(f"{job.variant}  fitted to its features: error of what was left out {before:.3f} -> {after:.3f}")
    mfu_per_image = utilisation_per_image(job, context, trainer.precision)
    training_log = TrainingLog(job, context, state, report, log, report_every_s, say_validations, mfu_per_image)

    def finish_step(*, validate: bool, save: bool, last: bool) -> None:
        step, folder = state.step, None
        if validate:
            started = time.monotonic()
            scores = trainer.validate()
            state.finished = last or stops_early(train, state, scores["val_miou"])
            if state.finished:
                trainer.validate_best(scores)
            training_log.validated(scores, time.monotonic() - started)
        if save:
            assert work_folder is not None, "checkpoints need a work folder"
            training_log.stamp()
            folder = work_folder / f"step-{step:08d}"
            trainer.save(folder)
        training_log.report(saved=save, folder=folder if context.rank == 0 else None)

    if train.steps == 0:
        finish_step(validate=True, save=job.save_checkpoints, last=True)
        return state
    batches = prefetch(micro_batches(job, context, state.step), context.device, trainer.loss.targets)
    while state.step < train.steps and not state.finished:
        started = time.monotonic()
        step_batches = [next(batches) for _ in range(train.accumulation_steps)]
        training_log.waited(time.monotonic() - started)
        terms = trainer.train_step(step_batches)
        step, last = state.step, state.step == train.steps
        due_log = last or step % job.runtime.log_every_steps == 0
        due_validation = last or step % train.validate_every_steps == 0
        due_save = job.save_checkpoints and (due_validation or step % train.checkpoint_every_steps == 0)
        state.val_miou = -1.0
        # A GPU is not waited for at every step; that nothing bad is saved or published is sure all the same.
        if context.device.type == "cpu" or due_log or due_validation or due_save:
            _refuse_non_finite(trainer, run_uri)
        if due_log:
            training_log.log(terms, trainer.max_learning_rate)
        finish_step(validate=due_validation, save=due_save, last=last)
    return state


def stops_early(train: TrainConfig, state: TrainState, miou: float) -> bool:
    """Whether the last validations, as many as `stop_after`, found nothing better than the best before them."""
    if train.stop_after is None:
        return False
    scores = [row["val_miou"] for row in state.history if "val_miou" in row] + [miou]
    return len(scores) - 1 - scores.index(max(scores)) >= train.stop_after


def _refuse_non_finite(trainer: Trainer, run_uri: str | None) -> None:
    job, context = trainer.job, trainer.context
    step = trainer.watch.first_step(context.world_size)
    if step is None:
        return
    # It may be some steps ago; any step's batch can be read again.
    again = micro_batches(job, context, step - 1, loader_workers=0)
    batches = [next(again) for _ in range(job.train.accumulation_steps)]
    stop_training(
        step,
        trainer.watch.values,
        batches,
        rank=context.rank,
        world_size=context.world_size,
        run_uri=run_uri,
    )
