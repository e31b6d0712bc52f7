"""Published names of tensors (SegViT, arXiv 2210.05844, the authors' checkpoints) and our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Layout(NamedTuple):
    """How many of each part a checkpoint has: enough to name all of its tensors."""

    structure: str
    num_blocks: int
    num_stages: int
    """ATM stages of a cascade, upsampling stages of Shrunk, otherwise 1."""
    num_layers: int
    """Decoder layers a stage."""
    input_projection: bool


def tensor_names(layout: Layout) -> dict[str, str]:
    """Published to own names of every tensor of a layout."""
    names = {"backbone.cls_token": "backbone.vit.cls_token", "backbone.pos_embed": "backbone.vit.pos_embed"}
    names |= both("backbone.patch_embed.projection", "backbone.vit.patch_embed.proj")
    for index in range(layout.num_blocks):
        names |= within(f"backbone.layers.{index}.", f"backbone.vit.blocks.{index}.", BLOCK_NAMES)
    if layout.structure == "shrunk":
        names["decode_head.q.weight"] = "decoder.grid_queries.weight"
        for stage, upsampling in stages("decode_head.", "decoder.upsampling.{}.", layout.num_stages):
            names |= stage_names(stage, upsampling, layout.num_layers, UPSAMPLING_LAYER_NAMES, projection=True)
        names |= head_names("decode_head.atm.", "decoder.atm.", "class_queries.weight")
        for stage, own in stages("decode_head.atm.", "decoder.atm.stage.", 1):
            names |= stage_names(stage, own, layout.num_layers, ATM_LAYER_NAMES, projection=False)
        return names
    cascade = layout.structure == "cascade"
    names |= head_names("decode_head.", "decoder.", "class_queries.0.weight" if cascade else "class_queries.weight")
    pattern = "decoder.stages.{}." if cascade else "decoder.stage."
    for stage, own in stages("decode_head.", pattern, layout.num_stages):
        names |= stage_names(stage, own, layout.num_layers, ATM_LAYER_NAMES, projection=layout.input_projection)
    return names


def stages(head: str, own: str, count: int) -> list[tuple[Callable[[str], str], str]]:
    """For each stage, the published name of a part of it, and the prefix of its own names."""

    def part_name(number: int) -> Callable[[str], str]:
        return lambda part: f"{head}{part}_{number}"

    return [(part_name(index + 1), own.format(index)) for index in range(count)]


def stage_names(
    stage: Callable[[str], str], own: str, num_layers: int, layer_names: Mapping[str, str], *, projection: bool
) -> dict[str, str]:
    """Names of one stage: its layers, and its projection where it has one."""
    names: dict[str, str] = {}
    if projection:
        names |= both(stage("input_proj"), f"{own}input.0") | both(stage("proj_norm"), f"{own}input.1")
    for index in range(num_layers):
        names |= within(f"{stage('decoder')}.layers.{index}.", f"{own}layers.{index}.", layer_names)
    return names


def head_names(published: str, own: str, queries: str) -> dict[str, str]:
    """Names of the class queries and the class head."""
    return {f"{published}q.weight": own + queries} | both(f"{published}class_embed", f"{own}class_head")


def both(published: str, own: str) -> dict[str, str]:
    """Weight and bias of a renamed layer."""
    return {f"{published}.{part}": f"{own}.{part}" for part in ("weight", "bias")}


def within(published: str, own: str, names: Mapping[str, str]) -> dict[str, str]:
    """The names below two prefixes."""
    return {published + theirs: own + ours for theirs, ours in names.items()}


def attention_names(published: str, own: str, weight: str, bias: str, output: str) -> dict[str, str]:
    """Stacked in-projection and output projection."""
    names = {f"{published}.in_proj_weight": f"{own}.{weight}", f"{published}.in_proj_bias": f"{own}.{bias}"}
    return names | both(f"{published}.out_proj", f"{own}.{output}")


BLOCK_NAMES = (
    both("ln1", "norm1")
    | attention_names("attn.attn", "attn", "qkv.weight", "qkv.bias", "proj")
    | both("ln2", "norm2")
    | both("ffn.layers.0.0", "mlp.fc1")
    | both("ffn.layers.1", "mlp.fc2")
)
_LAYER_NAMES = (
    attention_names("self_attn", "self_attention", "in_proj", "in_proj_bias", "out_proj")
    | both("linear1", "mlp.0")
    | both("linear2", "mlp.3")
    | {name: name for norm in ("norm1", "norm2", "norm3") for name in both(norm, norm)}
)
UPSAMPLING_LAYER_NAMES = _LAYER_NAMES | attention_names(
    "multihead_attn", "cross_attention", "in_proj", "in_proj_bias", "out_proj"
)
ATM_LAYER_NAMES = _LAYER_NAMES | {
    theirs: ours
    for part in ("q", "k", "v", "proj")
    for theirs, ours in both(f"multihead_attn.{part}", f"attention_to_mask.{part}").items()
}
