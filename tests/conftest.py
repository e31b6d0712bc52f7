from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.config import DataConfig, DigitsConfig, LossConfig, RuntimeConfig, TrainConfig, VariantSettings
from pipeline.records import BackboneRecord, ShardSet
from pipeline.training.trainer import TrainJob

MakeJob = Callable[..., TrainJob]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of checked shards stays in the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve training and six validation scenes of 96 pixels, prepared in this process."""
    from pipeline.shards.prepare import prepare_shards

    digits = DigitsConfig(num_train=12, num_val=6, image_size=96)
    config = DataConfig(dataset="digits", samples_per_shard=5, digits=digits)
    return prepare_shards(config, str(tmp_path_factory.mktemp("digits")), progress=lambda _line: None)


@pytest.fixture
def make_job(digits_shards: ShardSet) -> MakeJob:
    """A training job on the digits that takes seconds; keywords override its train section."""

    def make(structure: str = "cascade", **train: Any) -> TrainJob:
        model: dict[str, Any] = {
            "backbone": "vit_tiny_patch16_224",
            "image_size": [48, 64],
            "structure": structure,
            "out_layers": [1, 3],
            "decoder_layers": 1,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
        }
        if structure == "shrunk":
            model |= {"shrink_at": 2}
            del model["out_layers"]
        settings: dict[str, Any] = {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "validate_every_steps": 4,
            "checkpoint_every_steps": 4,
        }
        return TrainJob(
            variant="full",
            settings=VariantSettings(model=model, loss=LossConfig(), train=TrainConfig(**settings | train)),
            shard_set=digits_shards,
            backbone=BackboneRecord(
                backbone="vit_tiny_patch16_224", uri=None, digest="random", source="random", message=""
            ),
            runtime=RuntimeConfig(log_every_steps=1),
        )

    return make
