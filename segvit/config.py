"""What a SegViT model is made of, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from segvit.decoders import DECODERS
from segvit.decoders.decoder import Decoder
from segvit.option_types import type_problems
from segvit.registry import nearest_first

# More is a mistake, or malice: such a model takes more time to build than anyone has, even without its weights.
MAX_LAYERS, MAX_SIZE, MAX_CLASSES = 128, 1 << 16, 1 << 16
BACKBONE_OPTIONS = ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")


@dataclass(frozen=True, init=False)
class ModelConfig:
    """Structure and widths of a SegViT model (arXiv 2210.05844, sections 3 and 4).

    The fields below, and those that the decoder of the structure adds, are given, read and written alike:
    ``ModelConfig(backbone=..., image_size=(512, 512), structure="cascade", chain_stages=False).chain_stages``.
    Values that only a backbone can judge (block indices, the patch grid, the head split) are checked by
    `segvit.build_model` and, without allocating weights and all at once, by `segvit.model_problems`.

    Raises:
        ValueError: Unknown settings, or values that break a rule; all of them, each with what to use instead.
    """

    backbone: str
    """timm model name of a plain ViT, such as ``vit_base_patch16_384``, or of a hierarchical Swin."""
    image_size: tuple[int, int]
    """(height, width) of the training crop in pixels; multiples of the patch size."""
    structure: str = "cascade"
    """Name of a decoder in `segvit.decoders.DECODERS`. ``cascade``: ATM stages over `out_layers`. ``single``: one
    ATM stage, whose every layer predicts. ``naive_qd``: `single` after query-based downsampling. ``shrunk``: with
    upsampling layers too. ``anchored``: the cascade over a backbone that most patches leave early, restored.
    ``linear``: no ATM, one linear layer on the features (the baseline of the ablations)."""
    out_layers: tuple[int, ...] | None = None
    """0-based blocks (stages of a hierarchical backbone) whose features are read, ascending. None: the published
    choice, see `Decoder.default_out_layers`."""
    decoder_layers: int = 3
    """Decoder layers a stage."""
    decoder_width: int | None = None
    """Channels of the decoder; None: half the backbone's width."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; None: the backbone's."""
    class_token: bool = True
    """Whether the backbone's class token stays in the sequence; the published models drop it."""
    dropout: float = 0.1
    """Dropout rate of the decoder."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last backbone block's MLP branch; linear from 0 over the blocks."""
    backbone_options: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    """Overrides of timm's own sizes: embed_dim, depth, num_heads, patch_size, mlp_ratio."""
    decoder: Decoder = field(init=False)
    """The options of the structure."""

    def __init__(self, *, backbone: str, image_size: tuple[int, int], structure: str = "cascade", **settings: Any):
        given = {"backbone": backbone, "image_size": image_size, "structure": structure, **settings}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        kind = DECODERS.get(str(structure))
        options = {name: given.pop(name) for name in option_names(kind) if name in given}
        shared = {name: given.pop(name) for name in SHARED_FIELDS if name in given}
        problems = [problem for name, value in given.items() if (problem := foreign_problem(structure, name, value))]
        problems += type_problems(type(self), shared) + type_problems(kind, options)
        if not problems:
            defaults = {
                one.name: one.default if one.default_factory is MISSING else one.default_factory()
                for one in fields(self)
            }
            decoder = kind(**options)
            for name, value in (defaults | shared | {"decoder": decoder}).items():
                object.__setattr__(self, name, value)
            problems = self._problems() + decoder.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def __getattr__(self, name: str) -> Any:
        """The options of the decoder; asked only for what is no field of its own."""
        decoder = self.__dict__.get("decoder")
        if decoder is None or name not in option_names(type(decoder)):
            raise AttributeError(f"{type(self).__name__} has no {name!r}", name=name, obj=self)
        return getattr(decoder, name)

    def _problems(self) -> list[str]:
        problems = []
        if min(self.image_size) < 1:
            problems.append(f"image_size must be (height, width) in pixels, got {self.image_size}")
        if max(self.image_size) > MAX_SIZE:
            problems.append(f"image_size must be at most {MAX_SIZE} pixels a side, got {self.image_size}")
        for name, limit in (("decoder_layers", MAX_LAYERS), ("decoder_width", MAX_SIZE), ("decoder_heads", MAX_SIZE)):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be >= 1, got {value}")
            if value is not None and value > limit:
                problems.append(f"{name} must be at most {limit}, got {value}")
        for name in ("dropout", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                problems.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name, option in self.backbone_options.items():
            if name not in BACKBONE_OPTIONS:
                choices = ", ".join(nearest_first(name, BACKBONE_OPTIONS))
                problems.append(f"unknown backbone option {name}; choose from {choices}")
            elif not 0 < option < math.inf or (name != "mlp_ratio" and option != int(option)):
                number = "number" if name == "mlp_ratio" else "whole number"
                problems.append(f"backbone option {name} must be a {number} > 0, got {option}")
            elif option > (limit := MAX_LAYERS if name == "depth" else MAX_SIZE):
                problems.append(f"backbone option {name} must be at most {limit}, got {option}")
        layers, most = self.out_layers, self.decoder.max_out_layers
        if layers is not None and (not layers or min(layers) < 0 or list(layers) != sorted(set(layers))):
            problems.append(f"out_layers must be ascending block indices from 0, got {layers}")
        if layers is not None and most is not None and len(layers) > most:
            problems.append(f"structure {self.structure} reads at most {most} of out_layers, got {layers}")
        return problems

    @classmethod
    def field_names(cls, structure: str | None = None) -> tuple[str, ...]:
        """The settings that all structures share, and those of one structure's own where it is named.

        Raises:
            ValueError: Unknown structure.
        """
        return SHARED_FIELDS + (() if structure is None else option_names(DECODERS.get(structure)))

    def replace(self, **changes: Any) -> Self:
        """This configuration with other values; of another structure, options that it has not are left out."""
        values = self.to_dict() | changes
        if values["structure"] != self.structure:
            own = set(option_names(type(self.decoder))) - set(self.field_names(values["structure"])) - set(changes)
            values = {name: value for name, value in values.items() if name not in own}
        return self.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The shared fields and the structure's own, flat, as JSON-able values."""
        values = {name: getattr(self, name) for name in self.field_names(self.structure)}
        values["backbone_options"] = dict(self.backbone_options)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: An unknown or missing key, or a value that breaks a rule.
        """
        if missing := [name for name in ("backbone", "image_size") if name not in values]:
            raise ValueError(f"model setting {', '.join(missing)} is missing")
        return cls(**{str(name): value for name, value in values.items()})


SHARED_FIELDS = tuple(one.name for one in fields(ModelConfig) if one.init)


def option_names(kind: type[Decoder]) -> tuple[str, ...]:
    """The options of a structure."""
    return tuple(one.name for one in fields(kind))


def foreign_problem(structure: str, name: str, value: Any) -> str | None:
    """Why a setting that is no field of the structure is refused; None for the default of another structure's.

    Configurations that were written before structures had options of their own hold all of them.
    """
    owners = {
        owner: one.default for owner in DECODERS.builtins for one in fields(DECODERS.get(owner)) if one.name == name
    }
    if not owners:
        choices = nearest_first(name, ModelConfig.field_names(structure))
        return f"unknown model setting {name}; choose from {', '.join(choices)}"
    if value in owners.values():
        return None
    # A setting that the structure has no use for would silently do nothing.
    return f"{name} {value} has no meaning for structure {structure!r}; use {' or '.join(owners)}, or leave it out"
