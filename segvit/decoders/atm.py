"""Attention-to-Mask (SegViT, arXiv 2210.05844, section 3.2): class queries whose attention is the mask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from segvit.attention import FeedForward, LayerStack, MultiheadAttention, attend
from segvit.backbones.feature_map import FeatureMap
from segvit.decoders.decoder import Decoder, DecoderSpec
from segvit.output import at_least_float32, full_precision

# B batch, N classes (one query each), L patch tokens on an (h, w) grid, C decoder channels


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """What all parts of an ATM decoder share.

    `attention_scale`: factor of ATM's similarity; None: head width ** -0.5. `mask_upsampling`: how many times finer
    than the features the masks are, on each side.
    """

    num_classes: int
    width: int
    num_heads: int
    num_layers: int
    dropout: float
    attention_scale: float | None = None
    mask_upsampling: int = 1


@dataclass(frozen=True, kw_only=True)
class ATMDecoder(Decoder):
    """What the structures with ATM share."""

    attention_scale: float | None = None
    """Factor of ATM's similarity; None: head width ** -0.5."""

    @property
    def finer(self) -> int:
        """How many times finer than the features the masks are, on each side."""
        return 1

    def problems(self) -> list[str]:
        """See `Decoder`."""
        scale = self.attention_scale
        valid = scale is None or 0.0 < scale < math.inf
        rule = [] if valid else [f"attention_scale must be > 0, got {scale}; None is head width ** -0.5"]
        return [*super().problems(), *rule]

    @property
    def projects(self) -> bool:
        """Whether features are projected to the decoder's width."""
        return True

    def sizes(self, spec: DecoderSpec) -> DecoderSizes:
        """The sizes of all stages; by default half the backbone's width, and its heads."""
        own_width = spec.feature_widths[-1]
        return DecoderSizes(
            num_classes=spec.num_classes,
            width=spec.width or (own_width // 2 if self.projects else own_width),
            num_heads=spec.num_heads or spec.backbone_heads,
            num_layers=spec.num_layers,
            dropout=spec.dropout,
            attention_scale=self.attention_scale,
            mask_upsampling=self.finer,
        )

    def spec_problems(self, spec: DecoderSpec) -> list[str]:
        """The width must divide into the heads, and be the features' where nothing projects them."""
        sizes, problems = self.sizes(spec), []
        if sizes.width % sizes.num_heads:
            problems.append(
                f"decoder_width {sizes.width} is not a multiple of decoder_heads {sizes.num_heads}; change one of them"
            )
        if not self.projects and set(spec.feature_widths) != {sizes.width}:
            problems.append(
                f"decoder_width {sizes.width} is not the features' {', '.join(map(str, spec.feature_widths))}; "
                "without input_projection they must be the same"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class ATMOnFeatures(ATMDecoder):
    """What the structures share whose ATM stages read backbone features."""

    input_projection: bool = True
    """Whether a linear layer and a norm precede each ATM stage; without them the decoder has the backbone's width."""
    mask_upsampling: int = 1
    """How many times finer than the patch grid the masks are, on each side: 1, as published, 2 or 4; learned."""

    def problems(self) -> list[str]:
        """See `Decoder`."""
        valid = self.mask_upsampling in (1, 2, 4)
        rule = [] if valid else [f"mask_upsampling must be 1, 2 or 4, got {self.mask_upsampling}"]
        return [*super().problems(), *rule]

    @property
    def finer(self) -> int:
        """See `mask_upsampling`."""
        return self.mask_upsampling

    @property
    def projects(self) -> bool:
        """See `input_projection`."""
        return self.input_projection

    def input_widths(self, spec: DecoderSpec) -> list[int | None]:
        """Channels of the features that are projected, None for those taken as they are."""
        return [width if self.projects else None for width in spec.feature_widths]


class AttentionToMask(nn.Module):
    """Cross-attention of class queries whose head-averaged similarity, before the softmax, is the mask."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.dropout = sizes.dropout
        scale = sizes.attention_scale
        self.scale: float = (sizes.width // sizes.num_heads) ** -0.5 if scale is None else scale
        self.q = nn.Linear(sizes.width, sizes.width)
        self.k = nn.Linear(sizes.width, sizes.width)
        self.v = nn.Linear(sizes.width, sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, queries: Tensor, tokens: Tensor, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
        """Queries (B, N, C) attend to tokens (B, L, C).

        Returns:
            The attended values (B, N, C) and, if asked for, the mask logits (B, N, L).
        """
        q = self.q(queries)
        # One product for both is faster than two.
        weight, bias = torch.cat((self.k.weight, self.v.weight)), torch.cat((self.k.bias, self.v.bias))
        k, v = F.linear(tokens, weight, bias).chunk(2, dim=2)
        dropout = self.dropout if self.training else 0.0
        attended = attend(q, k, v, self.num_heads, dropout, self.scale)
        return self.proj(attended), self.mask_logits(q, k) if with_mask else None

    def mask_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Head mean of the scaled similarity of projected queries and keys: (B, N, L), float32 or more."""
        # The sum over heads of per-head products is the full-width product: no map per head is needed.
        with full_precision(q):
            q, k = at_least_float32(q), at_least_float32(k)
            return torch.matmul(q * (self.scale / self.num_heads), k.transpose(1, 2))


class ATMLayer(nn.Module):
    """Post-norm decoder layer with Attention-to-Mask as its cross-attention."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.self_attention = MultiheadAttention(sizes.width, sizes.num_heads, sizes.dropout)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attention_to_mask = AttentionToMask(sizes)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.mlp = FeedForward(sizes.width, sizes.dropout)
        self.norm3 = nn.LayerNorm(sizes.width)
        self.drop = nn.Dropout(sizes.dropout)

    def forward(self, queries: Tensor, tokens: Tensor, *, with_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The updated queries (B, N, C) and, if asked for, the layer's mask logits (B, N, L)."""
        queries = self.norm1(queries + self.drop(self.self_attention(queries, queries)))
        attended, mask = self.attention_to_mask(queries, tokens, with_mask=with_mask)
        queries = self.norm2(queries + self.drop(attended))
        return self.norm3(queries + self.drop(self.mlp(queries))), mask


class ATMStage(LayerStack):
    """A projection of backbone features and a stack of ATM layers over them.

    With `input_width` None the features are taken as they are, without projection or norm (Shrunk).
    """

    def __init__(self, input_width: int | None, sizes: DecoderSizes) -> None:
        super().__init__()
        self.input = InputProjection(input_width, sizes.width) if input_width is not None else nn.Identity()
        self.layers = nn.ModuleList(ATMLayer(sizes) for _ in range(sizes.num_layers))
        self.finer = FinerMasks(sizes) if sizes.mask_upsampling > 1 else None

    def forward(self, queries: Tensor, features: FeatureMap, *, inner_masks: bool) -> list[tuple[Tensor, Tensor]]:
        """Queries (B, N, C) and mask logits (B, N, h, w) of the last layer, or of every one if asked for.

        With mask upsampling the masks are that many times finer.
        """
        tokens = self.input(features.tokens)
        steps = []
        for index, layer in enumerate(self.layers):
            with_mask = inner_masks or index == len(self.layers) - 1
            queries, mask = self.run_layer(layer, queries, tokens, with_mask=with_mask)
            if mask is not None:
                steps.append((queries, mask.unflatten(2, features.grid)))
        if self.finer is not None:
            cells = self.finer.upsample(tokens, features.grid)
            steps = [(queries, self.finer(queries, mask, cells)) for queries, mask in steps]
        return steps


class FinerMasks(nn.Module):
    """Masks on a finer grid than the features': those of ATM, enlarged, and what upsampled features add to them.

    Each doubling is a transposed convolution and a depthwise one, as in EoMT (arXiv 2503.19108, section 3.2), here
    to half the channels before. The first step's masks are ATM's: what is added starts at zero.
    """

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.factor = sizes.mask_upsampling
        widths = [sizes.width // 2**doubling for doubling in range(self.factor.bit_length())]
        self.doublings = nn.ModuleList(Doubling(before, after) for before, after in pairwise(widths))
        self.query = nn.Linear(sizes.width, widths[-1])

    def upsample(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The features (B, h*w, C) of a grid as (B, factor * h, factor * w, C / factor)."""
        cells = torch.unflatten(tokens, 1, grid)
        for doubling in self.doublings:
            cells = doubling(cells)
        return cells

    def forward(self, queries: Tensor, mask: Tensor, cells: Tensor) -> Tensor:
        """The finer masks of queries (B, N, C) with masks (B, N, h, w), float32 or more."""
        size = (cells.shape[1], cells.shape[2])
        enlarged = F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
        query: Tensor = self.query(queries)
        with full_precision(query):
            query, flat = at_least_float32(query), at_least_float32(cells).flatten(1, 2)
            added = torch.matmul(query * query.shape[2] ** -0.5, flat.transpose(1, 2))
        return enlarged + torch.unflatten(added, 2, size)


def zero_finer_masks(decoder: nn.Module) -> None:
    """Let what upsampled features add to the masks start at nothing; after all weights are initialised."""
    for module in decoder.modules():
        if isinstance(module, FinerMasks):
            nn.init.zeros_(module.query.weight)
            nn.init.zeros_(module.query.bias)


class Doubling(nn.Module):
    """Twice the rows and columns of a feature map, learned."""

    def __init__(self, width: int, new_width: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(width, new_width, kernel_size=2, stride=2)
        self.mix = nn.Conv2d(new_width, new_width, kernel_size=3, padding=1, groups=new_width, bias=False)
        self.norm = LayerNorm2d(new_width)

    def forward(self, cells: Tensor) -> Tensor:
        """(B, h, w, C) to (B, 2h, 2w, new C): channels last, so that nothing is moved between the operations."""
        mixed = self.mix(F.gelu(self.enlarged(cells)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.layer_norm(mixed, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)

    def enlarged(self, cells: Tensor) -> Tensor:
        """The transposed convolution, each of whose cells becomes four of its own: one matrix product."""
        matrix = self.enlarge.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * new C, C)
        bias = None if self.enlarge.bias is None else self.enlarge.bias.repeat(4)
        fours = torch.unflatten(F.linear(cells, matrix, bias), 3, (2, 2, -1))
        return fours.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class InputProjection(nn.Sequential):
    """Linear layer to the decoder's width, then LayerNorm."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__(nn.Linear(input_width, width), nn.LayerNorm(width))
