"""What a command prints with --json, read back, and how it ends."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flows.cli import main


def exit_code(*arguments: str) -> int:
    """Run a command; the code with which it ends."""
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def facts(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that the command prints; what was captured before is dropped."""
    capfd.readouterr()
    main([*arguments, "--json"])
    said = capfd.readouterr().out
    # What workers print reaches standard output here, where it is not the process's own.
    start = re.search(r"^(\{|\[)(\n|\}$|\]$)", said, re.MULTILINE)
    assert start, said
    return json.loads(said[start.start() :])
