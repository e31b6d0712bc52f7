from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import segvit
from pipeline import storage
from pipeline.datasets.tree import Entry
from pipeline.errors import UserError
from pipeline.evaluation import predict
from pipeline.evaluation.image_sources import SourceImage, list_images
from pipeline.evaluation.predict import FailedImage, Prediction, Segmenter, plan_predictions, predict_images
from pipeline.training.job import TrainJob
from pipeline.training.trainer import build_job_model
from segvit.image_files import decode_image

NAMES = [f"class {index}" for index in range(11)]
PALETTE = [[20 * index, 255 - 20 * index, 128] for index in range(11)]


@pytest.fixture
def checkpoint(make_job: Callable[..., TrainJob], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    segvit.save_checkpoint(
        tmp_path / "checkpoint", build_job_model(make_job()), {"class_names": NAMES, "palette": PALETTE}
    )
    return tmp_path / "checkpoint"


@pytest.fixture
def segmenter(checkpoint: Path) -> Segmenter:
    return Segmenter(checkpoint)


def save_noise(path: Path, size: tuple[int, int] = (50, 70), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_noise(tmp_path / "photo.png")


def predicted(
    segmenter: Segmenter, sources: Sequence[Path], target: Path, batch_size: int = 1, **options: Any
) -> list[Prediction | FailedImage]:
    plan = plan_predictions(list_images([str(source) for source in sources]), target, **options)
    return [*plan.failed, *predict_images(segmenter, plan.remaining, batch_size=batch_size)]


def written(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def label_map(path: str | Path) -> Any:
    with Image.open(path) as labels:
        assert labels.mode == "P"
        return np.asarray(labels)


def expected_labels(checkpoint: Path, photo: Path, **inference: Any) -> Any:
    model, _ = segvit.load_checkpoint(checkpoint)
    with Image.open(photo) as image:
        return segvit.predict(model, np.asarray(image.convert("RGB")), **inference).numpy()


def test_predict_images__label_png_holds_class_ids_and_overlay_has_a_legend(
    checkpoint: Path, segmenter: Segmenter, photo: Path, tmp_path: Path
) -> None:
    [one] = predicted(segmenter, [photo], tmp_path / "out")
    assert isinstance(one, Prediction)
    expected = expected_labels(checkpoint, photo)
    assert (label_map(one.labels) == expected).all()
    assert one.overlay is not None
    with Image.open(one.overlay) as overlay:
        assert overlay.width >= 70
        assert overlay.height > 50
    assert sum(one.classes.values()) == pytest.approx(1.0)
    assert set(one.classes) == {NAMES[index] for index in np.unique(expected)}


def test_predict_images__relative_paths_are_kept_and_overlays_left_out(segmenter: Segmenter, tmp_path: Path) -> None:
    for name in ("a.png", "day/b.png", "day/noon/c.v2.jpg"):
        save_noise(tmp_path / "photos" / name)
    predicted(segmenter, [tmp_path / "photos"], tmp_path / "out", overlays=False)
    assert written(tmp_path / "out") == {"a.labels.png", "day/b.labels.png", "day/noon/c.v2.labels.png"}


def test_predict_images__batches_of_one_size_give_what_single_images_give(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, size in enumerate([(50, 70), (48, 64), (50, 70), (50, 70), (48, 64), (32, 32)]):
        save_noise(tmp_path / "photos" / f"{index}.png", size, seed=index)
    predicted(segmenter, [tmp_path / "photos"], tmp_path / "single", overlays=False)
    sizes: list[tuple[int, int, int]] = []
    original = Segmenter.label_maps

    def noted(self: Segmenter, images: Any, batch_size: int) -> Any:
        sizes.append((len(images), *images[0].shape[:2]))
        return original(self, images, batch_size)

    monkeypatch.setattr(Segmenter, "label_maps", noted)
    predicted(segmenter, [tmp_path / "photos"], tmp_path / "batched", batch_size=2, overlays=False)
    assert sizes == [(2, 50, 70), (2, 48, 64), (1, 50, 70), (1, 32, 32)]
    for name in written(tmp_path / "single"):
        agreement = (label_map(tmp_path / "single" / name) == label_map(tmp_path / "batched" / name)).mean()
        assert agreement > 0.999
    sizes.clear()
    monkeypatch.setattr(predict, "MAX_WAITING_PIXELS", 7000)
    predicted(segmenter, [tmp_path / "photos"], tmp_path / "bounded", batch_size=9, overlays=False)
    # Never more than 7000 pixels and the one that comes wait.
    assert sizes == [(2, 50, 70), (1, 48, 64), (1, 50, 70), (1, 48, 64), (1, 32, 32)]


def test_segmenter__precision_in_place_of_the_registered_one(checkpoint: Path, tmp_path: Path) -> None:
    model, metadata = segvit.load_checkpoint(checkpoint)
    registered = {**metadata, "inference": {"flip": True, "precision": "bf16"}}
    segvit.save_checkpoint(tmp_path / "bf16", model, registered)
    assert Segmenter(tmp_path / "bf16").inference == {"flip": True, "precision": "bf16"}
    assert Segmenter(tmp_path / "bf16", "model").inference == {"flip": True, "precision": None}
    assert Segmenter(checkpoint, "bf16").inference == {"precision": "bf16"}


def test_predict_images__in_bf16_images_share_batches(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        save_noise(tmp_path / "photos" / f"{index}.png", seed=index)
    given: list[Any] = []
    original = segvit.predict_batch

    def noted(model: segvit.SegViT, images: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append((len(images), options))
        return original(model, images, **options)

    monkeypatch.setattr(segvit, "predict_batch", noted)
    predicted(Segmenter(checkpoint, "bf16"), [tmp_path / "photos"], tmp_path / "out", batch_size=2, overlays=False)
    assert given == [(2, {"precision": "bf16"}), (1, {"precision": "bf16"})]


def test_predict_images__windows_are_those_of_the_registered_model(
    checkpoint: Path, photo: Path, tmp_path: Path
) -> None:
    inference = {"mode": "slide", "crop": [48, 64], "stride": [16, 32], "flip": True}
    model, metadata = segvit.load_checkpoint(checkpoint)
    segvit.save_checkpoint(tmp_path / "windows", model, {**metadata, "inference": inference})
    [one] = predicted(Segmenter(tmp_path / "windows"), [photo], tmp_path / "out", batch_size=3)
    assert isinstance(one, Prediction)
    assert (label_map(one.labels) == expected_labels(checkpoint, photo, **inference)).all()


def test_predict_images__deep_images_are_scaled_by_the_models_range(checkpoint: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (32, 48)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.tif")
    [failed] = predicted(Segmenter(checkpoint), [tmp_path / "deep.tif"], tmp_path / "out")
    assert isinstance(failed, FailedImage)
    assert "no grey range says which values are black and white" in failed.reason
    model, metadata = segvit.load_checkpoint(checkpoint)
    segvit.save_checkpoint(tmp_path / "deep", model, {**metadata, "grey_range": [0, 4095]})
    [one] = predicted(Segmenter(tmp_path / "deep"), [tmp_path / "deep.tif"], tmp_path / "out")
    assert isinstance(one, Prediction)
    pixels = decode_image((tmp_path / "deep.tif").read_bytes(), (0, 4095))
    assert (label_map(one.labels) == segvit.predict(model, pixels).numpy()).all()


def test_predict_images__refuses_to_replace_unless_told(segmenter: Segmenter, photo: Path, tmp_path: Path) -> None:
    predicted(segmenter, [photo], tmp_path / "out")
    with pytest.raises(UserError, match="exists; give --overwrite to replace it, --skip-existing to keep it"):
        predicted(segmenter, [photo], tmp_path / "out")
    assert len(predicted(segmenter, [photo], tmp_path / "out", overwrite=True)) == 1
    with pytest.raises(UserError, match=r"photo.png is a file; give --out a folder"):
        predicted(segmenter, [photo], photo)


def test_plan_predictions__skip_existing_leaves_what_is_whole(segmenter: Segmenter, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save_noise(tmp_path / "photos" / name, (32, 32))
    images = list_images([str(tmp_path / "photos")])
    plan = plan_predictions(images, tmp_path / "out")
    # As an interrupted run leaves it: one image done, of the next one the overlay alone.
    steps = predict_images(segmenter, plan.tasks)
    next(steps)
    assert plan.tasks[1].overlay is not None
    plan.tasks[1].overlay.write_bytes(b"whole, for it appears by rename")
    before = plan.tasks[0].labels.stat().st_mtime_ns
    again = plan_predictions(images, tmp_path / "out", skip_existing=True)
    assert [task.image.path for task in again.done] == ["a.png"]
    assert [task.image.path for task in again.remaining] == ["b.png", "c.png"]
    assert len(list(predict_images(segmenter, again.remaining))) == 2
    assert plan.tasks[0].labels.stat().st_mtime_ns == before
    assert plan_predictions(images, tmp_path / "out", skip_existing=True).remaining == []
    assert len(plan_predictions(images, tmp_path / "out", overlays=False, skip_existing=True).done) == 3


def test_plan_predictions__one_output_name_is_told_apart_or_refused(tmp_path: Path, photo: Path) -> None:
    for name in ("x/a.png", "x/a.jpg", "x/b.png", "y/b.png"):
        save_noise(tmp_path / name, (32, 32))
    plan = plan_predictions(list_images([str(tmp_path / "x")]), tmp_path / "out")
    names = [task.labels.name for task in plan.tasks]
    assert names == ["a.jpg.labels.png", "a.png.labels.png", "b.labels.png"]
    both = list_images([str(tmp_path / "x"), str(tmp_path / "y")])
    with pytest.raises(UserError, match=r"x/b.png and .*y/b.png would both be written as b.png.labels.png; predict"):
        plan_predictions(both, tmp_path / "out")
    save_noise(tmp_path / "x" / "a.jpg.png", (32, 32))
    with pytest.raises(UserError, match=r"would both be written as a.jpg.labels.png"):
        plan_predictions(list_images([str(tmp_path / "x")]), tmp_path / "out")


def test_plan_predictions__what_was_written_into_a_source_is_no_image(segmenter: Segmenter, photo: Path) -> None:
    folder = photo.parent / "photos"
    save_noise(folder / "a.png", (32, 32))
    save_noise(folder / "b.overlay.png", (32, 32))
    for target in (folder, folder / "out"):
        predicted(segmenter, [folder / "a.png"], target)
        plan = plan_predictions(list_images([str(folder)]), target, skip_existing=True)
        assert "a.png" in [task.image.path for task in plan.tasks]
        assert not [task for task in plan.tasks if task.labels.parent == folder / "out" / "out"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../up.png", "leads out of its source"),
        ("/root.png", "leads out of its source"),
        ("a/memory://b.png", "holds '::' or '://'"),
        ("a::b.png", "holds '::' or '://'"),
        ("a\x1b[31m.png", "characters that cannot be shown"),
        ("a\udcff.png", "characters that cannot be shown"),
        ("ü" * 111 + ".png", "leaves no room for that of its outputs"),
        ("a/" * 500 + "b.png", "leaves no room for that of its outputs"),
    ],
)
def test_plan_predictions__paths_that_are_none_fail_and_the_others_go_on(
    path: str, reason: str, tmp_path: Path, photo: Path
) -> None:
    images = [SourceImage(path, Entry("memory://bad", "")), *list_images([str(photo)])]
    plan = plan_predictions(images, tmp_path / "out")
    assert [task.image.path for task in plan.tasks] == ["photo.png"]
    [failed] = plan.failed
    assert (failed.image, reason in failed.reason) == ("memory://bad", True)
    with_dots = plan_predictions([SourceImage("a..b\u202f.png", Entry("x", ""))], tmp_path / "out")
    assert with_dots.failed == []


def test_predict_images__a_bad_image_fails_and_the_others_go_on(segmenter: Segmenter, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save_noise(folder / "b.png", (32, 32))
    save_noise(folder / "d.png", (32, 32))
    (folder / "a.png").write_text("no image")
    (folder / "c.png").symlink_to("nothing")
    (folder / "e.jpg").write_bytes(save_noise(tmp_path / "whole.jpg").read_bytes()[:500])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "d.labels.png").mkdir()
    found = predicted(segmenter, [folder], tmp_path / "out", batch_size=2, overwrite=True)
    reasons = {Path(one.image).name: one.reason for one in found if isinstance(one, FailedImage)}
    assert set(reasons) == {"a.png", "c.png", "d.png", "e.jpg"}
    assert reasons["a.png"] == "cannot be decoded (unknown format)"
    assert reasons["c.png"] == "is not there"
    assert reasons["d.png"].startswith("its output has the place of another file (")
    assert reasons["e.jpg"].startswith("cannot be decoded (")
    assert [Path(one.image).name for one in found if isinstance(one, Prediction)] == ["b.png"]
    assert written(tmp_path / "out") == {"b.labels.png", "b.overlay.png", "d.overlay.png"}


def test_predict_images__links_in_an_archive_are_not_followed(segmenter: Segmenter, photo: Path) -> None:
    (photo.parent / "link.png").symlink_to(photo)
    with tarfile.open(photo.parent / "p.tar", "w") as tar:
        tar.add(photo.parent / "link.png", "link.png")
        tar.add(photo, "sub/photo.png")
    link, own = predicted(segmenter, [photo.parent / "p.tar"], photo.parent / "out")
    assert isinstance(link, FailedImage)
    assert link.reason == "is a link, which is not followed inside an archive; pack the file itself"
    assert isinstance(own, Prediction)
    assert own.labels == str(photo.parent / "out" / "sub" / "photo.labels.png")


def test_predict_images__an_image_too_large_for_the_device_fails_alone(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_noise(tmp_path / "photos" / "a.png", (64, 96))
    save_noise(tmp_path / "photos" / "b.png", (32, 32))
    original = segvit.predict_batch

    def limited(model: segvit.SegViT, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, images)

    monkeypatch.setattr(segvit, "predict_batch", limited)
    large, small = predicted(segmenter, [tmp_path / "photos"], tmp_path / "out")
    assert isinstance(large, FailedImage)
    assert large.reason.startswith("96x64 pixels need more memory than the device has")
    assert isinstance(small, Prediction)


def test_predict_images__nothing_half_written_where_the_disk_is_full(
    segmenter: Segmenter, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"predictions cannot be written: the disk is full at .*photo.overlay.png"):
        predicted(segmenter, [photo], tmp_path / "out")
    assert written(tmp_path / "out") == set()
    assert storage.exists(str(tmp_path / "out"))
