"""From raw data to published shards: same bytes every time, nothing lost in silence, nothing done twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.config import DataConfig, DigitsConfig
from pipeline.datasets import RawSample
from pipeline.datasets.digits import Digits
from pipeline.errors import UserError
from pipeline.exported_metrics import PREPARED_SAMPLES
from pipeline.records import ShardSet
from pipeline.shards import shard_task
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.sample_check import check_sample
from pipeline.shards.shard_check import check_shard_set
from pipeline.workflow.lease import LeaseLost, take_lease
from tests.pipeline.fakes import Told

DIGITS = DataConfig(dataset="digits", samples_per_shard=4, digits=DigitsConfig(num_train=10, num_val=3))


def sums(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def run(config: DataConfig, folder: Path) -> tuple[ShardSet, list[str]]:
    lines: list[str] = []
    return prepare_shards(config, str(folder), progress=lines.append), lines


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """A CamVid miniature: 6 train and 2 val images of 8x10 pixels, without most of the classes."""
    root = tmp_path / "camvid"
    for split, count in (("train", 6), ("val", 2)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(count):
            Image.new("RGB", (10, 8), (number, 9 * (split == "val"), 0)).save(root / split / f"{number}.png")
            label = np.full((8, 10), number, dtype=np.uint8)
            Image.fromarray(label).save(root / f"{split}annot" / f"{number}.png")
    return root


def camvid_config(root: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate(
        {"dataset": "camvid", "root": str(root), "samples_per_shard": 2, "classes_without_pixels": "allow", **settings}
    )


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all samples read from now on."""
    keys: list[str] = []
    original: Callable[..., object] = Digits.read

    def read(self: Digits, sample: RawSample) -> object:
        keys.append(sample.key)
        return original(self, sample)

    monkeypatch.setattr(Digits, "read", read)
    return keys


def test_prepare__who_was_overtaken_stops_and_leaves_the_newer_set_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, uri = tmp_path / "set", str(tmp_path / "lease")
    overtaken, newer = take_lease(uri, "step prepare"), take_lease(uri, "step prepare")
    prepare_shards(DIGITS, str(folder), progress=lambda _: None, lease=newer)
    before = sums(folder)
    changed = DIGITS.model_copy(update={"samples_per_shard": 5})
    with pytest.raises(LeaseLost, match="step prepare was taken over"):
        prepare_shards(changed, str(folder), progress=lambda _: None, lease=overtaken)
    assert sums(folder) == before
    # Overtaken on the way: it finishes its shard and no more.
    keys, read = count_calls(monkeypatch), Digits.read

    def take_over(self: Digits, sample: RawSample) -> object:
        if len(keys) == 1:
            take_lease(uri, "step prepare")
        return read(self, sample)

    monkeypatch.setattr(Digits, "read", take_over)
    with pytest.raises(LeaseLost):
        prepare_shards(DIGITS, str(tmp_path / "other"), progress=lambda _: None, lease=newer)
    assert len(keys) == DIGITS.samples_per_shard
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_prepare__twice_from_scratch_gives_the_same_bytes(tmp_path: Path) -> None:
    first, lines = run(DIGITS, tmp_path / "first")
    second, _ = run(DIGITS, tmp_path / "second")
    assert sums(tmp_path / "first") == sums(tmp_path / "second")
    assert set(sums(tmp_path / "first")) == {
        *(f"train-0000{n}.tar" for n in range(3)),
        *(f"rows/train-0000{n}.parquet" for n in range(3)),
        "val-00000.tar",
        "rows/val-00000.parquet",
        "index.parquet",
        "quarantine.parquet",
        "manifest.json",
    }
    assert (first.digest, first.splits) == (second.digest, second.splits)
    assert (first.splits["train"].num_samples, first.splits["val"].num_samples) == (10, 3)
    assert first == check_shard_set(str(tmp_path / "first")).shard_set
    assert lines[-3].startswith("prepare digits: 4/4 shards, 13/13 images (100%), 0 rejected, ")
    assert lines[-3].endswith("ETA 0:00")
    assert lines[-2].startswith("prepare digits: val shows no pixel of '")
    place = tmp_path / "first"
    assert lines[-1] == f"prepare digits: 13 images = 13 in 4 shards + 0 in quarantine.parquet; published {place}"


