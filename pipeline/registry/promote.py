"""Moving the alias `champion`: forward through the gate, back to the champion before.

`pipeline.registry.gate` decides. What only the registry can tell is added here: that the registered artifact itself,
loaded in its own process, reproduces the evaluated predictions, and that nobody moved away from it. Each
decision is written on the version before the alias moves, so asking again mends a crash between the two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.records import Check, DecidedOn, Evaluation, ModelVersion, PromotionDecision, Record
from pipeline.registry import decisions, store
from pipeline.registry.artifact_check import reproduces
from pipeline.registry.champion_lease import champion_lease
from pipeline.registry.gate import GateDecision, decide, verdict
from pipeline.registry.models import ModelReference, model_folder
from pipeline.registry.rescoring import Scores, Standing, champion_standing
from pipeline.registry.store import CHAMPION
from pipeline.workflow.lease import LeaseLost
from pipeline.workflow.tracking import Tracking, current_user


class Unusable(Record):
    """A former champion that a rollback passed over, and why."""

    version: int
    reason: str


class Rollback(Record):
    """The alias moved from `champion_before` (None: there was none any more) back to `champion_after`.

    `skipped`: champions between the two that are unusable.
    """

    name: str
    champion_before: int | None
    champion_after: int
    skipped: tuple[Unusable, ...]
    check: Check


def promote_best(
    tracking: Tracking, versions: Sequence[ModelVersion], policy: PromotionPolicy, *, decided_by: str | None = None
) -> PromotionDecision:
    """Ask the gate about versions of one model, the best first, until one passes or is the champion already.

    The best has the highest mIoU; of equals it is the cheapest. So a cheaper version passes where the best is over
    budget, and a champion among the versions stays where the better ones are refused. Each decision is recorded on
    its version. The alias `candidate` goes to the version of the returned decision: the last one asked, or the best
    where none passed. Its reason tells what became of the others.
    """
    refused: list[PromotionDecision] = []
    ranked = sorted(versions, key=lambda one: (-one.evaluation.miou, one.evaluation.gflops))
    for version in ranked:
        decision = promote_version(tracking, version, policy, decided_by=decided_by)
        if decision.champion_after == version.version:
            break
        refused.append(decision)
    else:
        decision, *refused = refused
    store.set_alias(tracking, decision.name, store.CANDIDATE, decision.version)
    scores = {version.version: version.evaluation.miou for version in ranked}
    others = [f"version {one.version} (mIoU {scores[one.version]:.4f}) {one.reason}" for one in refused]
    return decision.model_copy(
        update={
            "reason": "; ".join((decision.reason, *others)),
            "also_refused": tuple(one.version for one in refused),
        }
    )


def promote_version(
    tracking: Tracking,
    version: ModelVersion,
    policy: PromotionPolicy,
    *,
    decided_by: str | None = None,
    manual: bool = False,
    dry_run: bool = False,
) -> PromotionDecision:
    """Ask the gate about a registered version, record the answer on it, and move the alias if it passes.

    A version that is champion already stays so, with the decision that made it so. The champion is looked up again
    right before the alias moves; where it changed meanwhile, the version is compared with the new one. It is compared
    by evaluations that are alike, of which the champion's may be one that was made since (pipeline.registry.rescoring);
    where there is none, the version is refused.

    Args:
        decided_by: default the user's name.
        manual: somebody asked for this very version. A flow is refused one that a person moved the alias away from,
            by a rollback or by promoting another, and would otherwise undo that behind the person's back; and one
            that cannot be compared with the champion since that has lost its files.
        dry_run: decide in full, the artifact loaded and all, and write nothing.

    Raises:
        UserError: the version is champion already and has lost its files, or the policy protects an unknown class.
    """
    artifact: Check | None = None
    while True:
        before = store.find_alias(tracking, version.name, CHAMPION)
        if before == version.version:
            return _kept(tracking, version)
        standing = champion_standing(tracking, version, before)
        scores = _scores_used(standing)
        champion = None if scores is None else scores.evaluation
        unusable = standing.obstacle if manual and standing.lost else None
        gate = decide(version.evaluation, champion, policy, remedy=_remedy(version, standing), unusable=unusable)
        if not manual:
            gate = _refused_if_withdrawn(tracking, version, champion, gate)
        if gate.promoted:
            artifact = artifact or _loaded_check(tracking, version)
            gate = verdict(version.evaluation, champion, (*gate.checks, artifact))
        decision = PromotionDecision(
            name=version.name,
            version=version.version,
            promoted=gate.promoted,
            reason=gate.reason,
            checks=gate.checks,
            champion_before=before,
            champion_after=version.version if gate.promoted else before,
            policy=policy.model_dump(mode="json"),
            candidate_scores=_decided_on(version.version, _registered(version)),
            champion_scores=None if before is None or scores is None else _decided_on(before, scores),
        )
        if dry_run:
            return decision
        # Overtaken: whoever came in between may have made another one champion.
        with suppress(LeaseLost), champion_lease(tracking, version.name) as lease:
            # Loading the artifact took seconds.
            if _is_champion(tracking, version.name, before):
                decisions.record_promotion(tracking, decision, decided_by or current_user(), manual=manual)
                if decision.promoted:
                    lease.move(version.version)
                return decision
        print(f"the champion of {version.name} changed meanwhile; deciding about version {version.version} again")


def verify_decision(record: PromotionDecision, tracking: Tracking, _arguments: Mapping[str, Any]) -> str | None:
    """Why a cached decision no longer holds, or None; a step's `verify`."""
    now = store.find_alias(tracking, record.name, CHAMPION)
    if now == record.champion_after:
        return None
    return f"the champion of {record.name} is now {'none' if now is None else f'version {now}'}"


