"""Prepare in images/s and MB/s, against what plainly copying the same files takes, in one run.

    SEGVIT_DATA=/data python -m tests.benchmarks.bench_prepare [--images 400] [--repeats 3] [--ray]

Two data sets: camvid below SEGVIT_DATA, where it is there, and generated JPEGs of ADE20K's mean size, 683x512.
Copies and prepares take turns, the medians are compared; both flush what they write to the disk. MB are those of
the source's files. Without --ray all is done in one process; with it, in a task a core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.shards.prepare import prepare_shards


def build_ade_sized(root: Path, count: int) -> None:
    """A CamVid layout of JPEG content: `count` images to train on, one to evaluate on, about 60 kB each."""
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 1)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (43, 57, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((683, 512), Image.Resampling.BICUBIC), dtype=np.int16)
            grain = rng.normal(0, 6, pixels.shape).astype(np.int16)
            image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
            image.save(root / split / f"{number:05d}.png", "JPEG", quality=80)
            regions = Image.fromarray(rng.integers(0, 12, (8, 10), dtype=np.uint8))
            label = regions.resize((683, 512), Image.Resampling.NEAREST).rotate(rng.uniform(-20, 20), fillcolor=11)
            label.save(root / f"{split}annot" / f"{number:05d}.png")


def copy_files(root: Path, target: Path) -> None:
    """Every file of the data set, flushed to the disk."""
    for path in root.rglob("*.png"):
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, copy.open("wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
    os.sync()


def compare(name: str, root: Path, repeats: int, max_tasks: int, max_long_side: int | None = None) -> None:
    """Print one line: the rates of copying and of preparing `root`, and their ratio."""
    splits = [split for split in ("train", "val", "test") if (root / split).is_dir()]
    files = [path for split in splits for folder in (split, f"{split}annot") for path in (root / folder).glob("*.png")]
    num_images, num_mb = len(files) // 2, sum(path.stat().st_size for path in files) / 1e6
    config = DataConfig(
        dataset="camvid",
        root=str(root),
        on_bad_sample="quarantine",
        max_quarantined_fraction=1.0,
        max_long_side=max_long_side,
    )
    copying, preparing = [], []
    for number in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            copy_files(root, Path(folder) / "copy")
            middle = time.perf_counter()
            prepare_shards(config, f"{folder}/out", max_tasks=max_tasks, progress=lambda line: None)
            end = time.perf_counter()
        # The first round warms up the page cache, the imports and Ray's workers.
        if number:
            copying.append(middle - start)
            preparing.append(end - middle)
    copied, prepared = statistics.median(copying), statistics.median(preparing)
    print(
        f"{name:24} {num_images:5} images {num_mb:7.1f} MB | copy {num_images / copied:8.0f} images/s "
        f"{num_mb / copied:7.1f} MB/s | prepare {num_images / prepared:6.0f} images/s {num_mb / prepared:6.1f} MB/s "
        f"| {copied / prepared:.3f} of the copy rate",
        flush=True,
    )


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    max_tasks = 1
    if options.ray:
        import ray

        ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
        max_tasks = os.cpu_count() or 1
    print(f"{os.cpu_count()} cores; {f'{max_tasks} Ray tasks' if options.ray else 'one process'}")
    data = os.environ.get("SEGVIT_DATA")
    if data:
        compare("camvid", Path(data) / "camvid", options.repeats, max_tasks)
    with tempfile.TemporaryDirectory() as folder:
        build_ade_sized(Path(folder), options.images)
        compare("683x512 JPEG", Path(folder), options.repeats, max_tasks)
        compare("683x512 JPEG to 512", Path(folder), options.repeats, max_tasks, max_long_side=512)


if __name__ == "__main__":
    main()
