"""What the comparison with other libraries makes of measurements; none of them is installed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import UserError
from tests.benchmarks import against_peers
from tests.benchmarks.peers import common, environment, huggingface, lightly, results
from tests.benchmarks.peers.results import Side


def measured(step: float, image: float = 1.0, crop: float = 1.0, cores: float = 2.0, **more: Any) -> dict[str, Any]:
    """A round's result."""
    times = {"step_seconds": [step, step, 9.0], "image_seconds": [image], "crop_seconds": [crop]}
    return {**times, "cores": cores, "peak_bytes": 2_000_000_000, "packages": {"torch": "2.14.1"}, **more}


def test_table__ratio_is_the_median_of_rounds() -> None:
    ours = Side(rounds=[measured(1.0), measured(4.0, cores=1.5), measured(1.0)])
    peer = Side(rounds=[measured(2.0, crop=4.0), measured(5.0, crop=4.0), measured(4.0, crop=4.0)])
    lines = results.table({"ours": ours, "lightly": peer, "huggingface": Side(refused="no scipy")}, minutes=0)
    assert lines[2] == "| ours | 1.000 s | 1.000 s | 1.000 s | 2.00 GB | not measured |"
    assert lines[3].startswith(
        "| LightlyTrain's EoMT | 4.000 s (ours 0.50 of it) | 1.000 s (ours 1.00 of it) | 4.000 s"
    )
    assert lines[4] == "| transformers' EoMT | refused: no scipy | | | | |"
    assert lines[6] == "ours: torch 2.14.1; had 2.0 cores"


def test_derived_of__shares_the_training_and_predicts_by_itself() -> None:
    derived = {"train_seconds": 2700.0, "image_seconds": [0.5], "crop_seconds": [0.25]}
    result = measured(1.0, derived=derived)
    ours = Side(rounds=[result], trained={**result, "steps": 1600, "train_seconds": 2640.0}, miou=0.7)
    shrunk = results.derived_of(ours)
    assert shrunk.miou is None
    shrunk.miou = 0.69
    lines = results.table({"ours": ours, "shrunk": shrunk, "lightly": Side(rounds=[measured(4.0)])}, minutes=45)
    assert lines[3] == "| ours, Shrunk | 1.000 s | 0.500 s | 0.250 s | 2.00 GB | 0.690 (1600 steps, 45.0 min) |"
    both = "1.000 s (ours 1.00; ours, Shrunk 0.{} of it)"
    assert f"| 4.000 s (ours 0.25 of it) | {both.format('50')} | {both.format('25')} |" in lines[4]
    assert [line.split(":")[0] for line in lines[6:]] == ["ours", "LightlyTrain's EoMT"]


def test_with_shrunk__stands_after_ours_and_is_scored(tmp_path: Path) -> None:
    for folder, pixels in (("valannot", [[0, 1]]), (common.DERIVED_LABEL_MAPS, [[0, 0]])):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / folder / "a.png")
    trained = measured(1.0, derived={"train_seconds": 5.0}, train_seconds=4.0)
    sides = against_peers.with_shrunk({"lightly": Side(), "ours": Side(trained=trained)}, tmp_path, tmp_path)
    assert list(sides) == ["ours", "shrunk", "lightly"]
    assert sides["shrunk"].miou == pytest.approx(0.25)
    assert (sides["ours"].miou, sides["shrunk"].trained["train_seconds"]) == (None, 5.0)  # type: ignore[index]


def test_table__score_with_what_it_took() -> None:
    side = Side(rounds=[measured(1.0)], trained={"steps": 1600, "train_seconds": 2640.0}, miou=0.7041)
    lines = results.table({"ours": side}, minutes=45)
    assert lines[0].endswith("| val mIoU after 45 min |")
    assert lines[2].endswith("| 0.704 (1600 steps, 44.0 min) |")


def test_score__unlabelled_pixels_do_not_count(tmp_path: Path) -> None:
    predicted, labels = tmp_path / "predicted", tmp_path / "labels"
    for folder in (predicted, labels):
        folder.mkdir()
    Image.fromarray(np.array([[0, 0, 1, 11]], dtype=np.uint8)).save(labels / "a.png")
    Image.fromarray(np.array([[0, 1, 1, 5]], dtype=np.uint8)).save(predicted / "a.png")
    assert results.score(predicted, labels) == pytest.approx(0.5)


