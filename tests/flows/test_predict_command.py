"""`segvit predict` from folders and archives to label maps and tables, whole, interrupted and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows.cli import main
from flows.present.predictions import PredictionLog
from pipeline.evaluation.predict import FailedImage, Prediction, PredictionPlan
from tests.flows.facts import facts
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))[0].uri


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """A folder of three images and a bad one, and an archive of one."""
    folder = tmp_path / "photos"
    for index, name in enumerate(("a.png", "night/b.jpg", "night/c.png")):
        save_noise(folder / name, index)
    (folder / "bad.png").write_text("no image")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as packed:
        packed.write(save_noise(tmp_path / "d.png", 4), "packed/d.png")
    return str(folder), str(tmp_path / "more.zip")


def save_noise(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((48, 32), Image.Resampling.NEAREST).save(path)
    return path


def predict(*arguments: str | Path) -> int:
    try:
        main(["predict", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def label_maps(folder: Path) -> dict[str, Any]:
    """The label maps below a folder; fails where one is not whole."""
    found = {}
    for file in sorted(folder.rglob("*.labels.png")):
        with Image.open(file) as picture:
            found[file.relative_to(folder).as_posix()] = np.asarray(picture)
    return found


def test_predict__a_folder_and_an_archive_with_tables_and_one_bad_image(
    model: str, sources: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, coco, areas = tmp_path / "out", tmp_path / "coco.json", tmp_path / "areas.parquet"
    options = ("--out", out, "--batch-size", 2, "--coco", coco, "--areas", areas)
    assert predict(model, *sources, *map(str, options), "--json") == 1
    printed = capfd.readouterr()
    given = json.loads(printed.out)
    assert given["failed"] == [{"image": f"{sources[0]}/bad.png", "reason": "cannot be decoded (unknown format)"}]
    assert f"failed: {sources[0]}/bad.png cannot be decoded (unknown format)\n" in printed.err
    assert "images: 4 predicted, 1 failed" in printed.err
    maps = label_maps(out)
    assert list(maps) == ["a.labels.png", "night/b.labels.png", "night/c.labels.png", "packed/d.labels.png"]
    assert all(Path(str(name).replace(".labels.", ".overlay.")).suffix == ".png" for name in maps)
    assert sorted(one["labels"] for one in given["predicted"]) == [str(out / name) for name in maps]
    rows = pq.read_table(areas).to_pylist()
    assert [row["image"] for row in rows[::3]] == ["a.png", "night/b.jpg", "night/c.png", "packed/d.png"]
    for row in rows:
        labels = maps[re.sub(r"\.\w+$", ".labels.png", row["image"])]
        assert row["pixels"] == (labels == row["class_id"]).sum()
        assert row["share"] == row["pixels"] / labels.size
    annotated = json.loads(coco.read_bytes())
    assert [image["file_name"] for image in annotated["images"]] == [row["image"] for row in rows[::3]]
    shown = [(row["image"], row["class"], row["pixels"]) for row in rows if row["pixels"]]
    names = {image["id"]: image["file_name"] for image in annotated["images"]}
    classes = {category["id"]: category["name"] for category in annotated["categories"]}
    assert shown == [
        (names[one["image_id"]], classes[one["category_id"]], one["area"]) for one in annotated["annotations"]
    ]


def test_predict__goes_on_where_it_ended_and_tables_hold_all(
    model: str, sources: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "bad.png").unlink()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tables = [("--coco", str(tmp_path / f"{one}.json"), "--areas", str(tmp_path / f"{one}.parquet")) for one in "ab"]
    assert predict(model, *sources, "--out", whole, *tables[0]) == 0
    assert predict(model, sources[1], "--out", parts) == 0
    given = facts(capfd, "predict", model, *sources, "--out", str(parts), "--skip-existing", *tables[1])
    assert given["skipped"] == [f"{sources[1]}/packed/d.png"]
    assert len(given["predicted"]) == 3
    for suffix in ("json", "parquet"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    capfd.readouterr()
    assert predict(model, *sources, "--out", parts, "--skip-existing") == 0
    assert "images: 0 predicted, 4 skipped, which exist, 0 failed" in capfd.readouterr().err
    assert predict(model, *sources, "--out", tmp_path / "new", *tables[0]) == 1
    assert re.search(r"a\.json exists; give --overwrite or --skip-existing", capfd.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "error: no image at none.png; check the path"),
        (["x.png", "--overwrite", "--skip-existing"], "error: --overwrite replaces the files that --skip-existing"),
        (["x.png", "--coco", "t", "--areas", "t"], "error: --coco and --areas both name t; give each a file"),
        (["x.png", "--coco", "no://t"], "error: no://t cannot be written (Protocol not known: no"),
    ],
)
def test_predict__mistakes_are_told_before_anything_is_written(
    arguments: list[str], message: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_noise(tmp_path / "x.png", 0)
    given = [str(tmp_path / one) if one == "x.png" else one for one in arguments]
    assert predict(model, *given, "--out", tmp_path / "out") == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predict__killed_leaves_whole_files_and_the_rest_follows(model: str, tmp_path: Path) -> None:
    for index in range(30):
        save_noise(tmp_path / "photos" / f"{index:02}.png", index)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flows.cli", "predict", model, str(tmp_path / "photos"), "--out", str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not list(out.glob("*.labels.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file: (out / file).stat().st_mtime_ns for file in label_maps(out)}
    assert 0 < len(kept) < 30
    subprocess.run([*command, "--skip-existing"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert len(label_maps(out)) == len(list(out.glob("*.overlay.png"))) == 30
    assert all((out / file).stat().st_mtime_ns == changed for file, changed in kept.items())


def test_prediction_log__counts_rate_and_time_left() -> None:
    from rich.console import Console

    tasks: list[Any] = [type("Task", (), {"labels": index}) for index in range(10)]
    unusable = FailedImage(image="u", reason="is bad")
    log = PredictionLog(Console(quiet=True), PredictionPlan(tasks, tasks[:2], [unusable]))
    assert log.progress(2.0) == "0 of 8 images, 1 failed, 0 images/s, unknown left"
    log.add(Prediction(image="a", labels="l", overlay=None, classes={}))
    log.add(FailedImage(image="b", reason="is bad"))
    assert log.progress(4.0) == "2 of 8 images, 2 failed, 0.5 images/s, 12.0 s left"
