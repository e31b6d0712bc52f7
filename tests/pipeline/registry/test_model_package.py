from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import segvit
from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Evaluation
from pipeline.registry.artifact_check import reproduces
from pipeline.registry.model_package import decoder_plugin
from pipeline.storage import names
from segvit import checkpoint
from segvit.decoders import DECODERS

# What another package adds by an entry point, whose module lies in a package with a module beside it.
OWN_DECODER = """
from segvit.decoders.linear import Linear
from own.options import GAIN
class Scaled(Linear):
    gain = GAIN
"""
# Installs the package for this process alone, trains nothing, packs the model and writes its predictions.
PACK = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder / "installed"))
import numpy as np, torch, segvit
from pipeline import storage
from pipeline.registry.model_package import save_pyfunc
config = segvit.ModelConfig(backbone="vit_tiny_patch16_224", image_size=(32, 32), structure="scaled", out_layers=(1,),
                            backbone_options={"depth": 2, "embed_dim": 48, "num_heads": 3})
model = segvit.build_model(config, 3).eval()
segvit.save_checkpoint(folder / "checkpoint", model, {"class_names": ["a", "b", "c"]})
images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
labels = segvit.predict_batch(model, torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
(folder / "probe").mkdir()
np.save(folder / "probe/images.npy", images)
np.save(folder / "probe/labels.npy", labels.astype(np.uint16))
save_pyfunc(folder / "model", folder / "checkpoint")
"""
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


def test_decoder_plugin__whose_module_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DECODERS, "plugin", lambda _: EntryPoint("mine", "nowhere_at_all:Mine", DECODERS.group))
    with pytest.raises(
        UserError, match=r"^decoder 'mine' is nowhere_at_all:Mine, which is not installed here; install"
    ):
        decoder_plugin("mine", tmp_path)


def test_decoder_plugin__of_a_built_in_decoder_is_nothing(tmp_path: Path) -> None:
    assert decoder_plugin("cascade", tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_names__a_checkpoint_is_called_as_segvit_writes_it() -> None:
    assert (checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE) == names.CHECKPOINT_FILES


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed model whose decoder is of another package, and what it predicted."""
    folder = tmp_path_factory.mktemp("packed")
    own, metadata = folder / "installed/own", folder / "installed/own-1.0.dist-info"
    own.mkdir(parents=True)
    metadata.mkdir()
    (own / "__init__.py").write_text("")
    (own / "options.py").write_text("GAIN = 1.0\n")
    (own / "decoder.py").write_text(OWN_DECODER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[segvit.decoders]\nscaled = own.decoder:Scaled\n")
    ended = subprocess.run([sys.executable, "-c", PACK, str(folder)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def evaluated(packed: Path, trained: Any) -> Evaluation:
    digest = storage.file_digest(str(packed / "checkpoint/model.safetensors"))
    scored: Evaluation = trained.scored(0.5, checkpoint_digest=digest, uri=str(packed))
    return scored


def test_save_pyfunc__a_decoder_of_another_package_loads_where_that_is_not_installed(
    packed: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(path.name for path in (packed / "model/code").iterdir()) == [
        "own",
        "segvit",
        "segvit_decoder_scaled-0.dist-info",
    ]
    # As where it was packed: the decoder's own module has to come from the artifact, too.
    monkeypatch.setattr(DECODERS, "plugin", lambda _: EntryPoint("scaled", "own.decoder:Scaled", DECODERS.group))
    check = reproduces(packed / "model", evaluated(packed, trained))
    assert check.passed, check.detail
    assert "predicts as evaluated in 100.00% of pixels" in check.detail


def test_reproduces__a_decoder_from_elsewhere_is_told(
    packed: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any module that the artifact does not carry stands for the decoder where it is installed.
    monkeypatch.setattr(DECODERS, "plugin", lambda _: EntryPoint("scaled", "numpy:Scaled", DECODERS.group))
    check = reproduces(packed / "model", evaluated(packed, trained))
    assert not check.passed
    assert check.detail == f"the registered artifact does not carry its own code but used {np.__file__}"


def test_reproduces__a_decoder_that_was_not_packed_is_told(packed: Path, trained: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(packed / "model", tmp_path / "model"))
    shutil.rmtree(model / "code/segvit_decoder_scaled-0.dist-info")
    check = reproduces(model, evaluated(packed, trained))
    assert not check.passed
    assert "unknown structure 'scaled'" in check.detail
