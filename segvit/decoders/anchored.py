"""An anchored Shrunk decoder: the cascade over a shrunk backbone, whose features are brought back to all patches.

The paper's Shrunk (`segvit.decoders.shrunk`) asks grid queries that know nothing of the image, which take tens of
thousands of steps to find out where they are. Here nothing has to be found out. A block of a ViT adds to the tokens
that it is given, so a patch that was left out lacks what the later blocks would have added to it; it gets what they
added to the tokens around it that look like it. From the first step on the cascade reads nearly the features of the
whole backbone, and weights of a model that does not shrink can be taken over (`ATMCascade`'s names are the same);
what the features of the two still differ by is mostly found by least squares (`segvit.distillation`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.downsampling import Downsampling, PatchChoice, rows_at
from segvit.backbones.feature_map import FeatureMap, KeptPatches
from segvit.decoders.atm import ATMOnFeatures, ATMStage, DecoderSizes
from segvit.decoders.cascade import ATMCascade, cascade_layers
from segvit.decoders.decoder import DecoderOutput, DecoderSpec
from segvit.decoders.shrinking import ShrinkingDecoder

# B batch, C channels of the features, M patches that the backbone kept, L that it left out


class AnchoredUpsampling(nn.Module):
    """Features of every patch from those of the tokens that are left.

    A patch p that was left out gets low(p) + sum over tokens m of w(p, m) (f(m) - low(m)), and a correction; the
    patches that were kept get f itself. The weights w are the backbone's, a softmax over how like the low-level
    features are and how near, as in joint bilateral upsampling; one set of weights for all features. The correction
    is a linear map, one a feature and at first zero, of what tells p from the tokens that it is made of: n(p) - sum
    over m of w(p, m) n(m), n the layer-normed low-level features. `segvit.fit_upsampling` finds these maps without
    training.

    Args:
        width: Channels C of all features.
        num_features: Features to bring back.
    """

    def __init__(self, width: int, num_features: int) -> None:
        super().__init__()
        self.corrections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_features))
        for correction in self.corrections:
            nn.init.zeros_(correction.weight)  # type: ignore[arg-type]

    def forward(self, features: Sequence[FeatureMap]) -> list[FeatureMap]:
        """The features (B, M, C) of one choice of patches, at every patch of their grid."""
        stand_ins, difference = self.stand_ins(features)
        kept = kept_of(features)
        order = torch.cat((kept.places, kept.left_out), dim=1).argsort(dim=1)
        restored = []
        for feature, patches, correction in zip(features, stand_ins, self.corrections, strict=True):
            patches = torch.cat((feature.tokens, patches + correction(difference)), dim=1)
            restored.append(feature._replace(tokens=rows_at(patches, order), kept=None))
        return restored

    def stand_ins(self, features: Sequence[FeatureMap]) -> tuple[list[Tensor], Tensor]:
        """Of the patches that were left out: each feature without its correction, and what the corrections map.

        All (B, L, C).
        """
        kept = kept_of(features)
        low, before = rows_at(kept.before, kept.left_out), rows_at(kept.before, kept.places)
        weights = kept.stand_ins.to(low.dtype)
        stand_ins = [low + weights @ (feature.tokens - before) for feature in features]
        normed, normed_before = (F.layer_norm(rows, rows.shape[-1:]) for rows in (low, before))
        return stand_ins, normed - weights @ normed_before


def kept_of(features: Sequence[FeatureMap]) -> KeptPatches:
    """The choice of patches that the features share."""
    kept = features[0].kept
    assert kept is not None, "a backbone whose patches are chosen"
    return kept


class AnchoredCascade(ATMCascade):
    """The cascade over features of which the later ones are brought back to all patches.

    Args:
        input_widths: Channels of the features, in the backbone's order; None: taken without projection.
        feature_width: Channels of all features.
        num_shrunk: How many of the features, the last ones, are those of a shrunk backbone.
        sizes: Of all stages.
    """

    def __init__(
        self, input_widths: Sequence[int | None], feature_width: int, num_shrunk: int, sizes: DecoderSizes
    ) -> None:
        super().__init__(input_widths, sizes)
        self.num_whole = len(input_widths) - num_shrunk
        self.upsampling = AnchoredUpsampling(feature_width, num_shrunk)

    def forward(self, features: Sequence[FeatureMap]) -> DecoderOutput:
        """One prediction a stage, from the features in the backbone's order, at the first one's stride."""
        return super().forward(self.restore(features))

    def restore(self, features: Sequence[FeatureMap]) -> list[FeatureMap]:
        """The features that the stages read, all of them at every patch."""
        return [*features[: self.num_whole], *self.upsampling(self.shrunk(features))]

    def shrunk(self, features: Sequence[FeatureMap]) -> Sequence[FeatureMap]:
        """Those of the backbone's features that have tokens at the kept patches alone."""
        return features[self.num_whole :]


@dataclass(frozen=True, kw_only=True)
class Anchored(ATMOnFeatures, ShrinkingDecoder):
    """ATM stages over `out_layers`, the last first; what is read before the downsampling is read as it is."""

    parts: ClassVar[Mapping[str, type[nn.Module]]] = MappingProxyType(
        {"upsampling": AnchoredUpsampling, "atm_stage": ATMStage}
    )

    keep_every: int = 3
    """Of the patches, every so many-th row and column stays in the sequence."""
    keep_unlike: float = 0.23
    """Share of the patches that stay besides: those that are least like the ones that stay already."""
    keep_edges: float = 0.0
    """Share of the patches that stay besides: those that differ most from their surroundings (SegViTv2, Shrunk++)."""
    edge_window: int = 3
    """Rows and columns of these surroundings, an odd number: 3 finds edges of large things, 5 and more small things."""
    proportional_attention: bool = True
    """Whether the later blocks' attention weighs a token by how many patches it stands for (ToMe, arXiv 2210.09461)."""

    def problems(self) -> list[str]:
        """See `Decoder`."""
        problems = super().problems()
        for name in ("keep_unlike", "keep_edges"):
            if not 0.0 <= (share := getattr(self, name)) < 1.0:
                problems.append(f"{name} must be in [0, 1), got {share}; it is a share of the patches")
        if self.keep_every < 2:
            problems.append(f"keep_every must be >= 2, got {self.keep_every}; use a structure that does not shrink")
        if self.edge_window < 3 or self.edge_window % 2 == 0:
            problems.append(
                f"edge_window must be an odd number >= 3, got {self.edge_window}; a patch lies in its middle"
            )
        if self.shrink_queries != "nearest":
            problems.append(
                f"shrink_queries {self.shrink_queries} does not go with structure anchored, whose tokens stand at "
                "patches; leave it out, or use nearest"
            )
        if self.shrink_keys:
            problems.append("shrink_keys does not go with structure anchored; leave it out")
        return problems

    def downsampling(self, depth: int) -> Downsampling:
        """See `ShrinkingDecoder`; with the patches that stay."""
        patches = PatchChoice(
            self.keep_every, self.keep_edges, self.keep_unlike, self.edge_window, self.proportional_attention
        )
        return super().downsampling(depth)._replace(patches=patches)

    def default_out_layers(self, depth: int, hierarchical: bool) -> tuple[int, ...]:
        """The cascade's."""
        return cascade_layers(depth)

    def build(self, spec: DecoderSpec) -> nn.Module:
        """See `Decoder`."""
        return AnchoredCascade(self.input_widths(spec), spec.feature_widths[0], spec.num_shrunk, self.sizes(spec))
