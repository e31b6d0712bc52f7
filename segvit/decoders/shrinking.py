"""The options of query-based downsampling (SegViT, arXiv 2210.05844, section 3.3), for the structures that use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from segvit.backbones.downsampling import Downsampling, ShrinkQueries
from segvit.decoders.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class ShrinkingDecoder(Decoder):
    """What the structures share whose backbone leaves tokens out inside one of its blocks."""

    shrinks: ClassVar[bool] = True

    shrink_at: int | None = None
    """0-based block inside which tokens are left out: its queries are those that stay (half the grid, or the patches
    that `anchored` chooses), its keys and values all tokens (see `shrink_keys`). None: a third of the depth, as in
    the paper."""
    shrink_queries: ShrinkQueries = "nearest"
    """Queries of that block: every second row and column, the average of each 2 x 2 tokens, or a learned 2 x 2
    convolution of stride 2."""
    shrink_keys: bool = False
    """Whether keys and values of that block are those of the queries, too, which loses what the others hold."""

    def problems(self) -> list[str]:
        """See `Decoder`."""
        valid = self.shrink_at is None or self.shrink_at >= 1
        rule = [] if valid else [f"shrink_at must be >= 1, got {self.shrink_at}; a block must precede it"]
        return [*super().problems(), *rule]

    def downsampling(self, depth: int) -> Downsampling:
        """The block that the options name, or the one at a third of the depth, at least 1."""
        block = max(depth // 3, 1) if self.shrink_at is None else self.shrink_at
        return Downsampling(block, self.shrink_queries, keys=self.shrink_keys)
