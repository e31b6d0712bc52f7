"""The gate between a candidate and the alias `champion`.

`decide` is a pure function of two evaluations and a policy. `promote_version` adds what only the registry can
tell: that the registered artifact itself, loaded in its own process, reproduces the evaluated predictions. Each
decision is written on the version before the alias moves, so asking again mends a crash between the two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import registry, storage
from pipeline.config import PromotionPolicy
from pipeline.errors import UserError
from pipeline.model_package import CHECKPOINT_FOLDER, WEIGHTS_FILE
from pipeline.models import ModelReference, model_folder
from pipeline.records import Check, Evaluation, ModelVersion, PromotionDecision
from pipeline.registry import CHAMPION
from pipeline.tracking import Tracking, who

# Rounding differs between devices and moves single border pixels; another model or preprocessing moves many.
MIN_PROBE_AGREEMENT = 0.995
ROUNDING = 1e-9
LOAD_TIMEOUT_S = 600

DECISION = "promotion.decision"
DECIDED_BY = "promotion.by"
DECIDED_AT = "promotion.at"
DECIDED_AGAINST = "promotion.against"
HISTORY = "promotion.history"

# Run by a bare interpreter: -I leaves out the working directory, PYTHONPATH and the user's own packages, -B leaves
# no compiled files in the artifact.
LOAD_AND_PREDICT = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow.pyfunc
import numpy as np
folder, images, labels = sys.argv[1:]
model = mlflow.pyfunc.load_model(folder)
np.save(labels, model.predict(np.load(images, allow_pickle=False)), allow_pickle=False)
import segvit
print(segvit.__file__)
"""


class GateDecision(NamedTuple):
    """Whether a candidate passes, why in one line, and each condition."""

    promoted: bool
    reason: str
    checks: tuple[Check, ...]


def decide(candidate: Evaluation, champion: Evaluation | None, policy: PromotionPolicy) -> GateDecision:
    """Whether a candidate may become champion: every condition of the policy that applies must hold.

    Without a champion there is nothing to regress from, and only the absolute conditions apply.
    Raises UserError where the policy protects a class that the data does not have.
    """
    for name in policy.protected_classes:
        if name not in candidate.class_names:
            raise UserError(f"promote.protected_classes names {name!r}; choose from {', '.join(candidate.class_names)}")
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
        Check(name=name, passed=value <= budget, detail=f"{name} {value:.6g}, at most {budget:.6g}")
        for name, value, budget in (
            ("GFLOPs", candidate.gflops, policy.max_gflops),
            ("parameters", candidate.parameters, policy.max_parameters),
            ("latency ms", candidate.latency_ms, policy.max_latency_ms),
        )
        if budget is not None
    ]
    return _verdict(candidate, champion, tuple(checks))


def promote_version(
    tracking: Tracking, version: ModelVersion, policy: PromotionPolicy, *, decided_by: str | None = None
) -> PromotionDecision:
    """Ask the gate about a registered version, record the answer on it, and move the alias if it passes.

    A version that is champion already stays so, with the decision that made it so.
    """
    before = registry.find_alias(tracking, version.name, CHAMPION)
    if before == version.version:
        return _kept(tracking, version)
    champion = None if before is None else registry.get_version(tracking, version.name, before).evaluation
    gate = decide(version.evaluation, champion, policy)
    if gate.promoted:
        with tempfile.TemporaryDirectory(prefix="segvit-promote-") as scratch:
            folder = model_folder(tracking, ModelReference(version.name, version.version), scratch)
            check = reproduces(folder, version.evaluation)
        gate = _verdict(version.evaluation, champion, (*gate.checks, check))
    decision = PromotionDecision(
        name=version.name,
        version=version.version,
        promoted=gate.promoted,
        reason=gate.reason,
        checks=gate.checks,
        champion_before=before,
        champion_after=version.version if gate.promoted else before,
    )
    _record(tracking, decision, decided_by or who())
    if decision.promoted:
        registry.set_alias(tracking, version.name, CHAMPION, version.version)
    return decision


