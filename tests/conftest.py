from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.config import DataConfig, DigitsConfig
from pipeline.records import ShardSet
from pipeline.training.trainer import TrainJob
from tests.jobs import tiny_job

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
        return tiny_job(digits_shards, structure, **train)

    return make
