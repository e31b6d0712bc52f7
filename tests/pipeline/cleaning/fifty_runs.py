"""A workspace as many runs leave it, made without Ray: steps are executed in this process, models are tiny."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline import storage
from pipeline.records import Checkpoint, Evaluation, ModelVersion, ShardSet, SplitInfo
from pipeline.registry import decisions, store
from pipeline.workflow import liveness
from pipeline.workflow.execution import StepRequest, execute_step
from pipeline.workflow.runs import end_running_children
from pipeline.workflow.step import StepContext, step
from pipeline.workflow.tracking import RunState, Tag, Tracking
from pipeline.workflow.workspace_format import enter_workspace, store_name
from tests.tiny_model import make_tiny_model

SHARD_BYTES, STATE_BYTES = 300_000, 200_000
NAME = "tiny"


@step(version=1)
def prepare(context: StepContext, data: str) -> ShardSet:
    uri = context.output_uri()
    storage.publish_bytes(storage.join(uri, "train-00000.tar"), data.encode() * (SHARD_BYTES // len(data)))
    return ShardSet(name=data, uri=uri, digest="e" * 64, num_classes=3, splits={"val": _split()})


@step(version=1)
def train(context: StepContext, shard_set: ShardSet, source: str, number: int) -> Checkpoint:
    print(f"training {number}")
    uri = context.output_uri()
    storage.publish_folder(source, uri)
    storage.publish_bytes(storage.join(context.workspace, "ray", context.run_name, "state.bin"), b"s" * STATE_BYTES)
    digest = storage.file_digest(storage.join(uri, "model.safetensors"))
    return Checkpoint(
        variant=f"v{number}", uri=uri, digest=digest, step=1, miou=0.5, history_uri=None, train_seconds=1.0
    )


@step(version=1)
def evaluate(context: StepContext, checkpoint: Checkpoint, scored: Evaluation, source: str) -> Evaluation:
    uri = context.output_uri()
    storage.publish_folder(source, uri)
    return scored.model_copy(update={"uri": uri, "variant": checkpoint.variant})


@step(version=1, verify=store.verify_version)
def register(context: StepContext, checkpoint: Checkpoint, evaluation: Evaluation, shard_set: ShardSet) -> ModelVersion:
    return store.register_model(
        context.tracking,
        NAME,
        checkpoint,
        evaluation,
        shard_set,
        run_id=context.run_id,
        flow_run_id=context.flow_run_id,
    )


def _split() -> SplitInfo:
    return SplitInfo(num_samples=1, num_shards=1, digest="d" * 64)


class Runs:
    """Makes runs of a flow in the workspace; the small model's files are those at `models`."""

    def __init__(self, workspace: Path, models: Path) -> None:
        self.workspace = workspace
        self.tracking = Tracking.for_workspace(str(workspace))
        self.models = models
        _, self.scored, _ = make_tiny_model(models)
        enter_workspace(str(workspace), store_name(str(workspace), self.tracking.uri, self.tracking.experiment))

    def begin(self) -> str:
        """A flow's run, driven by this process."""
        tags = {
            **{Tag.KIND: "flow", Tag.FLOW: "tiny", Tag.STATE: RunState.RUNNING.value},
            **{Tag.WORKSPACE: str(self.workspace), **liveness.identity_tags()},
        }
        return self.tracking.create_run("tiny", tags)

    def execute(self, flow: str, made: object, **arguments: object) -> object:
        """The record of one step."""
        outcome = execute_step(
            StepRequest(
                step=made,  # type: ignore[arg-type]
                label=made.name,  # type: ignore[attr-defined]
                arguments=arguments,
                depends_on=(),
                workspace=str(self.workspace),
                tracking=self.tracking,
                flow="tiny",
                flow_run_id=flow,
            )
        )
        assert outcome.record is not None, outcome.traceback
        return outcome.record

    def end(self, flow: str) -> None:
        """The flow has finished."""
        end_running_children(self.tracking, flow, RunState.KILLED, "left")
        self.tracking.client().log_text(flow, "<p>page</p>" * 1000, "report.html")
        self.tracking.end_run(flow, "FINISHED", {Tag.STATE: RunState.FINISHED.value})

    def run(self, number: int, *, registered: bool = False, data: str = "shards") -> ModelVersion | None:
        """One run; a registered one gets a model of weights of its own."""
        flow = self.begin()
        shards = self.execute(flow, prepare, data=data)
        source = self._weights(number) if registered else self._few_bytes(number)
        checkpoint = self.execute(flow, train, shard_set=shards, source=str(source), number=number)
        version = None
        if registered:
            assert isinstance(checkpoint, Checkpoint)
            scored = self.scored.model_copy(
                update={"checkpoint_digest": checkpoint.digest, "miou": 0.5 + number / 1000}
            )
            folder = str(self.models / "evaluation")
            evaluation = self.execute(flow, evaluate, checkpoint=checkpoint, scored=scored, source=folder)
            found = self.execute(flow, register, checkpoint=checkpoint, evaluation=evaluation, shard_set=shards)
            assert isinstance(found, ModelVersion)
            version = found
        self.end(flow)
        return version

    def promote(self, version: ModelVersion) -> None:
        """Make it champion and candidate, and keep that on record as the gate would."""
        before = store.find_alias(self.tracking, NAME, store.CHAMPION)
        decisions._record_move(self.tracking, NAME, "promoted", before, version.version, "test")
        for alias in (store.CHAMPION, store.CANDIDATE):
            store.set_alias(self.tracking, NAME, alias, version.version)

    def _weights(self, number: int) -> Path:
        return self.models / "checkpoint"

    def _few_bytes(self, number: int) -> Path:
        folder = self.models / f"few-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([number % 256]) * 50_000)
        return folder
