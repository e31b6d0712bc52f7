"""kill -9 of prepare at random instants: each rerun must complete, byte-identical to an undisturbed run.

    python -m tests.faults.kill_prepare [--kills 30] [--seed 0]

Every fifth run is on Ray, the others are without. Fails for a differing or stray file, in the shard set or in the
temporary folder, and for a process that outlives the killed one by half a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.processes import MARK, PYTHONPATH, wait_until_gone

NUM_TRAIN, NUM_VAL = 48, 16
NUM_REJECTED, NUM_DUPLICATES = 1, 2
RAY_EVERY = 5
CHILD = """
import sys
from pipeline.config import DataConfig
from pipeline.shards.prepare import prepare_shards

root, target, temporary = sys.argv[1:]
if temporary:
    import ray
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
config = DataConfig(
    dataset="camvid", root=root, samples_per_shard=4, on_bad_sample="quarantine", max_quarantined_fraction=0.1
)
print("START", flush=True)
shard_set = prepare_shards(config, target, max_tasks=2, progress=lambda line: None)
print("END", shard_set.num_quarantined, sum(split.num_samples for split in shard_set.splits.values()), flush=True)
"""


def build_source(root: Path) -> None:
    """A CamVid miniature of 240x320 pixels with a broken image, a duplicate one, and one that leaks."""
    rng = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(root / split / f"{number:03d}.png")
            label = np.kron(rng.integers(0, 12, (12, 16), dtype=np.uint8), np.ones((20, 20), dtype=np.uint8))
            Image.fromarray(label).save(root / f"{split}annot" / f"{number:03d}.png")
    (root / "train" / "007.png").write_bytes(b"broken")
    shutil.copy(root / "train" / "003.png", root / "train" / "030.png")
    shutil.copy(root / "train" / "020.png", root / "val" / "009.png")


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Prepare:
    """One process that prepares `root` to `target`."""

    def __init__(self, root: Path, target: Path, on_ray: bool) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = Path(tempfile.mkdtemp(prefix="kp", dir="/tmp"))
        self.on_ray = on_ray
        environment = os.environ | {MARK: self.mark, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        # Ray's own folder is apart: what it leaves there is not ours.
        ray_folder = str(self.temporary / "r") if on_ray else ""
        (self.temporary / "t").mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), str(target), ray_folder],
            env=environment | {"TMPDIR": str(self.temporary / "t")},
            stdout=subprocess.PIPE,
            stderr=(self.temporary / "errors").open("w"),
            text=True,
        )
        assert self.process.stdout is not None
        self._output = self.process.stdout
        line = self._output.readline()
        if line != "START\n":
            raise SystemExit(f"prepare did not start: {line} {(self.temporary / 'errors').read_text()}")

    def finish(self) -> None:
        """Wait for the end; raises SystemExit where it is not a good one."""
        output = self._output.read()
        self.process.wait(timeout=60)
        num_bad = NUM_REJECTED + NUM_DUPLICATES
        if output.split() != ["END", str(num_bad), str(NUM_TRAIN + NUM_VAL - num_bad)]:
            raise SystemExit(
                f"prepare ended with {self.process.returncode}: {output} {(self.temporary / 'errors').read_text()}"
            )
        self._clean()

    def kill(self) -> None:
        """SIGKILL to the process alone; its children have to notice."""
        self.process.kill()
        self.process.wait()
        wait_until_gone(self.mark)
        self._clean()

    def _clean(self) -> None:
        stray = [] if self.on_ray else sorted(path.name for path in (self.temporary / "t").rglob("*"))
        shutil.rmtree(self.temporary, ignore_errors=True)
        if stray:
            raise SystemExit(f"prepare left {stray} in the temporary folder")


def main() -> None:
    """Run all kills and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root, reference = Path(folder) / "raw", Path(folder) / "reference"
        build_source(root)
        durations = []
        for target in (reference, Path(folder) / "again"):
            started = Prepare(root, target, on_ray=False)
            start = time.monotonic()
            started.finish()
            durations.append(time.monotonic() - start)
        # The first is slower than those to come; kills shall fall into the work, not behind it.
        duration, expected = min(durations), sums(reference)
        print(f"undisturbed: {duration:.2f} s, {len(expected)} files", flush=True)
        kills = 0
        while kills < options.kills:
            on_ray = kills % RAY_EVERY == 1
            target = Path(folder) / f"target-{kills}"
            # On Ray the tasks start after the workers have, seconds later.
            longest = duration * (8 if on_ray else 0.9)
            moments = []
            for _ in range(min(rng.choice([1, 1, 2]), options.kills - kills)):
                run = Prepare(root, target, on_ray)
                moments.append(rng.uniform(0, longest))
                time.sleep(moments[-1])
                run.kill()
                kills += 1
            left = len(sums(target))
            Prepare(root, target, on_ray).finish()
            if sums(target) != expected:
                differing = sorted(dict(sums(target).items() ^ expected.items()))
                raise SystemExit(f"killed after {moments} s, the rerun differs in {differing}")
            when = ", ".join(f"{moment:.2f}" for moment in moments)
            print(f"kill {kills}: {'on Ray' if on_ray else 'no Ray'}, after {when} s, {left} files left: identical")
            sys.stdout.flush()
            shutil.rmtree(target)
    print(f"{kills} kills, every rerun byte-identical, no stray file, no orphan process")


if __name__ == "__main__":
    main()
