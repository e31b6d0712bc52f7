"""What a SegViT model is made of, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

Structure = Literal["cascade", "single", "naive_qd", "shrunk"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Structure and widths of a SegViT model (arXiv 2210.05844, sections 3 and 4).

    Values that only a built backbone can judge (block indices, the patch grid, the head split) are
    checked by `segvit.build_model` and, without allocating weights, by `segvit.check_config`.

    Raises:
        ValueError: A value breaks a rule; the message says which and what to use instead.
    """

    backbone: str
    """timm model name of a plain ViT, such as ``vit_base_patch16_384``."""
    image_size: tuple[int, int]
    """(height, width) of the training crop in pixels; multiples of the patch size."""
    structure: Structure = "cascade"
    """``cascade``: ATM stages over `out_layers`. ``single``: one ATM stage on the last block.
    ``naive_qd``: `single` after query-based downsampling. ``shrunk``: with two upsampling layers too."""
    out_layers: tuple[int, ...] = (5, 7, 11)
    """0-based blocks that feed the cascade, ascending; the last is visited first."""
    decoder_layers: int = 3
    """Decoder layers a stage."""
    decoder_width: int | None = None
    """Channels of the decoder; None: half the backbone's width."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; None: the backbone's."""
    shrink_at: int | None = None
    """0-based block that query-based downsampling precedes; None: one third of the depth, as in the paper."""
    dropout: float = 0.1
    """Dropout rate of the decoder."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the last backbone block's MLP branch; linear from 0 over the blocks."""

    def __post_init__(self) -> None:
        if self.structure not in STRUCTURES:
            raise ValueError(f"unknown structure {self.structure!r}; choose from {', '.join(STRUCTURES)}")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be (height, width) in pixels, got {self.image_size}")
        layers = self.out_layers
        if not layers or min(layers) < 0 or list(layers) != sorted(set(layers)):
            raise ValueError(f"out_layers must be ascending block indices from 0, got {layers}")
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers must be >= 1, got {self.decoder_layers}")
        for name in ("decoder_width", "decoder_heads", "shrink_at"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.shrink_at is not None and self.structure not in ("naive_qd", "shrunk"):
            raise ValueError(
                f"shrink_at {self.shrink_at} has no meaning for structure {self.structure!r}; "
                "use naive_qd or shrunk, or leave it out"
            )
        for name in ("dropout", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: An unknown or missing key, or a value that breaks a rule.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"unknown model setting {', '.join(unknown)}; choose from {', '.join(known)}")
        if missing := [name for name in ("backbone", "image_size") if name not in values]:
            raise ValueError(f"model setting {', '.join(missing)} is missing")
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)
