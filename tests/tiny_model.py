"""A small model on disk as training and evaluation leave it: checkpoint, evaluation with its probe, shard set."""

from __future__ import annotations

from pathlib import Path

from pipeline import storage
from pipeline.records import Checkpoint, Evaluation, ShardSet


def make_tiny_model(folder: Path) -> tuple[Checkpoint, Evaluation, ShardSet]:
    """A three-class model of random weights, with its predictions on two images of 32 x 48 pixels.

    The scores are made up; the shard set is a name only.
    """
    import numpy as np
    import torch

    import segvit
    from segvit.checkpoint import save_checkpoint

    torch.manual_seed(0)
    config = segvit.ModelConfig(
        backbone="vit_tiny_patch16_224", image_size=(32, 32), out_layers=(1, 3), decoder_layers=1
    )
    model = segvit.build_model(config, 3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_checkpoint(folder / "checkpoint", model, {"class_names": ["sky", "road", "pole"]})
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    labels = segvit.predict_batch(model, torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    probe = folder / "evaluation" / "probe"
    probe.mkdir(parents=True)
    np.save(probe / "images.npy", images, allow_pickle=False)
    np.save(probe / "labels.npy", labels.astype(np.uint16), allow_pickle=False)
    digest = storage.file_digest(str(folder / "checkpoint" / "model.safetensors"))
    checkpoint = Checkpoint(
        variant="full",
        uri=str(folder / "checkpoint"),
        digest=digest,
        step=3,
        miou=0.5,
        history_uri=str(folder / "checkpoint"),
        train_seconds=1.0,
    )
    evaluation = Evaluation(
        variant="full",
        checkpoint_digest=digest,
        data_digest="d" * 64,
        split="val",
        num_images=2,
        miou=0.5,
        macc=0.6,
        aacc=0.7,
        boundary_iou=None,
        class_names=("sky", "road", "pole"),
        per_class_iou=(0.8, 0.5, 0.2),
        per_class_accuracy=(0.9, 0.6, 0.3),
        gflops=1.5,
        parameters=5_000_000,
        latency_ms=12.0,
        cost_size=(32, 32),
        uri=str(folder / "evaluation"),
    )
    return checkpoint, evaluation, ShardSet(name="tiny", uri=str(folder), digest="e" * 64, num_classes=3, splits={})
