from __future__ import annotations

import pytest

from pipeline.config import RuntimeConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.estimate import choose_gpu, estimate_step, fitting_changes, setup_of
from segvit.config import ModelConfig
from segvit.devices import GPU, Peak, find_gpu
from segvit.training_cost import TrainingCost

COST = TrainingCost(ModelConfig(backbone="vit_base_patch16_384", image_size=(512, 512)), 150)
LARGEST = TrainingCost(ModelConfig(backbone="vit_7b_patch16_dinov3", image_size=(512, 512)), 150)


def training(**settings: object) -> TrainConfig:
    given = {"steps": 10, "warmup_steps": 0, "batch_size": 16, "validate_every_steps": 10, "checkpoint_every_steps": 10}
    return TrainConfig.model_validate(given | settings)


def card(gigabytes: float, bf16_tflops: float = 100.0) -> GPU:
    peak = Peak(50.0, None, bf16_tflops or None, gigabytes)
    return GPU("card", gigabytes * 1e9 / 2**30, peak)


@pytest.mark.parametrize(
    ("gigabytes", "changes"),
    [
        (40.0, {}),
        (15.0, {"train.precision": "bf16"}),
        (6.0, {"train.activation_checkpointing": True}),
        (4.5, {"train.precision": "bf16", "train.activation_checkpointing": True, "train.accumulation_steps": 2}),
        (1.0, None),
    ],
)
def test_fitting_changes__what_costs_least_first(gigabytes: float, changes: dict[str, object] | None) -> None:
    train, runtime, gpu = training(), RuntimeConfig(), card(gigabytes)
    found = fitting_changes(COST, train, runtime, gpu)
    assert found == changes
    for path in found or {}:
        fewer = {one: value for one, value in (found or {}).items() if one != path}
        assert COST.memory(setup_of(train, runtime, fewer, gpu)).needed > gpu.memory_bytes


def test_fitting_changes__no_bf16_on_a_card_without() -> None:
    found = fitting_changes(COST, training(precision="bf16"), RuntimeConfig(), card(15.0, bf16_tflops=0.0))
    assert found == {"train.activation_checkpointing": True}


@pytest.mark.parametrize(("gpu", "workers"), [("H100", 2), ("RTX 4090", 8)])
def test_fitting_changes__a_model_that_no_card_holds_is_shared(gpu: str, workers: int) -> None:
    train = training(precision="bf16")
    found = fitting_changes(LARGEST, train, RuntimeConfig(), find_gpu(gpu))
    assert found == {
        "train.activation_checkpointing": True,
        "runtime.sharding": "full",
        "runtime.num_workers": workers,
    }
    estimate = estimate_step("full", LARGEST, train, RuntimeConfig(), find_gpu(gpu))
    assert estimate.fits is False
    assert estimate.changes == found
    assert estimate.needed_then is not None
    assert estimate.needed_then <= find_gpu(gpu).memory_bytes < estimate.needed


def test_estimate_step__images_of_the_fewest_workers() -> None:
    train = training(accumulation_steps=2)
    setup = setup_of(train, RuntimeConfig(num_workers=(3, 8)), {}, None)
    assert (setup.num_images, setup.num_workers, setup.precision) == (3, 3, "fp32")
    estimate = estimate_step("full", COST, train, RuntimeConfig(), None)
    assert (estimate.gpu, estimate.step_seconds, estimate.fits, estimate.changes) == (None, None, None, None)
    assert estimate.needed == COST.memory(setup_of(train, RuntimeConfig(), {}, None)).needed


def test_estimate_step__no_time_of_a_card_that_is_not_known() -> None:
    unknown = GPU("Other", 40.0, None)
    estimate = estimate_step("full", COST, training(precision="bf16"), RuntimeConfig(), unknown)
    assert (estimate.fits, estimate.changes, estimate.step_seconds) == (True, {}, None)
    assert setup_of(training(precision="bf16"), RuntimeConfig(), {}, unknown).precision == "bf16"


def test_choose_gpu__unknown_name() -> None:
    with pytest.raises(UserError, match=r"^--gpu: unknown GPU 'cray'; choose from T4, V100 16GB, "):
        choose_gpu("cray")
