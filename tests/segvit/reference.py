"""SegViT written a second time, in the plainest way: what the product's models and loss are compared with.

Every module follows the written description of the published model word by word, with torch's own attention
and Python loops over heads, stages, images and classes. Nothing of `segvit` is used. The tensors carry the
published names, so a `state_dict()` is a published checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, N classes, L tokens, C channels, H W pixels, h w patch grid

NO_OBJECT_WEIGHT = 0.1


class Sizes(NamedTuple):
    """A small model: everything that the product has to find out from the tensors or is told."""

    num_classes: int = 7
    width: int = 48
    depth: int = 6
    num_heads: int = 3
    patch_size: int = 16
    hidden: int = 192
    image_size: tuple[int, int] = (64, 64)
    decoder_width: int = 24
    decoder_layers: int = 3
    out_layers: tuple[int, ...] = (1, 3, 5)
    shrink_at: int | None = None
    attention_scale: float | None = None
    input_projection: bool = True


class Reference(NamedTuple):
    """Class logits (B, N, N + 1) and mask logits (B, N, h, w) of each prediction, the final one last."""

    class_logits: list[Tensor]
    mask_logits: list[Tensor]


class WrappedAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        attended: Tensor = self.attn(queries, tokens, tokens)[0]
        return attended


class BlockMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.layers(tokens)
        return mixed


class Block(nn.Module):
    """Pre-norm ViT block, LayerNorm eps 1e-6."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.attn = WrappedAttention(sizes.width, sizes.num_heads)
        self.ln2 = nn.LayerNorm(sizes.width, eps=1e-6)
        self.ffn = BlockMLP(sizes.width, sizes.hidden)

    def forward(self, tokens: Tensor, kept: list[int] | None = None) -> Tensor:
        """With `kept`, only those tokens are queries and residual; keys and values keep all."""
        normed = self.ln1(tokens)
        if kept is None:
            tokens = tokens + self.attn(normed, normed)
        else:
            tokens = tokens[:, kept] + self.attn(normed[:, kept], normed)
        out: Tensor = tokens + self.ffn(self.ln2(tokens))
        return out


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, patch_size, patch_size)


class ViT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        rows, columns = (side // sizes.patch_size for side in sizes.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, sizes.width))
        self.patch_embed = PatchEmbedding(sizes.width, sizes.patch_size)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))

    def forward(self, images: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
        """Tokens (B, L, C) and grid of each out layer, ascending."""
        cells = self.patch_embed.projection(images)  # (B, C, h, w)
        grid = (cells.shape[2], cells.shape[3])
        tokens = cells.flatten(2).permute(0, 2, 1)

        first, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        old = tuple(side // self.sizes.patch_size for side in self.sizes.image_size)
        if grid != old:
            patches = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
            patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
            patches = patches.flatten(2).permute(0, 2, 1)
        class_token = self.cls_token.expand(len(images), -1, -1)
        tokens = torch.cat((class_token, tokens), dim=1) + torch.cat((first, patches), dim=1)
        tokens = tokens[:, 1:]

        features = []
        for index, block in enumerate(self.layers):
            if index == self.sizes.shrink_at:
                kept = [row * grid[1] + column for row in range(0, grid[0], 2) for column in range(0, grid[1], 2)]
                tokens = block(tokens, kept)
                grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
            else:
                tokens = block(tokens)
            if index in self.sizes.out_layers:
                features.append((tokens, grid))
        return features


class ATMAttention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        width = sizes.decoder_width
        scale = sizes.attention_scale
        self.scale = 1 / math.sqrt(width // sizes.num_heads) if scale is None else scale
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attended values (B, N, C), and the mean over heads of the similarity before the softmax (B, N, L)."""
        q, k, v = self.q(queries), self.k(tokens), self.v(tokens)
        head = q.shape[2] // self.num_heads
        attended, similarities = [], []
        for index in range(self.num_heads):
            part = slice(index * head, (index + 1) * head)
            similarity = q[:, :, part] @ k[:, :, part].transpose(1, 2) * self.scale
            similarities.append(similarity)
            attended.append(similarity.softmax(dim=2) @ v[:, :, part])
        return self.proj(torch.cat(attended, dim=2)), sum(similarities[1:], similarities[0]) / self.num_heads


class Layer(nn.Module):
    """Post-norm decoder layer, LayerNorm eps 1e-5; its cross-attention is torch's or Attention-to-Mask."""

    def __init__(self, sizes: Sizes, *, atm: bool) -> None:
        super().__init__()
        width = sizes.decoder_width
        self.atm = atm
        self.self_attn = nn.MultiheadAttention(width, sizes.num_heads, batch_first=True)
        self.multihead_attn: nn.Module = (
            ATMAttention(sizes) if atm else nn.MultiheadAttention(width, sizes.num_heads, batch_first=True)
        )
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))

    def forward(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.norm1(queries + self.self_attn(queries, queries, queries)[0])
        if self.atm:
            attended, mask = self.multihead_attn(queries, tokens)
        else:
            attended, mask = self.multihead_attn(queries, tokens, tokens)[0], queries
        queries = self.norm2(queries + attended)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries)))), mask


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes, *, atm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes, atm=atm) for _ in range(sizes.decoder_layers))