@pytest.mark.parametrize("pixels", [None, [[0, 0]], [[0, 0, 12, 0]]])
def test_score__what_is_no_label_map_is_refused(tmp_path: Path, pixels: list[list[int]] | None) -> None:
    Image.fromarray(np.zeros((1, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "predicted").mkdir()
    if pixels is not None:
        Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / "predicted/a.png")
    with pytest.raises(UserError, match=r"predicted/a\.png cannot be scored"):
        results.score(tmp_path / "predicted", tmp_path)


def test_check_weights__other_weights_are_refused() -> None:
    results.check_weights({"similarity": 0.999})
    for similarity in (0.02, float("nan")):
        with pytest.raises(UserError, match="the weights did not arrive"):
            results.check_weights({"similarity": similarity})


def test_attempt__a_refused_side_starts_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run_side(name: str, *_arguments: Any) -> dict[str, Any]:
        calls.append(name)
        return measured(1.0, similarity=0.1)

    monkeypatch.setattr(against_peers, "run_side", run_side)
    side: Any = Side()
    nothing: Any = None
    for _ in range(2):
        assert against_peers.attempt(side, "lightly", "python", nothing, Path()) is None
    assert calls == ["lightly"]
    assert "did not arrive" in side.refused


def test_step_clock__takes_the_first_optimizer_after_the_warm_up() -> None:
    clock = common.StepClock("cpu")
    first, second = (torch.optim.SGD([torch.ones(1, requires_grad=True)]) for _ in range(2))
    with clock.listening():
        for _ in range(5):
            first.step()
            second.step()
    first.step()
    assert len(clock.ends) == 5
    clock.ends, clock.cpu_ends = [0.0, 10.0, 20.0, 21.0, 23.0], [0.0, 1.0, 2.0, 3.0, 5.0]
    assert clock.seconds() == [1.0, 2.0]
    assert clock.cores() == pytest.approx(1.0)
    assert clock.train_seconds() == pytest.approx(23.0 * 5 / 4)


def test_features__similarity_is_a_cosine() -> None:
    tokens = np.array([[[1.0, 0.0], [0.0, 2.0]]], dtype=np.float32)
    features = common.Features(np.zeros((1, 2, 2, 3), dtype=np.uint8), tokens)
    assert features.similarity(lambda _images: torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])) == pytest.approx(1.0)
    assert features.similarity(lambda _images: torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])) == pytest.approx(0.5)


def test_square_crop__is_the_middle() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert common.square_crop(image, 2)[0, :, 0].tolist() == [3, 6]


def test_renamed__attention_is_taken_apart_and_positions_are_added() -> None:
    state = {
        "cls_token": torch.full((1, 1, 2), 3.0),
        "pos_embed": torch.arange(10.0).view(1, 5, 2),
        "patch_embed.proj.bias": torch.tensor([1.0, 2.0]),
        "blocks.0.attn.qkv.bias": torch.arange(6.0),
        "blocks.0.ls1.gamma": torch.ones(2),
        "norm.weight": torch.ones(2),
    }
    found = huggingface.renamed(state, grid=2)
    assert found["embeddings.cls_token"].flatten().tolist() == [3.0, 4.0]
    assert found["embeddings.position_embeddings.weight"].tolist() == [[2, 3], [4, 5], [6, 7], [8, 9]]
    assert found["layers.0.attention.k_proj.bias"].tolist() == [2.0, 3.0]
    names = {"layers.0.layer_scale1.lambda1", "layernorm.weight", "embeddings.patch_embeddings.projection.bias"}
    assert names < found.keys()


def test_annealed__blocks_end_one_after_the_other() -> None:
    assert huggingface.annealed(0, 100) == [1.0, 1.0, 1.0]
    assert huggingface.annealed(50, 100) == pytest.approx([0.0, 0.5**0.9, 1.0])
    assert huggingface.annealed(80, 100) == [0.0, 0.0, 0.0]


def test_short_runs__keep_the_share_of_the_warm_up() -> None:
    assert lightly.warmup_steps(40_000) == (500, 1000)
    assert lightly.warmup_steps(800) == (10, 20)
    assert results.steps_within(45, 2.0) == 1350


def test_pins__are_those_of_the_constraints(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# x\ntorch==2.14.1\nnumpy==2.4.6\ntorchvision==0.29.1\n")
    assert environment.pins(tmp_path / "constraints.txt", ("torchvision", "torch")) == [
        "torchvision==0.29.1",
        "torch==2.14.1",
    ]


def test_make_task__a_crop_between_patches_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SEGVIT_DATA", "SEGVIT_WEIGHTS"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match="--crop 290 is not a multiple of 14; use 280 or 294"):
        against_peers.make_task(argparse.Namespace(crop=290), tmp_path)
    monkeypatch.setenv("SEGVIT_WEIGHTS", "/nowhere")
    with pytest.raises(UserError, match="SEGVIT_WEIGHTS is '/nowhere', not an existing path"):
        against_peers.make_task(argparse.Namespace(crop=294), tmp_path)