def test_prepare__a_finished_set_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run(DIGITS, tmp_path)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    keys = count_calls(monkeypatch)
    again, lines = run(DIGITS, tmp_path)
    assert again == first
    assert not keys
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times
    assert "is up to date" in lines[-1]


def test_prepare__only_what_is_missing_or_damaged_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(DIGITS, tmp_path)
    whole = sums(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "train-00001.tar.0badcafe.partial").write_bytes(b"left by a killed task")
    (tmp_path / "rows" / "val-00000.parquet").unlink()
    shard = tmp_path / "train-00002.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 255
    shard.write_bytes(data)
    keys = count_calls(monkeypatch)
    run(DIGITS, tmp_path)
    assert keys == ["train-000008", "train-000009", "val-000000", "val-000001", "val-000002"]
    assert sums(tmp_path) == whole


def test_prepare__rows_of_an_old_plan_never_vouch_for_a_new_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(DIGITS, tmp_path / "a")
    other = DIGITS.model_copy(update={"seed": 1})
    monkeypatch.setattr(shard_task, "publish_parquet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(other, tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a" / "manifest.json").exists()
    run(DIGITS, tmp_path / "a")
    run(DIGITS, tmp_path / "b")
    assert sums(tmp_path / "a") == sums(tmp_path / "b")


def test_prepare__smaller_set_in_the_same_place_leaves_nothing_behind(tmp_path: Path) -> None:
    run(DIGITS, tmp_path / "a")
    smaller = DIGITS.model_copy(update={"max_samples_per_split": 3})
    shard_set, _ = run(smaller, tmp_path / "a")
    run(smaller, tmp_path / "b")
    assert sums(tmp_path / "a") == sums(tmp_path / "b")
    assert shard_set.splits["train"].num_samples == 3
    keys = pq.read_table(tmp_path / "a" / "index.parquet")["key"].to_pylist()
    assert keys == [
        "train-000000",
        "train-000003",
        "train-000006",
        "val-000000",
        "val-000001",
        "val-000002",
    ]


