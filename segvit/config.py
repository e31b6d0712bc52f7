"""What a SegViT model is made of, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

Structure = Literal["cascade", "single", "naive_qd", "shrunk", "linear"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
ShrinkQueries = Literal["nearest", "average", "convolution"]
SHRINK_QUERIES: tuple[ShrinkQueries, ...] = get_args(ShrinkQueries)
BACKBONE_OPTIONS = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Structure and widths of a SegViT model (arXiv 2210.05844, sections 3 and 4).

    Values that only a built backbone can judge (block indices, the patch grid, the head split) are
    checked by `segvit.build_model` and, without allocating weights, by `segvit.check_config`.

    Raises:
        ValueError: A value breaks a rule; the message says which and what to use instead.
    """

    backbone: str
    """timm model name of a plain ViT, such as ``vit_base_patch16_384``, or of a hierarchical Swin."""
    image_size: tuple[int, int]
    """(height, width) of the training crop in pixels; multiples of the patch size."""
    structure: Structure = "cascade"
    """``cascade``: ATM stages over `out_layers`. ``single``: one ATM stage, whose every layer predicts.
    ``naive_qd``: `single` after query-based downsampling. ``shrunk``: with upsampling layers too.
    ``linear``: no ATM, one linear layer on the features (the baseline of the paper's ablations)."""
    out_layers: tuple[int, ...] | None = None
    """0-based blocks (stages of a hierarchical backbone) whose features are read, ascending. The cascade visits
    the last first; `shrunk` has an upsampling layer for each, one or two, in this order. None: the published
    choice, see `default_out_layers`."""
    decoder_layers: int = 3
    """Decoder layers a stage."""
    decoder_width: int | None = None
    """Channels of the decoder; None: half the backbone's width."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; None: the backbone's."""
    input_projection: bool = True
    """Whether a linear layer and a norm precede each ATM stage; without them the decoder has the backbone's width."""
    chain_stages: bool = True
    """Whether a cascade stage starts from the queries of the stage before (cascade), or from the table (parallel)."""
    share_queries: bool = True
    """Whether unchained stages start from one table of class queries, or each from its own."""
    accumulate_masks: bool = True
    """Whether a cascade stage's prediction adds the masks of the stages before."""
    attention_scale: float | None = None
    """Factor of ATM's similarity; None: head width ** -0.5."""
    shrink_at: int | None = None
    """0-based block that query-based downsampling precedes; None: one third of the depth, as in the paper."""
    shrink_queries: ShrinkQueries = "nearest"
    """Queries of the downsampling block: every second row and column, the average of each 2 x 2 tokens, or a
    learned 2 x 2 convolution of stride 2."""
    class_token: bool = True
    """Whether the backbone's class token stays in the sequence; the published models drop it."""
    dropout: float = 0.1
    """Dropout rate of the decoder."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last backbone block's MLP branch; linear from 0 over the blocks."""
    backbone_options: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    """Overrides of timm's own sizes: embed_dim, depth, num_heads, patch_size, mlp_ratio."""

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, STRUCTURES)
        check_choice("shrink_queries", self.shrink_queries, SHRINK_QUERIES)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width) in pixels, got {self.image_size}")
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers must be >= 1, got {self.decoder_layers}")
        for name in ("decoder_width", "decoder_heads", "shrink_at"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name in ("dropout", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.attention_scale is not None and not self.attention_scale > 0.0:
            raise ValueError(f"attention_scale must be > 0, got {self.attention_scale}; None is head width ** -0.5")
        if unknown := sorted(set(self.backbone_options) - set(BACKBONE_OPTIONS)):
            raise ValueError(f"unknown backbone option {', '.join(unknown)}; choose from {', '.join(BACKBONE_OPTIONS)}")
        self._check_out_layers()
        self._check_structure()

    def _check_out_layers(self) -> None:
        layers = self.out_layers
        if layers is None:
            return
        if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
            raise ValueError(f"out_layers must be ascending block indices from 0, got {layers}")
        most = {"single": 1, "naive_qd": 1, "shrunk": 2}.get(self.structure, len(layers))
        if len(layers) > most:
            raise ValueError(f"structure {self.structure} reads at most {most} of out_layers, got {layers}")

    def _check_structure(self) -> None:
        # A setting that the structure has no use for would silently do nothing.
        owners: dict[str, tuple[Structure, ...]] = {
            "shrink_at": ("naive_qd", "shrunk"),
            "shrink_queries": ("naive_qd", "shrunk"),
            "chain_stages": ("cascade",),
            "accumulate_masks": ("cascade",),
            "share_queries": ("cascade",),
            "input_projection": ("cascade", "single", "naive_qd"),
            "attention_scale": ("cascade", "single", "naive_qd", "shrunk"),
        }
        defaults = {one.name: one.default for one in fields(self)}
        for name, structures in owners.items():
            value = getattr(self, name)
            if value != defaults[name] and self.structure not in structures:
                raise ValueError(
                    f"{name} {value} has no meaning for structure {self.structure!r}; "
                    f"use {' or '.join(structures)}, or leave it out"
                )
        if self.chain_stages and not self.share_queries:
            raise ValueError("share_queries False needs chain_stages False: chained stages start from one table")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["backbone_options"] = dict(self.backbone_options)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: An unknown or missing key, or a value that breaks a rule.
        """
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown model setting {', '.join(unknown)}; choose from {', '.join(known)}")
        if missing := [name for name in ("backbone", "image_size") if name not in values]:
            raise ValueError(f"model setting {', '.join(missing)} is missing")
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def default_shrink_at(depth: int) -> int:
    """The block that downsampling precedes in the paper: one third of the depth, at least 1."""
    return max(depth // 3, 1)


def default_out_layers(structure: Structure, depth: int, shrink_at: int | None) -> tuple[int, ...]:
    """The blocks that the published models of this depth read (SegViT, section 4).

    The cascade reads (5, 7, 11) of 12 blocks, (7, 15, 23) of 24, and the ends of the thirds of any other depth;
    Shrunk the last block before downsampling and the last of all; the others the last.
    """
    last = depth - 1
    if structure == "cascade":
        return (5, 7, 11) if depth == 12 else tuple(sorted({max(depth * third // 3 - 1, 0) for third in (1, 2, 3)}))
    if structure == "shrunk":
        return ((default_shrink_at(depth) if shrink_at is None else shrink_at) - 1, last)
    return (last,)