class Criterion(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        weight = torch.ones(num_classes + 1, dtype=torch.float64)
        weight[-1] = NO_OBJECT_WEIGHT
        self.register_buffer("empty_weight", weight)


class LossHolder(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.criterion = Criterion(num_classes)


class Head(nn.Module):
    """Parts that all heads have: numbered stages with their projections, queries, and what the loss keeps."""

    def __init__(self, sizes: Sizes, num_stages: int, num_queries: int, *, atm: bool, projection: bool) -> None:
        super().__init__()
        self.num_stages = num_stages
        self.projection = projection
        self.loss_decode = LossHolder(sizes.num_classes)
        for stage in range(1, num_stages + 1):
            if projection:
                self.add_module(f"input_proj_{stage}", nn.Linear(sizes.width, sizes.decoder_width))
                self.add_module(f"proj_norm_{stage}", nn.LayerNorm(sizes.decoder_width))
            self.add_module(f"decoder_{stage}", Decoder(sizes, atm=atm))
        self.q = nn.Embedding(num_queries, sizes.decoder_width)
        if atm:
            self.class_embed = nn.Linear(sizes.decoder_width, sizes.num_classes + 1)

    def project(self, stage: int, tokens: Tensor) -> Tensor:
        if not self.projection:
            return tokens
        projected: Tensor = self.get_submodule(f"input_proj_{stage}")(tokens)
        normed: Tensor = self.get_submodule(f"proj_norm_{stage}")(projected)
        return normed

    def run(self, stage: int, queries: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Queries and mask similarity after each layer."""
        steps = []
        decoder = self.get_submodule(f"decoder_{stage}")
        assert isinstance(decoder, Decoder)
        for layer in decoder.layers:
            queries, mask = layer(queries, tokens)
            steps.append((queries, mask))
        return steps


class ATMHead(Head):
    def __init__(self, sizes: Sizes, num_stages: int, *, projection: bool) -> None:
        super().__init__(sizes, num_stages, sizes.num_classes, atm=True, projection=projection)

    def cascade(self, features: Sequence[tuple[Tensor, tuple[int, int]]]) -> Reference:
        """Last backbone layer first; each stage starts from the one before, masks add up."""
        out = Reference([], [])
        queries = self.q.weight.unsqueeze(0).repeat(len(features[0][0]), 1, 1)
        for stage in range(1, self.num_stages + 1):
            tokens, (h, w) = features[len(features) - stage]
            queries, mask = self.run(stage, queries, self.project(stage, tokens))[-1]
            mask = mask.reshape(*mask.shape[:2], h, w)
            out.mask_logits.append(mask if stage == 1 else mask + out.mask_logits[-1])
            out.class_logits.append(self.class_embed(queries))
        return out

    def every_layer(self, tokens: Tensor, grid: tuple[int, int]) -> Reference:
        """One stage, a prediction a layer, nothing added up."""
        start = self.q.weight.unsqueeze(0).repeat(len(tokens), 1, 1)
        steps = self.run(1, start, self.project(1, tokens))
        return Reference(
            [self.class_embed(queries) for queries, _ in steps],
            [mask.reshape(*mask.shape[:2], *grid) for _, mask in steps],
        )


class ShrunkHead(Head):
    def __init__(self, sizes: Sizes, num_stages: int) -> None:
        self.grid = tuple(side // sizes.patch_size for side in sizes.image_size)
        super().__init__(sizes, num_stages, math.prod(self.grid), atm=False, projection=True)
        self.atm = ATMHead(sizes, 1, projection=False)

    def forward(self, features: Sequence[tuple[Tensor, tuple[int, int]]], grid: tuple[int, int]) -> Reference:
        table = self.q.weight
        if grid != self.grid:
            cells = table.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
            cells = F.interpolate(cells, size=grid, mode="bicubic", align_corners=False)
            table = cells.flatten(2).permute(0, 2, 1)[0]
        queries = table.unsqueeze(0).repeat(len(features[0][0]), 1, 1)
        for stage, (tokens, _) in enumerate(features, start=1):
            queries = self.run(stage, queries, self.project(stage, tokens))[-1][0]
        return self.atm.every_layer(queries, grid)


class ReferenceSegViT(nn.Module):
    """`kind`: ``cascade``, ``single``, ``naive_qd`` or ``shrunk``; the last two need `shrink_at`."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        self.kind = kind
        self.sizes = sizes
        self.backbone = ViT(sizes)
        stages = len(sizes.out_layers)
        self.decode_head: Head = (
            ShrunkHead(sizes, stages)
            if kind == "shrunk"
            else ATMHead(sizes, stages if kind == "cascade" else 1, projection=sizes.input_projection)
        )

    def forward(self, images: Tensor) -> Reference:
        features = self.backbone(images)
        if isinstance(self.decode_head, ShrunkHead):
            grid = tuple(side // self.sizes.patch_size for side in images.shape[2:])
            out: Reference = self.decode_head(features, grid)
            return out
        assert isinstance(self.decode_head, ATMHead)
        if self.kind == "cascade":
            return self.decode_head.cascade(features)
        return self.decode_head.every_layer(*features[-1])


def to_pixels(mask_logits: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Masks bilinearly resized to pixels; cells beyond the image, of an odd grid that was halved, are cut off."""
    covered = [cells * stride for cells in mask_logits.shape[2:]]
    masks = F.interpolate(mask_logits, size=covered, mode="bilinear", align_corners=False)
    return masks[:, :, : size[0], : size[1]]


def reference_losses(
    class_logits: Tensor, mask_logits: Tensor, labels: Tensor, stride: int, ignore_index: int = 255
) -> dict[str, Tensor]:
    """Weighted class, focal and dice terms of one prediction."""
    batch, num_classes = class_logits.shape[:2]
    masks = to_pixels(mask_logits, labels.shape[1:], stride)
    entropy, weights = [], []
    focal, dice = [], []
    for image in range(batch):
        found = set(labels[image].flatten().tolist()) - {ignore_index}
        for query in range(num_classes):
            target = query if query in found else num_classes
            weight = 1.0 if query in found else NO_OBJECT_WEIGHT
            log_probability = class_logits[image, query].log_softmax(dim=0)[target]
            entropy.append(-weight * log_probability)
            weights.append(weight)
        for query in sorted(found):
            logit = masks[image, query]
            target_mask = (labels[image] == query).to(logit)
            p = logit.sigmoid()
            p_true = p * target_mask + (1 - p) * (1 - target_mask)
            alpha = 0.25 * target_mask + 0.75 * (1 - target_mask)
            bce = F.binary_cross_entropy_with_logits(logit, target_mask, reduction="none")
            focal.append((alpha * (1 - p_true) ** 2 * bce).mean())
            dice.append(1 - (2 * (p * target_mask).sum() + 1) / (p.sum() + target_mask.sum() + 1))
    nothing = mask_logits.sum() * 0
    pairs = max(len(focal), 1)
    return {
        "class": torch.stack(entropy).sum() / sum(weights),
        "focal": 20.0 * (sum(focal, nothing) / pairs),
        "dice": sum(dice, nothing) / pairs,
    }


def reference_total(out: Reference, labels: Tensor, stride: int) -> dict[str, Tensor]:
    """The terms of every prediction, under the product's names, and their sum."""
    terms: dict[str, Tensor] = {}
    last = len(out.class_logits) - 1
    for index, (class_logits, mask_logits) in enumerate(zip(out.class_logits, out.mask_logits, strict=True)):
        prefix = "" if index == last else f"auxiliary.{index}."
        found = reference_losses(class_logits, mask_logits, labels, stride)
        terms |= {prefix + name: value for name, value in found.items()}
    return terms | {"total": sum(terms.values(), torch.zeros((), dtype=class_logits.dtype))}


def reference_scores(out: Reference, size: tuple[int, int], stride: int) -> Tensor:
    """(B, N, H, W): sum over queries of class probability times mask probability, masks resized first."""
    masks = to_pixels(out.mask_logits[-1], size, stride).sigmoid()
    classes = out.class_logits[-1].softmax(dim=-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, masks)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter, biases and norms too, so that none could be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_norm = ".ln" in name or "norm" in name
        scale = 0.3 if is_norm or parameter.ndim == 1 else 1.5 / math.sqrt(parameter[0].numel())
        if (name.endswith("q.weight") and "multihead" not in name) or name.startswith("backbone.pos"):
            scale = 1.0
        parameter.data = (noise * scale + (1.0 if is_norm and name.endswith("weight") else 0.0)).to(parameter)
