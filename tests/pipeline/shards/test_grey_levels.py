"""Images of more than 8 bits a channel: one range for the whole set, the same in shards, model and prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.records import ShardSet
from pipeline.shards import prepare, shard_task
from pipeline.shards.grey_levels import common_range
from pipeline.shards.loader import EvalLoader
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_task import ShardResult
from pipeline.shards.shards import read_manifest
from segvit.image_files import decode_image
from tests.pipeline.shards.test_prepare import sums

NUM_IMAGES = 7  # the last is val


def greys(number: int) -> np.ndarray:
    """(24, 32) levels 0 to 255, all of them in each image."""
    return np.random.default_rng(number).permutation(np.arange(24 * 32) % 256).reshape(24, 32).astype(np.uint16)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data set of one image a number, by what `make` gives for it."""

    def build(make: Callable[[int], np.ndarray], name: str = "raw", **settings: object) -> DataConfig:
        root = tmp_path / name
        for folder in ("images", "labels", "splits"):
            (root / folder).mkdir(parents=True)
        (root / "classes.txt").write_text("left\nright\n")
        names = [f"f{number}" for number in range(NUM_IMAGES)]
        (root / "splits/train.txt").write_text("\n".join(names[:-1]))
        (root / "splits/val.txt").write_text(names[-1])
        label = np.zeros((24, 32), np.uint8)
        label[:, 16:] = 1
        for number, one in enumerate(names):
            cv2.imwrite(str(root / f"images/{one}.png"), make(number))
            cv2.imwrite(str(root / f"labels/{one}.png"), label)
        return DataConfig.model_validate(
            {
                "dataset": "folder",
                "root": str(root),
                "samples_per_shard": 2,
                "classes_without_pixels": "allow",
                **settings,
            }
        )

    return build


def run(config: DataConfig, folder: Path) -> tuple[ShardSet, list[str]]:
    lines: list[str] = []
    return prepare_shards(config, str(folder), progress=lines.append), lines


def pixels_of(shard_set: ShardSet, split: str) -> dict[str, np.ndarray]:
    return {sample.key: sample.image.permute(1, 2, 0).numpy() for sample in EvalLoader(shard_set, split=split)}


@pytest.mark.parametrize(
    ("camera", "expected"),
    [
        (lambda level: level * 16, (16, 4080)),
        (lambda level: 29_000 + 8 * level, (29_000, 31_040)),
    ],
    ids=["12 bits", "thermal"],
)
def test_prepare__all_grey_levels_reach_the_model(
    make_folder: Callable[..., DataConfig],
    tmp_path: Path,
    camera: Callable[[np.ndarray], np.ndarray],
    expected: tuple[float, float],
) -> None:
    config = make_folder(lambda number: camera(greys(number)))
    shard_set, lines = run(config, tmp_path / "set")
    assert read_manifest(shard_set.uri).grey_range == expected
    low, high = expected
    for split, numbers in (("train", range(NUM_IMAGES - 1)), ("val", [NUM_IMAGES - 1])):
        images = pixels_of(shard_set, split)
        assert len(images) == len(numbers)
        for number in numbers:
            values = camera(greys(number)).astype(float)
            by_hand = np.clip(np.floor((values - low) * 255 / (high - low) + 0.5), 0, 255)
            np.testing.assert_array_equal(images[f"f{number}"], np.repeat(by_hand[..., None], 3, axis=2))
            assert len(np.unique(images[f"f{number}"])) >= 254
            # A raw file is predicted from the very same pixels.
            file = Path(str(config.root)) / f"images/f{number}.png"
            np.testing.assert_array_equal(decode_image(file.read_bytes(), expected), images[f"f{number}"])
    said = (
        f"prepare folder: 7 images of more than 8 bits a channel: {low:g} to {high:g} become 0 to 255 "
        "(measured over train; data.grey_range sets another)"
    )
    assert said in lines
    assert "prepare folder: writing 4 shards with their images scaled to 8 bits" in lines


def test_prepare__a_stated_range_needs_one_pass_and_gives_the_same_as_the_measured(
    make_folder: Callable[..., DataConfig], tmp_path: Path
) -> None:
    config = make_folder(lambda number: greys(number) * 16)
    measured, _ = run(config, tmp_path / "measured")
    stated, lines = run(config.model_copy(update={"grey_range": (16.0, 4080.0)}), tmp_path / "stated")
    assert stated.digest == measured.digest
    assert not [line for line in lines if "writing" in line]
    assert any("16 to 4080 become 0 to 255 (as data.grey_range says)" in line for line in lines)
    other, _ = run(config.model_copy(update={"grey_range": (0.0, 8160.0)}), tmp_path / "stated")
    assert other.digest != stated.digest
    assert max(image.max() for image in pixels_of(other, "train").values()) == 128  # 4080 of 8160, half up


