from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from segvit.registry import Registry

OWN_MODULE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.decoder import Decoder, DecoderOutput, DecoderSpec, Prediction
from segvit.losses.term import LossTerm


@dataclass(frozen=True, kw_only=True)
class Pooled(Decoder):
    """One linear layer on pooled tokens."""

    has_masks: ClassVar[bool] = False
    gain: float = 1.0

    def problems(self) -> list[str]:
        return [] if self.gain > 0 else [f"gain must be > 0, got {self.gain}"]

    def build(self, spec: DecoderSpec) -> nn.Module:
        return Head(spec.feature_widths[-1], spec.num_classes, self.gain)


class Head(nn.Module):
    def __init__(self, width: int, num_classes: int, gain: float) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(width, num_classes), gain

    def forward(self, features: list[FeatureMap]) -> DecoderOutput:
        last = features[-1]
        logits = self.gain * self.linear(last.tokens).transpose(1, 2).unflatten(2, last.grid)
        return DecoderOutput([Prediction(None, logits)], last.stride)


def square(done: float, least: float = 0.0) -> float:
    return max(least, (1 - done) ** 2)


MARGIN = LossTerm(
    name="margin", compares="pixels", function=lambda scores, labels: scores.relu().sum(1), search_range=(0.1, 1.0)
)
'''
ENTRY_POINTS = """
[segvit.decoders]
pooled = own_parts:Pooled
broken = own_parts:Missing
[segvit.loss_terms]
margin = own_parts:MARGIN
[segvit.schedules]
square = own_parts:square
"""
PROGRAM = """
import sys
from pathlib import Path
import torch
from segvit.decoders import DECODERS
from segvit.losses import LOSS_TERMS
from segvit.schedules import SCHEDULES, build_schedule
assert DECODERS.names() == ["cascade", "single", "naive_qd", "shrunk", "anchored", "linear", "broken", "pooled"]
assert LOSS_TERMS.names()[-1] == "margin" and SCHEDULES.names()[-1] == "square"
assert "own_parts" not in sys.modules, "names import nothing"
assert DECODERS.plugin_file("pooled") == Path(sys.argv[1]) / "own_parts.py"
assert DECODERS.plugin_file("cascade") is None
assert [build_schedule("square", 4, least=0.1)(step) for step in (0, 2, 4)] == [1.0, 0.25, 0.1]

import segvit
try:
    DECODERS.get("broken")
except ValueError as error:
    assert "structure 'broken' cannot be loaded from own_parts:Missing" in str(error), error
small = {"backbone": "vit_tiny_patch16_224", "image_size": (32, 32), "structure": "pooled", "out_layers": (1,)}
for gain, message in ((-1.0, "gain must be > 0"), ("2", "gain must be a number, got '2'")):
    try:
        segvit.ModelConfig(**small, gain=gain)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(gain)
config = segvit.ModelConfig(**small, gain=2.0)
weights = {"cross_entropy": 1.0, "margin": 0.5}
assert segvit.model_problems(config, 3, loss=weights) == []
assert "compares masks" in segvit.model_problems(config, 3, loss={"dice": 1.0})[0]
model = segvit.build_model(config, 3)
loss = segvit.SegmentationLoss(3, weights)
terms = loss(model(torch.randn(1, 3, 32, 32)), torch.randint(0, 3, (1, 32, 32)))
assert list(terms) == ["cross_entropy", "margin", "total"]
terms["total"].backward()
assert model.decoder.linear.weight.grad.abs().sum() > 0
folder = Path(sys.argv[1]) / "checkpoint"
segvit.save_checkpoint(folder, model, {})
again, _ = segvit.load_checkpoint(folder)
assert again.config == config and again.config.gain == 2.0
assert torch.equal(segvit.predict_batch(again, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)),
                   segvit.predict_batch(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
assert segvit.model_cost(config, 3, (32, 32)).gflops > 0
print("done")
"""


def install(folder: Path, module: str, entry_points: str, name: str = "own") -> None:
    """What installing a package of one file leaves."""
    (folder / "own_parts.py").write_text(module)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def test_entry_points__decoder_term_and_schedule_from_one_file(tmp_path: Path) -> None:
    install(tmp_path, OWN_MODULE, ENTRY_POINTS)
    program = f"import sys; sys.path.insert(0, sys.argv[1])\n{textwrap.dedent(PROGRAM)}"
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("done\n", 0), ended.stderr


def test_get__two_packages_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        install(tmp_path, "", f"[segvit.test]\nthing = {name}:item\n", name)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[int] = Registry("thing", "segvit.test", {})
    with pytest.raises(ValueError, match="thing 'thing' is added by one:item and by two:item; remove or rename one"):
        registry.get("thing")


def test_get__unknown_name_lists_the_nearest_first() -> None:
    registry: Registry[float] = Registry("number", "segvit.none", {"pi": "math:pi", "tau": "math:tau", "e": "math:e"})
    registry.register("golden", 1.618)
    assert (registry.get("tau"), registry.get("golden")) == (6.283185307179586, 1.618)
    with pytest.raises(ValueError, match="unknown number 'gold'; choose from golden, pi, tau, e"):
        registry.get("gold")
