"""Like with like: what a champion scores on a candidate's data, found on record or made, and kept on its version.

A version carries the evaluation that it was registered with, and beside it, in a tag each, those on other data, on
another split or with other inference settings. What is known of a checkpoint counts for every version that holds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from pipeline import storage
from pipeline.config import EvaluateConfig, RuntimeConfig
from pipeline.records import Evaluation, ModelVersion, Record, RescoredChampion, ShardSet
from pipeline.registry import store
from pipeline.registry.gate import scoring_differences
from pipeline.registry.models import ModelReference, fetch_checkpoint
from pipeline.registry.store import CHAMPION
from pipeline.workflow.lease import Lease
from pipeline.workflow.progress import StepProgress
from pipeline.workflow.tracking import Tracking

KEPT = "segvit.also_evaluated"


class Scores(Record):
    """An evaluation of a version's checkpoint on record; `rescored` by `run_id`, or registered by it."""

    run_id: str
    rescored: bool
    evaluation: Evaluation


class Standing(NamedTuple):
    """A champion as a candidate finds it.

    Attributes:
        champion: None where there is none.
        scores: comparable with the candidate's; None where there are none.
        source: where there are none, a version that holds the champion's checkpoint and has its files.
        obstacle: where there is neither, why.
        lost: whether that is because the files are gone.
    """

    champion: ModelVersion | None
    scores: Scores | None = None
    source: ModelReference | None = None
    obstacle: str | None = None
    lost: bool = False


def keep_evaluation(tracking: Tracking, version: ModelVersion, evaluation: Evaluation, run_id: str) -> bool:
    """Keep an evaluation on a version; False where the version was registered with one that is as good.

    Raises ValueError for one of another checkpoint.
    """
    if evaluation.checkpoint_digest != version.checkpoint_digest:
        raise ValueError(f"the evaluation is of another checkpoint than {version.model_uri} holds")
    if not scoring_differences(evaluation, version.evaluation, ""):
        return False
    scores = Scores(run_id=run_id, rescored=True, evaluation=evaluation)
    scored_on = json.dumps([evaluation.data_digest, evaluation.split, evaluation.inference], sort_keys=True)
    key = f"{KEPT}.{hashlib.sha256(scored_on.encode()).hexdigest()[:16]}"
    store.set_version_tags(tracking, version.name, version.version, {key: scores.to_json()})
    return True


def scores_on_record(tracking: Tracking, version: ModelVersion) -> Iterator[Scores]:
    """All evaluations of a version's checkpoint: what it was registered with, what it carries, then other versions'."""
    others = store.versions_of_checkpoint(tracking, version.name, version.checkpoint_digest)
    for one in (version, *(one for one in others if one.version != version.version)):
        yield Scores(run_id=one.run_id, rescored=False, evaluation=one.evaluation)
        yield from _kept(tracking, one)


def comparable_scores(tracking: Tracking, version: ModelVersion, other: Evaluation) -> Scores | None:
    """What is on record of a version's checkpoint and scored as `other` was."""
    on_record = scores_on_record(tracking, version)
    return next((one for one in on_record if not scoring_differences(other, one.evaluation, "")), None)


def champion_standing(tracking: Tracking, candidate: ModelVersion, champion: int | None) -> Standing:
    """How a champion compares; raises UserError for one that carries no evaluation this release can read."""
    if champion is None:
        return Standing(None)
    version = store.get_version(tracking, candidate.name, champion)
    scores = comparable_scores(tracking, version, candidate.evaluation)
    if scores is not None:
        return Standing(version, scores)
    if version.evaluation.class_names != candidate.evaluation.class_names:
        return Standing(version, obstacle=f"{version.model_uri} has other classes")
    source = _with_files(tracking, version)
    if source is not None:
        return Standing(version, source=source)
    return Standing(version, obstacle=store.lost_files(tracking, version.name, version.version), lost=True)


def rescore_champion(
    tracking: Tracking,
    versions: Sequence[ModelVersion],
    shard_set: ShardSet,
    config: EvaluateConfig,
    runtime: RuntimeConfig,
    *,
    target_uri: str,
    run_id: str,
    lease: Lease,
    progress: StepProgress | None = None,
) -> RescoredChampion:
    """Score the champion on the shard set that candidates were scored on, where nothing comparable is on record.

    The evaluation is published below `target_uri` and kept on the champion's version.

    Raises UserError where the champion cannot be downloaded or loaded, and LeaseLost.
    """
    name = versions[0].name
    champion = store.find_alias(tracking, name, CHAMPION)
    standing = champion_standing(tracking, versions[0], champion)
    if standing.champion is None or standing.source is None:
        return RescoredChampion(name=name, champion=champion, obstacle=standing.obstacle)
    from pipeline.evaluation.evaluate import evaluate_checkpoint

    digest = standing.champion.checkpoint_digest
    folder = storage.join(target_uri, digest[:16])
    checkpoint = fetch_checkpoint(tracking, standing.source, digest, storage.join(folder, "checkpoint"), lease)
    evaluation = evaluate_checkpoint(
        checkpoint, shard_set, config, runtime, storage.join(folder, "evaluation"), lease=lease, progress=progress
    )
    lease.check()
    keep_evaluation(tracking, standing.champion, evaluation, run_id)
    return RescoredChampion(name=name, champion=champion, evaluation=evaluation)


def standing_changed(record: RescoredChampion, tracking: Tracking, versions: Sequence[ModelVersion]) -> str | None:
    """Why a champion has to be looked at again before `versions` are compared with it, or None."""
    champion = store.find_alias(tracking, record.name, CHAMPION)
    if champion in [one.version for one in versions]:
        # Scored alike, as candidates of one flow are.
        return None
    if champion != record.champion:
        return f"the champion of {record.name} is now {'none' if champion is None else f'version {champion}'}"
    standing = champion_standing(tracking, versions[0], champion)
    if standing.obstacle != record.obstacle:
        return standing.obstacle or f"models:/{record.name}/{champion} can be compared now"
    if standing.source is not None:
        return f"what models:/{record.name}/{champion} scored on this data is no longer on record"
    return None


def _kept(tracking: Tracking, version: ModelVersion) -> list[Scores]:
    """Those that this release can read and that are of the version's own checkpoint."""
    found = []
    for key, text in sorted(store.version_tags(tracking, version.name, version.version).items()):
        if key.startswith(f"{KEPT}."):
            try:
                scores = Scores.from_json(text)
            except ValidationError:
                continue
            if scores.evaluation.checkpoint_digest == version.checkpoint_digest:
                found.append(scores)
    return found


def _with_files(tracking: Tracking, version: ModelVersion) -> ModelReference | None:
    """A version that holds the same checkpoint and has its files, rather this one."""
    others = store.versions_of_checkpoint(tracking, version.name, version.checkpoint_digest)
    for number in (version.version, *(one.version for one in others)):
        if store.lost_files(tracking, version.name, number) is None:
            return ModelReference(version.name, number)
    return None
