"""The gate between a candidate and the alias `champion`: a pure function of two evaluations and a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.records import Check, Evaluation

ROUNDING = 1e-9


class GateDecision(NamedTuple):
    """Whether a candidate passes, why in one line, and each condition."""

    promoted: bool
    reason: str
    checks: tuple[Check, ...]


def policy_problems(policy: PromotionPolicy, class_names: Sequence[str]) -> list[str]:
    """What of a policy does not fit a data set, a line each."""
    return [
        f"protected_classes names {name!r}; choose from {', '.join(class_names)}"
        for name in policy.protected_classes
        if name not in class_names
    ]


def decide(candidate: Evaluation, champion: Evaluation | None, policy: PromotionPolicy) -> GateDecision:
    """Whether a candidate may become champion: every condition of the policy that applies must hold.

    Without a champion there is nothing to regress from, and only the absolute conditions apply.
    Raises UserError where the policy protects a class that the data does not have.
    """
    for name in policy.protected_classes:
        if name not in candidate.class_names:
            raise UserError(
                f"the policy's protected_classes names {name!r}; choose from {', '.join(candidate.class_names)}"
            )
    checks = [
        Check(
            name="minimum mIoU",
            passed=candidate.miou >= policy.min_miou - ROUNDING,
            detail=f"mIoU {candidate.miou:.4f}, minimum {policy.min_miou:.4f}",
        )
    ]
    if champion is not None:
        checks += _comparison(candidate, champion, policy)
    checks += [
        Check(name=name, passed=value <= budget, detail=f"{name} {_figure(value)}, at most {_figure(budget)}")
        for name, value, budget in (
            ("GFLOPs", candidate.gflops, policy.max_gflops),
            ("parameters", candidate.parameters, policy.max_parameters),
            ("latency ms", candidate.latency_ms, policy.max_latency_ms),
        )
        if budget is not None
    ]
    return verdict(candidate, champion, tuple(checks))


def verdict(candidate: Evaluation, champion: Evaluation | None, checks: tuple[Check, ...]) -> GateDecision:
    """What the checks come to: refused for each that failed, or promoted."""
    failed = [check.detail for check in checks if not check.passed]
    if failed:
        return GateDecision(False, "refused: " + "; ".join(failed), checks)
    against = "the first champion" if champion is None else f"the champion had {champion.miou:.4f}"
    return GateDecision(True, f"promoted: mIoU {candidate.miou:.4f}, {against}; {len(checks)} checks passed", checks)


def _comparison(candidate: Evaluation, champion: Evaluation, policy: PromotionPolicy) -> list[Check]:
    ours, theirs = candidate.data_digest, champion.data_digest
    if ours != theirs:
        detail = f"scored on data {ours[:8]}, the champion on {theirs[:8]}: not comparable"
        return [Check(name="same data", passed=False, detail=detail)]
    checks = [Check(name="same data", passed=True, detail=f"both scored on data {ours[:8]}")]
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


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
