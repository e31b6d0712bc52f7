"""Scoring a checkpoint on a split: overall and per class, per image, with example overlays and a cost beside it."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import segvit
from pipeline import storage
from pipeline.config import EvaluateConfig, RuntimeConfig
from pipeline.cpu_threads import set_cpu_threads
from pipeline.errors import UserError
from pipeline.evaluation.latency import Latency, machine_lock, time_prediction
from pipeline.evaluation.per_image import ImageCounts, write_counts
from pipeline.evaluation.scoring import confusion_of_split
from pipeline.evaluation.tally import RankCount, ScoreMeter, Tally, wait_for_scores
from pipeline.records import Checkpoint, Evaluation, ShardSet
from pipeline.shards.loader import EvalLoader, EvalSample
from pipeline.shards.shard_check import check_shard_set
from pipeline.storage.names import (
    CONFIG_FILE,
    CONFUSION_FILE,
    COUNTS_FILE,
    EXAMPLES_FILE,
    EXAMPLES_FOLDER,
    MANIFEST,
    PROBE_FOLDER,
    PROBE_IMAGES,
    PROBE_LABELS,
    SCORES_FILE,
)
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import StepProgress
from pipeline.workflow.ray_session import wants_gpu
from segvit.checkpoint import read_config
from segvit.compilation import compile_regions
from segvit.flops import model_cost
from segvit.inference.precision import keep_for_precision
from segvit.metrics import BoundaryIoU, ConfusionMatrix, segmentation_metrics

NUM_PROBE_IMAGES = 2


class ImageScore(NamedTuple):
    """One image's mIoU over the classes in its label or prediction, and its pixel accuracy."""

    key: str
    miou: float
    accuracy: float


class Example(NamedTuple):
    """An image (H, W, 3), its label and its prediction (H, W), kept to be shown."""

    score: ImageScore
    image: NDArray[np.uint8]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]


class SplitPart(NamedTuple):
    """What one evaluation worker found on its slice of the split."""

    confusion: ConfusionMatrix
    boundary: BoundaryIoU
    scores: list[ImageScore]
    counts: list[ImageCounts]
    best: list[Example]
    worst: list[Example]
    probe: list[Example]


