"""What a decoder is: the options of its structure, what they mean, and the module that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from segvit.backbones.downsampling import Downsampling

# B batch, N classes, h w grid of the masks


class Prediction(NamedTuple):
    """Classes and masks of one ATM stage or layer, or of a linear head."""

    class_logits: Tensor | None
    """(B, N, N + 1); the last column is "no object". None where there are no masks, as of a linear head."""
    mask_logits: Tensor
    """(B, N, h, w), before the sigmoid; without masks, the class logits before the softmax."""


class DecoderOutput(NamedTuple):
    """All predictions of a decoder, the final one last, on a grid of the features or a finer one."""

    predictions: list[Prediction]
    stride: int
    """Pixels that a cell of the features' grid covers on each side."""
    upsampling: int = 1
    """How many cells of the masks there are along such a cell."""


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What a decoder is built for: the features that it reads, and the sizes that a configuration asks for."""

    num_classes: int
    feature_widths: tuple[int, ...]
    """Channels of the features, in the backbone's order."""
    num_shrunk: int
    """How many of them, the last ones, come from blocks that downsample or follow one that does."""
    backbone_heads: int
    """Attention heads of the backbone."""
    patch_size: int
    """Pixels a backbone patch covers on each side."""
    patch_grid: tuple[int, int]
    """(h, w) of the training crop's patches."""
    num_layers: int
    """Decoder layers a stage."""
    width: int | None
    """Channels of the decoder; None: for the decoder to choose."""
    num_heads: int | None
    """Attention heads of the decoder; None: for the decoder to choose."""
    dropout: float


@dataclass(frozen=True, kw_only=True)
class Decoder(ABC):
    """A structure: subclasses add its options as fields with defaults, and say what they mean.

    The fields of a model's configuration that the structure has of its own; their names must not be those of
    `ModelConfig`. Values are checked against the annotated types before `problems` is asked.
    """

    max_out_layers: ClassVar[int | None] = None
    """How many backbone features are read at most; None: any number."""
    has_masks: ClassVar[bool] = True
    """Whether predictions have class logits and masks; without, their masks are class logits a pixel."""
    shrinks: ClassVar[bool] = False
    """Whether the backbone downsamples, as `downsampling` says."""
    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType({})
    """Modules whose cost is counted apart, by the name it is shown under."""

    def problems(self) -> list[str]:
        """A sentence for each option whose value breaks a rule."""
        return []

    def default_out_layers(self, depth: int, hierarchical: bool) -> tuple[int, ...]:
        """The blocks, or the stages of a hierarchical backbone, that are read where a configuration names none."""
        return (depth - 1,)

    def downsampling(self, depth: int) -> Downsampling | None:
        """Where a backbone of that many blocks downsamples; None: nowhere."""
        return None

    def spec_problems(self, spec: DecoderSpec) -> list[str]:
        """A sentence for each size that cannot be built."""
        return []

    @abstractmethod
    def build(self, spec: DecoderSpec) -> nn.Module:
        """The module, which maps features in the backbone's order (list of `FeatureMap`) to a `DecoderOutput`.

        Called only where `spec_problems` names none.
        """
