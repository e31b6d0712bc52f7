"""A disk that is really full, under the outputs, the logs and the store: a small tmpfs in a mount namespace of its own.

    python -m tests.faults.full_disk

Prints one line a case, or `no mount namespace` where this machine permits none.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline import storage
from pipeline.records import Report
from pipeline.workflow import liveness
from pipeline.workflow.execution import Outcome, StepRequest, execute_step
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import RunState, Tag, Tracking
from tests.faults.processes import REPOSITORY

DISK_MIB = 24
FULL = "the disk is full"


@step(version=1)
def write(context: StepContext, kind: str, mib: int) -> Report:
    """Publish `mib` MiB, as one file or as a folder of 1 MiB files."""
    if kind == "file":
        storage.publish_bytes(context.output_uri("big"), bytes(mib << 20))
    else:
        with tempfile.TemporaryDirectory(dir=context.runtime) as folder:
            for number in range(mib):
                (Path(folder) / f"{number:02d}").write_bytes(bytes(1 << 20))
            storage.publish_folder(folder, context.output_uri())
    return Report(uri=context.output_uri(), digest=kind)


def run(workspace: Path, tracking: Tracking, scratch: str, kind: str, mib: int) -> Outcome:
    """The step in a flow of its own."""
    flow = tracking.create_run("flow", {Tag.KIND: "flow", **liveness.identity_tags()})
    request = StepRequest(
        step=write,
        label=f"write/{kind}",
        arguments={"kind": kind, "mib": mib},
        depends_on=(),
        workspace=str(workspace),
        tracking=tracking,
        flow="full",
        flow_run_id=flow,
        runtime=scratch,
    )
    return execute_step(request)


def fill(disk: Path, spare_bytes: int = 0) -> Path:
    """Take what is left of the disk but `spare_bytes`."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - spare_bytes))
    return ballast


def expect(case: str, outcome: Outcome, state: RunState, *, log: bool | None = None) -> None:
    """Raise SystemExit where a step ended otherwise."""
    good = outcome.state == state and (state != RunState.FAILED or str(outcome.error).startswith(FULL))
    if not good or (log is not None and (outcome.log_uri is not None) != log):
        raise SystemExit(f"{case}: {outcome.state}, {outcome.error}, log {outcome.log_uri}\n{outcome.traceback}")


def inside(disk: Path, elsewhere: Path) -> None:
    """All cases, on the mounted disk."""
    store = Tracking.for_workspace(str(elsewhere))
    for kind in ("file", "folder"):
        workspace = disk / kind
        outcome = run(workspace, store, str(elsewhere), kind, DISK_MIB)
        expect(f"full outputs, {kind}", outcome, RunState.FAILED, log=True)
        left = [path.name for path in (workspace / "write").rglob("*") if path.is_file() or "partial" in path.name]
        if left:
            raise SystemExit(f"{kind}: left {left}")
        print(f"outputs, {kind}: {outcome.error}")
        ballast = fill(disk)
        expect(f"full logs, {kind}", run(workspace, store, str(elsewhere), kind, 1), RunState.FAILED, log=False)
        ballast.unlink()
        expect(f"room again, {kind}", run(workspace, store, str(elsewhere), kind, 1), RunState.DONE)
        expect(f"remembered, {kind}", run(workspace, store, str(elsewhere), kind, 1), RunState.REUSED)
    store = Tracking.for_workspace(str(disk / "store"))
    workspace = elsewhere / "outputs"
    flow_before = run(workspace, store, str(elsewhere), "file", 1)
    expect("store with room", flow_before, RunState.DONE)
    flow = store.create_run("flow", {Tag.KIND: "flow", **liveness.identity_tags()})
    arguments = {"kind": "file", "mib": 2}
    request = StepRequest(
        step=write,
        label="write",
        arguments=arguments,
        depends_on=(),
        workspace=str(workspace),
        tracking=store,
        flow="full",
        flow_run_id=flow,
    )
    ballast = fill(disk)
    outcome = execute_step(request)
    expect("full store", outcome, RunState.FAILED, log=True)
    print(f"store: {outcome.error}")
    ballast.unlink()
    expect("store with room again", execute_step(request), RunState.DONE)
    expect("store remembers", execute_step(request), RunState.REUSED)
    print("full disk: every failure one line, nothing half-published, every rerun complete")


def main() -> None:
    """Mount the disk in a namespace of its own and run the cases there."""
    if len(sys.argv) == 3:
        disk = Path(sys.argv[1])
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB - 4}m", "tmpfs", str(disk)], check=True)
        inside(disk, Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory(prefix="full") as name:
        disk, elsewhere = Path(name) / "disk", Path(name) / "elsewhere"
        disk.mkdir()
        elsewhere.mkdir()
        possible = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", str(disk)]
        if os.name != "posix" or subprocess.run(possible, capture_output=True, check=False).returncode:
            print("no mount namespace")
            return
        command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.faults.full_disk"]
        done = subprocess.run([*command, str(disk), str(elsewhere)], cwd=REPOSITORY, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