def test_prepare__a_changed_source_file_changes_its_shard_only(camvid: Path, tmp_path: Path) -> None:
    before, _ = run(camvid_config(camvid), tmp_path / "out")
    old = sums(tmp_path / "out")
    Image.fromarray(np.full((8, 10), 9, dtype=np.uint8)).save(camvid / "trainannot" / "2.png")
    after, _ = run(camvid_config(camvid), tmp_path / "out")
    new = sums(tmp_path / "out")
    assert {name for name in old if name.endswith(".tar") and old[name] != new[name]} == {"train-00001.tar"}
    assert before.digest != after.digest
    assert before.splits["val"] == after.splits["val"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            "unknown id",
            r"/trainannot/3\.png holds label id 77, outside the class list \(0-10, 11 = unlabelled\); corr",
        ),
        (
            "size",
            r"/train/3\.png is 8x10 \(height x width\) but its label map .*/3\.png is 4x10; give both the",
        ),
        ("image", r"/train/3\.png cannot be decoded \(unknown format\); replace the file"),
        ("format", r"/train/3\.png is GIF, none of JPEG, PNG, TIFF, WebP and BMP; convert it to PNG; replace"),
        ("label", r"/trainannot/3\.png is missing: there is no such label map; add it"),
    ],
)
def test_prepare__bad_sample_is_one_clear_error(camvid: Path, tmp_path: Path, damage: str, message: str) -> None:
    image, label = camvid / "train" / "3.png", camvid / "trainannot" / "3.png"
    if damage == "unknown id":
        Image.fromarray(np.full((8, 10), 77, dtype=np.uint8)).save(label)
    elif damage == "size":
        Image.fromarray(np.zeros((4, 10), dtype=np.uint8)).save(label)
    elif damage == "image":
        image.write_bytes(b"not an image")
    elif damage == "format":
        Image.new("RGB", (10, 8)).save(image, "GIF")
    else:
        label.unlink()
    with pytest.raises(UserError, match=message) as caught:
        run(camvid_config(camvid), tmp_path / "fail")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fail" / "manifest.json").exists()
    assert not list((tmp_path / "fail").rglob("*.partial"))

    lenient = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.125)
    shard_set, lines = run(lenient, tmp_path / "lenient")
    assert (shard_set.num_quarantined, shard_set.splits["train"].num_samples) == (1, 5)
    assert "8/8 images (100%), 1 rejected" in lines[-3]
    assert "8 images = 7 in 4 shards + 1 in quarantine.parquet" in lines[-1]
    rejected = pq.read_table(tmp_path / "lenient" / "quarantine.parquet").to_pylist()
    assert [(row["split"], row["key"]) for row in rejected] == [("train", "3")]
    assert rejected[0]["file"] in {str(image), str(label)}
    assert rejected[0]["remedy"]

    strict = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.12)
    with pytest.raises(UserError, match=r"1 of 8 samples are bad, more than .* 0\.12 allows.*The first: .*3\.png"):
        run(strict, tmp_path / "strict")
    # What the lenient policy let pass still fails under the others.
    with pytest.raises(UserError, match=r"1 of 8 samples are bad"):
        run(strict, tmp_path / "lenient")
    with pytest.raises(UserError, match=message):
        run(camvid_config(camvid), tmp_path / "lenient")


def test_prepare__all_bad_samples_are_told_at_once(camvid: Path, tmp_path: Path) -> None:
    for place in ("trainannot/1", "trainannot/5", "valannot/0"):
        Image.fromarray(np.full((8, 10), 77, dtype=np.uint8)).save(camvid / f"{place}.png")
    (camvid / "trainannot/4.png").unlink()
    lines: list[str] = []
    with pytest.raises(UserError) as caught:
        prepare_shards(camvid_config(camvid), str(tmp_path / "out"), progress=lines.append)
    message = str(caught.value).splitlines()
    lead = "4 of 8 samples are bad; segvit check lists all of them. The first: "
    assert message[0].startswith(f"{lead}{camvid}/trainannot/1.png holds label id 77")
    # One a shard, in the order of the data.
    assert message[1] == f"Others: {camvid}/trainannot/4.png, {camvid}/valannot/0.png"
    assert lines[0].startswith(f"prepare camvid: {camvid}/trainannot/1.png holds label id 77")
    assert lines[0].endswith(". Looking for others")
    assert not (tmp_path / "out/manifest.json").exists()
    # What was mended is done again, the rest is not.
    for place in ("trainannot/1", "trainannot/4", "trainannot/5", "valannot/0"):
        Image.fromarray(np.full((8, 10), 1, dtype=np.uint8)).save(camvid / f"{place}.png")
    shard_set, _ = run(camvid_config(camvid), tmp_path / "out")
    again, _ = run(camvid_config(camvid), tmp_path / "afresh")
    assert shard_set.digest == again.digest


def test_prepare__split_without_images_or_without_good_ones(camvid: Path, tmp_path: Path) -> None:
    for label in (camvid / "valannot").iterdir():
        label.write_bytes(b"")
    lenient = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=1.0)
    with pytest.raises(UserError, match="no sample of split 'val' is good"):
        run(lenient, tmp_path / "out")
    for folder in ("val", "valannot"):
        for file in (camvid / folder).iterdir():
            file.unlink()
    with pytest.raises(UserError, match=r"camvid has no images in split 'val' below .*; check data\.root"):
        run(lenient, tmp_path / "out")


