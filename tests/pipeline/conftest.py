from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Checkpoint, Evaluation, ModelVersion, ShardSet
from pipeline.workflow.tracking import Tracking
from tests.tiny_model import make_tiny_model


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
    """The small model's records."""

    checkpoint: Checkpoint
    evaluation: Evaluation
    shard_set: ShardSet

    def scored(self, miou: float, **changes: Any) -> Evaluation:
        """The evaluation with another score."""
        return self.evaluation.model_copy(update={"miou": miou, **changes})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(*make_tiny_model(tmp_path_factory.mktemp("trained")))


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
