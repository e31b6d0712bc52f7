from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.multiprocessing.spawn import spawn

import pipeline.training.trainer as trainer_module
import segvit
from pipeline import storage
from pipeline.config import DistillConfig, InferenceConfig, RuntimeConfig
from pipeline.errors import UserError
from pipeline.evaluation.scoring import confusion_of_split
from pipeline.records import Checkpoint
from pipeline.shards.loader import EvalLoader
from pipeline.training.batches import micro_batches
from pipeline.training.checkpoint_files import damage_of
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.loop import run_training
from pipeline.training.trainer import Trainer
from segvit.checkpoint import load_checkpoint
from segvit.compilation import compile_regions
from segvit.losses.segmentation_loss import SegmentationLoss
from segvit.metrics import segmentation_metrics
from tests.jobs import with_settings
from tests.ranks import leave_group

MakeJob = Callable[..., TrainJob]
ALONE = DistributedContext(0, 1, torch.device("cpu"))
CLOCKS = ("images_per_s", "seconds", "data_wait_share")


class Reports:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.folders: list[Path] = []

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        # What a worker tells of itself is of the moment: tests/pipeline/training/test_live.py.
        self.rows.append({name: value for name, value in metrics.items() if name != "live"})
        if folder is not None:
            self.folders.append(folder)


def train(job: TrainJob, work: Path, resume: Path | None = None) -> Reports:
    reports = Reports()
    run_training(job, ALONE, reports, resume_from=resume, log=lambda _line: None, work_folder=work)
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


def test_save__the_grey_range_of_the_shards_goes_with_the_model(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    for grey_range in (None, [1000.0, 3000.0]):
        folder = tmp_path / str(grey_range)
        folder.mkdir()
        manifest = json.loads((Path(job.shard_set.uri) / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"grey_range": grey_range}))
        moved = job.shard_set.model_copy(update={"uri": str(folder)})
        Trainer(job.model_copy(update={"shard_set": moved}), ALONE).save(folder / "checkpoint")
        assert load_checkpoint(folder / "checkpoint")[1].get("grey_range") == grey_range


def test_run_training__resumed_run_equals_the_undisturbed_one(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=6, validate_every_steps=6, checkpoint_every_steps=3)
    job = with_settings(job, model={"dropout": 0.2, "drop_path_rate": 0.2})
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


