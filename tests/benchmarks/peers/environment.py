"""The Python environments that the sides run in: this one, and a throw-away one for each peer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]
# As measured in docs/benchmarks.md; never dependencies of the project.
REQUIREMENTS = {
    "lightly": ("lightly-train==0.18.0",),
    "huggingface": ("transformers[torch]==5.24.0", "scipy==1.17.1"),
}
# The peers compute with the project's own releases of these.
SHARED = ("torch", "torchvision")
INSTALLED = "installed.txt"


def python_of(side: str, folder: Path) -> str:
    """The interpreter that a side runs in; a peer's environment is made below `folder` unless it is there, whole.

    Raises:
        UserError: pip cannot install the peer.
    """
    if side not in REQUIREMENTS:
        return sys.executable
    environment = folder / side
    python, mark = environment / "bin" / "python", environment / INSTALLED
    wanted = "\n".join([*REQUIREMENTS[side], *pins(ROOT / "constraints.txt", SHARED)])
    if not mark.is_file() or mark.read_text() != wanted:
        print(f"installing {wanted.replace(chr(10), ', ')} into {environment}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted.splitlines()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"{side} cannot be installed into {environment}: {cause}; leave it out with --only")
        mark.write_text(wanted)
    return str(python)


def pins(constraints: Path, names: tuple[str, ...]) -> list[str]:
    """The lines name==version of a constraints file, in the order of `names`."""
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(), flags=re.MULTILINE))
    return [f"{name}=={found[name]}" for name in names]
