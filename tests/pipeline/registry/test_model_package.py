from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import segvit
from pipeline.registry.model_package import decoder_plugin
from pipeline.storage import names
from segvit import checkpoint

FIND = """
import sys
sys.path[:0] = sys.argv[1:]
from segvit.decoders import DECODERS
print(DECODERS.get("mine").__file__)
"""


def installed(site: Path, files: dict[str, str], value: str) -> None:
    """A package as pip leaves it, with a decoder `mine`; the decoder is only an object here."""
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    information = site / "somebody-3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 3\n")
    (information / "entry_points.txt").write_text(f"[segvit.decoders]\nmine = {value}\n")


@pytest.mark.parametrize(
    ("files", "value", "found"),
    [
        ({"mine.py": "import sys\nMine = sys.modules[__name__]\n"}, "mine:Mine", "mine.py"),
        (
            {
                "kit/__init__.py": "",
                "kit/own/__init__.py": "from kit import base\nMine = base\n",
                "kit/base.py": "",
            },
            "kit.own:Mine",
            "kit",
        ),
        (
            {"gear/__init__.py": "", "gear/own/mine.py": "import sys\nMine = sys.modules[__name__]\n"},
            "gear.own.mine:Mine",
            "gear",
        ),
    ],
)
def test_decoder_plugin__is_found_without_its_package(
    files: dict[str, str], value: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, scratch, code = tmp_path / "site", tmp_path / "scratch", tmp_path / "code"
    for folder in (site, scratch, code):
        folder.mkdir()
    installed(site, files, value)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(site))
        module, metadata = decoder_plugin("mine", scratch)
    assert module == site / found
    for path in (module, metadata):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, code / path.name)
    root = str(Path(segvit.__file__).parents[1])
    ended = subprocess.run([sys.executable, "-IBc", FIND, str(code), root], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.strip()).is_relative_to(code)


def test_decoder_plugin__of_a_built_in_decoder_is_nothing(tmp_path: Path) -> None:
    assert decoder_plugin("cascade", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_names__a_checkpoint_is_called_as_segvit_writes_it() -> None:
    assert (checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE) == names.CHECKPOINT_FILES
