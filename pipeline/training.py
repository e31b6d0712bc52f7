"""The training loop of one worker: it is told its rank and where to report; Ray is not needed to run it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError
from pipeline.loader import Batch, TrainLoader
from pipeline.trainer import Trainer, TrainJob, TrainState, WorkerPlace

LOSS_TERMS = ("class", "focal", "dice", "cross_entropy", "auxiliary")

# Takes metrics of rank 0 and, when there is one, this rank's part of a checkpoint folder.
Reporter = Callable[[dict[str, float], Path | None], None]


def run_training(
    job: TrainJob,
    place: WorkerPlace,
    report: Reporter,
    resume_from: Path | None = None,
    say: Callable[[str], None] = print,
    work_folder: Path | None = None,
) -> TrainState:
    """Train to the job's last step, reporting, validating and checkpointing on the way.

    Args:
        job: what to train.
        place: this worker.
        report: receives metrics and checkpoint folders; called equally often on every rank.
        resume_from: checkpoint folder to continue from.
        say: prints a progress line (rank 0 only).
        work_folder: where checkpoint folders are written before they are reported; needed if they are saved.

    Raises:
        UserError: the loss is not finite.
    """
    if place.device.type == "cpu":
        torch.set_num_threads(job.runtime.cpus_per_worker)
    trainer = Trainer(job, place, resume_from)
    train, state = job.train, trainer.state
    micro_batches = _micro_batches(job, place, state.step)
    started, steps_before = time.monotonic(), state.step
    seconds_before = state.train_seconds
    log_started, log_step = started, state.step
    validating = 0.0
    while state.step < train.steps:
        batches = [next(micro_batches) for _ in range(train.accumulation_steps)]
        terms = trainer.train_step(batches)
        step = state.step
        last = step == train.steps
        state.train_seconds = seconds_before + time.monotonic() - started
        due_log = last or step % job.runtime.log_every_steps == 0
        if place.device.type == "cpu" or due_log:
            _refuse_non_finite(terms["total"], step, batches)
        metrics: dict[str, float] = {}
        if due_log:
            seconds = time.monotonic() - log_started
            row = _summed_terms(_mean_over_ranks(terms, place))
            row["learning_rate"] = trainer.decoder_rate
            row["images_per_s"] = (step - log_step) * train.batch_size / seconds
            row["seconds"] = state.train_seconds
            state.history.append({"step": step, **row})
            metrics.update(row)
            pace = (time.monotonic() - started - validating) / (step - steps_before)
            if place.rank == 0:
                say(_progress_line(job.variant, step, train.steps, row, pace * (train.steps - step)))
            log_started, log_step = time.monotonic(), step
        validated = last or step % train.validate_every_steps == 0
        if validated:
            before = time.monotonic()
            miou = trainer.validate()
            validating += time.monotonic() - before
            log_started += time.monotonic() - before
            state.best_miou = max(state.best_miou, miou)
            state.history.append({"step": step, "val_miou": miou})
            metrics["val_miou"] = miou
            if place.rank == 0:
                say(f"{job.variant}  step {step}/{train.steps}  val mIoU {miou:.4f}  best {state.best_miou:.4f}")
        folder = None
        if job.save_checkpoints and (validated or step % train.checkpoint_every_steps == 0):
            assert work_folder is not None, "checkpoints need a work folder"
            folder = work_folder / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            state.train_seconds = seconds_before + time.monotonic() - started
            trainer.save(folder)
        if metrics or folder is not None:
            # A checkpoint between validations never counts as the best one.
            report({"step": float(step), "val_miou": -1.0, **metrics}, folder)
    return state


def _micro_batches(job: TrainJob, place: WorkerPlace, start_step: int) -> Iterator[Batch]:
    loader = TrainLoader(
        job.shard_set,
        split="train",
        crop=(job.model["image_size"][0], job.model["image_size"][1]),
        augmentation=job.train.augmentation,
        seed=job.train.seed,
        global_batch_size=job.train.batch_size // job.train.accumulation_steps,
        rank=place.rank,
        world_size=place.world_size,
        start_step=start_step * job.train.accumulation_steps,
        num_workers=job.runtime.loader_workers,
        repeat_factor_threshold=job.train.repeat_factor_threshold,
        stream_buffer=job.train.stream_buffer,
    )
    return iter(loader)


def _refuse_non_finite(total: Tensor, step: int, batches: list[Batch]) -> None:
    if not math.isfinite(total.item()):
        keys = ", ".join(key for batch in batches for key in batch.keys)
        raise UserError(
            f"the loss is {total.item()} at step {step}; a loss must be finite. Lower train.learning_rate or use "
            f"precision fp32, and look at the samples of this step: {keys}"
        )


def _mean_over_ranks(terms: dict[str, Tensor], place: WorkerPlace) -> dict[str, float]:
    stacked = torch.stack([value.float() for value in terms.values()])
    if place.world_size > 1:
        dist.all_reduce(stacked)
        stacked = stacked / place.world_size
    return dict(zip(terms, stacked.tolist(), strict=True))


def _summed_terms(terms: dict[str, float]) -> dict[str, float]:
    """The final prediction's terms, all auxiliary ones in one sum, and the total."""
    row = {name: value for name, value in terms.items() if not name.startswith("auxiliary.")}
    row["auxiliary"] = sum(value for name, value in terms.items() if name.startswith("auxiliary."))
    return row


def _progress_line(variant: str, step: int, steps: int, row: dict[str, float], seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    eta = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    terms = "  ".join(f"{name} {row[name]:.3f}" for name in LOSS_TERMS if name in row)
    return (
        f"{variant}  step {step}/{steps}  loss {row['total']:.3f} ({terms})  "
        f"lr {row['learning_rate']:.1e}  {row['images_per_s']:.1f} images/s  ETA {eta}"
    )
