"""Damaged and hostile inputs to every reader: each is read, or refused in one clear line.

    python -m tests.faults.fuzz_inputs [--inputs 10000] [--seed 0] [--readers coco mat ...]

Input N goes to reader N modulo their number (`tests/faults/fuzz/readers.py`), mutated as N and the seed say. Fails for
a process that ends, for more than 20 seconds, for an exception other than the reader's refusals, for a refusal of
several lines, for a file left outside of the input's own folder, and for more than MAX_GROWTH_MIB of memory beyond what
the process had before.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

from tests.faults.fuzz.case import require_one_line
from tests.faults.fuzz.readers import READERS
from tests.faults.processes import REPOSITORY

LIMIT_S = 20
MAX_ADDRESS_SPACE = 8 << 30
MAX_GROWTH_MIB = 1024
INPUTS_A_PROCESS = 2000


def judge(case: Path, name: str, number: int, seed: int) -> dict[str, str]:
    """Read input `number` of the reader `name` below the empty folder `case`: its kind, its outcome and why."""
    made = READERS[name](case, random.Random(f"{seed}-{name}-{number}"))
    try:
        made.read()
        outcome, why = "good", ""
    except made.refusals as error:
        try:
            require_one_line(error)
            outcome, why = "refused", ""
        except AssertionError as unclear:
            outcome, why = "UNCLEAR", str(unclear)
    except BaseException as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "nowhere"
        outcome, why = "CRASH", f"{type(error).__name__}: {str(error)[:400]} at {where}"
    return {"kind": made.kind, "outcome": outcome, "why": why}


def _time_out(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"took more than {LIMIT_S} s")


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def work(names: list[str], first: int, last: int, seed: int) -> None:
    """The inputs from `first` to `last`, a line of JSON each."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    signal.signal(signal.SIGALRM, _time_out)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = f"{scratch}/temporary"
        Path(tempfile.tempdir).mkdir()
        for number in range(first, last):
            case = Path(scratch) / "case" / str(number)
            case.mkdir(parents=True)
            # The peak starts anew.
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory_kib("VmRSS")
            signal.alarm(LIMIT_S)
            # Code that holds the interpreter hears no signal.
            faulthandler.dump_traceback_later(LIMIT_S + 10, exit=True)
            result = judge(case, names[number % len(names)], number, seed)
            faulthandler.cancel_dump_traceback_later()
            signal.alarm(0)
            peak = _memory_kib("VmHWM")
            os.chdir(scratch)
            shutil.rmtree(Path(scratch) / "case", ignore_errors=True)
            outside = sorted(path.name for path in Path(scratch).iterdir() if path.name != "temporary")
            if outside:
                result |= {"outcome": "STRAY FILES", "why": str(outside)}
            if (peak - before) >> 10 > MAX_GROWTH_MIB:
                result |= {"outcome": "MEMORY", "why": f"{(peak - before) >> 10} MiB more than before"}
            line = {"number": number, "growth_kib": peak - before, "peak_kib": peak, **result}
            print(json.dumps(line), flush=True)


def run(names: list[str], inputs: int, seed: int) -> tuple[list[dict[str, str | int]], list[str]]:
    """The results of all inputs, and what was bad; a process that ends is followed by another behind its input."""
    results: list[dict[str, str | int]] = []
    bad: list[str] = []
    first = 0
    while first < inputs:
        last = min(first + INPUTS_A_PROCESS, inputs)
        command = [sys.executable, "-m", "tests.faults.fuzz_inputs", "--seed", str(seed), "--readers", *names]
        command += ["--work", str(first), str(last)]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('{"number"'):
                    continue
                result = json.loads(line)
                results.append(result)
                first = int(result["number"]) + 1
                if result["outcome"].isupper():
                    bad.append(_say(names, result["number"], f"{result['kind']}: {result['outcome']} {result['why']}"))
            process.wait()
            errors.seek(0)
            end = errors.read()
        if first < last:
            bad.append(_say(names, first, f"the process ended with {process.returncode}: {end[-1500:]}"))
            first += 1
    return results, bad


def _say(names: list[str], number: int, what: str) -> str:
    """What went wrong with an input; said at once, since the others may take long."""
    line = f"input {number}, {names[number % len(names)]}, {what}"
    print(line, flush=True)
    return line


def main() -> None:
    """Give the inputs to processes, one after the other, and sum up what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        first, last = options.work
        work(options.readers, first, last, options.seed)
        return
    results, bad = run(options.readers, options.inputs, options.seed)
    outcomes = Counter((options.readers[int(one["number"]) % len(options.readers)], one["outcome"]) for one in results)
    for (name, outcome), count in sorted(outcomes.items()):
        growth = max(
            int(one["growth_kib"])
            for one in results
            if options.readers[int(one["number"]) % len(options.readers)] == name
        )
        print(f"{name:20} {outcome:12} {count:5}   at most {growth >> 10} MiB an input")
    peak = max(int(one["peak_kib"]) for one in results)
    print(f"{len(results)} inputs over {len(options.readers)} readers, {len(bad)} bad, peak memory {peak >> 10} MiB")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
