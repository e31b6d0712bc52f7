from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import segvit
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.master_weights import MasterWeights
from pipeline.training.trainer import Trainer
from tests.jobs import with_settings

MakeJob = Callable[..., TrainJob]
ALONE = DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def test_master_weights__gradients_add_up_in_float32_and_small_steps_are_not_lost() -> None:
    config = segvit.ModelConfig(backbone="vit_tiny_patch16_224", image_size=(32, 32), out_layers=(1, 3))
    model = segvit.build_model(config, 3)
    model.freeze_blocks(1)
    masters = MasterWeights(model)
    name = "decoder.class_head.weight"
    weight, half = (one.get_parameter(name) for one in (model, masters.copy))
    assert half.dtype == torch.bfloat16
    # In bf16, 256 + 1 is 256.
    for value in (256.0, 1.0):
        half.grad = torch.full_like(half, value)
        masters.take_gradients()
        assert half.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 257.0))
    with torch.no_grad():
        weight.fill_(256.0)
        for _ in range(2):
            weight.add_(1.0)  # each lost in bf16
    masters.update_copy()
    assert torch.equal(half, torch.full_like(half, 258.0))
    # What is frozen is in bf16, too, and has no gradient to take.
    assert masters.copy.get_parameter("backbone.vit.blocks.0.mlp.fc1.weight").dtype == torch.bfloat16
    assert not masters.copy.get_submodule("backbone.vit.blocks.0").training


@pytest.mark.parametrize("structure", ["cascade", "anchored"])
def test_train_step__bf16_params_take_nearly_the_steps_of_fp32(make_job: MakeJob, structure: str) -> None:
    trainers = [
        Trainer(make_job(structure, precision=precision, freeze_blocks=1), ALONE)
        for precision in ("fp32", "bf16_params")
    ]
    totals = []
    for trainer in trainers:
        batches = micro_batches(trainer.job, ALONE, 0)
        totals.append([float(trainer.train_step([next(batches)])["total"]) for _ in range(3)])
    assert totals[1] == pytest.approx(totals[0], rel=1e-2)
    fp32, mixed = (trainer.model.state_dict() for trainer in trainers)
    for name, tensor in mixed.items():
        assert tensor.dtype == torch.float32
        # Three steps of Adam at 1e-4, ten times that in the decoder.
        assert (tensor - fp32[name]).abs().max() <= 6e-3, name
    masters = trainers[1].masters
    assert masters is not None
    for master, half in zip(trainers[1].model.parameters(), masters.copy.parameters(), strict=True):
        assert torch.equal(half, master.bfloat16())


def test_train_step__accumulated_bf16_params_equal_the_whole_batch(make_job: MakeJob) -> None:
    totals = []
    for accumulation_steps in (1, 2):
        job = make_job(precision="bf16_params", accumulation_steps=accumulation_steps)
        trainer, batches = Trainer(job, ALONE), micro_batches(job, ALONE, 0)
        steps = [trainer.train_step([next(batches) for _ in range(accumulation_steps)]) for _ in range(2)]
        totals.append([float(terms["total"]) for terms in steps])
    assert totals[1] == pytest.approx(totals[0], rel=5e-3)


def test_run_training__precisions_go_on_from_one_anothers_checkpoints(make_job: MakeJob, tmp_path: Path) -> None:
    def train(precision: str, name: str, resume: Path | None = None) -> list[float]:
        totals: list[float] = []
        job = make_job(precision=precision, steps=3, validate_every_steps=3, checkpoint_every_steps=2)
        job = with_settings(job, model={"dropout": 0.2})
        run_training(
            job,
            ALONE,
            lambda metrics, _folder: totals.append(metrics["total"]),
            resume,
            lambda _line: None,
            work_folder=tmp_path / name,
        )
        return totals

    whole = {precision: train(precision, precision) for precision in ("fp32", "bf16_params")}
    for first, second in (("fp32", "bf16_params"), ("bf16_params", "fp32"), ("bf16_params", "bf16_params")):
        saved = tmp_path / first / "step-00000002"
        assert {tensor.dtype for tensor in load_file(saved / "model.safetensors").values()} == {torch.float32}
        assert {tensor.dtype for tensor in load_file(saved / "optimizer.safetensors").values()} == {torch.float32}
        resumed = train(second, f"{first}-{second}", saved)
        rel = 1e-2 if first != second else 0.0
        assert resumed == pytest.approx(whole[second][2:], rel=rel)


def test_run_training__bf16_params_are_fp32_where_the_processor_would_emulate_them(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    lines: list[str] = []
    for precision in ("bf16_params", "fp32"):
        job = make_job(precision=precision, steps=1)
        run_training(job, ALONE, lambda *_: None, work_folder=tmp_path / precision, log=lines.append)
    written = [
        (tmp_path / name / "step-00000001" / "model.safetensors").read_bytes() for name in ("bf16_params", "fp32")
    ]
    assert written[0] == written[1]
    assert [line for line in lines if "instructions" in line] == ["full  in fp32: this cpu has no bf16 instructions"]
