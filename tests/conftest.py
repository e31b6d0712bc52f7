from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.config import DataConfig, DigitsConfig
from pipeline.records import ShardSet
from pipeline.training.job import TrainJob
from tests.jobs import tiny_job

MakeJob = Callable[..., TrainJob]
REPOSITORY = Path(__file__).parents[1]
# They start Ray, which waits a lot: `make test` runs them one after the other while another process runs all else.
ON_RAY = (
    "faults/",
    "flows/test_extending.py",
    "flows/test_growing_cluster.py",
    "flows/test_own_data.py",
    "flows/test_scoring.py",
    "flows/test_submit.py",
    "flows/recipes/",
    "pipeline/shards/test_prepare_on_ray.py",
    "pipeline/training/test_train.py",
    "pipeline/tuning/test_search.py",
    "pipeline/tuning/test_trial.py",
    "pipeline/workflow/test_flow.py",
)


def pytest_configure() -> None:
    """Look for garbage cycles less often here, and in the processes that tests start; see tests/startup."""
    gc.set_threshold(200_000, 50, 100)
    paths = [str(REPOSITORY / "tests" / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no test file of which the two halves of `make test` want nothing."""
    unwanted = {"on_ray": False, "not on_ray": True}.get(config.option.markexpr)
    if unwanted is None or collection_path.is_dir():
        return None
    return True if starts_ray(collection_path) == unwanted else None


def starts_ray(path: Path) -> bool:
    return path.relative_to(REPOSITORY / "tests").as_posix().startswith(ON_RAY)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests on Ray."""
    if starts_ray(item.path):
        item.add_marker("on_ray")


class FlowRun(NamedTuple):
    """A small flow that ran to its end, and another one of the same experiment that was killed on the way."""

    workspace: Path
    config: str
    said: str


@pytest.fixture(scope="session")
def flow_run(tmp_path_factory: pytest.TempPathFactory) -> FlowRun:
    """The short form of tests.faults.kill_flow, whose undisturbed flow other tests look at."""
    folder = tmp_path_factory.mktemp("flow")
    # The whole cluster while it trains; a training worker alone is killed in tests/pipeline/training/test_train.py.
    options = ["--kills", "1", "--seed", "334", "--keep", str(folder)]
    command = [sys.executable, "-m", "tests.faults.kill_flow", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return FlowRun(folder / "reference", str(folder / "kills.yaml"), done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """Ray stays up from one command of this process to the next."""
    from pipeline.workflow import ray_session

    ray_session.start(ray_session.default_options)
    yield
    ray_session.stop()


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
