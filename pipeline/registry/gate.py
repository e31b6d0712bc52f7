"""The gate between a candidate and the alias `champion`: a pure function of two evaluations and a policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.records import Check, Evaluation
from segvit.registry import nearest_first

ROUNDING = 1e-9
SCORE_ALIKE = "score both on the same data with the same settings"
OTHER_CLASSES = "a model of other classes is another model; give its experiment another name"


class GateDecision(NamedTuple):
    """Whether a candidate passes, why in one line, and each condition."""

    promoted: bool
    reason: str
    checks: tuple[Check, ...]


def decide(
    candidate: Evaluation,
    champion: Evaluation | None,
    policy: PromotionPolicy,
    *,
    remedy: str = SCORE_ALIKE,
    unusable: str | None = None,
) -> GateDecision:
    """Whether a candidate may become champion: every condition of the policy that applies must hold.

    Without a champion there is nothing to regress from, and only the absolute conditions apply.

    Args:
        remedy: what to do where the two were not scored alike.
        unusable: why nobody can use the champion any more; one that was not scored alike is then not compared with.

    Raises:
        UserError: the policy protects a class that the data does not have.
    """
    problems = policy_problems(policy, candidate.class_names)
    if problems:
        raise UserError(f"the policy's {'; '.join(problems)}")
    checks = [
        Check(
            name="minimum mIoU",
            passed=candidate.miou >= policy.min_miou - ROUNDING,
            detail=f"mIoU {candidate.miou:.4f}, minimum {policy.min_miou:.4f}",
        )
    ]
    if candidate.unmeasured_classes:
        names = ", ".join(candidate.unmeasured_classes)
        allowed = policy.unmeasured_classes == "allow"
        how = (
            "which the policy allows" if allowed else "and the mIoU says nothing of it; score it on data that shows all"
        )
        detail = f"split {candidate.split} has no labelled pixel of {names}, {how}"
        checks.append(Check(name="all classes measured", passed=allowed, detail=detail))
    if champion is not None:
        checks += _comparison(candidate, champion, policy, remedy, unusable)
    checks += [
        _budget_check(name, value, budget)
        for name, value, budget in (
            ("GFLOPs", candidate.gflops, policy.max_gflops),
            ("parameters", candidate.parameters, policy.max_parameters),
        )
        if budget is not None
    ]
    if policy.max_latency_ms is not None:
        checks.append(_latency_check(candidate, policy.max_latency_ms))
    return verdict(candidate, champion, tuple(checks))


def policy_problems(policy: PromotionPolicy, class_names: Sequence[str]) -> list[str]:
    """What a policy asks for that data of these classes cannot tell."""
    return [
        f"protected_classes names {name!r}; choose from {', '.join(nearest_first(name, class_names))}"
        for name in policy.protected_classes
        if name not in class_names
    ]


def scoring_differences(first: Evaluation, second: Evaluation, other: str) -> list[str]:
    """Why scores of two evaluations are not comparable, such as "on data 0a1b2c3d, the champion on data 4e5f6a7b".

    Args:
        other: what the second one is called.
    """
    found = []
    if first.split != second.split:
        found.append(f"on split {first.split}, {other} on split {second.split}")
    if first.data_digest != second.data_digest:
        found.append(f"on data {first.data_digest[:8]}, {other} on data {second.data_digest[:8]}")
    for number, (mine, its) in enumerate(zip_longest(first.class_names, second.class_names, fillvalue="missing")):
        if mine != its:
            found.append(f"with class {number} {mine}, {other} with {its}")
            break
    # As JSON: a tuple comes back from the registry as a list.
    settings, others = (json.dumps(one.inference, sort_keys=True) for one in (first, second))
    if settings != others:
        found.append(f"with inference {settings}, {other} with {others}")
    return found


def verdict(candidate: Evaluation, champion: Evaluation | None, checks: tuple[Check, ...]) -> GateDecision:
    """What the checks come to: refused for each that failed, or promoted."""
    failed = [check.detail for check in checks if not check.passed]
    if failed:
        return GateDecision(False, "refused: " + "; ".join(failed), checks)
    if champion is None:
        against = "the first champion"
    elif scoring_differences(candidate, champion, ""):
        against = "not compared with the champion"
    else:
        against = f"the champion had {champion.miou:.4f}"
    return GateDecision(True, f"promoted: mIoU {candidate.miou:.4f}, {against}; {len(checks)} checks passed", checks)


def _comparison(
    candidate: Evaluation, champion: Evaluation, policy: PromotionPolicy, remedy: str, unusable: str | None
) -> list[Check]:
    differences = scoring_differences(candidate, champion, "the champion")
    if differences and unusable is not None:
        return [Check(name="same scoring", passed=True, detail=f"{unusable}: not compared")]
    if differences:
        if candidate.class_names != champion.class_names:
            remedy = OTHER_CLASSES
        detail = f"scored {'; '.join(differences)}: not comparable; {remedy}"
        return [Check(name="same scoring", passed=False, detail=detail)]
    checks = [
        Check(name="same scoring", passed=True, detail=f"both scored alike on data {candidate.data_digest[:8]}"),
    ]
    checks.append(
        Check(
            name="no regression",
            passed=candidate.miou >= champion.miou - policy.max_regression - ROUNDING,
            detail=f"mIoU {candidate.miou:.4f}, the champion's {champion.miou:.4f}, "
            f"tolerance {policy.max_regression:.4f}",
        )
    )
    candidate_iou = dict(zip(candidate.class_names, candidate.per_class_iou, strict=True))
    champion_iou = dict(zip(champion.class_names, champion.per_class_iou, strict=True))
    tolerance = policy.max_class_regression
    for name in policy.protected_classes:
        mine, other = candidate_iou[name], champion_iou.get(name)
        if other is None:
            passed, detail = True, f"{name}: the champion has no IoU"
        elif mine is None:
            passed, detail = False, f"{name}: no IoU, the champion's {other:.4f}"
        else:
            passed = mine >= other - tolerance - ROUNDING
            detail = f"{name}: IoU {mine:.4f}, the champion's {other:.4f}, tolerance {tolerance:.4f}"
        checks.append(Check(name=f"class {name}", passed=passed, detail=detail))
    return checks


def _budget_check(name: str, value: float, budget: float) -> Check:
    return Check(name=name, passed=value <= budget, detail=f"{name} {_figure(value)}, at most {_figure(budget)}")


def _latency_check(candidate: Evaluation, budget_ms: float) -> Check:
    check = _budget_check("latency ms", candidate.latency_ms, budget_ms)
    if candidate.latency_reliable:
        return check
    detail = (
        f"{check.detail}, but timed beside other work and therefore unreliable; when the machine is idle, remove "
        f"{candidate.uri} and run the experiment again: only this evaluation and what follows is done anew"
    )
    return Check(name=check.name, passed=False, detail=detail)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
