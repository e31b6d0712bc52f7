"""The published models' experiment files, and DINOv3's beside them: figures, plan and first steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from flows.cli import main
from pipeline.config import ExperimentConfig
from pipeline.config.file import load_config
from pipeline.preflight import Machine
from pipeline.records import BackboneRecord, ShardSet
from pipeline.shards.prepare import prepare_shards
from pipeline.training.batches import micro_batches
from pipeline.training.job import DistributedContext, TrainJob
from pipeline.training.trainer import Trainer
from segvit import PUBLISHED_SCALES
from segvit.config import ModelConfig
from segvit.flops import ModelCost, model_cost
from segvit.presets import PRESETS, published_names
from tests.pipeline.datasets.test_ade20k import make_ade20k
from tests.pipeline.datasets.test_coco_stuff import make_coco_stuff
from tests.pipeline.datasets.test_pascal_context import detail_file, make_pascal_context

CONFIGS = Path(__file__).parents[2] / "flows" / "configs"


class Recipe(NamedTuple):
    """What the paper trains and tests a data set's models with (SegViT section 6)."""

    num_classes: int
    resize: tuple[int, int]
    """(long, short)."""
    steps: int
    weight_decay: float
    power: float


RECIPES = {
    "ade20k": Recipe(150, (2048, 640), 160_000, 0.01, 1.0),
    "ade20k/vit_base": Recipe(150, (2048, 512), 160_000, 0.01, 1.0),
    "coco_stuff10k": Recipe(171, (2048, 512), 80_000, 0.02, 2.0),
    "pascal_context": Recipe(60, (520, 520), 80_000, 0.03, 1.0),
}
WINDOWS = {
    "ade20k": (640, 608),
    "ade20k/vit_base": (512, 341),
    "coco_stuff10k": (512, 341),
    "pascal_context": (480, 320),
}
# File, and the paper's mIoU at one scale and over scales with flips, and GFLOPs (section 7).
PUBLISHED = {
    "ade20k/vit_base": (51.3, 53.0, 120.9),
    "ade20k/vit_large_shrunk": (53.9, 55.1, 373.5),
    "ade20k/vit_large": (54.6, 55.2, 637.9),
    "coco_stuff10k/vit_large_shrunk": (49.1, 49.4, 224.8),
    "coco_stuff10k/vit_large": (49.9, 50.3, 383.9),
    "pascal_context/vit_large_shrunk": (62.3, 63.7, 186.9),
    "pascal_context/vit_large": (64.1, 65.3, 321.6),
}
DINOV3 = tuple(f"{data}/dinov3_vit_large" for data in ("ade20k", "coco_stuff10k", "pascal_context"))
FILES = (*PUBLISHED, *DINOV3)
MAKERS: dict[str, Callable[[Path], Path]] = {
    "ade20k": make_ade20k,
    "coco_stuff10k": make_coco_stuff,
    "pascal_context": lambda root: make_pascal_context(root, detail_file()),
}
# Two of the miniature of ADE20K's three images are equal. Few of the classes are in it.
MINIATURE = ("data.max_quarantined_fraction=0.5", "data.classes_without_pixels=allow")
SMALL = (
    "model.backbone_options={embed_dim: 48, num_heads: 3}",
    "model.image_size=[32, 32]",
    "model.decoder_layers=1",
    "train.batch_size=2",
    "runtime={num_workers: 1}",
    *MINIATURE,
)


def of_data_set(table: dict[str, Any], file: str) -> Any:
    """A row for the file itself, or else for its data set."""
    return table.get(file) or table[file.partition("/")[0]]


def read(file: str, *overrides: str) -> ExperimentConfig:
    return load_config(CONFIGS / f"{file}.yaml", overrides)


