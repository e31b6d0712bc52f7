from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.errors import UserError, root_cause
from pipeline.records import BackboneRecord, LossWeights, ShardSet, SplitInfo


def shard_set(uri: str, digest: str = "d") -> ShardSet:
    split = SplitInfo(num_samples=1, num_shards=1, digest="s")
    return ShardSet(name="x", uri=uri, digest=digest, num_classes=2, splits={"val": split})


def test_content_digest__is_of_the_content_not_of_its_place() -> None:
    assert shard_set("/a").content_digest() == shard_set("/b").content_digest()
    assert shard_set("/a").content_digest() != shard_set("/a", digest="e").content_digest()


def test_content_digest__tells_record_types_apart() -> None:
    weights = LossWeights(class_weight=1, focal_weight=20, dice_weight=1)
    searched = weights.model_copy(update={"miou": 0.5, "num_trials": 8})
    assert weights.content_digest() == searched.content_digest()
    assert weights.content_digest() != weights.model_copy(update={"dice_weight": 2.0}).content_digest()


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
