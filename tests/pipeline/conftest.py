from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.engine.tracking import Tracking
from pipeline.records import Checkpoint, Evaluation, ModelVersion, ShardSet


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite store for all tests: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def tracking(store_uri: str, tmp_path: Path) -> Tracking:
    """An experiment of the test's own in the common store."""
    return Tracking(store_uri, f"test-{uuid.uuid4().hex[:12]}", str(tmp_path / "mlartifacts"))


@dataclass(frozen=True)
class Trained:
    """A small model on disk as training and evaluation leave it: checkpoint, probe, shard set."""

    checkpoint: Checkpoint
    evaluation: Evaluation
    shard_set: ShardSet

    def scored(self, miou: float, **changes: Any) -> Evaluation:
        """The evaluation with another score."""
        return self.evaluation.model_copy(update={"miou": miou, **changes})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A three-class model of random weights, with predictions on two images of 32 x 48 pixels."""
    import torch

    import segvit
    from segvit.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("trained")
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
    probe = folder / "evaluation/probe"
    probe.mkdir(parents=True)
    np.save(probe / "images.npy", images, allow_pickle=False)
    np.save(probe / "labels.npy", labels.astype(np.uint16), allow_pickle=False)
    digest = storage.file_digest(str(folder / "checkpoint/model.safetensors"))
    return Trained(
        checkpoint=Checkpoint(
            variant="full",
            uri=str(folder / "checkpoint"),
            digest=digest,
            step=3,
            miou=0.5,
            history_uri=str(folder / "checkpoint"),
            train_seconds=1.0,
        ),
        evaluation=Evaluation(
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
        ),
        shard_set=ShardSet(name="tiny", uri=str(folder), digest="e" * 64, num_classes=3, splits={}),
    )


@pytest.fixture
def register(tracking: Tracking, trained: Trained) -> Callable[..., ModelVersion]:
    """Register an evaluation of the small model under a name that belongs to the test."""
    from pipeline.registry.store import register_model

    def make(evaluation: Evaluation | None = None, name: str = tracking.experiment) -> ModelVersion:
        run = tracking.client().create_run(tracking.experiment_id())
        return register_model(
            tracking,
            name,
            trained.checkpoint,
            evaluation or trained.evaluation,
            trained.shard_set,
            run_id=run.info.run_id,
            flow_run_id="flow",
        )

    return make