def test_prepare__the_same_bytes_after_a_kill_at_any_shard(
    make_folder: Callable[..., DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One image of train is in val, too, so that shards are written again for both reasons.
    config = make_folder(
        lambda number: greys(6 if number == 1 else number) * 16,
        on_bad_sample="quarantine",
        max_quarantined_fraction=0.5,
    )
    whole, _ = run(config, tmp_path / "whole")
    assert whole.num_quarantined == 1
    for work in ("prepare_shard", "revise_shard"):
        for allowed in range(4):
            folder = tmp_path / f"{work}-{allowed}"
            done: list[int] = []
            original = getattr(shard_task, work)

            def killed(
                *arguments: object,
                done: list[int] = done,
                allowed: int = allowed,
                original: Callable[..., object] = original,
            ) -> object:
                if len(done) == allowed:
                    raise KeyboardInterrupt
                done.append(1)
                return original(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(prepare, work, killed)
                with pytest.raises(KeyboardInterrupt):
                    run(config, folder)
            assert not (folder / "manifest.json").exists()
            run(config, folder)
            assert sums(folder) == sums(tmp_path / "whole")
    again, lines = run(config, tmp_path / "whole")
    assert again == whole
    assert "is up to date" in lines[-1]


def test_prepare__eight_bits_beside_sixteen_stay_as_they_are(
    make_folder: Callable[..., DataConfig], tmp_path: Path
) -> None:
    config = make_folder(lambda number: greys(number) * 16 if number % 2 else greys(number).astype(np.uint8))
    shard_set, lines = run(config, tmp_path / "set")
    assert any(line.endswith("; the other 4 of 8 bits stay as they are") for line in lines)
    images = pixels_of(shard_set, "train")
    np.testing.assert_array_equal(images["f2"][..., 0], greys(2))
    assert images["f1"].max() == 255


def test_prepare__colours_of_sixteen_bits(make_folder: Callable[..., DataConfig], tmp_path: Path) -> None:
    def colours(number: int) -> np.ndarray:
        return np.stack([greys(number) * factor for factor in (1, 2, 4)], axis=2)

    config = make_folder(colours, grey_range=[0, 1020])
    shard_set, _ = run(config, tmp_path / "set")
    blue = greys(0).astype(float)  # OpenCV writes blue first
    expected = np.floor(np.stack([blue * 4, blue * 2, blue], axis=2) / 4 + 0.5)
    np.testing.assert_array_equal(pixels_of(shard_set, "train")["f0"], expected)


def test_prepare__scaled_down_and_to_eight_bits(make_folder: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = make_folder(lambda number: np.full((24, 32), 1000 + 100 * number, np.uint16), max_long_side=16)
    shard_set, _ = run(config, tmp_path / "set")
    assert read_manifest(shard_set.uri).grey_range == (1000, 1500)
    images = pixels_of(shard_set, "train")
    assert images["f3"].shape == (12, 16, 3)
    assert np.unique(images["f3"]).tolist() == [153]  # 300 of 500


def test_prepare__nothing_to_measure_is_refused(make_folder: Callable[..., DataConfig], tmp_path: Path) -> None:
    only_val = make_folder(lambda number: greys(number) * 16 if number == 6 else greys(number).astype(np.uint8))
    with pytest.raises(UserError, match=r"1 images have more than 8 bits a channel, and none of train has.*grey_range"):
        run(only_val, tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()
    shard_set, _ = run(only_val.model_copy(update={"grey_range": (0.0, 4080.0)}), tmp_path / "set")
    assert pixels_of(shard_set, "val")["f6"].max() == 255


def test_common_range__one_value_is_no_range() -> None:
    results = [ShardResult("", "t", "train", "", 0, 1, 0, None, (), bytes(8), {}, 1, (7, 7))]
    with pytest.raises(UserError, match=r"folder: 1 images .* and those of train hold one value, 7, so nothing says"):
        common_range("folder", DataConfig(dataset="folder"), results, print)
    results.append(ShardResult("", "u", "train", "", 0, 1, 0, None, (), bytes(8), {}, 1, (5, 6)))
    assert common_range("folder", DataConfig(dataset="folder"), results, print) == (5, 7)


def test_prepare__eight_bits_alone_have_no_range(make_folder: Callable[..., DataConfig], tmp_path: Path) -> None:
    config = make_folder(lambda number: greys(number).astype(np.uint8))
    plain, lines = run(config, tmp_path / "set")
    assert read_manifest(plain.uri).grey_range is None
    assert not any("more than 8 bits" in line for line in lines)
    stated, lines = run(config.model_copy(update={"grey_range": (0.0, 9.0)}), tmp_path / "set")
    assert stated.digest == plain.digest
    assert "prepare folder: no image has more than 8 bits a channel; data.grey_range changes nothing" in lines


def test_grey_range__must_rise() -> None:
    for wrong in ([5, 5], [9, 3], [0, float("inf")], [float("nan"), 3]):
        with pytest.raises(ValidationError, match="must be two values that rise"):
            DataConfig(dataset="folder", grey_range=(wrong[0], wrong[1]))
