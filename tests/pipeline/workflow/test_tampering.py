"""One flipped byte anywhere is found before it is used: the step that made it runs again, those behind it do not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import steps, storage
from pipeline.config import DataConfig, DigitsConfig, RuntimeConfig
from pipeline.records import Checkpoint, Report, ShardSet
from pipeline.workflow import liveness
from pipeline.workflow.execution import Outcome, StepRequest, execute_step
from pipeline.workflow.step import Step, StepContext, step
from pipeline.workflow.tracking import RECORD_FILE, RunState, Tag, Tracking
from tests.pipeline.conftest import Trained

CONFIG = DataConfig(
    dataset="digits", samples_per_shard=4, digits=DigitsConfig(num_train=9, num_val=4), on_bad_sample="quarantine"
)


@step(version=1)
def fit(context: StepContext, shards: ShardSet, source: str) -> Checkpoint:
    """A checkpoint that is always the same: what training gives with a fixed seed."""
    storage.publish_folder(source, context.output_uri())
    return Checkpoint(
        variant="full",
        uri=context.output_uri(),
        digest=storage.file_digest(context.output_uri("model.safetensors")),
        step=1,
        miou=None,
        history_uri=context.output_uri("config.json"),
        train_seconds=time.monotonic(),
    )


@step(version=1)
def score(context: StepContext, checkpoint: Checkpoint, shards: ShardSet) -> Report:
    """A folder with files at two depths, as an evaluation leaves it."""
    storage.publish_json(context.output_uri("confusion.json"), [[1, 2], [3, 4]])
    storage.publish_bytes(context.output_uri("examples/0-image.jpg"), b"picture")
    return Report(uri=context.output_uri(), digest="d")


@dataclass
class Chain:
    """prepare, fit, score, run in this process; each run in a flow of its own."""

    workspace: Path
    tracking: Tracking
    source: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self) -> dict[str, str]:
        """How the steps ended."""
        flow = self.tracking.create_run("test", {Tag.KIND: "flow", **liveness.identity_tags()})
        shards = self._step(flow, "prepare", steps.prepare, CONFIG, "source").record
        checkpoint = self._step(flow, "fit", fit, shards, self.source).record
        self._step(flow, "score", score, checkpoint, shards)
        return {label: outcome.state.value for label, outcome in self.outcomes.items()}

    def notes(self) -> dict[str, str]:
        return {label: outcome.note for label, outcome in self.outcomes.items() if outcome.note}

    def uri(self, label: str) -> Path:
        return Path(self.outcomes[label].record.uri)  # type: ignore[union-attr]

    def _step(self, flow: str, label: str, made: Step[..., Any], *args: Any) -> Outcome:
        request = StepRequest(
            step=made,
            label=label,
            arguments=made.bind(args, {}),
            depends_on=(),
            workspace=str(self.workspace),
            tracking=self.tracking,
            flow="test",
            flow_run_id=flow,
            runtime=RuntimeConfig(),
        )
        self.outcomes[label] = execute_step(request)
        return self.outcomes[label]


@pytest.fixture
def chain(tracking: Tracking, tmp_path: Path, trained: Trained) -> Chain:
    made = Chain(tmp_path / "space", tracking, trained.checkpoint.uri)
    assert made.run() == {"prepare": "done", "fit": "done", "score": "done"}
    time.sleep(0.05)
    assert made.run() == {"prepare": "reused", "fit": "reused", "score": "reused"}
    assert made.notes() == {}
    return made


def flip(file: Path, place: int = -1) -> bytes:
    """Flip one bit and set the modification time back; returns what was there."""
    about, before = file.stat(), file.read_bytes()
    data = bytearray(before)
    data[place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    return before


SHARD = "differs from the manifest in its sha256; prepare it again"


@pytest.mark.parametrize(
    ("label", "name", "note"),
    [
        ("prepare", "train-00001.tar", SHARD),
        ("prepare", "val-00000.tar", SHARD),
        ("prepare", "index.parquet", SHARD),
        ("prepare", "quarantine.parquet", SHARD),
        ("fit", "model.safetensors", "has changed"),
        ("fit", "config.json", "has changed"),
        ("score", "confusion.json", "has changed"),
        ("score", "examples/0-image.jpg", "has changed"),
    ],
)
def test_flipped_byte__in_an_output(chain: Chain, label: str, name: str, note: str) -> None:
    file = chain.uri(label) / name
    before = flip(file, 700 if name.endswith(".tar") else -1)
    assert chain.run() == {other: "done" if other == label else "reused" for other in ("prepare", "fit", "score")}
    assert chain.notes() == {label: f"{file} {note}"}
    assert file.read_bytes() == before
    assert chain.run() == {"prepare": "reused", "fit": "reused", "score": "reused"}


def test_flipped_byte__in_the_manifest(chain: Chain) -> None:
    file = chain.uri("prepare") / "manifest.json"
    place = file.read_bytes().index(b"sha256") + 12
    before = flip(file, place)
    assert chain.run() == {"prepare": "done", "fit": "reused", "score": "reused"}
    assert "prepare" in chain.notes()
    assert file.read_bytes() == before


def test_flipped_byte__in_a_record(chain: Chain, tracking: Tracking) -> None:
    (run,) = (
        run
        for run in tracking.runs(f"tags.`{Tag.LABEL}` = 'fit'")
        if Tag.DONE in run.data.tags and run.data.tags[Tag.STATE] == RunState.DONE
    )
    flip(Path(run.info.artifact_uri) / RECORD_FILE, 20)
    assert chain.run() == {"prepare": "reused", "fit": "done", "score": "reused"}
    assert chain.notes() == {"fit": f"the record of run {run.info.run_id[:8]} is missing or was changed"}


def test_unchanged_outputs__are_not_read_again(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest: Callable[[str], str] = storage.file_digest

    def note_and_read(uri: str) -> str:
        read.append(uri)
        return digest(uri)

    monkeypatch.setattr(storage, "file_digest", note_and_read)
    assert chain.run() == {"prepare": "reused", "fit": "reused", "score": "reused"}
    assert read == []
