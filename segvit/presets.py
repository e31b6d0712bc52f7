"""Named configurations: the published models and every ablation of the paper (SegViT, arXiv 2210.05844)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from segvit.backbones.downsampling import SHRINK_QUERIES
from segvit.config import ModelConfig
from segvit.losses.segmentation_loss import PUBLISHED_WEIGHTS

VIT_BASE = "vit_base_patch16_384.augreg_in21k_ft_in1k"
VIT_LARGE = "vit_large_patch16_384.augreg_in21k_ft_in1k"
ADE20K_CLASSES = 150
COCO_STUFF10K_CLASSES = 171
PASCAL_CONTEXT_CLASSES = 60
MASK_LOSS = dict(PUBLISHED_WEIGHTS)
PIXEL_LOSS = {"cross_entropy": 1.0}

Ablation = tuple[str, ModelConfig, Mapping[str, float], str]
"""Name, model, weights of the loss, description."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedResult:
    """What the paper reports for a model."""

    miou: float
    """Percent, at one scale."""
    miou_multi_scale: float
    """Percent, over scales 0.5 to 1.75 with horizontal flip."""
    gflops: float
    """10^9 multiply-adds of one image of the training crop's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model configuration with what it is trained for."""

    model: ModelConfig
    num_classes: int
    description: str
    loss: Mapping[str, float] = field(default_factory=lambda: dict(PUBLISHED_WEIGHTS), hash=False)
    """Weights of `SegmentationLoss` by term."""
    published: PublishedResult | None = None
    """None: an ablation, whose figures depend on the schedule it is trained with."""


def published_presets() -> Iterator[tuple[str, Preset]]:
    """The seven published models (paper, tables 1 to 3)."""
    rows = (
        ("ade20k_vit_base", BASE, ADE20K_CLASSES, 512, (51.3, 53.0, 120.9)),
        ("ade20k_vit_large_shrunk", LARGE_SHRUNK, ADE20K_CLASSES, 640, (53.9, 55.1, 373.5)),
        ("ade20k_vit_large", LARGE, ADE20K_CLASSES, 640, (54.6, 55.2, 637.9)),
        ("coco_stuff10k_vit_large_shrunk", LARGE_SHRUNK, COCO_STUFF10K_CLASSES, 512, (49.1, 49.4, 224.8)),
        ("coco_stuff10k_vit_large", LARGE, COCO_STUFF10K_CLASSES, 512, (49.9, 50.3, 383.9)),
        ("pascal_context_vit_large_shrunk", LARGE_SHRUNK, PASCAL_CONTEXT_CLASSES, 480, (62.3, 63.7, 186.9)),
        ("pascal_context_vit_large", LARGE, PASCAL_CONTEXT_CLASSES, 480, (64.1, 65.3, 321.6)),
    )
    for name, model, num_classes, crop, (miou, miou_multi_scale, gflops) in rows:
        structure = "Shrunk" if model.structure == "shrunk" else "SegViT"
        yield (
            name,
            Preset(
                model=model.replace(image_size=(crop, crop)),
                num_classes=num_classes,
                description=f"{structure}, {model.backbone.partition('.')[0]}, {num_classes} classes at {crop} pixels",
                published=PublishedResult(miou=miou, miou_multi_scale=miou_multi_scale, gflops=gflops),
            ),
        )


BASE = ModelConfig(
    backbone=VIT_BASE, image_size=(512, 512), out_layers=(5, 7, 11), drop_path_rate=0.1, class_token=False
)
LARGE = ModelConfig(
    backbone=VIT_LARGE, image_size=(640, 640), out_layers=(7, 15, 23), drop_path_rate=0.3, class_token=False
)
LARGE_SINGLE = LARGE.replace(structure="single", out_layers=(23,))
LARGE_NAIVE_QD = LARGE.replace(structure="naive_qd", out_layers=(23,), shrink_at=8)
LARGE_SHRUNK = LARGE.replace(structure="shrunk", out_layers=(7, 23), shrink_at=8)


def ablations() -> Iterator[Ablation]:
    """Every ablation of the paper: name, model, loss, description."""
    yield from atm_ablations()
    yield from layer_ablations()
    yield from decoder_ablations()
    yield from hierarchical_ablations()
    yield from downsampling_ablations()
    yield from shrunk_ablations()


def atm_ablations() -> Iterator[Ablation]:
    """What ATM and its mask loss add to per-pixel classification on the same features."""
    single = BASE.replace(structure="single", out_layers=(11,))
    linear = BASE.replace(structure="linear", out_layers=(11,))
    yield "ablation_linear_cross_entropy", linear, PIXEL_LOSS, "linear head, per-pixel cross-entropy"
    yield "ablation_atm_cross_entropy", single, PIXEL_LOSS, "one ATM stage, cross-entropy on its semantic scores"
    yield "ablation_atm_mask_loss", single, MASK_LOSS, "one ATM stage, mask loss"


