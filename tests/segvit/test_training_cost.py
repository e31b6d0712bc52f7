from __future__ import annotations

import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from segvit.config import ModelConfig
from segvit.devices import find_gpu
from segvit.flops import activation_bytes
from segvit.training_cost import MetaAutocast, TrainingCost, TrainingSetup

PLAIN = TrainingSetup(num_images=8, precision="bf16")


@cache
def cost_of(backbone: str, size: tuple[int, int], structure: str = "cascade", num_classes: int = 150) -> TrainingCost:
    of_backbones: dict[str, dict[str, Any]] = {
        "vit_large_patch16_384": {"drop_path_rate": 0.3, "class_token": False},
        "vit_base_patch16_384": {"drop_path_rate": 0.1, "class_token": False},
        "vit_small_patch14_dinov2": {"out_layers": (3, 7, 11), "decoder_width": 384},
    }
    settings = of_backbones.get(backbone, {})
    if structure != "cascade":
        settings = settings | {"structure": structure, "shrink_at": 8}
    elif backbone == "vit_large_patch16_384":
        settings = settings | {"out_layers": (7, 15, 23)}
    return TrainingCost(ModelConfig(backbone=backbone, image_size=size, **settings), num_classes)


# docs/benchmarks.md: peaks above what the model and AdamW's state take, batch 8, bf16 by autocast, in 10^9 bytes.
@pytest.mark.parametrize(("structure", "measured"), [("cascade", 13.8), ("shrunk", 9.9), ("anchored", 9.2)])
def test_memory__of_the_measured_training_steps(structure: str, measured: float) -> None:
    cost = cost_of("vit_large_patch16_384", (640, 640), structure)
    memory = cost.memory(PLAIN)
    assert memory.weights == 4 * cost.num_parameters
    assert memory.optimizer == 8 * cost.num_trained
    above = memory.peak - memory.weights - memory.optimizer
    assert above / 1e9 == pytest.approx(measured, rel=0.1)


def test_memory__of_a_measured_run_of_camvid() -> None:
    # docs/benchmarks.md, "CamVid at 504 x 672 on a GPU": the whole of the run, validation included, 4.2 GiB.
    cost = cost_of("vit_small_patch14_dinov2", (504, 672), num_classes=11)
    assert cost.memory(PLAIN).peak / 2**30 == pytest.approx(4.2, rel=0.25)


def test_seconds__of_the_measured_training_step() -> None:
    cost = cost_of("vit_large_patch16_384", (640, 640))
    assert cost.seconds(PLAIN, find_gpu("H200")) == pytest.approx(0.1209, rel=0.1)
    # Blocks are three quarters of a checkpointed step's four passes and more, as nearly all of the model is blocks.
    again = cost.seconds(replace(PLAIN, activation_checkpointing=True), find_gpu("H200"))
    assert 1.3 < again / cost.seconds(PLAIN, find_gpu("H200")) < 4 / 3
    # Without bf16 instructions it is fp32, at half the peak.
    assert cost.seconds(PLAIN, find_gpu("V100 32GB")) == pytest.approx(cost.flops(PLAIN) / (15.7e12 * 0.5))