def test_prepare__two_images_of_one_name(camvid: Path, tmp_path: Path) -> None:
    (camvid / "train" / "3.PNG").write_bytes((camvid / "train" / "3.png").read_bytes())
    if len(list((camvid / "train").iterdir())) == 6:
        pytest.skip("the file system takes 3.PNG and 3.png for one file")
    with pytest.raises(UserError, match=r"another image in split 'train' has this name; rename one"):
        run(camvid_config(camvid), tmp_path / "out")


def test_prepare__remote_target(tmp_path: Path) -> None:
    remote = prepare_shards(DIGITS, "memory://prepared", progress=lambda _: None)
    local, _ = run(DIGITS, tmp_path)
    assert remote.digest == local.digest
    assert check_shard_set("memory://prepared").shard_set == remote


def test_prepare__relative_paths_become_absolute(camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shard_set, _ = run(camvid_config(Path("camvid")), Path("out"))
    assert shard_set.uri == str(tmp_path / "out")
    Image.fromarray(np.full((8, 10), 77, dtype=np.uint8)).save(camvid / "trainannot" / "0.png")
    with pytest.raises(UserError, match=f"^{camvid}/trainannot/0.png holds"):
        run(camvid_config(Path("camvid")), Path("out"))


def test_prepare__progress_is_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 100.0, 0.8))
    monkeypatch.setattr("pipeline.shards.prepare.time.monotonic", lambda: float(next(clock)))
    _, lines = run(DIGITS.model_copy(update={"samples_per_shard": 1}), tmp_path)
    # 13 shards, one every 0.8 s: a line at every third, and at the last.
    assert [int(line.split()[2].split("/")[0]) for line in lines[:-2]] == [3, 6, 9, 12, 13]


@pytest.mark.skipif("SEGVIT_DATA" not in os.environ, reason="SEGVIT_DATA does not name a folder with camvid/")
def test_real_camvid__plain_webdataset_reads_all_of_it(tmp_path: Path) -> None:
    root = Path(os.environ["SEGVIT_DATA"]) / "camvid"
    config = DataConfig(dataset="camvid", root=str(root), samples_per_shard=16, max_samples_per_split=24)
    shard_set, _ = run(config, tmp_path)
    for split in ("train", "val"):
        assert shard_set.splits[split].num_samples == 24
        plain = webdataset.WebDataset([str(tmp_path / f"{split}-0000{n}.tar") for n in range(2)], shardshuffle=False)
        samples = list(plain)
        assert len({sample["__key__"] for sample in samples}) == len(samples) == 24
        for sample in samples[:3]:
            name = sample["__key__"].rsplit("/", 1)[-1] + ".png"
            assert sample["png"] == (root / split / name).read_bytes()
            label = np.asarray(Image.open(root / f"{split}annot" / name))
            written = next(iter(webdataset.WebDataset(sample["__url__"], shardshuffle=False).decode("rgb8")))
            assert written["label.png"].shape == (*label.shape, 3)


