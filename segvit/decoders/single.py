"""One ATM stage (SegViT, arXiv 2210.05844, ablations), also the end of naive downsampling and of Shrunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from segvit.attention import initialize_linear
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.atm import ATMOnFeatures, ATMStage, DecoderSizes, zero_finer_masks
from segvit.decoders.decoder import DecoderOutput, DecoderSpec, Prediction
from segvit.output import at_least_float32


@dataclass(frozen=True, kw_only=True)
class Single(ATMOnFeatures):
    """One ATM stage on the last features, whose every layer predicts."""

    max_out_layers: ClassVar[int | None] = 1
    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType({"atm_stage": ATMStage})

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return SingleATM(self.input_widths(spec)[-1], self.sizes(spec))


class SingleATM(nn.Module):
    """One ATM stage, each of whose layers makes a prediction of its own (baseline, and end of Shrunk).

    With `input_width` None the features are taken without projection.
    """

    def __init__(self, input_width: int | None, sizes: DecoderSizes) -> None:
        super().__init__()
        self.class_queries = nn.Embedding(sizes.num_classes, sizes.width)
        self.stage = ATMStage(input_width, sizes)
        self.class_head = nn.Linear(sizes.width, sizes.num_classes + 1)
        self.finer = sizes.mask_upsampling
        self.apply(initialize_linear)
        zero_finer_masks(self)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a layer, from the last of the features."""
        feature = features[-1]
        queries = self.class_queries.weight.expand(len(feature.tokens), -1, -1)
        predictions = [
            Prediction(at_least_float32(self.class_head(queries)), mask)
            for queries, mask in self.stage(queries, feature, inner_masks=True)
        ]
        return DecoderOutput(predictions, feature.stride, self.finer)
