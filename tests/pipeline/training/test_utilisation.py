from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.prefetch import prefetch
from pipeline.training.trainer import computed_precision
from pipeline.training.utilisation import utilisation_per_image
from segvit.flops import training_gflops

GPU = torch.device("cuda", 0)


def test_utilisation__operations_over_the_peak_of_all_workers(
    make_job: Callable[..., TrainJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    job = make_job(freeze_blocks=1)
    giga = training_gflops(job.model, job.shard_set.num_classes, job.model.image_size, 1)
    found = utilisation_per_image(job, DistributedContext(0, 2, GPU), "bf16")
    assert found == pytest.approx(2e9 * giga / (2 * 989.4e12))
    all_trained = utilisation_per_image(make_job(), DistributedContext(0, 2, GPU), "bf16")
    assert found is not None
    assert all_trained is not None
    assert all_trained > found


def test_utilisation__not_known(make_job: Callable[..., TrainJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Unheard-of GPU")
    assert utilisation_per_image(make_job(), DistributedContext(0, 1, GPU), "bf16") is None
    assert utilisation_per_image(make_job(), DistributedContext(0, 1, torch.device("cpu")), "fp32") is None


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "tf32"), ((9, 0), "tf32")])
def test_computed_precision__tf32(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert computed_precision("tf32", GPU) == precision
    assert computed_precision("tf32", torch.device("cpu")) == "fp32"


def test_prefetch__a_cpus_batches_are_handed_on() -> None:
    batches = [object(), object()]
    assert list(prefetch(batches, torch.device("cpu"))) == batches  # type: ignore[arg-type]