def test_prepare__equal_images_stay_once_and_evaluation_keeps_them(camvid: Path, tmp_path: Path) -> None:
    same = (camvid / "train" / "1.png").read_bytes()
    for place in ("train/2", "train/4", "val/1"):
        (camvid / f"{place}.png").write_bytes(same)
    (camvid / "train" / "5.png").write_bytes((camvid / "train" / "0.png").read_bytes())
    with pytest.raises(
        UserError, match=r"train/1\.png is the same image, byte for byte, as .*/val/1\.png of split val"
    ):
        run(camvid_config(camvid), tmp_path / "fail")
    assert not (tmp_path / "fail" / "manifest.json").exists()
    strict = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.4)
    with pytest.raises(UserError, match=r"4 of 8 samples are bad"):
        run(strict, tmp_path / "out")

    lenient = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.5)
    shard_set, lines = run(lenient, tmp_path / "out")
    assert (shard_set.splits["train"].num_samples, shard_set.splits["val"].num_samples) == (2, 2)
    assert "4 duplicate images; writing 3 shards without them" in lines[-3]
    assert "8 images = 4 in 4 shards + 4 in quarantine.parquet" in lines[-1]
    rows = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    copies = {"1": f"{camvid}/val/1.png of split val", "5": f"{camvid}/train/0.png of split train"}
    assert [(row["split"], row["key"], row["file"], row["reason"]) for row in rows] == [
        (
            "train",
            key,
            f"{camvid}/train/{key}.png",
            f"is the same image, byte for byte, as {copies['5' if key == '5' else '1']}",
        )
        for key in ("1", "2", "4", "5")
    ]
    index = pq.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert [row["key"] for row in index] == ["0", "3", "0", "1"]
    for row in index:
        data = (tmp_path / "out" / row["shard"]).read_bytes()
        image = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
        assert image == (camvid / row["split"] / f"{row['key']}.png").read_bytes()
    # The shard that lost both of its samples is an archive of none, which any reader takes.
    assert not list(
        webdataset.WebDataset(str(tmp_path / "out" / "train-00002.tar"), shardshuffle=False, empty_check=False)
    )


def test_prepare__duplicates_come_out_the_same_by_any_way(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (camvid / "train" / "2.png").write_bytes((camvid / "val" / "0.png").read_bytes())
    lenient = camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.5)
    run(lenient, tmp_path / "whole")
    # Interrupted after the first pass, and after the tar of the second without its rows.
    for name, last in (("_revise_shards", None), ("_publish_set", "rows/train-00001.parquet")):
        with monkeypatch.context() as patch:
            patch.setattr(f"pipeline.shards.prepare.{name}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(lenient, tmp_path / name)
        if last:
            (tmp_path / name / last).unlink()
        run(lenient, tmp_path / name)
        assert sums(tmp_path / name) == sums(tmp_path / "whole")
    # The image that stayed goes: the other comes back, and its shard is made from the source again.
    other = Image.new("RGB", (10, 8), (99, 99, 99))
    other.save(camvid / "val" / "0.png")
    run(lenient, tmp_path / "whole")
    run(lenient, tmp_path / "afresh")
    assert sums(tmp_path / "whole") == sums(tmp_path / "afresh")
    keys = pq.read_table(tmp_path / "whole" / "index.parquet")["key"].to_pylist()
    assert keys == ["0", "1", "2", "3", "4", "5", "0", "1"]


def test_prepare__second_pass_copies_and_decodes_nothing(
    camvid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (camvid / "train" / "2.png").write_bytes((camvid / "val" / "0.png").read_bytes())
    checked: list[str] = []

    def check(dataset: object, sample: RawSample, *rest: object) -> object:
        checked.append(sample.image.removeprefix(f"{camvid}/"))
        return check_sample(dataset, sample, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_task, "check_sample", check)
    run(camvid_config(camvid, on_bad_sample="quarantine", max_quarantined_fraction=0.5), tmp_path / "out")
    assert checked == [*(f"train/{number}.png" for number in range(6)), "val/0.png", "val/1.png"]


def test_prepare__tells_its_step_of_every_shard(tmp_path: Path) -> None:
    told: Any = Told()
    digits = DigitsConfig(num_train=7, num_val=3, image_size=96)
    config = DataConfig(dataset="digits", samples_per_shard=4, digits=digits)
    prepare_shards(config, str(tmp_path / "set"), progress=lambda _line: None, step=told)
    assert [(one.done, one.total, one.unit, one.note) for one in told.progress] == [
        (4, 10, "images", "1/3 shards"),
        (7, 10, "images", "2/3 shards"),
        (10, 10, "images", "3/3 shards"),
    ]
    assert told.progress[-1].seconds_left == 0
    counted = [(value, tags) for metric, value, tags in told.exported if metric is PREPARED_SAMPLES]
    assert counted == [(4, {"split": "train"}), (3, {"split": "train"}), (3, {"split": "val"})]
