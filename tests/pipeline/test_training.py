from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from pipeline.config import RuntimeConfig
from pipeline.errors import UserError
from pipeline.trainer import Trainer, TrainJob, WorkerPlace
from pipeline.training import run_training

MakeJob = Callable[..., TrainJob]
ALONE = WorkerPlace(0, 1, torch.device("cpu"))


class Reports:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.folders: list[Path] = []

    def __call__(self, metrics: dict[str, float], folder: Path | None) -> None:
        self.rows.append(metrics)
        if folder is not None:
            self.folders.append(folder)


def train(job: TrainJob, work: Path, resume: Path | None = None) -> Reports:
    reports = Reports()
    run_training(job, ALONE, reports, resume_from=resume, say=lambda _line: None, work_folder=work)
    return reports


def assert_same_weights(first: Path, second: Path, tolerance: float) -> None:
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance, name


def test_run_training__loss_falls_and_the_checkpoint_holds_the_model(make_job: MakeJob, tmp_path: Path) -> None:
    reports = train(make_job(steps=12, validate_every_steps=12, checkpoint_every_steps=12), tmp_path)
    totals = [row["total"] for row in reports.rows]
    assert len(totals) == 12
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])
    assert 0.0 <= reports.rows[-1]["val_miou"] <= 1.0
    config = json.loads((reports.folders[-1] / "config.json").read_text())
    assert config["num_classes"] == 11
    assert config["metadata"]["step"] == 12
    assert len(config["metadata"]["class_names"]) == 11


def test_run_training__resumed_run_equals_the_undisturbed_one(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=6, validate_every_steps=6, checkpoint_every_steps=3)
    job = job.model_copy(update={"model": job.model | {"dropout": 0.2, "drop_path_rate": 0.2}})
    whole = train(job, tmp_path / "whole")
    assert [folder.name for folder in whole.folders] == ["step-00000003", "step-00000006"]
    resumed = train(job, tmp_path / "resumed", resume=whole.folders[0])
    assert [row["total"] for row in resumed.rows] == [row["total"] for row in whole.rows[3:]]
    assert_same_weights(whole.folders[1], resumed.folders[0], tolerance=0.0)
    history = [json.loads(line) for line in (resumed.folders[0] / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history if "total" in row] == [1, 2, 3, 4, 5, 6]


def test_run_training__accumulated_batches_equal_the_whole_batch(make_job: MakeJob, tmp_path: Path) -> None:
    settings = {"steps": 2, "validate_every_steps": 2, "checkpoint_every_steps": 2}
    whole = train(make_job(**settings), tmp_path / "whole")
    split = train(make_job(accumulation_steps=2, **settings), tmp_path / "split")
    for one, other in zip(whole.rows, split.rows, strict=True):
        assert other["total"] == pytest.approx(one["total"], rel=1e-5)
    assert_same_weights(whole.folders[0], split.folders[0], tolerance=2e-5)


def test_run_training__two_workers_equal_one_on_the_same_global_batch(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=2, validate_every_steps=2, checkpoint_every_steps=2)
    one = train(job, tmp_path / "one")
    spawn(_worker, (2, str(tmp_path), job.model_dump_json()), nprocs=2)  # type: ignore[no-untyped-call]
    rows = json.loads((tmp_path / "rows.json").read_text())
    for alone, shared in zip(one.rows, rows, strict=True):
        for name in ("class", "focal", "dice", "total"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-5), name
    assert rows[-1]["val_miou"] == pytest.approx(one.rows[-1]["val_miou"], abs=1e-3)
    assert_same_weights(one.folders[0], tmp_path / "rank-0" / "step-00000002", tolerance=2e-5)


def _worker(rank: int, world_size: int, folder: str, job: str) -> None:
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    reports = Reports()
    work = Path(folder) / f"rank-{rank}"
    place = WorkerPlace(rank, world_size, torch.device("cpu"))
    run_training(TrainJob.model_validate_json(job), place, reports, say=lambda _line: None, work_folder=work)
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(reports.rows))
    dist.destroy_process_group()


@pytest.mark.parametrize("structure", ["cascade", "shrunk"])
def test_train_step__bf16_with_frozen_blocks(make_job: MakeJob, structure: str) -> None:
    from pipeline.training import _micro_batches

    job = make_job(structure, precision="bf16", freeze_blocks=1)
    trainer = Trainer(job, ALONE)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    terms = trainer.train_step([next(_micro_batches(job, ALONE, 0))])
    assert torch.isfinite(terms["total"])
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    frozen = {name for name in before if not dict(trainer.model.named_parameters())[name].requires_grad}
    assert frozen
    assert changed == before.keys() - frozen
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}


def test_trainer__localized_upsampling_starts_from_position_codes(make_job: MakeJob) -> None:
    job = make_job("shrunk")
    plain = Trainer(job, ALONE)
    localized = Trainer(job.model_copy(update={"localize_upsampling": True}), ALONE)
    again = Trainer(job.model_copy(update={"localize_upsampling": True}), ALONE)
    table = localized.model.state_dict()["decoder.grid_queries.weight"]
    assert not torch.equal(table, plain.model.state_dict()["decoder.grid_queries.weight"])
    for name, value in localized.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_run_training__non_finite_loss_names_the_samples(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer, batches: Any) -> dict[str, torch.Tensor]:
        self.state.step += 1
        return {"total": torch.tensor(float("nan"))}

    monkeypatch.setattr(Trainer, "train_step", broken)
    with pytest.raises(UserError, match=r"the loss is nan at step 1; .* samples of this step: train-\d+"):
        train(make_job(), tmp_path)


def test_trainer__compiled_forward_gives_the_same_loss(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.training import _micro_batches

    job = make_job()
    compiled_calls = []

    def compile_eagerly(module: torch.nn.Module) -> torch.nn.Module:
        # The compiler itself takes minutes on a CPU; that the model traces as one graph is segvit's test.
        compiled_calls.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    fast = job.model_copy(update={"runtime": RuntimeConfig(compile=True)})
    batch = next(_micro_batches(job, ALONE, 0))
    plain, compiled = Trainer(job, ALONE), Trainer(fast, ALONE)
    assert compiled_calls == [compiled.model]
    assert compiled.train_step([batch])["total"] == plain.train_step([batch])["total"]
