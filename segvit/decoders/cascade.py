"""The cascade (SegViT, arXiv 2210.05844, figure 2): ATM stages over several backbone layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch.nn.functional as F
from torch import nn

from segvit.attention import initialize_linear
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.atm import ATMOnFeatures, ATMStage, DecoderSizes, zero_finer_masks
from segvit.decoders.decoder import DecoderOutput, DecoderSpec, Prediction
from segvit.output import at_least_float32


@dataclass(frozen=True, kw_only=True)
class Cascade(ATMOnFeatures):
    """ATM stages over `out_layers`, the last first."""

    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType({"atm_stage": ATMStage})

    chain_stages: bool = True
    """Whether a stage starts from the queries of the stage before (cascade), or from the table (parallel)."""
    share_queries: bool = True
    """Whether unchained stages start from one table of class queries, or each from its own."""
    accumulate_masks: bool = True
    """Whether a stage's prediction adds the masks of the stages before."""

    def problems(self) -> list[str]:
        """See `Decoder`."""
        unused = self.chain_stages and not self.share_queries
        rule = ["share_queries False needs chain_stages False: chained stages start from one table"] if unused else []
        return [*super().problems(), *rule]

    def default_out_layers(self, depth: int, hierarchical: bool) -> tuple[int, ...]:
        """(5, 7, 11) of 12 blocks and (7, 15, 23) of 24 as published, the ends of the thirds of others; all stages."""
        if hierarchical:
            return tuple(range(depth))
        return cascade_layers(depth)

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return ATMCascade(
            self.input_widths(spec),
            self.sizes(spec),
            chain=self.chain_stages,
            share_queries=self.share_queries,
            accumulate=self.accumulate_masks,
        )


def cascade_layers(depth: int) -> tuple[int, ...]:
    """The blocks that a cascade reads of a plain ViT: the published choice for 12, else the ends of the thirds."""
    return (5, 7, 11) if depth == 12 else ends_of_thirds(depth)


def ends_of_thirds(depth: int) -> tuple[int, ...]:
    """The last blocks of the first, second and last third: (3, 7, 11) of 12, (7, 15, 23) of 24."""
    return tuple(sorted({max(depth * third // 3 - 1, 0) for third in (1, 2, 3)}))


class ATMCascade(nn.Module):
    """ATM stages over several backbone layers, the last layer first (SegViT, figure 2).

    Args:
        input_widths: Channels of the features, in the backbone's order; None: taken without projection.
        sizes: What all stages share.
        chain: Whether a stage starts from the queries of the stage before, or from the table (parallel).
        share_queries: Whether there is one table of class queries, or one a stage.
        accumulate: Whether a prediction adds the masks of the stages before.
    """

    def __init__(
        self,
        input_widths: Sequence[int | None],
        sizes: DecoderSizes,
        *,
        chain: bool = True,
        share_queries: bool = True,
        accumulate: bool = True,
    ) -> None:
        super().__init__()
        self.chain = chain
        self.accumulate = accumulate
        num_tables = 1 if share_queries else len(input_widths)
        self.class_queries = nn.ModuleList(nn.Embedding(sizes.num_classes, sizes.width) for _ in range(num_tables))
        self.stages = nn.ModuleList(ATMStage(width, sizes) for width in reversed(input_widths))
        self.class_head = nn.Linear(sizes.width, sizes.num_classes + 1)
        self.finer = sizes.mask_upsampling
        self.apply(initialize_linear)
        zero_finer_masks(self)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a stage, from features in the backbone's order, on the first feature's grid or a finer one."""
        batch = len(features[0].tokens)
        grid = (self.finer * features[0].grid[0], self.finer * features[0].grid[1])
        # Through parameters(): the type of a module list's members is not known to be a table.
        tables = [table.expand(batch, -1, -1) for table in self.class_queries.parameters()]
        queries = tables[0]
        predictions: list[Prediction] = []
        for index, (stage, feature) in enumerate(zip(self.stages, reversed(features), strict=True)):
            start = queries if self.chain else tables[index % len(tables)]
            [(queries, mask)] = stage(start, feature, inner_masks=False)
            if tuple(mask.shape[-2:]) != grid:
                mask = F.interpolate(mask, size=grid, mode="bilinear", align_corners=False)
            if predictions and self.accumulate:
                mask = mask + predictions[-1].mask_logits
            predictions.append(Prediction(at_least_float32(self.class_head(queries)), mask))
        return DecoderOutput(predictions, features[0].stride, self.finer)