def roll_back(tracking: Tracking, name: str, *, decided_by: str | None = None, dry_run: bool = False) -> Rollback:
    """Move the alias back to the last champion before this one that loads and predicts as evaluated.

    The version withdrawn is refused by the gate from now on, unless it is promoted by hand. `dry_run` finds and checks
    the version, and writes nothing.

    Raises UserError where there is no such version, saying what is wrong with each, or where the champion changes
    meanwhile.
    """
    before = store.find_alias(tracking, name, CHAMPION)
    line = decisions.champions(tracking, name, before)
    skipped: list[Unusable] = []
    for candidate in reversed(line if before is None else line[:-1]):
        if candidate == before or candidate in (one.version for one in skipped):
            continue
        try:
            check = _loaded_check(tracking, store.get_version(tracking, name, candidate))
        except UserError as error:
            skipped.append(Unusable(version=candidate, reason=str(error)))
            continue
        if not check.passed:
            skipped.append(Unusable(version=candidate, reason=check.detail))
            continue
        if not dry_run:
            with champion_lease(tracking, name) as lease:
                if not _is_champion(tracking, name, before):
                    raise UserError(f"the champion of {name} changed meanwhile; look at it with segvit models {name}")
                decisions.record_rollback(tracking, name, before, candidate, check, decided_by or current_user())
                lease.move(candidate)
        return Rollback(
            name=name, champion_before=before, champion_after=candidate, skipped=tuple(skipped), check=check
        )
    now = f"model {name} has no champion" if before is None else f"version {before} of model {name} is champion"
    tried = "; ".join(f"version {one.version}: {one.reason}" for one in skipped)
    raise UserError(
        f"{now}, and no earlier champion is usable ({tried or 'there was none'}); "
        f"promote a version with segvit promote {name} VERSION"
    )


def _registered(version: ModelVersion) -> Scores:
    return Scores(run_id=version.run_id, rescored=False, evaluation=version.evaluation)


def _scores_used(standing: Standing) -> Scores | None:
    """The champion's that are comparable or, to say why there are none, those that it was registered with."""
    if standing.champion is None or standing.scores is not None:
        return standing.scores
    return _registered(standing.champion)


def _decided_on(version: int, scores: Scores) -> DecidedOn:
    return DecidedOn(
        version=version,
        run_id=scores.run_id,
        rescored=scores.rescored,
        digest=scores.evaluation.content_digest(),
        data_digest=scores.evaluation.data_digest,
        miou=scores.evaluation.miou,
    )


def _remedy(version: ModelVersion, standing: Standing) -> str:
    if standing.source is not None:
        return (
            "run the experiment again, or score the champion alike: "
            f"segvit evaluate models:/{version.name}/{standing.source.version} {version.model_uri}"
        )
    return (
        f"the champion cannot be scored again, {standing.obstacle}; run its experiment again to register it anew, or "
        f"promote without comparing: segvit promote {version.name} {version.version}"
    )


def _refused_if_withdrawn(
    tracking: Tracking, version: ModelVersion, champion: Evaluation | None, gate: GateDecision
) -> GateDecision:
    withdrawn = decisions.why_withdrawn(tracking, version.name, version.version)
    if not withdrawn:
        return gate
    remedy = f"to have it all the same, run segvit promote {version.name} {version.version}"
    check = Check(name="not withdrawn", passed=False, detail=f"version {version.version} {withdrawn}; {remedy}")
    return verdict(version.evaluation, champion, (*gate.checks, check))


def _loaded_check(tracking: Tracking, version: ModelVersion) -> Check:
    with tempfile.TemporaryDirectory(prefix="segvit-promote-") as scratch:
        try:
            folder = model_folder(tracking, ModelReference(version.name, version.version), scratch)
        except UserError as error:
            return Check(name="artifact", passed=False, detail=str(error))
        return reproduces(folder, version.evaluation)


def _is_champion(tracking: Tracking, name: str, version: int | None) -> bool:
    return store.find_alias(tracking, name, CHAMPION) == version


def _kept(tracking: Tracking, version: ModelVersion) -> PromotionDecision:
    lost = store.lost_files(tracking, version.name, version.version)
    if lost is not None:
        raise UserError(
            f"the champion {lost}; run its experiment again, which registers it anew, or go back with segvit rollback "
            f"{version.name}"
        )
    kept = f"version {version.version} is the champion already; kept"
    recorded = store.version_tags(tracking, version.name, version.version).get(decisions.DECISION)
    if recorded is not None:
        decision = PromotionDecision.from_json(recorded)
        if decision.promoted:
            return decision.model_copy(update={"reason": f"{kept} ({decision.reason})"})
    return PromotionDecision(
        name=version.name,
        version=version.version,
        promoted=False,
        reason=kept,
        checks=(),
        champion_before=version.version,
        champion_after=version.version,
    )
