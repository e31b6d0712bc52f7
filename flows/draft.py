"""An experiment file for data that nobody has described yet: data section, crop, steps, model and variants.

The figures follow flows/configs/camvid_cpu.yaml and camvid.yaml, which were measured; each is said where it is written,
so that whoever knows better finds the place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import DataConfig
from pipeline.data_check.check import SourceCheck
from pipeline.preflight import Machine
from segvit.backbones.families import outline_backbone
from segvit.config import ModelConfig
from segvit.flops import model_gflops
from segvit.weights.fitting import key_mismatch
from segvit.weights.pretrained import WEIGHTS_VARIABLE, read_shapes

DEFAULT_BACKBONE = "vit_small_patch14_dinov2"
# Of these a weights file is recognised by its tensors.
BACKBONES = (
    DEFAULT_BACKBONE,
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
)
SHRUNK_SHARE = 0.60  # of the full model's GFLOPs
_FEWEST_PATCHES = 6  # a side
_MOST_UNLIKE = 30  # hundredths


@dataclass(frozen=True, slots=True)
class _Budget:
    """What a kind of machine trains with."""

    patches: int  # of a crop
    decoder_layers: int
    learning_rate: float
    layer_decay: float
    read: int  # twelfths of the backbone's blocks that are run; features are read at its last three twelfths
    frozen: int  # twelfths of its blocks, from the first on
    epochs: int
    steps: tuple[int, int]  # fewest and most
    warmup_steps: int
    why: str


_CPU = _Budget(432, 1, 1.5e-4, 1.0, 9, 3, 20, (200, 800), 30, "no GPU: a quarter of the blocks frozen, few steps")
_GPU = _Budget(1728, 3, 1.2e-4, 0.8, 12, 0, 60, (500, 20_000), 100, "a GPU: all blocks trained")
_BATCH_SIZE = 8


def choose_backbone() -> tuple[str, str]:
    """The backbone whose weights are at hand, and why it is that one."""
    path = os.environ.get(WEIGHTS_VARIABLE)
    if not path:
        return DEFAULT_BACKBONE, "the default; segvit finds its weights, or says that it has none"
    try:
        shapes = read_shapes(Path(path))
    except (FileNotFoundError, ValueError) as error:
        return DEFAULT_BACKBONE, f"the default, as {WEIGHTS_VARIABLE} cannot be read: {error}"
    for name in BACKBONES:
        if not key_mismatch(outline_backbone(name), shapes):
            return name, f"{WEIGHTS_VARIABLE} holds its weights"
    return DEFAULT_BACKBONE, f"the default, as {WEIGHTS_VARIABLE} holds weights of another; name that with --backbone"


def draft_experiment(name: str, data: DataConfig, found: SourceCheck, machine: Machine, backbone: str, why: str) -> str:
    """The text of an experiment file for `data`, of which `found` tells sizes and amounts.

    `backbone` is a timm name, `why` says why it is that one. Raises ValueError for a backbone that there is not.
    """
    budget = _GPU if machine.num_gpus else _CPU
    outline: Any = outline_backbone(backbone)
    patch, depth = int(outline.patch_embed.patch_size[0]), len(outline.blocks)
    middle = found.splits[0].sizes[len(found.splits[0].sizes) // 2]
    crop = crop_for(middle, patch, budget.patches)
    largest = max(max(size) for split in found.splits for size in split.sizes)
    limit = 2 * max(crop)
    section: dict[str, Any] = data.model_dump(mode="json", exclude_defaults=True)
    inference: dict[str, Any] = {}
    if largest > limit and data.max_long_side is None:
        section["max_long_side"] = limit
        inference = {"inference": {"resize": [limit, limit]}}
    layers = sorted({max(twelfths * depth // 12 - 1, 0) for twelfths in range(budget.read - 2, budget.read + 1)})
    model = {
        "backbone": backbone,
        "image_size": list(crop),
        "decoder_layers": budget.decoder_layers,
        "decoder_width": min(384, int(outline.embed_dim)),
        "mask_upsampling": 2,
        "dropout": 0.0,
        "drop_path_rate": 0.0,
    }
    num_train = found.splits[0].num_samples
    steps = min(max(num_train * budget.epochs // _BATCH_SIZE, budget.steps[0]), budget.steps[1])
    low = round(min(max(1.07 * max(crop) / min(max(middle), limit), 0.5), 1.0), 2)
    shrunk = _shrunk_fields(model, layers, depth)
    kept = _FIELDS_OF_SHRUNK.format(layers=layers, **shrunk) if shrunk else _NO_SHRUNK
    return _TEMPLATE.format(
        layout="\n".join(f"# {line}" for line in found.layout),
        name=name,
        data=_block({"data": section}),
        why_backbone=why,
        model=_block({"model": model}),
        middle="{} x {}".format(*middle),
        patches=f"{crop[0] // patch} x {crop[1] // patch}",
        layers=layers,
        shrunk=kept,
        why_budget=budget.why,
        num_train=num_train,
        epochs=round(steps * _BATCH_SIZE / num_train),
        steps=steps,
        batch_size=_BATCH_SIZE,
        freeze_blocks=budget.frozen * depth // 12,
        learning_rate=f"{budget.learning_rate:.1e}".replace("e-0", "e-"),
        layer_decay=budget.layer_decay,
        warmup_steps=budget.warmup_steps,
        validate_every_steps=-(-steps // 2),
        checkpoint_every_steps=min(500, -(-steps // 4)),
        scale_range=[low, round(low + 1, 2)],
        evaluate=f"\n# Larger images are predicted at the size that was trained on.\n{_block({'evaluate': inference})}"
        if inference
        else "",
        cpus_per_worker=machine.num_cpus if not machine.num_gpus else 2,
        loader_workers=min(12, max(1, machine.num_cpus - 2)) if machine.num_gpus else 0,
    )


def crop_for(size: tuple[int, int], patch: int, num_patches: int) -> tuple[int, int]:
    """(height, width) of a training crop, pixels: the image's shape in whole patches, about `num_patches` at most."""
    scale = min(1.0, (num_patches * patch * patch / (size[0] * size[1])) ** 0.5)
    rows, columns = (max(_FEWEST_PATCHES, min(round(side * scale / patch), side // patch)) for side in size)
    return rows * patch, columns * patch


def experiment_name(root: str) -> str:
    """A name for experiments on the data at `root`: that of its folder or archive, in the signs that names may have."""
    stem = root.rstrip("/").rpartition("/")[2].partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:63] or "experiment"


def _shrunk_fields(model: Mapping[str, Any], layers: list[int], depth: int) -> dict[str, Any]:
    """Of the most patches that keep the Shrunk variant at its share of the cost; empty where none do."""
    size = (model["image_size"][0], model["image_size"][1])

    def gflops(**fields: Any) -> float:
        return model_gflops(ModelConfig.from_dict({**model, "out_layers": layers, **fields}), 2, size)

    full = gflops(structure="cascade")
    shrunk = {"shrink_at": depth // 3, "keep_every": 3}

    def fits(hundredths: int) -> bool:
        return gflops(structure="anchored", keep_unlike=hundredths / 100, **shrunk) <= SHRUNK_SHARE * full

    if not fits(0):
        return {}
    low, high = 0, _MOST_UNLIKE
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return {**shrunk, "keep_unlike": low / 100}


def _block(section: Mapping[str, Any], indent: str = "") -> str:
    """YAML of a mapping, a line a key; lists on theirs."""
    lines = []
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", _block(value, f"{indent}  ")]
        else:
            text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=float("inf"))
            lines.append(f"{indent}{key}: {text.strip()[1:-1]}")
    return "\n".join(lines)


_FIELDS_OF_SHRUNK = """\
  # At 0.6 of the cost: beside every third row and column, the patches least like those stay; the others are restored.
  shrunk:
    structure: anchored
    shrink_at: {shrink_at}
    keep_every: {keep_every}
    keep_unlike: {keep_unlike}
    out_layers: {layers}
    start_from: full
    distill: {{images: 128}}
    train: {{steps: 0}}"""
_NO_SHRUNK = "  # No shrunk variant: the crop has too few patches to save any."

_TEMPLATE = """\
{layout}
# Made by `segvit init`. Look at the data with `segvit check`, at the steps with `segvit plan`, and run it all with
# `segvit run`, each with this file's name.
name: {name}

{data}

# The backbone: {why_backbone}.
# The middle image is {middle} pixels (height x width); the crop is {patches} patches of it.
# Masks twice as fine as the patches, for what is thinner than one.
{model}

variants:
  full:
    structure: cascade
    out_layers: {layers}
{shrunk}

# Dice at five times its published weight: few steps, thin classes.
loss:
  class: 1.0
  focal: 20.0
  dice: 5.0

# For {why_budget}. {num_train} images, each seen about {epochs} times.
train:
  steps: {steps}
  batch_size: {batch_size}
  precision: bf16
  freeze_blocks: {freeze_blocks}
  optimizer: muon
  learning_rate: {learning_rate}
  layer_decay: {layer_decay}
  decoder_lr_multiplier: 10
  weight_decay: 0.01
  warmup_steps: {warmup_steps}
  validate_every_steps: {validate_every_steps}
  checkpoint_every_steps: {checkpoint_every_steps}
  augmentation:
    scale_range: {scale_range}
    flip_probability: 0.5      # 0 where left and right differ, as in writing
{evaluate}
# No search of the loss weights; num_trials: 12 searches them before training.
tune:
  num_trials: 0

# What a version must hold to become champion: name protected_classes, or raise min_miou, once you know what is usual.
promote:
  min_miou: 0.0
  max_regression: 0.005

runtime:
  cpus_per_worker: {cpus_per_worker}
  loader_workers: {loader_workers}
"""
