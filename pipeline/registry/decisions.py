"""What is recorded of promotions and rollbacks, in MLflow's tags.

A version carries every decision about it, each under its time, and the latest one at a glance. The registered
model carries the moves of the alias `champion`, which therefore outlive versions that are deleted. Both are
written before the alias moves, and a move that a crash kept from happening does no harm: every later one says
from which version it went. A version that a person moved the alias away from says so, and no flow moves it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config import PromotionPolicy
from pipeline.records import Check, ModelVersion, PromotionDecision, Record
from pipeline.registry import store
from pipeline.workflow.tracking import Tracking

DECISION = "promotion.decision"
DECIDED_BY = "promotion.by"
DECIDED_AT = "promotion.at"
DECIDED_AGAINST = "promotion.against"
HISTORY = "promotion.history"
POLICY = "promotion.policy"
# The tag keeps the name that registries hold already.
WITHDRAWN = "promotion.left"
MOVES = "promotion.moves"


class Move(Record):
    """One move of the alias `champion`, from `before` (None: there was no champion) to `after`."""

    event: Literal["promoted", "rolled back"]
    before: int | None
    after: int
    by: str
    at: str


def record_promotion(tracking: Tracking, decision: PromotionDecision, decided_by: str, *, manual: bool = False) -> None:
    """Write a decision on its version, and on the model that the alias is about to move.

    `manual`: a person asked for it, and the champion before is withdrawn thereby.
    """
    against = "none" if decision.champion_before is None else f"version {decision.champion_before}"
    facts = {
        DECIDED_AGAINST: against,
        store.PROMOTED: json.dumps(decision.promoted),
        store.PROMOTION_REASON: decision.reason,
    }
    compared = decision.model_dump(mode="json", include={"candidate_scores", "champion_scores"})
    details = {"checks": [check.model_dump() for check in decision.checks], "policy": decision.policy, **compared}
    at = _record(tracking, decision.name, decision.version, decided_by, facts, details)
    store.set_version_tags(tracking, decision.name, decision.version, {DECISION: decision.to_json()})
    if decision.promoted:
        _forget_withdrawal(tracking, decision.name, decision.version)
        if manual and decision.champion_before is not None:
            withdrawn = f"was replaced with version {decision.version} by {decided_by} at {at}"
            store.set_version_tags(tracking, decision.name, decision.champion_before, {WITHDRAWN: withdrawn})
        _record_move(tracking, decision.name, "promoted", decision.champion_before, decision.version, decided_by)


def record_rollback(tracking: Tracking, name: str, before: int | None, after: int, check: Check, by: str) -> None:
    """Write a rollback on both versions, and on the model that the alias is about to move."""
    if before is not None:
        facts = {
            DECIDED_AGAINST: f"version {after}",
            store.PROMOTED: json.dumps(False),
            store.PROMOTION_REASON: f"rolled back to version {after} by {by}",
        }
        at = _record(tracking, name, before, by, facts, {})
        withdrawn = f"was rolled back to version {after} by {by} at {at}"
        store.set_version_tags(tracking, name, before, {WITHDRAWN: withdrawn})
    gone = "the champion was gone" if before is None else f"version {before} was rolled back"
    facts = {
        DECIDED_AGAINST: "none" if before is None else f"version {before}",
        store.PROMOTED: json.dumps(True),
        store.PROMOTION_REASON: f"champion again: {gone} by {by}",
    }
    _record(tracking, name, after, by, facts, {"checks": [check.model_dump()]})
    _forget_withdrawal(tracking, name, after)
    _record_move(tracking, name, "rolled back", before, after, by)


def why_withdrawn(tracking: Tracking, name: str, version: int) -> str:
    """How a person moved the alias away from a version that was not promoted again since; "" where nobody did."""
    return store.version_tags(tracking, name, version).get(WITHDRAWN, "")


def champions(tracking: Tracking, name: str, now: int | None) -> list[int]:
    """The champion `now` and those before it that a rollback goes back to, the oldest first.

    Where the alias was moved or removed by hand, `now` says more than what is recorded.
    """
    tags: Mapping[str, str] = tracking.client().get_registered_model(name).tags
    line: list[int] = []
    for key in sorted(tags):
        if not key.startswith(f"{MOVES}."):
            continue
        move = Move.from_json(tags[key])
        if move.before is not None:
            _end_at(line, move.before)
        if move.event == "promoted":
            line.append(move.after)
            continue
        if move.before is not None:
            # The version that is champion again may be further down the line a second time.
            line.pop()
        _end_at(line, move.after)
    if now is not None:
        _end_at(line, now)
    return line


def keep_policy(tracking: Tracking, versions: Sequence[ModelVersion], policy: PromotionPolicy) -> None:
    """Note on versions with which policy their flow was run; promotion by hand starts from it."""
    for version in versions:
        store.set_version_tags(tracking, version.name, version.version, {POLICY: policy.model_dump_json()})


def last_policy(tracking: Tracking, name: str) -> tuple[int, PromotionPolicy] | None:
    """The version of a model that was decided about last, and the policy used; None where none was."""
    found: list[tuple[str, int, Any]] = []
    client = tracking.client()
    for version in store.all_pages(client.search_model_versions, filter_string=f"name = '{name}'"):
        for key, text in version.tags.items():
            if key.startswith(f"{HISTORY}.") and (policy := json.loads(text).get("policy")):
                found.append((key, int(version.version), policy))
    for _key, number, policy in sorted(found, key=lambda one: one[0], reverse=True):
        try:
            return number, PromotionPolicy.model_validate(policy)
        except ValidationError:
            # Of another release; what was used before it is nearer than nothing.
            continue
    return None


def _record(
    tracking: Tracking, name: str, version: int, by: str, facts: Mapping[str, str], details: Mapping[str, Any]
) -> str:
    now = datetime.now(UTC)
    at = now.isoformat(timespec="seconds")
    facts = {DECIDED_BY: by, DECIDED_AT: at, **facts}
    history = json.dumps({**facts, **details})
    store.set_version_tags(tracking, name, version, {**facts, _timed(HISTORY, now): history})
    return at


def _forget_withdrawal(tracking: Tracking, name: str, version: int) -> None:
    if why_withdrawn(tracking, name, version):
        store.set_version_tags(tracking, name, version, {WITHDRAWN: ""})


def _record_move(
    tracking: Tracking, name: str, event: Literal["promoted", "rolled back"], before: int | None, after: int, by: str
) -> None:
    now = datetime.now(UTC)
    move = Move(event=event, before=before, after=after, by=by, at=now.isoformat(timespec="seconds"))
    tracking.client().set_registered_model_tag(name, _timed(MOVES, now), move.to_json())


def _end_at(line: list[int], version: int) -> None:
    """Cut the line behind the last position of `version`, or put it at the end."""
    while line and line[-1] != version and version in line:
        line.pop()
    if not line or line[-1] != version:
        line.append(version)


def _timed(prefix: str, now: datetime) -> str:
    return f"{prefix}.{now:%Y%m%dT%H%M%S.%fZ}"
