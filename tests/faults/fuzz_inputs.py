"""Damaged and hostile inputs to prepare: each must end in a quarantine row or one clear error.

    python -m tests.faults.fuzz_inputs [--inputs 2000] [--seed 0]

Every input is a CamVid miniature of which one file, one name or the archive around it is mutated. Fails for a
crash, for more than 20 seconds, for any other exception, for an error of several lines, for a file outside the
target, and for a process of more than 1.5 GiB. A mutation that leaves a readable sample may pass.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType

import numpy as np
from PIL import Image

from pipeline.config import DataConfig
from pipeline.errors import UserError
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_check import check_shard_set
from tests.faults.mutations import BYTES, hostile_name, pack, replace_by_special

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 20
MAX_ADDRESS_SPACE = 6 << 30
MAX_RSS_KIB = 1536 << 10
INPUTS_A_PROCESS = 250
OUTPUT = re.compile(r"(rows/)?((train|val)-\d{5}\.(tar|parquet)|index\.parquet|quarantine\.parquet|manifest\.json)")


def build_source(root: Path) -> None:
    """Two images to train on and one to evaluate on, 16x24 pixels; the first is a JPEG by content."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
            image.save(root / split / f"{number}.png", "PNG" if number else "JPEG")
            Image.fromarray(rng.integers(0, 12, (16, 24), dtype=np.uint8)).save(root / f"{split}annot/{number}.png")


def mutate(root: Path, rng: random.Random) -> tuple[str, Path]:
    """Change one thing in the data set at `root`: what it was, and where the data set is now."""
    file = root / rng.choice(["train/0.png", "train/1.png", "trainannot/0.png"])
    where = rng.choices(["bytes", "special", "name", "archive"], [60, 6, 8, 26])[0]
    if where == "bytes":
        kinds = list(BYTES)
        kind = rng.choices(kinds, [BYTES[name][0] for name in kinds])[0]
        file.write_bytes(BYTES[kind][1](file.read_bytes(), rng))
        return kind, root
    if where == "special":
        replace_by_special(file, rng)
        return "no plain file", root
    if where == "name":
        name = hostile_name(rng)
        for folder in ("train", "trainannot"):
            (root / folder / "1.png").rename(root / folder / f"{name}.png")
        return "hostile name", root
    archive = root.with_suffix(rng.choice([".tar", ".zip"]))
    pack(root, archive, rng)
    if rng.random() < 0.6:
        kind = rng.choice(["truncated", "bits flipped", "overwritten"])
        archive.write_bytes(BYTES[kind][1](archive.read_bytes(), rng))
        return f"{kind} archive", archive
    return "hostile archive", archive


def judge(case: Path, number: int, seed: int) -> dict[str, str]:
    """Prepare input `number` below the empty folder `case`: its kind, its outcome and, if that is bad, why."""
    (case / "here").mkdir(parents=True)
    os.chdir(case / "here")
    root, target = case / "raw", case / "out"
    build_source(root)
    kind, root = mutate(root, random.Random(f"{seed}-{number}"))
    before = {path for path in case.rglob("*") if target not in path.parents}
    lenient = {"on_bad_sample": "quarantine", "max_quarantined_fraction": 1.0, "classes_without_pixels": "allow"}
    config = DataConfig.model_validate({"dataset": "camvid", "root": str(root), **lenient})
    try:
        shard_set = prepare_shards(config, str(target), progress=lambda line: None)
        check_shard_set(str(target))
        outcome = "quarantined" if shard_set.num_quarantined else "good"
        why = ""
    except UserError as error:
        outcome, why = "error", str(error)
        if "\n" in why or len(why) > 2000 or (target / "manifest.json").exists():
            outcome = "BAD ERROR"
    except BaseException as error:
        outcome, why = "CRASH", f"{type(error).__name__}: {error}"
    after = {path for path in case.rglob("*") if target not in path.parents and path != target}
    files = [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()]
    stray = [*map(str, after ^ before), *(name for name in files if not OUTPUT.fullmatch(name))]
    if stray:
        outcome, why = "STRAY FILES", str(stray)
    return {"kind": kind, "outcome": outcome, "why": why}


def _time_out(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"took more than {LIMIT_S} s")


def work(first: int, last: int, seed: int) -> None:
    """The inputs from `first` to `last`, a line of JSON each; with the peak memory so far."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _time_out)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            case = Path(folder) / str(number)
            signal.alarm(LIMIT_S)
            result = judge(case, number, seed)
            signal.alarm(0)
            os.chdir(folder)
            shutil.rmtree(case)
            outside = [path.name for path in Path(folder).iterdir()]
            if outside:
                result |= {"outcome": "STRAY FILES", "why": str(outside)}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps({"number": number, "peak_kib": peak, **result}), flush=True)


def main() -> None:
    """Give the inputs to processes, one after the other, and sum up what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        first, last = options.work
        work(first, last, options.seed)
        return
    outcomes: Counter[tuple[str, str]] = Counter()
    bad, peak = list[str](), 0
    for first in range(0, options.inputs, INPUTS_A_PROCESS):
        last = min(first + INPUTS_A_PROCESS, options.inputs)
        command = [sys.executable, "-m", "tests.faults.fuzz_inputs", "--seed", str(options.seed)]
        command += ["--work", str(first), str(last)]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1000)
            end, output = f"ended with {done.returncode}: {done.stderr[-500:]}", done.stdout
        except subprocess.TimeoutExpired as error:
            end, output = "hung", (error.stdout or b"").decode()
        results = [json.loads(line) for line in output.splitlines()]
        if len(results) < last - first:
            bad.append(f"input {first + len(results)}: the process {end}")
        for result in results:
            outcomes[result["kind"], result["outcome"]] += 1
            peak = max(peak, result["peak_kib"])
            if result["outcome"].isupper():
                bad.append(f"input {result['number']}, {result['kind']}: {result['outcome']} {result['why']}")
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:22} {outcome:12} {count:5}")
    print(f"{sum(outcomes.values())} inputs, {len(bad)} bad, peak memory {peak >> 10} MiB")
    if peak > MAX_RSS_KIB:
        bad.append(f"peak memory {peak >> 10} MiB, more than {MAX_RSS_KIB >> 10}")
    if bad:
        raise SystemExit("\n".join(bad[:20]))


if __name__ == "__main__":
    main()
