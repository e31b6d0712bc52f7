"""What a run left in storage: damage is found, half uploads go, and Ray reads what is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train

from pipeline.training.checkpoint_files import FILES, SUMS_FILE, damage_of, sha256_of
from pipeline.training.train_run import RAY_LIST, RAY_PREFIX, chosen_checkpoint, listed_checkpoints, repair_run
from pipeline.workflow.lease import Lease, LeaseLost, take_lease

# Step and mIoU of each checkpoint; the best is the second.
SCORES = ((5, -1.0), (10, 0.6), (15, -1.0), (20, 0.4))


def write_checkpoint(run: Path, step: int, miou: float) -> Path:
    folder = run / f"checkpoint_2026-01-01_00-00-{step:02d}.000000"
    folder.mkdir(parents=True)
    best = max(score for number, score in SCORES if number <= step)
    state = {"step": step, "val_miou": miou, "best_miou": best, "train_seconds": float(step)}
    for name in FILES:
        (folder / name).write_text(json.dumps(state) if name == "state.json" else f"{name} {step}" * 50)
    (folder / SUMS_FILE).write_text(json.dumps({name: sha256_of(folder / name) for name in FILES}))
    return folder


def newest_lease(run: Path) -> Lease:
    return take_lease(str(run.parent / "lease"), "training")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with four checkpoints and the list that Ray would have of them."""
    run = tmp_path / "run"
    for step, miou in SCORES:
        write_checkpoint(run, step, miou)
    repair_run(str(run), "last", newest_lease(run), log=lambda _line: None)
    return run


def steps(run: Path, keep: str, said: list[str] | None = None) -> list[int]:
    return [
        one.step for one in repair_run(str(run), keep, newest_lease(run), log=(said if said is not None else []).append)
    ]


def test_repair_run__ray_reads_the_list_that_is_made(run: Path) -> None:
    result = ray.train.Result.from_path(str(run))
    assert result.metrics == {"step": 20.0, "val_miou": 0.4}
    assert result.checkpoint is not None
    assert Path(result.checkpoint.path).name == "checkpoint_2026-01-01_00-00-20.000000"
    assert [metrics["val_miou"] for _, metrics in result.best_checkpoints or []] == [-1.0, -1.0, 0.4, 0.6]
    # One more, as Ray lists it, is found.
    assert len(listed_checkpoints(str(run)) or ()) == 4


def test_repair_run__sound_run_is_left_alone(run: Path) -> None:
    before = (run / RAY_LIST).read_bytes()
    said: list[str] = []
    assert steps(run, "best", said) == [5, 10, 15, 20]
    assert (run / RAY_LIST).read_bytes() == before
    assert said == []
    assert steps(run / "none", "best") == []


def flip(folder: Path) -> str:
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optimizer.safetensors has another sha256 than when it was written"


def cut(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors has another sha256 than when it was written"


def lose(folder: Path) -> str:
    (folder / "rng.safetensors").unlink()
    return "rng.safetensors is missing"


def lose_sums(folder: Path) -> str:
    (folder / SUMS_FILE).unlink()
    return f"{SUMS_FILE} is missing"


def garble_sums(folder: Path) -> str:
    (folder / SUMS_FILE).write_text("{}")
    return f"{SUMS_FILE} is damaged"


@pytest.mark.parametrize("damage", [flip, cut, lose, lose_sums, garble_sums])
def test_repair_run__damaged_checkpoint_gives_way_to_the_one_before(run: Path, damage: Callable[[Path], str]) -> None:
    last = run / "checkpoint_2026-01-01_00-00-20.000000"
    reason = damage(last)
    assert damage_of(str(last)) == reason
    said: list[str] = []
    assert steps(run, "best", said) == [5, 10, 15]
    assert said == [f"checkpoint {last} is not used: {reason}; training goes on from the one before it"]
    assert not last.exists()
    assert ray.train.Result.from_path(str(run)).metrics == {"step": 15.0, "val_miou": -1.0}


def test_repair_run__lost_best_is_trained_again(run: Path) -> None:
    flip(run / "checkpoint_2026-01-01_00-00-10.000000")
    said: list[str] = []
    # What comes after it would publish a worse one.
    assert steps(run, "best", said) == [5]
    assert len([line for line in said if line.endswith("the best one before it is lost; training finds it again")]) == 2
    assert [path.name for path in run.glob("checkpoint_*") if path.is_dir()] == [
        "checkpoint_2026-01-01_00-00-05.000000"
    ]


def test_repair_run__lost_best_does_not_matter_where_the_last_is_published(run: Path) -> None:
    flip(run / "checkpoint_2026-01-01_00-00-10.000000")
    assert steps(run, "last") == [5, 15, 20]


def test_repair_run__half_an_upload_is_removed_and_never_used(run: Path) -> None:
    half = write_checkpoint(run, 25, -1.0)
    (half / SUMS_FILE).unlink()
    assert steps(run, "best") == [5, 10, 15, 20]
    assert not half.exists()


@pytest.mark.parametrize("content", ["", '{"ray_version": "2.', '{"ray_version": "1.0.0", "checkpoint_results": []}'])
def test_repair_run__list_that_ray_cannot_read_is_made_anew(run: Path, content: str) -> None:
    # A kill while Ray writes it in place leaves a part of it.
    (run / RAY_LIST).write_text(content)
    said: list[str] = []
    assert steps(run, "best", said) == [5, 10, 15, 20]
    assert said == [f"{run}: Ray's list of checkpoints is gone or unreadable; made anew from 4 whole ones"]
    assert ray.train.Result.from_path(str(run)).metrics == {"step": 20.0, "val_miou": 0.4}


def test_repair_run__nothing_whole_starts_anew(run: Path) -> None:
    for folder in run.glob("checkpoint_*-*"):
        lose_sums(folder)
    assert steps(run, "best") == []
    assert list(run.iterdir()) == []


def test_chosen_checkpoint__best_or_last(run: Path) -> None:
    saved = repair_run(str(run), "best", newest_lease(run))
    assert chosen_checkpoint(saved, "best").step == 10
    assert chosen_checkpoint(saved, "last").step == 20
    equal = [one._replace(val_miou=0.5) for one in saved]
    assert chosen_checkpoint(equal, "best").step == 20


def test_repair_run__touches_nothing_of_another_execution(run: Path) -> None:
    overtaken, holder = newest_lease(run), newest_lease(run)
    uploading = run / f"{RAY_PREFIX}2030-01-01_00-00-00.000000"
    uploading.mkdir()
    (uploading / "model.safetensors").write_bytes(b"half")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(LeaseLost, match=r"^training was taken over by another process \(lease 3 of \w+, after 2\)"):
        repair_run(str(run), "best", overtaken)
    assert sorted(path.name for path in run.iterdir()) == before
    repair_run(str(run), "best", holder, log=lambda _line: None)
    assert not uploading.exists()


def test_repair_run__paused_on_the_way_removes_nothing_more(run: Path) -> None:
    lease = newest_lease(run)
    (newest := max(run.glob(f"{RAY_PREFIX}2*"))).joinpath("model.safetensors").write_bytes(b"damaged")

    def pause(_line: str) -> None:
        newest_lease(run)

    list_before = (run / RAY_LIST).read_bytes()
    with pytest.raises(LeaseLost):
        repair_run(str(run), "last", lease, log=pause)
    assert newest.exists()
    assert (run / RAY_LIST).read_bytes() == list_before
