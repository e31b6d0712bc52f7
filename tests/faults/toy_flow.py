"""A flow of cheap steps with real publishing, registration and promotion, for faults that strike the machinery.

`python -m tests.faults.toy_flow FOLDER TRACKING_URI RAY_FOLDER` drives it: a line `NAME DELAY_S SECONDS PROMOTE` on
standard input runs the flow NAME, whose toy steps take SECONDS each and which ends with a promotion where PROMOTE is
1; a line tells how it ended. Whenever a step is executed it adds its label to FOLDER/NAME.executed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pipeline import storage
from pipeline.records import Checkpoint, Evaluation, ModelVersion, Report, ShardSet
from pipeline.registry import store
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import Tracking

EXECUTED = ("bottom", "choose", "left", "right", "top")
OUTPUTS = {"top": "t", "left": "tl", "right": "tr", "bottom": "tltr"}
STEPS = (*EXECUTED, "register")
PROMOTE = "promote"


def _note_execution(context: StepContext) -> None:
    file = os.open(context.runtime["executed"], os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(file, f"{context.label}\n".encode())
    finally:
        os.close(file)
    time.sleep(context.runtime["seconds"])


@step(version=1)
def join(context: StepContext, flow_name: str, parts: list[Report], text: str) -> Report:
    """The texts of `parts` with `text` behind them, as a file."""
    _note_execution(context)
    whole = "".join(storage.read_bytes(part.uri).decode() for part in parts) + text
    storage.publish_bytes(context.output_uri("text.txt"), whole.encode())
    return Report(uri=context.output_uri("text.txt"), digest=f"{flow_name} {whole}")


@step(version=1)
def choose(context: StepContext, version: ModelVersion) -> ModelVersion:
    """Give the version the alias `candidate`."""
    _note_execution(context)
    store.set_alias(context.tracking, version.name, store.CANDIDATE, version.version)
    return version


def run_flow(
    folder: Path,
    tracking: Tracking,
    name: str,
    seconds: float,
    promote: bool,
    model: tuple[Checkpoint, Evaluation, ShardSet],
) -> str:
    """Run the flow `name`; returns its run's id."""
    from pipeline import steps
    from pipeline.config import PromotionPolicy
    from pipeline.workflow.flow import Flow

    runtime = {"executed": str(folder / f"{name}.executed"), "seconds": seconds}
    with Flow(str(folder / "space"), tracking, name, runtime=runtime) as flow:
        top = flow.step(join, name, [], "t", label="top")
        sides = [flow.step(join, name, [top], side[0], label=side) for side in ("left", "right")]
        flow.step(join, name, sides, "", label="bottom")
        version = flow.step(steps.register, name, *model)
        chosen = flow.step(choose, version)
        if promote:
            flow.step(steps.promote, [chosen], PromotionPolicy())
    return flow.run_id


def main() -> None:
    """Drive flows as they are asked for on standard input."""
    from pipeline.workflow import ray_session

    folder, uri, ray_folder = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def options() -> dict[str, object]:
        own = {"include_dashboard": False, "num_cpus": 2, "_temp_dir": ray_folder}
        return ray_session.default_options() | ({} if os.environ.get("RAY_ADDRESS") else own)

    ray_session.start(options)
    model = tuple(
        kind.from_json((folder / f"{kind.__name__}.json").read_text()) for kind in (Checkpoint, Evaluation, ShardSet)
    )
    print("READY", flush=True)
    for line in sys.stdin:
        name, delay_s, seconds, promote = line.split()
        time.sleep(float(delay_s))
        try:
            run_id = run_flow(folder, Tracking(uri), name, float(seconds), promote == "1", model)  # type: ignore[arg-type]
            print("ENDED", run_id, flush=True)
        except Exception as error:
            print("FAILED", " ".join(str(error).split()), flush=True)
    ray_session.stop()


if __name__ == "__main__":
    main()