def verify_decision(record: PromotionDecision, tracking: Tracking) -> str | None:
    """Why a remembered decision no longer holds, or None; a step's `verify`."""
    now = registry.find_alias(tracking, record.name, CHAMPION)
    if now == record.champion_after:
        return None
    return f"the champion of {record.name} is now {'none' if now is None else f'version {now}'}"


def reproduces(folder: Path, evaluation: Evaluation) -> Check:
    """Whether the registered model in a local folder is the evaluated one, in weights and in predictions.

    It is loaded by an interpreter of its own that sees nothing of this source tree, as any user of it would.
    """

    def result(passed: bool, detail: str) -> Check:
        return Check(name="artifact", passed=passed, detail=f"the registered artifact {detail}")

    weights = folder / CHECKPOINT_FOLDER / WEIGHTS_FILE
    if not weights.is_file() or storage.file_digest(str(weights)) != evaluation.checkpoint_digest:
        return result(False, "does not hold the evaluated weights")
    with tempfile.TemporaryDirectory(prefix="segvit-probe-") as scratch:
        probe = storage.fetch_folder(storage.join(evaluation.uri, "probe"), Path(scratch) / "probe")
        expected = np.load(probe / "labels.npy", allow_pickle=False)
        written = Path(scratch) / "predicted.npy"
        arguments = [str(folder), str(probe / "images.npy"), str(written)]
        try:
            ended = subprocess.run(
                [sys.executable, "-IB", "-c", LOAD_AND_PREDICT, *arguments],
                cwd=scratch,
                env=_bare_environment(),
                capture_output=True,
                text=True,
                timeout=LOAD_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return result(False, f"does not load and predict within {LOAD_TIMEOUT_S} s")
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines()
            return result(False, f"does not load: {lines[-1] if lines else f'exit code {ended.returncode}'}")
        carried = Path(ended.stdout.strip().splitlines()[-1])
        if not carried.resolve().is_relative_to(folder.resolve()):
            return result(False, f"does not carry its own code but used {carried}")
        predicted = np.load(written, allow_pickle=False)
    if predicted.shape != expected.shape:
        return result(False, f"predicts shape {predicted.shape}, evaluated was {expected.shape}")
    agreement = float((predicted == expected).mean())
    return result(
        agreement >= MIN_PROBE_AGREEMENT,
        f"predicts as evaluated in {agreement:.2%} of pixels, at least {MIN_PROBE_AGREEMENT:.2%}",
    )


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


def _verdict(candidate: Evaluation, champion: Evaluation | None, checks: tuple[Check, ...]) -> GateDecision:
    failed = [check.detail for check in checks if not check.passed]
    if failed:
        return GateDecision(False, "refused: " + "; ".join(failed), checks)
    against = "the first champion" if champion is None else f"the champion had {champion.miou:.4f}"
    return GateDecision(True, f"promoted: mIoU {candidate.miou:.4f}, {against}; {len(checks)} checks passed", checks)


def _kept(tracking: Tracking, version: ModelVersion) -> PromotionDecision:
    kept = f"version {version.version} is the champion already; kept"
    recorded = registry.version_tags(tracking, version.name, version.version).get(DECISION)
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


def _record(tracking: Tracking, decision: PromotionDecision, decided_by: str) -> None:
    now = datetime.now(UTC)
    against = "none" if decision.champion_before is None else f"version {decision.champion_before}"
    facts = {
        DECIDED_BY: decided_by,
        DECIDED_AT: now.isoformat(timespec="seconds"),
        DECIDED_AGAINST: against,
        registry.PROMOTED: json.dumps(decision.promoted),
        registry.PROMOTION_REASON: decision.reason,
    }
    # The latest decision is there to be read at a glance, and each stays under its time.
    history = json.dumps(facts | {"checks": [check.model_dump() for check in decision.checks]})
    facts |= {f"{HISTORY}.{now:%Y%m%dT%H%M%S.%fZ}": history, DECISION: decision.to_json()}
    registry.set_version_tags(tracking, decision.name, decision.version, facts)


def _bare_environment() -> dict[str, str]:
    # Ray gives tasks that reserve no CPU one thread; this process may use the machine for its few seconds.
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}