def head(file: str) -> list[str]:
    """The comment that a file begins with."""
    lines = (CONFIGS / f"{file}.yaml").read_text().splitlines()
    return [*takewhile(lambda line: line.startswith("#"), lines)]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SEGVIT_DATA: a miniature of each publisher's tree."""
    folder = tmp_path_factory.mktemp("data")
    for name, make in MAKERS.items():
        make(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGVIT_DATA", str(folder))
        patch.delenv("SEGVIT_WEIGHTS", raising=False)
        yield folder


@pytest.fixture(scope="module")
def shard_sets(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """The shards of each data set."""
    return {
        name: prepare_shards(
            read(f"{name}/vit_large", *MINIATURE).data, str(tmp_path_factory.mktemp(name)), progress=lambda _line: None
        )
        for name in MAKERS
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


def test_files__the_published_models_and_one_more_a_data_set() -> None:
    paths = (path for data in MAKERS for path in (CONFIGS / data).glob("*.yaml"))
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in paths}
    assert found == set(FILES)
    presets = [read(file).model.preset for file in PUBLISHED]
    assert presets == [file.replace("/", "_") for file in PUBLISHED]
    assert set(presets) == set(published_names())


@cache
def cost_of(file: str) -> ModelCost:
    """Of one image of the training crop, with the data set's classes."""
    config = read(file)
    (variant,) = config.variants
    model = ModelConfig.from_dict(config.variant_settings(variant).model)
    return model_cost(model, of_data_set(RECIPES, file).num_classes, model.image_size)


@pytest.mark.parametrize("file", PUBLISHED)
def test_cost__as_published(file: str) -> None:
    miou, multi_scale, gflops = PUBLISHED[file]
    assert cost_of(file).gflops == pytest.approx(gflops, rel=0.005)
    assert PRESETS[file.replace("/", "_")].num_classes == of_data_set(RECIPES, file).num_classes
    first = head(file)[0]
    assert first.endswith(f"as published: mIoU {miou}, {multi_scale} over scales and flips; {gflops} GFLOPs.")


@pytest.mark.parametrize("file", FILES)
def test_head__estimates_follow_the_formula(file: str) -> None:
    cost, train = cost_of(file), read(file).train
    in_bf16 = train.precision == "bf16"
    num_bytes = cost.parameters * (22 if in_bf16 else 20) + 2 * cost.activation_bytes * (0.5 if in_bf16 else 1.0)
    rate = 989e12 / 4 if in_bf16 else 67e12 / 2
    hours = 2e9 * cost.gflops * 3 * train.batch_size * train.steps / rate / 3600
    found = re.search(r": ([\d.]+) GB a GPU; at least ([\d.]+) h on eight H100, ([\d.]+) h on one", head(file)[-1])
    assert found is not None
    gigabytes, on_eight, on_one = map(float, found.groups())
    assert gigabytes == pytest.approx(num_bytes / 1e9, abs=0.051)
    assert on_eight == pytest.approx(hours / 8, rel=0.05, abs=0.051)
    assert on_one == pytest.approx(hours, rel=0.05, abs=0.051)


@pytest.mark.parametrize("file", PUBLISHED)
def test_schedule__as_published(file: str) -> None:
    config = read(file)
    (variant,) = config.variants
    settings = config.variant_settings(variant)
    train, augmentation = settings.train, settings.train.augmentation
    recipe: Recipe = of_data_set(RECIPES, file)
    window, stride = of_data_set(WINDOWS, file)
    assert (train.steps, train.batch_size, train.accumulation_steps) == (recipe.steps, 16, 1)
    assert (train.learning_rate, train.decoder_lr_multiplier) == (2e-5, 10.0)
    assert (train.weight_decay, train.gradient_clip_norm, train.freeze_blocks) == (recipe.weight_decay, 35.0, 0)
    assert (train.schedule.name, train.schedule.options) == ("poly", {"power": recipe.power})
    assert (train.warmup_steps, train.precision) == (1500, "fp32")
    assert (augmentation.resize_long, augmentation.resize_short) == recipe.resize
    assert (augmentation.scale_range, augmentation.flip_probability) == ((0.5, 2.0), 0.5)
    assert (augmentation.max_class_fraction, augmentation.crop_tries) == (0.75, 10)
    assert (augmentation.brightness, augmentation.hue) == (32.0, 18.0)
    assert augmentation.contrast == augmentation.saturation == (0.5, 1.5)
    assert settings.loss.resolved() == {"class": 1.0, "focal": 20.0, "dice": 1.0}
    assert settings.model["image_size"] == [window, window]
    inference = config.evaluate.inference
    assert (inference.mode, inference.scales, inference.flip) == ("slide", (1.0,), False)
    assert (inference.crop, inference.stride) == ((window, window), (stride, stride))
    augmentation = config.train.augmentation
    assert inference.resize == (augmentation.resize_long, augmentation.resize_short)
    [(name, second)] = config.evaluate.also.items()
    assert name == "multi_scale"
    assert second == inference.model_copy(update={"scales": PUBLISHED_SCALES, "flip": True})


@pytest.mark.parametrize("file", DINOV3)
def test_dinov3__a_cascade_at_the_data_sets_crop(file: str) -> None:
    config = read(file)
    settings = config.variant_settings("full")
    recipe: Recipe = of_data_set(RECIPES, file)
    window, stride = of_data_set(WINDOWS, file)
    assert settings.model["backbone"] == "vit_large_patch16_dinov3.lvd1689m"
    assert (settings.model["structure"], settings.model["out_layers"]) == ("cascade", [7, 15, 23])
    assert (settings.train.steps, settings.train.precision) == (recipe.steps // 4, "bf16")
    assert settings.model["image_size"] == [window, window]
    assert config.evaluate.inference.stride == (stride, stride)


@pytest.mark.parametrize("file", FILES)
def test_plan__all_that_there_is_to_do_with_eight_gpus(
    file: str, workspace: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: cls(num_cpus=64, num_gpus=8)))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1 << 40))
    main(["plan", str(CONFIGS / f"{file}.yaml"), "--workspace", str(workspace), "--json"])
    labels = [step["label"] for step in json.loads(capfd.readouterr().out)]
    (variant,) = read(file).variants
    assert labels[0] == "prepare"
    assert {f"{step}/{variant}" for step in ("train", "evaluate", "register")} < set(labels)
    assert labels[-2:] == ["promote", "report"]


