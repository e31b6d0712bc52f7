from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from pipeline.shards.loader import EvalLoader
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.trainer import Trainer
from tests.ranks import leave_group

MakeJob = Callable[..., TrainJob]
CPU = torch.device("cpu")
TERMS = ("class", "focal", "dice", "total")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cascade": ("cascade", {"accumulation_steps": 2}),
    "anchored": (
        "anchored",
        {
            "freeze_blocks": 1,
            "activation_checkpointing": True,
            "ema_decay": 0.5,
            "average_best": 2,
            "gradient_clip": "by_group",
            "validate_every_steps": 1,
        },
    ),
}


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def in_shares(job: TrainJob) -> TrainJob:
    return job.model_copy(update={"runtime": job.runtime.model_copy(update={"sharding": "full"})})


def train(job: TrainJob, place: DistributedContext, work: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    run_training(
        job, place, lambda metrics, _folder: rows.append(metrics), resume, lambda _line: None, work_folder=work
    )
    return [{key: value for key, value in row.items() if key in (*TERMS, "step", "val_miou")} for row in rows]


def assert_close(rows: list[dict[str, Any]], others: list[dict[str, Any]], rel: float = 1e-4) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in TERMS:
            assert row[name] == pytest.approx(other[name], rel=rel), (row["step"], name)
        assert row["val_miou"] == pytest.approx(other["val_miou"], abs=2e-3)


def assert_same_tensors(first: Path, second: Path, tolerance: float) -> None:
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape
        assert (tensor - other[name]).abs().max() <= tolerance, name


def make_jobs(make_job: MakeJob) -> dict[str, TrainJob]:
    jobs = {}
    for name, (structure, settings) in CASES.items():
        given: dict[str, Any] = {"steps": 3, "validate_every_steps": 3, "checkpoint_every_steps": 2, **settings}
        jobs[name] = make_job(structure, **given)
    return jobs


def five_images(job: TrainJob) -> TrainJob:
    """Validation of one image at a time, in two passes each, of a number that two ranks do not share evenly."""
    inference = job.inference.model_copy(update={"flip": True})
    return job.model_copy(update={"max_val_samples": 5, "inference": inference})


def test_run_training__shares_on_two_ranks_train_as_whole_models_do(make_job: MakeJob, tmp_path: Path) -> None:
    jobs = make_jobs(make_job)
    alone = DistributedContext(0, 1, CPU)
    train(jobs["cascade"], alone, tmp_path / "alone")
    told_jobs = {name: job.model_dump_json() for name, job in jobs.items()}
    spawn(_worker, (2, str(tmp_path), told_jobs), nprocs=2)  # type: ignore[no-untyped-call]
    told = json.loads((tmp_path / "told.json").read_text())
    for name in CASES:
        assert_close(told[f"{name}-sharded"], told[f"{name}-whole"])
        sharded, whole = (tmp_path / f"{name}-{kind}-0" / "step-00000003" for kind in ("sharded", "whole"))
        for file in sorted(whole.glob("*.safetensors")):
            if file.name != "rng.safetensors":
                assert_same_tensors(sharded / file.name, file, tolerance=1e-4)
    # Saved in shares on two ranks, goes on whole on one; and the other way round.
    expected = told["cascade-whole"][2:]
    assert_close(
        train(jobs["cascade"], alone, tmp_path / "one", tmp_path / "cascade-sharded-0" / "step-00000002"), expected
    )
    assert_close(told["resumed"], expected)
    # Each rank holds half of what is trained and of what is frozen.
    assert 0.49 < told["share"] < 0.51
    assert sorted(told["val_images"]) == [2, 3]
    assert told["miou"] == pytest.approx(Trainer(five_images(jobs["cascade"]), alone).validate()["val_miou"], abs=1e-6)


def _worker(rank: int, world_size: int, folder: str, jobs: dict[str, str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    place, root = DistributedContext(rank, world_size, CPU), Path(folder)
    told: dict[str, Any] = {}
    for name, text in jobs.items():
        job = TrainJob.model_validate_json(text)
        for kind, one in (("whole", job), ("sharded", in_shares(job))):
            told[f"{name}-{kind}"] = train(one, place, root / f"{name}-{kind}-{rank}")
    job = in_shares(TrainJob.model_validate_json(jobs["cascade"]))
    resume = root / "alone" / "step-00000002"
    told["resumed"] = train(job, place, root / f"resumed-{rank}", resume)
    trainer = Trainer(five_images(job), place)
    told["miou"] = trainer.validate()["val_miou"]
    parameters = list(trainer.model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    local = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
    told["share"] = local / sum(p.numel() for p in parameters)
    loader = EvalLoader(job.shard_set, "val", rank=rank, world_size=world_size, max_samples=5)
    counts: list[int] = [0] * world_size
    dist.all_gather_object(counts, sum(1 for _ in loader))
    told["val_images"] = counts
    if rank == 0:
        (root / "told.json").write_text(json.dumps(told))
    dist.barrier()
    leave_group()


@pytest.mark.parametrize(
    ("structure", "precision"), [("shrunk", "fp32"), ("cascade", "bf16"), ("anchored", "bf16_params")]
)
def test_run_training__shares_of_one_rank(
    make_job: MakeJob, tmp_path: Path, structure: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    job = make_job(
        structure,
        steps=3,
        validate_every_steps=3,
        checkpoint_every_steps=2,
        precision=precision,
        activation_checkpointing=True,
    )
    alone = DistributedContext(0, 1, CPU)
    whole = train(job, alone, tmp_path / "whole")
    rel = 1e-5 if precision == "fp32" else 1e-2
    assert_close(train(in_shares(job), alone, tmp_path / "shares"), whole, rel)
    resumed = train(in_shares(job), alone, tmp_path / "resumed", tmp_path / "whole" / "step-00000002")
    assert_close(resumed, whole[2:], rel)
