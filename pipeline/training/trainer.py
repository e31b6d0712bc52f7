"""One training worker: model, optimizer, one optimizer step, validation, checkpoints. Pure torch, without Ray.

B images of one micro-batch, H W crop pixels. A step is one optimizer step over `batch_size` images, split over
ranks and accumulation steps; the loss and its gradient equal those of one process that sees the whole batch.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import segvit
from pipeline import storage
from pipeline.errors import UserError
from pipeline.evaluation.scoring import confusion_of_split
from pipeline.shards.loader import Batch, EvalLoader
from pipeline.storage.names import MANIFEST
from pipeline.training.averaging import BestWeights, MovingAverage, Weights, swapped, trainable
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob, job_schedule
from pipeline.training.master_weights import MasterWeights
from pipeline.training.non_finite import FiniteWatch
from pipeline.training.sharding import shard_model, uneven_forwards, whole_model, whole_weights
from pipeline.training.train_checkpoint import (
    Averages,
    TrainState,
    gather_moments,
    gather_rng,
    load_training,
    save_training,
)
from segvit.bf16 import has_bf16
from segvit.compilation import compile_loss, compile_regions
from segvit.losses.segmentation_loss import LossNormalizer, LossTargets
from segvit.metrics import segmentation_metrics
from segvit.optim import clip_gradients, parameter_groups, whole
from segvit.optimizers import build_optimizer
from segvit.weights.pretrained import load_backbone_state, read_file, read_grid
from segvit.weights.start import TakenWeights, take_weights

IN_BF16 = ("bf16", "bf16_params")


class Trainer:
    """One worker's model, optimizer and data stream.

    Args:
        job: what to train.
        context: rank, world size and device.
        resume_from: folder of a checkpoint this trainer wrote, or None.

    Raises:
        UserError: the model to start from cannot be read, or does not fit.
    """

    def __init__(self, job: TrainJob, context: DistributedContext, resume_from: Path | None = None) -> None:
        self.job = job
        self.context = context
        self.precision = computed_precision(job.train.precision, context.device)
        if context.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        self.state = TrainState()
        self.watch = FiniteWatch(context.device)
        torch.manual_seed(job.train.seed)
        self.model = build_job_model(job)
        self.sharded = job.runtime.sharding == "full"
        if not self.sharded or job.settings.distill is not None:
            self.model.to(context.device)
        self.taken: TakenWeights | None = None
        self.fitted: segvit.FeatureFit | None = None
        self._start_from_other(resumed=resume_from is not None)
        if self.sharded:
            shard_model(self.model, context.device, torch.bfloat16 if self.precision in IN_BF16 else None)
        self.loss = build_loss(job)
        self.optimizer = build_job_optimizer(job, self.model)
        ema_decay, average_best = job.train.ema_decay, job.train.average_best
        self.averages = Averages(
            moving=None if ema_decay is None else MovingAverage(self.model, ema_decay),
            best=None if average_best is None else BestWeights(average_best),
        )
        self.chosen: Weights | None = None
        self.rate_factor = job_schedule(job.train)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        # Same initial weights everywhere, different dropout on each rank.
        torch.manual_seed(job.train.seed + 7919 * (context.rank + 1))
        if resume_from is not None:
            self.state = load_training(
                resume_from, self.model, self.optimizer, context.rank, context.device, self.averages
            )
        in_bf16 = self.precision == "bf16_params" and not self.sharded
        self.masters = MasterWeights(self.model) if in_bf16 else None
        self.forward = self._distributed_forward()

    def _start_from_other(self, *, resumed: bool) -> None:
        job = self.job
        if job.start is None or resumed:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="segvit-start-") as folder:
                fetched = storage.fetch_folder(job.start.uri, Path(folder) / "checkpoint")
                source, metadata = segvit.load_checkpoint(fetched)
            classes = storage.read_json(storage.join(job.shard_set.uri, MANIFEST))["classes"]
            self.taken = take_weights(self.model, source, classes, metadata.get("class_names", ()))
            if job.settings.distill is not None:
                self.fitted = self._fit_features(source.to(self.context.device), job.settings.distill.images)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{job.variant} cannot start from {job.start.origin} ({job.start.uri}): {error}") from error

    def _fit_features(self, teacher: segvit.SegViT, num_images: int) -> segvit.FeatureFit:
        """Fit what the model restores to the teacher's features on this many crops, over all ranks."""
        job, distributed = self.job, self.context.world_size > 1
        micro_batch = job.train.batch_size // job.train.accumulation_steps
        batches = itertools.islice(micro_batches(job, self.context, 0), -(-num_images // micro_batch))
        images = (self.model.normalize(batch.images.to(self.context.device)) for batch in batches)

        def add_up(sums: Tensor) -> None:
            if distributed:
                total = sums.to(self.context.device)
                dist.all_reduce(total)
                sums.copy_(total)

        with self.autocast():
            return segvit.fit_upsampling(self.model, teacher, images, add_up)

    def _distributed_forward(self) -> nn.Module:
        trained = self.model if self.masters is None else self.masters.copy
        if self.job.runtime.compile:
            compile_regions(self.model)
            compile_loss(self.loss)
            if self.masters is not None:
                compile_regions(self.masters.copy)
        forward: nn.Module = trained
        if self.context.world_size > 1 and not self.sharded:
            device_ids = [self.context.device] if self.context.device.type == "cuda" else None
            forward = nn.parallel.DistributedDataParallel(forward, device_ids=device_ids)
        return forward

    def autocast(self, *, training: bool = False) -> contextlib.AbstractContextManager[None]:
        """bf16 autocast where the job asks for it and the device has it; parameters that train in bf16 need none."""
        has_copies = self.sharded or self.precision == "bf16_params"
        enabled = self.precision in IN_BF16 and not (training and has_copies)
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=enabled)

    def train_step(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step over this rank's micro-batches; returns this rank's weighted loss terms, detached."""
        factor = self.rate_factor(self.state.step)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        self.model.train()
        targets = [batch.targets or self.loss.targets(batch.labels.to(self.context.device)) for batch in batches]
        normalizer = self._global_normalizer(targets)
        terms: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            images = self.model.normalize(batch.images.to(self.context.device, non_blocking=True))
            with self._no_sync_unless(index == len(batches) - 1):
                with self.autocast(training=True):
                    output = self.forward(images)
                losses = self.loss(output, targets[index], normalizer=normalizer)
                losses["total"].backward()
            if self.masters is not None:
                self.masters.take_gradients()
            for name, value in losses.items():
                terms[name] = terms[name] + value.detach() if name in terms else value.detach()
        # Of the gradient that all ranks share: the same number everywhere.
        gradient_norm = whole(
            clip_gradients(
                self.optimizer.param_groups,
                self.job.train.gradient_clip_norm,
                per_group=self.job.train.gradient_clip == "by_group",
            )
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            self.masters.update_copy()
        self.state.step += 1
        if self.averages.moving is not None:
            self.averages.moving.update(self.model, self.state.step)
        self.chosen = None
        self.watch.note(self.state.step, terms, gradient_norm)
        return terms

    def _no_sync_unless(self, last: bool) -> contextlib.AbstractContextManager[None]:
        # Shares and masters add up gradients of their own: a whole one of every parameter would be memory, and bf16.
        if last or self.context.world_size == 1 or self.sharded or self.masters is not None:
            return contextlib.nullcontext()
        return self.forward.no_sync()  # type: ignore[operator,no-any-return]

    def _global_normalizer(self, targets: list[LossTargets]) -> LossNormalizer:
        parts = [self.loss.normalizer(one) for one in targets]
        total = torch.stack([torch.stack(list(part)) for part in parts]).sum(0)
        if self.context.world_size > 1:
            dist.all_reduce(total)
        total = total / self.context.world_size
        return LossNormalizer(*total)

    @property
    def max_learning_rate(self) -> float:
        """The highest learning rate of the last step, which is the decoder's."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def validate(self) -> dict[str, float]:
        """mIoU of the weights and of their moving average, predicted as in evaluation; the better is what is saved.

        Over all ranks, on the val split or on what is held apart of train.

        Returns:
            ``val_miou``, the better one's, and, where there is an average, each one's own.
        """
        scores = {"val_miou": self._miou()}
        self.chosen = None
        if self.averages.moving is not None:
            self._weigh(scores, "val_miou_average", self.averages.moving.weights)
        if self.averages.best is not None:
            self.averages.best.offer(scores["val_miou"], self.chosen or trainable(self.model))
        return scores

    def validate_best(self, scores: dict[str, float]) -> None:
        """At the end: the mean of the best validations' weights among the last validation's scores, where asked for."""
        best = self.averages.best
        if best is not None and len(best.kept) > 1:
            self._weigh(scores, "val_miou_mean_of_best", best.mean())

    def _weigh(self, scores: dict[str, float], name: str, weights: Weights) -> None:
        """Score other weights, and choose them if none are better."""
        scores.setdefault("val_miou_trained", scores["val_miou"])
        with swapped(self.model, weights):
            scores[name] = self._miou()
        if scores[name] >= scores["val_miou"]:
            scores["val_miou"], self.chosen = scores[name], weights

    def _miou(self) -> float:
        loader = EvalLoader(
            self.job.shard_set,
            split="train" if self.job.hold_out else "val",
            rank=self.context.rank,
            world_size=self.context.world_size,
            num_workers=self.job.runtime.loader_workers,
            max_samples=self.job.max_val_samples,
            held_apart=self.job.hold_out,
        )
        with self.autocast(), uneven_forwards(self.model):
            inference = self.job.inference.options()
            confusion = confusion_of_split(self.model, loader, self.context.device, inference=inference)
        matrix = torch.from_numpy(confusion.matrix)
        if self.context.world_size > 1:
            matrix = matrix.to(self.context.device)
            dist.all_reduce(matrix)
        return float(segmentation_metrics(matrix.cpu().numpy()).miou)

    def save(self, folder: Path) -> None:
        """Write a checkpoint to the new folder, from rank 0; a collective call."""
        rng, keep = gather_rng(self.context.world_size, self.context.device), self.context.rank == 0
        model, moments = whole_model(self.model, keep=keep), gather_moments(self.model, self.optimizer, keep=keep)
        moving = None if self.averages.moving is None else whole_weights(self.averages.moving.weights, keep=keep)
        chosen = None if self.chosen is None else whole_weights(self.chosen, keep=keep)
        if not keep:
            return
        manifest = storage.read_json(storage.join(self.job.shard_set.uri, MANIFEST))
        metadata = {
            "variant": self.job.variant,
            "step": self.state.step,
            "data_digest": self.job.shard_set.digest,
            "class_names": manifest["classes"],
            "palette": manifest["palette"],
        }
        if manifest.get("grey_range") is not None:
            metadata["grey_range"] = manifest["grey_range"]
        save_training(folder, model, moments, self.state, rng, metadata, moving, self.averages.best, chosen)


def computed_precision(asked: str, device: torch.device) -> str:
    """`asked`, but fp32 where the device has no tf32, or would have to emulate bf16."""
    if asked == "tf32":
        ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "tf32" if ampere else "fp32"
    return asked if has_bf16(device) else "fp32"


def build_loss(job: TrainJob) -> segvit.SegmentationLoss:
    """The loss that the job's variant is trained with."""
    loss = job.settings.loss
    return segvit.SegmentationLoss(
        job.shard_set.num_classes,
        loss.resolved(),
        count_ignored_as_background=loss.count_ignored_as_background,
        label_smoothing=loss.label_smoothing,
    )


def build_job_optimizer(job: TrainJob, model: segvit.SegViT) -> torch.optim.Optimizer:
    """The optimizer of the job over the model's trainable parameters."""
    train = job.train
    groups = parameter_groups(
        model,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        decoder_lr_multiplier=train.decoder_lr_multiplier,
        layer_decay=train.layer_decay,
    )
    return build_optimizer(train.optimizer.name, groups, **train.optimizer.options)


def build_job_model(job: TrainJob) -> segvit.SegViT:
    """The job's model with the job's backbone weights and frozen blocks."""
    model = segvit.build_model(job.model, num_classes=job.shard_set.num_classes)
    if job.backbone.uri is not None:
        with tempfile.TemporaryDirectory(prefix="segvit-backbone-") as folder:
            file = storage.fetch_file(job.backbone.uri, folder)
            load_backbone_state(model, read_file(file), source_grid=read_grid(file))
    if job.train.freeze_blocks:
        model.freeze_blocks(job.train.freeze_blocks)
    model.set_grad_checkpointing(job.train.activation_checkpointing)
    return model