@pytest.mark.parametrize("file", FILES)
def test_one_gpu__what_the_head_says_fits(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in head(file) if line.startswith("# One GPU"))
    config = read(file, *line.split(" --set ")[1:])
    assert config.runtime.max_workers == 1
    # As many images at once as on each of eight.
    assert config.train.batch_size // config.train.accumulation_steps == 2
    assert read(file).train.batch_size // read(file).runtime.max_workers == 2


@pytest.mark.parametrize("file", FILES)
def test_train__first_two_steps_of_a_narrow_one(file: str, shard_sets: dict[str, ShardSet]) -> None:
    config = read(file, *SMALL)
    (variant,) = config.variants
    settings = config.variant_settings(variant)
    job = TrainJob(
        variant=variant,
        settings=settings,
        shard_set=shard_sets[file.partition("/")[0]],
        backbone=BackboneRecord(
            backbone=settings.model["backbone"], uri=None, digest="random", source="random", message=""
        ),
        runtime=config.runtime,
        save_checkpoints=False,
    )
    assert job.shard_set.num_classes == of_data_set(RECIPES, file).num_classes
    context = DistributedContext(0, 1, torch.device("cpu"))
    trainer = Trainer(job, context)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batches = micro_batches(job, context, 0)
    for _ in range(2):
        terms = trainer.train_step([next(batches)])
        assert {"class", "focal", "dice", "total"} <= set(terms)
        assert all(bool(torch.isfinite(term)) for term in terms.values())
        assert float(terms["total"]) > 0.1
    # The second step's rate: a step of the warm-up, whose first one has 1e-6 of the rate, and of the decay.
    train = settings.train
    decay = (1 - 1 / train.steps) ** train.schedule.options["power"]
    rate = train.learning_rate * decay * (1 - (1 - 1 / 1500) * (1 - 1e-6))
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert rates["backbone"] == pytest.approx((rate, train.weight_decay))
    assert rates["backbone_norms"] == pytest.approx((rate, 0.0))
    assert rates["decoder"] == pytest.approx((10 * rate, train.weight_decay))
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert trainer.state.step == 2
    for part in ("backbone.", "decoder."):
        assert any(name.startswith(part) for name in changed)
