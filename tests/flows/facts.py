"""What a command prints with --json, read back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flows.cli import main


def facts(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that the command prints; what was captured before is dropped."""
    capfd.readouterr()
    main([*arguments, "--json"])
    said = capfd.readouterr().out
    # What workers print reaches standard output here, where it is not the process's own.
    start = re.search(r"^(\{|\[)(\n|\}$|\]$)", said, re.MULTILINE)
    assert start, said
    return json.loads(said[start.start() :])
