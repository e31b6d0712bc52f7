"""The embedded data set: scenes of real handwritten digits (scikit-learn's 1,797 scans) on textured ground.

The scans, not the scenes, are split into train and val, so no handwriting seen in training is scored. A
scene depends on (settings, seed, split, index) alone, so any task can build any scene. Class ids 0-9 are the
digits, 10 is the background. H = W = image_size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import DigitsConfig
from pipeline.datasets.raw import Palette, RawPair, RawSample, digest_of
from pipeline.errors import UserError
from segvit.image_files import encode_png

BACKGROUND = 10
VAL_FRACTION = 0.2
# Raise it when scenes change for the same settings: cached shards are then made anew.
GENERATOR_VERSION = 1

Floats = NDArray[np.float32]
SPLITS = ("train", "val")


class Scans(NamedTuple):
    """Handwritten digits, 8x8, ink from 0 to 1."""

    ink: Floats  # (n, 8, 8)
    digits: NDArray[np.int64]  # (n,)
    numbers: NDArray[np.int64]  # (n,) position among the 1,797


class Digits:
    """Composed scenes; `seed` chooses both the split of the scans and the scenes."""

    name = "digits"
    class_names: tuple[str, ...] = (*(str(digit) for digit in range(10)), "background")
    palette: Palette = (
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
        (70, 240, 240),
        (240, 50, 230),
        (210, 245, 60),
        (250, 190, 212),
        (64, 64, 64),
    )

    def __init__(self, config: DigitsConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def splits(self) -> tuple[str, ...]:
        """Train and val."""
        return SPLITS

    def samples(self, split: str) -> Sequence[RawSample]:
        """One a scene."""
        count = {"train": self.config.num_train, "val": self.config.num_val}[split]
        settings = digest_of(self._identity())
        uris = (f"digits/{split}/{index}" for index in range(count))
        return [RawSample(f"{split}-{index:06d}", uri, uri, settings) for index, uri in enumerate(uris)]

    def read(self, sample: RawSample) -> RawPair:
        """Compose the scene."""
        _, split, index = sample.image.split("/")
        image, label = self.scene(split, int(index))
        return RawPair(encode_png(image), label)

    def source_digest(self) -> str:
        """sha256 over the settings, the seed and the generator's version."""
        return digest_of([*self._identity(), self.config.num_train, self.config.num_val])

    def scene(self, split: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Scene `index` of `split`: image (H, W, 3) and class ids (H, W)."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        scans = split_scans(split, self.seed)
        size = self.config.image_size
        ground_level, ink_level = _draw_contrast(rng)
        image = _draw_ground(rng, size, ground_level)
        label = np.full((size, size), BACKGROUND, dtype=np.uint8)
        occupied = np.zeros((size, size), dtype=bool)
        for _ in range(int(rng.integers(1, self.config.max_digits + 1))):
            scan = int(rng.integers(len(scans.digits)))
            placed = self._place(rng, scans.ink[scan], occupied)
            if placed is None:
                continue
            ink, window = placed
            opacity = _smooth_step(ink, self.config.ink_threshold)[..., None]
            image[window] = image[window] * (1 - opacity) + _draw_colour(rng, ink_level) * opacity
            covered = ink > self.config.ink_threshold
            label[window][covered] = scans.digits[scan]
            occupied[window] |= covered
        grain = rng.normal(0.0, rng.uniform(1.0, 5.0), image.shape).astype(np.float32)
        return np.clip(image + grain, 0, 255).round().astype(np.uint8), label

    def _identity(self) -> list[Any]:
        """What a scene depends on besides its split and index."""
        settings = self.config.model_dump(mode="json", exclude={"num_train", "num_val"})
        return [self.name, GENERATOR_VERSION, self.seed, settings]

    def _place(
        self, rng: np.random.Generator, scan: Floats, occupied: NDArray[np.bool_]
    ) -> tuple[Floats, tuple[slice, slice]] | None:
        """Ink of `scan` and its window, at most 3 % of it on earlier digits; None when no try finds room.

        The first size is drawn from the whole of `digit_size`; the longer it seeks room, the smaller it gets.
        """
        (low, high), limit = self.config.digit_size, occupied.shape[0]
        for share in (1.0, 0.5, 0.25, 0.0):
            ink = _draw_ink(scan, rng.uniform(low, low + (high - low) * share), limit)
            covered = ink > self.config.ink_threshold
            height, width = ink.shape
            for _ in range(20):
                top = int(rng.integers(limit - height + 1))
                left = int(rng.integers(limit - width + 1))
                window = (slice(top, top + height), slice(left, left + width))
                if np.count_nonzero(occupied[window] & covered) <= 0.03 * np.count_nonzero(covered):
                    return ink, window
        return None


@functools.cache
def load_scans() -> Scans:
    """All scans, as scikit-learn ships them; raises UserError when it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("dataset digits needs scikit-learn; pip install scikit-learn") from error
    bunch = load_digits()
    return Scans(
        ink=(bunch.images / 16.0).astype(np.float32),
        digits=bunch.target.astype(np.int64),
        numbers=np.arange(len(bunch.target)),
    )


@functools.lru_cache(maxsize=8)
def split_scans(split: str, seed: int) -> Scans:
    """The scans of `split`: a seeded fifth of each digit's scans is val, the rest train."""
    scans = load_scans()
    rng = np.random.default_rng([seed, len(SPLITS)])
    chosen = []
    for digit in range(10):
        numbers = rng.permutation(scans.numbers[scans.digits == digit])
        num_val = round(len(numbers) * VAL_FRACTION)
        chosen.append(numbers[:num_val] if split == "val" else numbers[num_val:])
    numbers = np.sort(np.concatenate(chosen))
    return Scans(scans.ink[numbers], scans.digits[numbers], numbers)


def _draw_contrast(rng: np.random.Generator) -> tuple[float, float]:
    """Brightness of ground and ink, 80 to 180 levels apart; dark on light as often as light on dark."""
    contrast = rng.uniform(80.0, 180.0)
    darker = rng.uniform(15.0, 240.0 - contrast)
    lighter = darker + contrast
    return (lighter, darker) if rng.random() < 0.5 else (darker, lighter)


def _draw_colour(rng: np.random.Generator, level: float) -> Floats:
    """An RGB colour around brightness `level`."""
    tint = rng.uniform(-40.0, 40.0, 3)
    colour: Floats = np.clip(level + tint - tint.mean(), 0, 255).astype(np.float32)
    return colour


def _draw_ground(rng: np.random.Generator, size: int, level: float) -> Floats:
    """(H, W, 3): a base colour, changed by one or two of gradient, stripes and smooth noise."""
    ground = np.broadcast_to(_draw_colour(rng, level), (size, size, 3)).astype(np.float32)
    textures = [_gradient, _stripes, _smooth_noise]
    for kind in rng.choice(len(textures), size=int(rng.integers(1, 3)), replace=False):
        # Two textures together change brightness by half of the smallest contrast at most: ink stands out.
        brightness = rng.choice([-1.0, 1.0]) * rng.uniform(5.0, 20.0)
        change = _draw_colour(rng, 128.0 + brightness) - np.float32(128.0)
        ground = ground + textures[kind](rng, size)[..., None] * change
    return ground


def _coordinates(rng: np.random.Generator, size: int) -> Floats:
    """(H, W) positions along a random direction, -0.5 to 0.5 over the width."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size) - np.float32(0.5)
    along: Floats = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    return along


def _gradient(rng: np.random.Generator, size: int) -> Floats:
    gradient: Floats = _coordinates(rng, size) * np.float32(np.sqrt(2.0))
    return gradient


def _stripes(rng: np.random.Generator, size: int) -> Floats:
    cycles, phase = rng.uniform(3.0, 16.0), rng.uniform(0.0, 2.0 * np.pi)
    waves = np.sin(2.0 * np.pi * cycles * _coordinates(rng, size) + phase)
    stripes: Floats = np.clip(waves * rng.uniform(1.0, 4.0), -1.0, 1.0).astype(np.float32)
    return stripes


def _smooth_noise(rng: np.random.Generator, size: int) -> Floats:
    cells = int(rng.integers(3, 24))
    noise: Floats = _enlarge(rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32), size).clip(-1.0, 1.0)
    return noise


def _enlarge(values: Floats, size: int) -> Floats:
    enlarged = Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(enlarged, dtype=np.float32)


def _draw_ink(scan: Floats, side: float, limit: int) -> Floats:
    """The 8x8 `scan` enlarged smoothly to `side` pixels and cut to its ink, at most `limit` pixels a side."""
    # A ring of blank paper, so that strokes touching the scan's edge end smoothly.
    ink = np.clip(_enlarge(np.pad(scan, 1), round(side * 10 / 8)), 0.0, 1.0)
    rows, columns = np.nonzero(ink.max(axis=1) > 0.1)[0], np.nonzero(ink.max(axis=0) > 0.1)[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:limit, :limit]


def _smooth_step(ink: Floats, threshold: float) -> Floats:
    """Opacity of the ink: half at `threshold`, so that the label's edge is the one the eye sees."""
    ramp = np.clip((ink - threshold) / 0.4 + 0.5, 0.0, 1.0)
    opacity: Floats = ramp * ramp * (3.0 - 2.0 * ramp)
    return opacity