def layer_ablations() -> Iterator[Ablation]:
    """Which backbone layers the cascade reads."""
    choices = {
        "vit_base": (BASE, ((11,), (7, 11), (5, 11), (5, 7, 11), (3, 7, 11), (9, 10, 11), (2, 5, 8, 11))),
        "vit_large": (LARGE, ((23,), (15, 23), (7, 23), (7, 15, 23), (21, 22, 23), (5, 11, 17, 23))),
    }
    for name, (model, layer_choices) in choices.items():
        for layers in layer_choices:
            suffix = "_".join(map(str, layers))
            yield (
                f"ablation_{name}_layers_{suffix}",
                model.replace(out_layers=layers),
                MASK_LOSS,
                f"cascade over blocks {', '.join(map(str, layers))}",
            )


def decoder_ablations() -> Iterator[Ablation]:
    """How the stages work together, and how deep they are."""
    parallel = BASE.replace(chain_stages=False)
    kinds = {
        "cascade": (BASE, "cascade"),
        "parallel": (parallel, "parallel stages from one table of queries"),
        "parallel_own_queries": (parallel.replace(share_queries=False), "parallel stages, each with its own queries"),
    }
    for name, (model, text) in kinds.items():
        yield f"ablation_{name}", model, MASK_LOSS, f"{text}, masks accumulated"
        separate = model.replace(accumulate_masks=False)
        yield f"ablation_{name}_separate_masks", separate, MASK_LOSS, f"{text}, masks not accumulated"
    for num_layers in range(1, 7):
        yield (
            f"ablation_decoder_layers_{num_layers}",
            BASE.replace(decoder_layers=num_layers),
            MASK_LOSS,
            f"cascade of {num_layers} decoder layers a stage",
        )


def hierarchical_ablations() -> Iterator[Ablation]:
    """ATM stages on a Swin's feature maps of strides 4 to 32."""
    sizes = {
        "swin_tiny_patch4_window7_224": (384, 12),
        "swin_base_patch4_window12_384": (512, 16),
        "swin_large_patch4_window12_384": (768, 24),
    }
    for backbone, (width, heads) in sizes.items():
        model = ModelConfig(
            backbone=backbone,
            image_size=(512, 512),
            out_layers=(0, 1, 2, 3),
            decoder_width=width,
            decoder_heads=heads,
            drop_path_rate=0.3,
        )
        name = "_".join(backbone.split("_")[:2])
        yield f"ablation_{name}", model, MASK_LOSS, f"cascade over the four stages of {backbone}"


def downsampling_ablations() -> Iterator[Ablation]:
    """How the queries of downsampling are made, and before which block."""
    for queries in SHRINK_QUERIES:
        for block in (4, 8, 12, 16):
            yield (
                f"ablation_qd_{queries}_at_{block}",
                LARGE_NAIVE_QD.replace(shrink_queries=queries, shrink_at=block),
                MASK_LOSS,
                f"downsampling with {queries} queries before block {block}, ATM on its result",
            )
    yield (
        "ablation_qd_nearest_keys_at_8",
        LARGE_NAIVE_QD.replace(shrink_keys=True),
        MASK_LOSS,
        "downsampling of queries, keys and values alike before block 8, ATM on its result",
    )


def shrunk_ablations() -> Iterator[Ablation]:
    """The parts of Shrunk, (a) to (c), side by side."""
    yield (
        "ablation_shrunk_a_baseline",
        LARGE_SINGLE,
        MASK_LOSS,
        "one ATM stage on the last block, no downsampling",
    )
    yield "ablation_shrunk_b_naive_qd", LARGE_NAIVE_QD, MASK_LOSS, "query-based downsampling, ATM on its result"
    one_qu = LARGE_SHRUNK.replace(out_layers=(23,))
    yield (
        "ablation_shrunk_one_qu",
        one_qu,
        MASK_LOSS,
        "downsampling, and one upsampling stage on the last block",
    )
    yield (
        "ablation_shrunk_c_two_qu",
        LARGE_SHRUNK,
        MASK_LOSS,
        "downsampling, and two upsampling stages: the proposed one",
    )


PRESETS: dict[str, Preset] = dict(published_presets()) | {
    name: Preset(model=model, num_classes=ADE20K_CLASSES, description=description, loss=loss)
    for name, model, loss, description in ablations()
}


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: No such preset; the message names the closest ones.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"published models are {', '.join(published_names())}"
        raise ValueError(f"unknown preset {name!r}; {hint}")
    return PRESETS[name]


def published_names() -> list[str]:
    """The presets of the seven published models."""
    return [name for name, preset in PRESETS.items() if preset.published]
