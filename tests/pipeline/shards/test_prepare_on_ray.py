"""Prepare as Ray tasks gives what it gives in one process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import DataConfig, DigitsConfig
from pipeline.shards.prepare import prepare_shards

DIGITS = DataConfig(dataset="digits", samples_per_shard=4, digits=DigitsConfig(num_train=10, num_val=3))


def sums(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


_ON_RAY = """
import sys, ray
from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
good = DataConfig.model_validate_json(sys.argv[1])
print("DIGEST", prepare_shards(good, sys.argv[2], max_tasks=2, progress=lambda line: None).digest)
try:
    bad = DataConfig(dataset="camvid", root=sys.argv[3], samples_per_shard=2)
    prepare_shards(bad, sys.argv[2] + "-bad", max_tasks=2, progress=lambda line: None)
except UserError as error:
    print("ERROR", type(error).__name__, error)
"""


def test_prepare__on_ray_gives_the_same_set_and_the_same_errors(tmp_path: Path) -> None:
    expected = prepare_shards(DIGITS, str(tmp_path / "here"), progress=lambda line: None)
    camvid = tmp_path / "camvid"
    for split in ("train", "val"):
        for folder, ids in ((split, 0), (f"{split}annot", 77 if split == "val" else 0)):
            (camvid / folder).mkdir(parents=True)
            Image.fromarray(np.full((8, 10), ids, dtype=np.uint8)).save(camvid / folder / "1.png")
    command = [sys.executable, "-c", _ON_RAY, DIGITS.model_dump_json(), str(tmp_path / "there"), str(camvid)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    output = finished.stdout.splitlines()
    assert f"DIGEST {expected.digest}" in output, finished.stderr
    assert sums(tmp_path / "here") == sums(tmp_path / "there")
    (error,) = [line for line in output if line.startswith("ERROR")]
    assert error.startswith(f"ERROR UserError {camvid}/valannot/1.png holds label id 77")
