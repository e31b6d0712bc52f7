"""Known vulnerabilities of the packages in constraints.txt, asked of the advisory service that pip-audit knows.

    python -m tests.audit

Exit code 1 where there is one, or where the audit itself fails. Where the service cannot be reached, or knows none of
the packages, as behind a mirror, a line says so and the exit code is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
REQUEST_TIMEOUT_S = 5
TIMEOUT_S = 180
# In what pip-audit says where nobody answers.
_UNREACHABLE = ("ConnectionError", "Connection refused", "Max retries", "timed out", "Tried to connect", "ProxyError")


def judge(report: dict[str, Any] | None, said: str) -> tuple[int, list[str]]:
    """Exit code and lines, by pip-audit's report (None: it wrote none) and what it said."""
    if report is None:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        if any(words in said for words in _UNREACHABLE):
            return 0, [f"audit skipped: the advisory service cannot be reached ({last[:200]})"]
        return 1, [f"the audit failed: {last[:500]}"]
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {advisory['id']}, "
        f"{'mended in ' + ', '.join(advisory['fix_versions']) if advisory['fix_versions'] else 'not mended yet'}"
        for package in packages
        for advisory in package.get("vulns", [])
    ]
    if found:
        return 1, [f"{len(found)} known vulnerabilities; raise the versions in {CONSTRAINTS.name}", *found]
    if len(unknown) == len(packages):
        return 0, ["audit skipped: the advisory service knows none of the packages, as behind a mirror"]
    more = f"; not known there: {', '.join(unknown)}" if unknown else ""
    return 0, [f"no known vulnerability in {len(packages) - len(unknown)} packages{more}"]


def main() -> None:
    """Run pip-audit on the constraints."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
        command += ["--timeout", str(REQUEST_TIMEOUT_S), "--progress-spinner", "off"]
        command += ["--format", "json", "--output", str(output)]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S).stderr
        except subprocess.TimeoutExpired:
            said = f"timed out after {TIMEOUT_S} s"
        report = json.loads(output.read_text()) if output.is_file() and output.stat().st_size else None
    code, lines = judge(report, said)
    print(*lines, sep="\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
