"""docs/security.md: every test that it names as a proof is there, and every file that it names as a place."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")


def test_security__every_test_it_names_exists_once() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "tests").rglob("test_*.py"))
    defined = re.findall(r"^def (test_\w+)", sources, re.MULTILINE)
    assert len(named) >= 40
    assert {name: defined.count(name) for name in named} == dict.fromkeys(named, 1)


def test_security__every_row_of_a_table_has_a_proof() -> None:
    heads = ("| promise", "| input")
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(heads)]
    assert len(rows) >= 25
    assert [row for row in rows if "`test_" not in row] == []


def test_security__every_file_it_names_exists() -> None:
    paths = re.findall(r"`([\w/]+/\w+\.py|cluster\.yaml)`", TEXT)
    assert len(set(paths)) >= 15
    assert [path for path in paths if not (REPOSITORY / path).is_file()] == []
