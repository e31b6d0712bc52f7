"""Experiments written for data: they say what follows from sizes, amounts, weights and machine, and fit as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from flows.draft import SHRUNK_SHARE, choose_backbone, crop_for, draft_experiment, experiment_name
from flows.experiment import load_experiment
from pipeline.config import DataConfig, ExperimentConfig
from pipeline.config.file import load_config
from pipeline.data_check.check import check_source
from pipeline.preflight import Machine
from segvit.config import ModelConfig
from segvit.flops import model_gflops

SMALL = "vit_small_patch14_dinov2"
LAPTOP = Machine(2, 0)
CONFIGS = Path(__file__).parents[2] / "flows" / "configs"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGVIT_WEIGHTS", raising=False)


def data(root: Path, size: tuple[int, int] = (240, 320), num_train: int = 6) -> DataConfig:
    """Images of (height, width) `size`, two of them in val."""
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"f{number}" for number in range(num_train + 2)]
    for name in names:
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size[::-1]).save(root / f"images/{name}.jpg")
        label = np.zeros(size, np.uint8)
        label[: size[0] // 2] = 1
        Image.fromarray(label).save(root / f"labels/{name}.png")
    (root / "classes.txt").write_text("a\nb\n")
    (root / "splits/train.txt").write_text("\n".join(names[:-2]))
    (root / "splits/val.txt").write_text("\n".join(names[-2:]))
    return DataConfig(dataset="folder", root=str(root))


def drafted(folder: Path, config: DataConfig, machine: Machine = LAPTOP, backbone: str = SMALL) -> ExperimentConfig:
    """The experiment as its file is read; it passes all checks before a start."""
    text = draft_experiment("my-set", config, check_source(config, ("why",)), machine, backbone, "as asked")
    file = folder / "experiment.yaml"
    file.write_text(text)
    assert text.startswith("# why\n")
    assert max(map(len, text.splitlines())) <= 120 + len(str(folder))
    experiment = load_experiment(file)
    if not machine.num_gpus:
        experiment.check(str(folder / "workspace"))
    assert experiment.warnings() == []
    return experiment.config


def share(config: ExperimentConfig) -> float:
    """Of the shrunk variant's cost in the full one's."""
    models = [ModelConfig.from_dict(config.variant_settings(name).model) for name in ("shrunk", "full")]
    costs = [model_gflops(model, 2, model.image_size) for model in models]
    return costs[0] / costs[1]


def test_draft__without_a_gpu(tmp_path: Path) -> None:
    config = drafted(tmp_path, data(tmp_path / "my set"))
    assert config.name == "my-set"
    assert (config.data.dataset, config.data.root) == ("folder", str(tmp_path / "my set"))
    assert config.model.fields["image_size"] == [238, 308]
    assert (config.train.steps, config.train.freeze_blocks, config.train.batch_size) == (200, 3, 8)
    assert (config.runtime.cpus_per_worker, config.runtime.loader_workers) == (2, 0)
    assert (config.data.max_long_side, config.evaluate.inference.resize) == (None, None)
    assert 0.57 <= share(config) <= SHRUNK_SHARE


@pytest.mark.parametrize(
    ("file", "machine", "size"), [("camvid_cpu.yaml", LAPTOP, (360, 480)), ("camvid.yaml", Machine(16, 1), (720, 960))]
)
def test_draft__trains_as_the_shipped_experiments(
    file: str, machine: Machine, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGVIT_DATA", str(tmp_path))
    shipped = load_config(CONFIGS / file)
    config = drafted(tmp_path, data(tmp_path / "d", size), machine)
    amounts = {"steps", "warmup_steps", "validate_every_steps", "checkpoint_every_steps", "augmentation"}
    assert config.train.model_dump(exclude=amounts) == shipped.train.model_dump(exclude=amounts)
    assert config.loss == shipped.loss
    of_machine = {"dropout", "drop_path_rate"}
    models = [
        {name: value for name, value in one.variant_settings("full").model.items() if name not in of_machine}
        for one in (config, shipped)
    ]
    assert models[0] == models[1]


def test_draft__large_images_and_a_gpu(tmp_path: Path) -> None:
    config = drafted(tmp_path, data(tmp_path / "big", (1000, 2000), 20), Machine(16, 1))
    # 1728 patches of 14 pixels in the images' shape; images at twice that, in the shards and whenever one is predicted.
    assert config.model.fields["image_size"] == [406, 826]
    assert (config.data.max_long_side, config.evaluate.inference.resize) == (1652, (1652, 1652))
    assert config.train.augmentation.scale_range == (0.54, 1.54)
    assert (config.train.steps, config.train.freeze_blocks, config.runtime.loader_workers) == (500, 0, 12)
    assert share(config) <= SHRUNK_SHARE


def test_draft__another_backbone(tmp_path: Path) -> None:
    config = drafted(tmp_path, data(tmp_path / "d"), backbone="vit_tiny_patch16_224")
    assert config.model.fields["image_size"] == [240, 320]
    assert config.model.fields["decoder_width"] == 192
    assert share(config) <= SHRUNK_SHARE
    found = check_source(config.data)
    with pytest.raises(ValueError, match="vit_tinny"):
        draft_experiment("a", config.data, found, LAPTOP, "vit_tinny", "as asked")


def test_draft__tiny_images_have_no_patches_to_save(tmp_path: Path) -> None:
    config = drafted(tmp_path, data(tmp_path / "d", (64, 64)))
    assert config.model.fields["image_size"] == [84, 84]
    assert list(config.variants) in (["full"], ["full", "shrunk"])


@pytest.mark.parametrize(
    ("size", "patches", "crop"),
    [
        ((360, 480), 432, (252, 336)),
        ((100, 100), 432, (98, 98)),
        ((1000, 100), 100, (448, 84)),
        ((20, 20), 9, (84, 84)),
    ],
)
def test_crop__the_images_shape_in_whole_patches(size: tuple[int, int], patches: int, crop: tuple[int, int]) -> None:
    assert crop_for(size, 14, patches) == crop


def test_name__of_the_folder_or_archive() -> None:
    roots = {
        "/data/My set {v1}/": "My-set-v1",
        "s3://bucket/roads.tar.gz": "roads",
        "/data/ä": "experiment",
        "/": "experiment",
    }
    assert {root: experiment_name(root) for root in roots} == roots


def test_backbone__the_one_whose_weights_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backbone()[0] == SMALL
    weights: dict[str, Any] = timm.create_model("vit_tiny_patch16_224").state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    monkeypatch.setenv("SEGVIT_WEIGHTS", str(tmp_path / "w.safetensors"))
    assert choose_backbone() == ("vit_tiny_patch16_224", "SEGVIT_WEIGHTS holds its weights")
    save_file({"a": weights["cls_token"]}, tmp_path / "w.safetensors")
    assert choose_backbone() == (
        SMALL,
        "the default, as SEGVIT_WEIGHTS holds weights of another; name that with --backbone",
    )
