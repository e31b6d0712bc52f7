"""A cleaner's turn at the outputs of a step: nobody executes that step meanwhile, and nobody at work has found them.

Two things keep a flow that starts or runs meanwhile from harm. Who would execute the step stands in the same line as
the cleaner (`pipeline.workflow.step_lease`), whose run bears the step's fingerprint for as long as its turn lasts. And
who has found the step finished has noted that on its flow's run before it looked a last time (`execution.look_up`):
the cleaner takes the mark `segvit.done` away first and looks for such notes then, so that one of both sees the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.cleaning.store_view import CLEANING, living_flows
from pipeline.workflow import liveness
from pipeline.workflow.driver_watch import DriverWatch
from pipeline.workflow.step_lease import StepLine, in_line_tags, take_step_lease
from pipeline.workflow.tracking import Tag, Tracking, current_user

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True, slots=True)
class Cleaner:
    """A cleaning at work: its own run, which gives signs of life, and below it the one that stands in lines."""

    tracking: Tracking
    workspace: str
    run_id: str
    turn_run_id: str
    watch: DriverWatch

    @contextmanager
    def turn(self, step: str, fingerprint: str, *, take_marks: bool = True) -> Iterator[str | None]:
        """The turn at a step's outputs, which no flow finds any more within the block; or why it is not given.

        Without `take_marks` a finished step stays finished: only nobody executes it meanwhile.
        """
        line = StepLine(self.tracking, self.turn_run_id, f"clean {step}", self.run_id, fingerprint)
        self.tracking.set_tags(self.turn_run_id, {Tag.FINGERPRINT: fingerprint, **in_line_tags()})
        try:
            if any(other.is_alive() for other in line.others()):
                yield "a run is at work on it"
                return
            take_step_lease(line, self.workspace, step)
            if not take_marks:
                yield None
                return
            runs = list(
                self.tracking.runs(f"tags.`{Tag.FINGERPRINT}` = '{fingerprint}' and tags.`{Tag.KIND}` = 'step'")
            )
            user = self._user(fingerprint, runs)
            if user is None:
                self._take_marks(fingerprint, runs)
                user = self._user(fingerprint, runs)
                if user is not None:
                    self._give_back(fingerprint, runs)
            yield f"run {user[:12]} uses it" if user is not None else None
        finally:
            self.tracking.client().set_tag(self.turn_run_id, Tag.FINGERPRINT, "")

    def _user(self, fingerprint: str, runs: list[Run]) -> str | None:
        """A flow at work that has the step among its own, or has found it finished."""
        parents = {run.data.tags.get(Tag.PARENT) for run in runs}
        for flow in living_flows(self.tracking):
            if flow.info.run_id in parents or f"{Tag.USES}.{fingerprint[:16]}" in flow.data.tags:
                return str(flow.info.run_id)
        return None

    def _take_marks(self, fingerprint: str, runs: list[Run]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for run in runs:
            if run.data.tags.get(Tag.DONE) == fingerprint:
                self.tracking.client().delete_tag(run.info.run_id, Tag.DONE)
        for run in runs:
            if Tag.CLEANED not in run.data.tags:
                self.tracking.client().set_tag(run.info.run_id, Tag.CLEANED, now)

    def _give_back(self, fingerprint: str, runs: list[Run]) -> None:
        for run in runs:
            if Tag.CLEANED not in run.data.tags:
                self.tracking.client().delete_tag(run.info.run_id, Tag.CLEANED)
            if run.data.tags.get(Tag.DONE) == fingerprint:
                self.tracking.client().set_tag(run.info.run_id, Tag.DONE, fingerprint)


@contextmanager
def cleaning(tracking: Tracking, workspace: str) -> Iterator[Cleaner]:
    """Be a cleaner within the block. Its runs go with it; those of a killed one are ended and go, too."""
    client = tracking.client()
    for run in list(tracking.runs(f"tags.`{Tag.KIND}` = '{CLEANING}'")):
        owner = client.get_run(run.data.tags.get(Tag.PARENT, run.info.run_id))
        if owner.info.status != "RUNNING" or liveness.why_dead(owner.data.tags) is not None:
            client.delete_run(run.info.run_id)
    tags = {Tag.KIND: CLEANING, Tag.WORKSPACE: workspace, "mlflow.user": current_user(), **liveness.identity_tags()}
    run_id = tracking.create_run("clean", tags)
    turn_run_id = tracking.create_run("clean/turn", {Tag.KIND: CLEANING, Tag.PARENT: run_id, Tag.LABEL: "clean"})
    watch = DriverWatch(tracking)
    watch.take_signals()
    watch.start(run_id)
    try:
        yield Cleaner(tracking, workspace, run_id, turn_run_id, watch)
    finally:
        watch.stop_beating()
        watch.release()
        for one in (turn_run_id, run_id):
            client.set_terminated(one, "FINISHED")
            client.delete_run(one)