def evaluate_part(
    checkpoint_uri: str,
    shard_set: ShardSet,
    config: EvaluateConfig,
    rank: int,
    world_size: int,
    runtime: RuntimeConfig,
    tally: Any = None,
) -> SplitPart:
    """Score one of `world_size` contiguous slices of the split; over all ranks each sample is scored once.

    `tally`: the actor that is told how far it is.
    """
    model, device = _load_model(checkpoint_uri, config, runtime)
    if runtime.compile:
        compile_regions(model)
    boundary = BoundaryIoU(model.num_classes)
    scores: list[ImageScore] = []
    counts: list[ImageCounts] = []
    examples: list[Example] = []
    probe: list[Example] = []
    count = RankCount(tally, rank)

    def visit(sample: EvalSample, predicted: Tensor) -> None:
        boundary.update(predicted, sample.label.to(predicted.device))
        matrix = ConfusionMatrix(model.num_classes)
        matrix.update(predicted.cpu(), sample.label)
        metrics = segmentation_metrics(matrix.matrix)
        score = ImageScore(sample.key, metrics.miou, metrics.aacc)
        scores.append(score)
        counts.append(ImageCounts.of(sample.key, matrix.matrix))
        example = Example(score, sample.image.permute(1, 2, 0).numpy(), sample.label.numpy(), predicted.cpu().numpy())
        if len(probe) < NUM_PROBE_IMAGES and (not probe or probe[0].image.shape == example.image.shape):
            probe.append(example)
        examples.append(example)
        examples.sort(key=lambda kept: kept.score.miou)
        if len(examples) > 2 * config.num_examples:
            del examples[config.num_examples : -config.num_examples or None]
        count.add_one()

    loader = EvalLoader(
        shard_set, split=config.split, rank=rank, world_size=world_size, num_workers=runtime.loader_workers
    )
    with machine_lock(alone=False):
        confusion = confusion_of_split(model, loader, device, visit, config.inference.options())
    half = min(config.num_examples, (len(examples) + 1) // 2)
    return SplitPart(
        confusion,
        boundary,
        scores,
        counts,
        best=examples[::-1][:half],
        worst=examples[: len(examples) - half],
        probe=probe,
    )


def time_checkpoint(
    checkpoint_uri: str, config: EvaluateConfig, cost_size: tuple[int, int], runtime: RuntimeConfig
) -> Latency:
    """Time the prediction of one image of `cost_size` as the configuration says."""
    model, _ = _load_model(checkpoint_uri, config, runtime)
    return time_prediction(model, cost_size, config.latency_repeats, config.inference.options())


def _load_model(
    checkpoint_uri: str, config: EvaluateConfig, runtime: RuntimeConfig
) -> tuple[segvit.SegViT, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        set_cpu_threads(runtime.cpus_per_worker, print)
    with tempfile.TemporaryDirectory(prefix="segvit-evaluate-") as folder:
        model, _ = segvit.load_checkpoint(storage.fetch_folder(checkpoint_uri, folder), device=str(device))
    keep_for_precision(model, config.inference.precision)
    return model, device


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    shard_set: ShardSet,
    config: EvaluateConfig,
    runtime: RuntimeConfig,
    target_uri: str,
    *,
    lease: Lease | None = None,
    progress: StepProgress | None = None,
) -> Evaluation:
    """Score on the cluster, one task a worker, then time the model, and publish the evaluation folder to `target_uri`.

    Where others may do the same, `lease` is the right to write there. `progress` is told how far it is.

    Raises UserError for a split that the shard set lacks or a model of other classes, and LeaseLost.
    """
    if config.split not in shard_set.splits:
        raise UserError(f"evaluate.split {config.split!r} is not prepared; choose from {', '.join(shard_set.splits)}")
    check_shard_set(shard_set, [config.split], log=print)
    with tempfile.TemporaryDirectory(prefix="segvit-config-") as folder:
        config_file = storage.fetch_file(storage.join(checkpoint.uri, CONFIG_FILE), folder)
        checkpoint_config = read_config(config_file)
    manifest = storage.read_json(storage.join(shard_set.uri, MANIFEST))
    check_classes(checkpoint, checkpoint_config, shard_set.name, manifest["classes"])
    _compare_ranges(checkpoint, checkpoint_config["metadata"].get("grey_range"), manifest)
    model_config = segvit.ModelConfig.from_dict(checkpoint_config["model"])
    num_images = shard_set.splits[config.split].num_samples
    world_size = min(runtime.max_workers, num_images)
    on_worker = ray.remote(num_cpus=runtime.cpus_per_worker, num_gpus=1 if wants_gpu(runtime.use_gpu) else 0)
    score = on_worker(evaluate_part)
    tally = ray.remote(num_cpus=0)(Tally).remote()
    parts: list[SplitPart] = wait_for_scores(
        [
            score.remote(checkpoint.uri, shard_set, config, rank, world_size, runtime, tally)
            for rank in range(world_size)
        ],
        tally,
        ScoreMeter(progress, config.split, num_images),
    )
    latency: Latency = ray.get(
        on_worker(time_checkpoint).remote(checkpoint.uri, config, model_config.image_size, runtime)
    )
    # Fresh ones to add to: what comes out of Ray's object store is read-only.
    confusion, boundary = ConfusionMatrix(shard_set.num_classes), BoundaryIoU(shard_set.num_classes)
    for part in parts:
        confusion.merge(part.confusion)
        boundary.merge(part.boundary)
    scores = sorted((score for part in parts for score in part.scores), key=lambda score: (score.miou, score.key))
    best = sorted((one for part in parts for one in part.best), key=lambda one: -one.score.miou)
    worst = sorted((one for part in parts for one in part.worst), key=lambda one: one.score.miou)
    with tempfile.TemporaryDirectory(prefix="segvit-evaluation-") as folder:
        write_evaluation_folder(
            Path(folder),
            confusion,
            scores,
            {"best": best[: config.num_examples], "worst": worst[: config.num_examples]},
            parts[0].probe,
            class_names=manifest["classes"],
            palette=manifest["palette"],
        )
        counts_digest = write_counts([one for part in parts for one in part.counts], f"{folder}/{COUNTS_FILE}")
        if lease is not None:
            lease.check()
        storage.publish_folder(folder, target_uri, last=CONFUSION_FILE)
    metrics = segmentation_metrics(confusion.matrix)
    cost = model_cost(model_config, shard_set.num_classes, model_config.image_size)
    return Evaluation(
        variant=checkpoint.variant,
        checkpoint_digest=checkpoint.digest,
        data_digest=shard_set.splits[config.split].digest,
        split=config.split,
        inference=config.inference.options(),
        num_images=len(scores),
        miou=metrics.miou,
        macc=metrics.macc,
        aacc=metrics.aacc,
        boundary_iou=_known(boundary.mean()),
        class_names=tuple(manifest["classes"]),
        per_class_iou=tuple(_known(value) for value in metrics.per_class_iou),
        per_class_accuracy=tuple(_known(value) for value in metrics.per_class_acc),
        gflops=cost.gflops,
        parameters=cost.parameters,
        latency_ms=latency.milliseconds,
        latency_reliable=latency.reliable,
        cost_size=model_config.image_size,
        uri=target_uri,
        counts_digest=counts_digest,
    )


def check_classes(checkpoint: Checkpoint, config: Mapping[str, Any], dataset: str, class_names: Sequence[str]) -> None:
    """Raise UserError unless the model's classes are those of the data, one by one."""
    own = config["metadata"].get("class_names") or class_names
    if config["num_classes"] != len(class_names):
        raise UserError(
            f"{checkpoint.variant} tells {config['num_classes']} classes apart, {dataset} has {len(class_names)}; "
            "score it on the data set that it was trained for"
        )
    for number, (mine, theirs) in enumerate(zip(own, class_names, strict=True)):
        if mine != theirs:
            raise UserError(
                f"class {number} of {checkpoint.variant} is {mine!r}, of {dataset} {theirs!r}; "
                "score it on data with the same classes in the same order"
            )


def _compare_ranges(checkpoint: Checkpoint, own: Sequence[float] | None, manifest: Mapping[str, Any]) -> None:
    """Print a line where the data's images were scaled to 8 bits by another range than the model's."""
    theirs = manifest.get("grey_range")
    if own is not None and theirs is not None and list(own) != list(theirs):
        print(
            f"{checkpoint.variant} was trained on images whose values {own[0]:g} to {own[1]:g} became 0 to 255; in "
            f"{manifest['name']} it is {theirs[0]:g} to {theirs[1]:g}; data.grey_range makes them alike",
            flush=True,
        )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def write_evaluation_folder(
    folder: Path,
    confusion: ConfusionMatrix,
    scores: list[ImageScore],
    examples: dict[str, list[Example]],
    probe: list[Example],
    *,
    class_names: list[str],
    palette: list[list[int]],
) -> None:
    """Write confusion.json, images.json, examples.json with its pictures, and probe/ with images and predictions."""
    storage.publish_json(
        str(folder / CONFUSION_FILE), {"class_names": class_names, "matrix": confusion.matrix.tolist()}
    )
    storage.publish_json(str(folder / SCORES_FILE), [score._asdict() for score in scores])
    listed: list[dict[str, object]] = []
    (folder / EXAMPLES_FOLDER).mkdir()
    for kind, chosen in examples.items():
        for example in chosen:
            stem = f"{EXAMPLES_FOLDER}/{len(listed)}"
            pictures = {
                "image": example.image,
                "truth": segvit.overlay(example.image, example.label, palette),
                "prediction": segvit.overlay(example.image, example.predicted, palette),
            }
            for name, picture in pictures.items():
                (folder / f"{stem}-{name}.jpg").write_bytes(_jpeg(picture))
            listed.append(
                {
                    "key": example.score.key,
                    "kind": kind,
                    "miou": example.score.miou,
                    **{name: f"{stem}-{name}.jpg" for name in pictures},
                }
            )
    storage.publish_json(str(folder / EXAMPLES_FILE), listed)
    probe_folder = folder / PROBE_FOLDER
    probe_folder.mkdir()
    np.save(probe_folder / PROBE_IMAGES, np.stack([one.image for one in probe]), allow_pickle=False)
    labels = np.stack([one.predicted for one in probe]).astype(np.uint16)
    np.save(probe_folder / PROBE_LABELS, labels, allow_pickle=False)


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()
