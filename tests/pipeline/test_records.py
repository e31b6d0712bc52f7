from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.errors import UserError, root_cause
from pipeline.records import BackboneRecord, SearchResult, ShardSet, SplitInfo


def shard_set(uri: str, digest: str = "d") -> ShardSet:
    split = SplitInfo(num_samples=1, num_shards=1, digest="s")
    return ShardSet(name="x", uri=uri, digest=digest, num_classes=2, splits={"val": split})


def test_content_digest__is_of_the_content_not_of_its_place() -> None:
    assert shard_set("/a").content_digest() == shard_set("/b").content_digest()
    assert shard_set("/a").content_digest() != shard_set("/a", digest="e").content_digest()


def test_content_digest__tells_record_types_apart() -> None:
    found = SearchResult(
        variant="full", values={"loss.dice": 1.0}, miou=0.5, num_trials=4, trials_uri="/t", trials_digest="d"
    )
    # More trials that find nothing better change nothing of what follows.
    longer = found.model_copy(update={"miou": 0.6, "num_trials": 8, "trials_digest": "e"})
    assert found.content_digest() == longer.content_digest()
    assert found.content_digest() != found.model_copy(update={"values": {"loss.dice": 2.0}}).content_digest()


def test_from_json__round_trip_and_unknown_field() -> None:
    record = BackboneRecord(backbone="vit", uri=None, digest="random", source="random", message="m")
    assert BackboneRecord.from_json(record.to_json()) == record
    with pytest.raises(ValidationError):
        BackboneRecord.from_json(record.to_json()[:-1] + ', "extra": 1}')


def test_root_cause__through_wrappers() -> None:
    class GroupError(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            self.worker_failures = failures

    inner = UserError("the value is wrong")
    task = RuntimeError("task failed")
    task.cause = inner  # type: ignore[attr-defined]
    assert root_cause(GroupError({1: task})) is inner
    assert root_cause(inner) is inner