def test_memory__follows_the_formulas() -> None:
    cost = cost_of("vit_base_patch16_384", (512, 512))
    # An unused class token is not trained.
    n, t = cost.num_parameters, cost.num_parameters - 768
    one = cost.memory(TrainingSetup(num_images=2))
    assert (one.weights, one.optimizer, one.gradients, one.exchange) == (4 * n, 8 * t, 4 * t, 0)
    assert cost.memory(TrainingSetup(num_images=2, optimizer_bytes=4)).peak == one.peak - 4 * t
    ddp = cost.memory(TrainingSetup(num_images=2, num_workers=8))
    assert ddp.peak == one.peak + 4 * t
    bf16 = cost.memory(TrainingSetup(num_images=2, precision="bf16_params"))
    assert bf16.weights == 6 * n
    # Every second byte of what is kept, but for what a norm and a mask keep in float32.
    assert 0.5 <= bf16.activations / one.activations < 0.55
    accumulated = cost.memory(TrainingSetup(num_images=2, accumulation_steps=2))
    assert accumulated.peak == one.peak + 4 * t
    shares = cost.memory(TrainingSetup(num_images=2, num_workers=8, sharded=True))
    assert (shares.weights, shares.optimizer, shares.gradients) == (4 * n // 8, t, 4 * t // 8)
    block = sum(p.numel() for p in cost.model.backbone.blocks[0].parameters())
    assert shares.exchange == 4 * (n - 12 * block + 4 * block)
    gathered = cost.memory(TrainingSetup(num_images=2, num_workers=8, sharded=True, precision="bf16"))
    assert gathered.exchange == shares.exchange // 2
    assert gathered.activations == bf16.activations


def test_memory__checkpointed_blocks_keep_their_inputs() -> None:
    cost = cost_of("vit_base_patch16_384", (512, 512))
    tokens = 32 * 32 * 768 * 4
    kept, again = cost.memory(TrainingSetup(num_images=1)), TrainingSetup(num_images=1, activation_checkpointing=True)
    frozen = TrainingCost(cost.config, 150, freeze_blocks=12)
    # Decoder and loss are as they are without: what all frozen blocks leave. Three of the inputs it keeps, too.
    decoder = frozen.memory(TrainingSetup(num_images=1)).activations
    of_block = (kept.activations - decoder) / 12
    assert cost.memory(again).activations == pytest.approx(decoder + 12 * tokens + of_block, rel=0.1)
    assert frozen.num_trained == sum(p.numel() for p in frozen.model.decoder.parameters())


def test_frozen_blocks__cost_one_pass_of_three() -> None:
    cost = cost_of("vit_base_patch16_384", (512, 512))
    half = TrainingCost(cost.config, 150, freeze_blocks=6)
    setup = TrainingSetup(num_images=1)
    saved = cost.flops(setup) - half.flops(setup)
    assert saved == pytest.approx(2e9 * cost._gflops["blocks"])


@pytest.mark.parametrize(
    ("backbone", "size", "parameters", "fp32_state"),
    [("vit_giant_patch14_dinov2", (518, 518), 1.2e9, 19.6e9), ("vit_7b_patch16_dinov3", (512, 512), 7.3e9, 117e9)],
)
def test_training_cost__of_models_that_no_weights_are_taken_for(
    backbone: str, size: tuple[int, int], parameters: float, fp32_state: float
) -> None:
    cost = cost_of(backbone, size)
    assert cost.num_parameters == pytest.approx(parameters, rel=0.05)
    memory = cost.memory(PLAIN)
    assert memory.weights + memory.optimizer + memory.gradients == pytest.approx(fp32_state, rel=0.05)
    shares = cost.memory(replace(PLAIN, num_images=1, num_workers=8, sharded=True, activation_checkpointing=True))
    assert shares.peak < memory.peak / 5


class Small(nn.Module):
    """A linear layer, its norm, and a scale, as in a block's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 16), nn.LayerNorm(16)
        self.second = nn.Linear(16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(images.flatten(2).transpose(1, 2))
        output: torch.Tensor = tokens.float() + self.second(self.norm(tokens))
        return output


def test_meta_autocast__keeps_what_autocast_keeps() -> None:
    def kept(num_images: int) -> int:
        with torch.device("meta"):
            model = Small()
        with MetaAutocast(), torch.autocast("cpu", torch.bfloat16):
            return activation_bytes(model, (4, 8), num_images)

    # An image of 32 tokens: the first layer's input in bf16 (3); of the norm its input, which the first layer makes in
    # bf16, in float32, with a mean and a deviation; the second layer's input in bf16.
    of_image = 32 * (2 * 3 + 4 * 16 + 4 * 2 + 2 * 16)
    assert kept(2) - kept(1) == of_image
    # The second layer's weight in bf16, cast once; the first one's is needed for no gradient.
    assert kept(1) - of_image == 2 * 16 * 16


def test_bench_memory__in_miniature() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "bench_memory.py"))
    rows = list(script["rows"]("tiny", torch.device("cpu"), batch=2, num_steps=2))
    torch.distributed.destroy_process_group()
    *ways, fp32, bf16 = rows
    assert [(row["precision"], row["parallel"]) for row in ways] == [
        *[("bf16", "none")] * 2,
        *[("bf16_params", "none")] * 2,
        ("fp32", "ddp"),
        *[("fp32", "sharded")] * 2,
        ("bf16_params", "ddp"),
        ("bf16_params", "sharded"),
    ]
    for row in ways:
        assert row["losses"] == pytest.approx(ways[4]["losses"], rel=1e-2)
        assert row["losses"][1] < row["losses"][0]
        assert row["predicted_gb"] > 0.08
    assert ways[0]["losses"] == ways[1]["losses"]
    assert (fp32["same"], bf16["same"]) == ("ddp and sharded",) * 2
    assert fp32["largest_relative_difference"] < 1e-5
    assert bf16["largest_relative_difference"] < 1e-3