def test_run_training__three_workers_with_unequal_shares(make_job: MakeJob, tmp_path: Path) -> None:
    # Batches of four: one worker has two samples, the others one.
    plain = make_job(steps=2, validate_every_steps=2, checkpoint_every_steps=2, gradient_clip_norm=1e9)
    random = make_job(batch_size=8, accumulation_steps=2, validate_every_steps=4, checkpoint_every_steps=2)
    random = with_settings(random, model={"dropout": 0.2, "drop_path_rate": 0.2})
    fitted = distilled(make_job, tmp_path / "plain-0" / "step-00000002", steps=0)
    jobs = [job.model_dump_json() for job in (plain, random, fitted)]
    spawn(_worker, (3, str(tmp_path), *jobs), nprocs=3)  # type: ignore[no-untyped-call]
    told = json.loads((tmp_path / "told.json").read_text())
    # One process that sees the whole batch takes the same gradient.
    alone = gradients(plain, ALONE)
    shared = load_file(tmp_path / "gradients.safetensors")
    largest = max(float(value.abs().max()) for value in alone.values())
    for name, value in alone.items():
        assert (value - shared[name]).abs().max() <= 1e-5 * largest, name
    # And the same steps, scores and weights.
    one = train(plain, tmp_path / "one")
    for lone, common in zip(one.rows, told["plain"], strict=True):
        for name in ("class", "focal", "dice", "total"):
            assert common[name] == pytest.approx(lone[name], rel=1e-5), name
    assert told["plain"][-1]["val_miou"] == pytest.approx(one.rows[-1]["val_miou"], abs=1e-3)
    assert_same_weights(one.folders[0], tmp_path / "plain-0" / "step-00000002", tolerance=1e-4)
    # Resumed, with all ranks' random generators. Three gradients may be added in another order, and Adam enlarges
    # what that changes in gradients that are zero but for rounding (attention's key biases).
    for row, other in zip(told["resumed"], told["whole"][2:], strict=True):
        assert row == pytest.approx(other, abs=1e-6)
    whole, resumed = (tmp_path / f"{name}-0" / "step-00000004" for name in ("whole", "resumed"))
    assert_same_weights(whole, resumed, tolerance=1e-5)
    # Fitted to a teacher on the images of all.
    lone_fit = Trainer(fitted, ALONE)
    assert told["fitted"] == pytest.approx(lone_fit.fitted, rel=1e-4)
    for name, tensor in load_file(tmp_path / "fitted.safetensors").items():
        torch.testing.assert_close(tensor, lone_fit.model.state_dict()[name], rtol=1e-3, atol=1e-4)
    # The last rank's loss was made infinite in the second step: all stop alike, and its two samples are kept.
    assert told["errors"] == [told["errors"][0]] * 3
    file = tmp_path / "run/non_finite/step-00000002-rank-2.safetensors"
    batches = micro_batches(plain, DistributedContext(2, 3, ALONE.device), 1)
    keys = next(batches).keys
    assert told["errors"][0] == (
        "the loss is inf at step 2 (in focal); both must be finite. Lower train.learning_rate or use precision fp32, "
        f"and look at the batch kept in {file}: {keys[0]}, {keys[1]}"
    )
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def gradients(job: TrainJob, place: DistributedContext) -> dict[str, torch.Tensor]:
    trainer = Trainer(job, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.optimizer, "zero_grad", lambda set_to_none: None)
        trainer.train_step([next(micro_batches(job, place, 0))])
    return {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


def _worker(rank: int, world_size: int, folder: str, plain_json: str, random_json: str, fitted_json: str) -> None:
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    place, root = DistributedContext(rank, world_size, torch.device("cpu")), Path(folder)
    plain, random = TrainJob.model_validate_json(plain_json), TrainJob.model_validate_json(random_json)

    def run(job: TrainJob, name: str, resume: Path | None = None) -> list[dict[str, Any]]:
        reports = Reports()
        work = root / f"{name}-{rank}"
        run_training(job, place, reports, resume, lambda _line: None, work, run_uri=str(root / "run"))
        return [{key: value for key, value in row.items() if key not in CLOCKS} for row in reports.rows]

    found = gradients(plain, place)
    told: dict[str, Any] = {
        "plain": run(plain, "plain"),
        "whole": run(random, "whole"),
        "resumed": run(random, "resumed", root / "whole-0" / "step-00000002"),
    }
    dist.barrier()
    fitted = Trainer(TrainJob.model_validate_json(fitted_json), place)
    told["fitted"] = fitted.fitted
    if rank == 2:
        poison(step=2)
    with pytest.raises(UserError) as caught:
        run(plain, "stopped")
    errors: list[str | None] = [None] * world_size
    dist.all_gather_object(errors, str(caught.value))
    if rank == 0:
        save_file(found, root / "gradients.safetensors")
        save_file(fitted.model.state_dict(), root / "fitted.safetensors")
        (root / "told.json").write_text(json.dumps(told | {"errors": errors}))
    leave_group()


def poison(step: int) -> None:
    """Make the focal term infinite, in this process, from a step on."""
    forward, calls = SegmentationLoss.forward, []

    def broken(self: SegmentationLoss, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        terms = forward(self, *args, **options)
        calls.append(1)
        if len(calls) >= step:
            terms = terms | {name: terms[name] * float("inf") for name in ("focal", "total")}
        return terms

    SegmentationLoss.forward = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("structure", ["cascade", "shrunk"])
def test_train_step__bf16_with_frozen_blocks(
    make_job: MakeJob, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    job = make_job(structure, precision="bf16", freeze_blocks=1)
    trainer = Trainer(job, ALONE)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    terms = trainer.train_step([next(micro_batches(job, ALONE, 0))])
    assert torch.isfinite(terms["total"])
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    frozen = {name for name in before if not dict(trainer.model.named_parameters())[name].requires_grad}
    assert frozen
    assert changed == before.keys() - frozen
    assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}


def test_run_training__bf16_is_fp32_where_the_processor_would_emulate_it(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False})
    weights, lines = {}, list[str]()
    for precision in ("bf16", "fp32"):
        job = make_job(precision=precision, steps=1)
        reports = Reports()
        run_training(job, ALONE, reports, work_folder=tmp_path / precision, log=lines.append)
        weights[precision] = (tmp_path / precision / "step-00000001" / "model.safetensors").read_bytes()
    assert weights["bf16"] == weights["fp32"]
    assert [line for line in lines if "instructions" in line] == ["full  in fp32: this cpu has no bf16 instructions"]


def start_of(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(
        variant="full", uri=str(folder), digest="d", step=step, miou=None, history_uri=None, train_seconds=0.0
    )


def test_run_training__starts_from_another_variant(make_job: MakeJob, tmp_path: Path) -> None:
    run_training(make_job(steps=2), ALONE, Reports(), work_folder=tmp_path)
    saved = tmp_path / "step-00000002"
    job = make_job("anchored", steps=1).model_copy(update={"variant": "small", "start": start_of(saved, 2)})
    theirs = load_checkpoint(saved)[0].state_dict()
    for name, value in Trainer(job, ALONE).model.state_dict().items():
        if not name.startswith("decoder.upsampling."):
            assert torch.equal(value, theirs[name]), name
    lines: list[str] = []
    run_training(job, ALONE, Reports(), work_folder=tmp_path / "small", log=lines.append)
    expected = f"small  starts from full (step 2): backbone and decoder taken ({len(theirs)} tensors), "
    assert [line for line in lines if "starts from" in line] == [f"{expected}new: decoder.upsampling (1 tensor)"]
    # What goes on after a stop has its own weights.
    lines.clear()
    again = job.model_copy(update={"start": start_of(tmp_path / "nowhere", 2)})
    run_training(
        with_settings(again, train=job.train.model_copy(update={"steps": 2})),
        ALONE,
        Reports(),
        resume_from=tmp_path / "small" / "step-00000001",
        work_folder=tmp_path / "more",
        log=lines.append,
    )
    assert not any("starts from" in line for line in lines)


def test_trainer__starts_from_a_model_of_other_classes(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=2)
    torch.manual_seed(1)
    other = segvit.build_model(job.model, 3)
    own_names = storage.read_json(storage.join(job.shard_set.uri, "manifest.json"))["classes"]
    segvit.save_checkpoint(tmp_path / "other", other, {"class_names": ["crane", own_names[4], "kite"]})
    lines: list[str] = []
    started = job.model_copy(update={"start": start_of(tmp_path / "other", 0)})
    trainer, fresh = Trainer(started, ALONE), Trainer(job, ALONE)
    head, untouched, theirs = (
        model.state_dict()["decoder.class_head.weight"] for model in (trainer.model, fresh.model, other)
    )
    assert torch.equal(head[[4, -1]], theirs[[1, -1]])
    assert torch.equal(head[:4], untouched[:4])
    run_training(started, ALONE, Reports(), work_folder=tmp_path / "run", log=lines.append)
    [line] = [line for line in lines if "starts from" in line]
    assert line.endswith(f"nothing new; classes by name: taken {own_names[4]}; {len(own_names) - 1} new")


def test_run_training__no_steps_keep_what_the_variant_starts_from(make_job: MakeJob, tmp_path: Path) -> None:
    run_training(make_job(steps=2), ALONE, Reports(), work_folder=tmp_path)
    saved = tmp_path / "step-00000002"
    job = make_job("anchored", steps=0, warmup_steps=5).model_copy(update={"start": start_of(saved, 2)})
    expected = Trainer(job, ALONE)
    reports = Reports()
    state = run_training(job, ALONE, reports, work_folder=tmp_path / "small")
    assert (state.step, state.train_seconds < 60) == (0, True)
    [row] = reports.rows
    assert row == {"step": 0.0, "val_miou": expected.validate()["val_miou"]}
    kept = load_file(tmp_path / "small" / "step-00000000" / "model.safetensors")
    assert kept.keys() == expected.model.state_dict().keys()
    assert all(torch.equal(value, kept[name]) for name, value in expected.model.state_dict().items())


def test_run_training__distilled_is_fitted_to_the_features_of_its_start(make_job: MakeJob, tmp_path: Path) -> None:
    run_training(make_job(steps=2), ALONE, Reports(), work_folder=tmp_path)
    saved = tmp_path / "step-00000002"
    theirs = load_file(saved / "model.safetensors")
    lines: list[str] = []
    run_training(
        distilled(make_job, saved, steps=0), ALONE, Reports(), log=lines.append, work_folder=tmp_path / "small"
    )
    assert lines[0].endswith("new: decoder.upsampling (1 tensor)")
    found = re.fullmatch(r"full  fitted to its features: error of what was left out (0\.\d{3}) -> (0\.\d{3})", lines[1])
    assert found is not None
    assert float(found[2]) < 0.9 * float(found[1])
    for name, tensor in load_file(tmp_path / "small" / "step-00000000" / "model.safetensors").items():
        if name.startswith("decoder.upsampling.corrections."):
            assert tensor.any(), name
        elif name in theirs:
            assert torch.equal(tensor, theirs[name]) or "cls_token" in name, name
    # With steps it goes on from there by the labels, and a run that continues is not fitted anew.
    job = distilled(make_job, saved, steps=4, validate_every_steps=4, checkpoint_every_steps=2)
    whole = train(job, tmp_path / "whole")
    resumed = train(job, tmp_path / "resumed", resume=whole.folders[0])
    assert_same_weights(whole.folders[-1], resumed.folders[-1], tolerance=0.0)


def distilled(make_job: MakeJob, start: Path, **train: Any) -> TrainJob:
    job = make_job("anchored", **train).model_copy(update={"start": start_of(start, 2)})
    return with_settings(job, distill=DistillConfig(images=9))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"out_layers": [0, 3]}, r"out_layers \(0, 3\) are not those of its teacher, \(1, 3\), whose features it"),
        ({"structure": "shrunk", "out_layers": [1, 3]}, r"structure shrunk restores no features that could be fitted"),
    ],
)
def test_trainer__a_teacher_that_does_not_fit(
    make_job: MakeJob, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    run_training(make_job(steps=2), ALONE, Reports(), work_folder=tmp_path)
    job = make_job("anchored").model_copy(update={"start": start_of(tmp_path / "step-00000002", 2)})
    with pytest.raises(UserError, match=f"^full cannot start from full .*{message}"):
        Trainer(with_settings(job, distill=DistillConfig(), model=model), ALONE)


def test_trainer__a_start_that_is_gone(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("anchored").model_copy(update={"start": start_of(tmp_path / "nowhere", 2)})
    with pytest.raises(UserError, match=r"^full cannot start from full \(.*nowhere\): .*nowhere"):
        Trainer(job, ALONE)


def test_run_training__gradient_that_is_not_finite_stops_before_anything_is_saved(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda _parameters, _norm: torch.tensor(float("nan")))
    job = make_job(checkpoint_every_steps=1)
    expected = next(micro_batches(job, ALONE, 0))
    reports = Reports()
    with pytest.raises(UserError, match=r"^the gradient's norm is nan at step 1, the loss [\d.]+; both must be finite"):
        run_training(job, ALONE, reports, work_folder=tmp_path / "work", run_uri=str(tmp_path / "run"))
    assert reports.rows == []
    assert not (tmp_path / "work").exists()
    with safe_open(tmp_path / "run/non_finite/step-00000001-rank-0.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("images"), expected.images)
        assert torch.equal(file.get_tensor("labels"), expected.labels)
        metadata = file.metadata()
    assert json.loads(metadata["keys"]) == list(expected.keys)
    assert (metadata["step"], metadata["rank"]) == ("1", "0")
    assert json.loads(metadata["terms"])["gradient_norm"] == "nan"


def test_run_training__late_look_names_the_first_step(make_job: MakeJob) -> None:
    # As on a GPU, which is asked at log steps only.
    trainer = Trainer(make_job(), ALONE)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    assert trainer.watch.first_step(1) is None
    for step, total in enumerate((good, bad, good, bad), start=1):
        trainer.watch.note(step, {"dice": torch.tensor(float(step)), "total": total}, good)
    assert trainer.watch.first_step(1) == 2
    values = trainer.watch.values
    assert (values["dice"], values["gradient_norm"]) == (2.0, 1.0)


def test_run_training__rows_wait_for_a_report_that_comes_anyway(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(steps=5, checkpoint_every_steps=3, validate_every_steps=5)
    reports = Reports()
    run_training(job, ALONE, reports, log=lambda _line: None, work_folder=tmp_path, report_every_s=3600)
    assert [row["step"] for row in reports.rows] == [3.0, 5.0]
    assert [[one["step"] for one in row["earlier"]] for row in reports.rows] == [[1, 2], [4]]
    assert [row["val_miou"] >= 0 for row in reports.rows] == [False, True]
    assert all("total" in one for row in reports.rows for one in [*row["earlier"], row])
    assert [damage_of(str(folder)) for folder in reports.folders] == [None, None]


def test_trainer__compiled_training_and_validation_of_mixed_sizes(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The default backend takes minutes on a CPU, and shares all but the last step with this one.
    monkeypatch.setattr(trainer_module, "compile_regions", partial(compile_regions, backend="aot_eager"))
    job = with_settings(make_job(), model={"drop_path_rate": 0.0})
    fast = job.model_copy(update={"runtime": RuntimeConfig(compile=True)})
    batches = micro_batches(job, ALONE, 0)
    plain, compiled = Trainer(job, ALONE), Trainer(fast, ALONE)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    graphs = []
    for _ in range(2):
        batch = next(batches)
        total = plain.train_step([batch])["total"]
        torch.testing.assert_close(compiled.train_step([batch])["total"], total, rtol=1e-5, atol=0)
        assert compiled.validate() == pytest.approx(plain.validate(), abs=1e-3)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]


def test_validate__predicts_as_evaluation_does(make_job: MakeJob) -> None:
    windows = InferenceConfig(mode="slide", crop=(32, 32), stride=(16, 16), resize=(64, 64), flip=True)
    job = make_job().model_copy(update={"inference": windows})
    trainer = Trainer(job, ALONE)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # tells more than one class
    loader = EvalLoader(job.shard_set, "val")
    expected = confusion_of_split(trainer.model, loader, ALONE.device, inference=windows.options())
    whole = confusion_of_split(trainer.model, loader, ALONE.device)
    assert not (expected.matrix == whole.matrix).all()
    assert trainer.validate()["val_miou"] == segmentation_metrics(expected.matrix).miou
    # Workers get the job as JSON.
    assert TrainJob.model_validate(job.model_dump(mode="json")).inference == windows


def test_validate__on_what_is_held_apart_of_train(make_job: MakeJob) -> None:
    job = make_job().model_copy(update={"hold_out": 0.3})
    trainer = Trainer(job, ALONE)
    loader = EvalLoader(job.shard_set, "train", held_apart=0.3)
    confusion = confusion_of_split(trainer.model, loader, ALONE.device)
    assert trainer.validate()["val_miou"] == segmentation_metrics(confusion.matrix).miou
    assert trainer.validate()["val_miou"] != Trainer(make_job(), ALONE).validate()["val_miou"]
