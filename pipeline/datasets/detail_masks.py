"""The annotations of PASCAL-Context: label maps from trainval_merged.json of the PASCAL in Detail challenge.

What is read of the file, an object of arrays:
- `images`: image_id, file_name, height, width, phase (train or val; the split where there are no list files);
- `annos_segmentation`: image_id, category_id, segmentation. A segmentation is COCO's run-length encoding
  ({"size": [height, width], "counts": a string in COCO's compression, or a list}) or a list of polygons
  ([[x0, y0, x1, y1, ...], ...] in pixels from the upper left corner).
`annos_occlusion`, `annos_boundary`, `categories` and `parts` are passed over.

A map starts as 0 (background) and takes the annotations in the file's order, later ones over earlier ones, as the
publisher's tool draws them. A pixel belongs to a polygon where its centre is inside by the even-odd rule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.json_stream import Element, read_elements
from segvit.image_files import MAX_PIXELS, DecodeError

Span = tuple[int, int]  # offset and size in the file, bytes


@dataclass(slots=True)
class DetailImage:
    """Where in the file one image and its annotations are described."""

    phase: str
    spans: list[Span]  # first of the image's own record, then of its annotations
    stamp: str


def index_detail(file: IO[bytes]) -> dict[str, DetailImage]:
    """All images in `file` by their name without suffix; raises ValueError where it is not of this format."""
    records: dict[Any, Element] = {}
    spans: dict[Any, list[Span]] = {}
    sums: dict[Any, Any] = {}
    for element in read_elements(file):
        if element.key not in ("images", "annos_segmentation"):
            continue
        if not isinstance(element.value, dict) or "image_id" not in element.value:
            raise ValueError(f"the element of {element.key} at byte {element.offset} has no image_id")
        image_id = element.value["image_id"]
        if element.key == "images":
            records[image_id] = element
            continue
        # Neighbours are read with one request.
        known = spans.setdefault(image_id, [])
        if known and 0 < element.offset - sum(known[-1]) <= 4:
            known[-1] = (known[-1][0], element.offset + element.size - known[-1][0])
        else:
            known.append((element.offset, element.size))
        text = json.dumps(element.value, sort_keys=True).encode()
        sums.setdefault(image_id, hashlib.sha256()).update(text)
    if not records:
        raise ValueError("it lists no images")
    images = {}
    for image_id, record in records.items():
        name = _as_text(str(record.value.get("file_name", "")))
        digest = sums[image_id].hexdigest() if image_id in sums else "none"
        size = f"{record.value.get('height')}x{record.value.get('width')}"
        images[name.rpartition(".")[0]] = DetailImage(
            phase=str(record.value.get("phase")),
            spans=[(record.offset, record.size), *spans.get(image_id, [])],
            stamp=f"{size}:{digest}",
        )
    return images


def draw_label(parts: Sequence[bytes]) -> NDArray[np.int32]:
    """(H, W) category ids from the texts of an image's spans; raises DecodeError."""
    try:
        image = json.loads(parts[0])
        height, width = int(image["height"]), int(image["width"])
        if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
            raise DecodeError(f"gives the image {height}x{width} pixels (height x width)")
        label = np.zeros((height, width), dtype=np.int32)
        for part in parts[1:]:
            for annotation in json.loads(b"[" + part + b"]"):
                mask = _draw_mask(annotation["segmentation"], height, width)
                label[mask] = int(annotation["category_id"])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"holds an annotation that is not of the format ({error!r})") from error
    return label


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's compressed string: base 32, six bits a sign, each less the one two before it."""
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64:
            raise DecodeError(f"holds the sign {sign!r} in a run-length code")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            if shift > 60:
                raise DecodeError("holds a run-length code without end")
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def draw_runs(counts: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """(H, W) from run lengths down the columns, outside first; raises DecodeError where they do not fill it."""
    runs = np.asarray(counts, dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise DecodeError(f"holds run lengths that do not fill {height}x{width} pixels")
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return mask.reshape(width, height).T


def draw_polygon(points: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """(H, W): the pixels whose centres are inside the closed polygon [x0, y0, x1, y1, ...], by the even-odd rule."""
    corners = np.asarray(points, dtype=np.float64)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
        raise DecodeError("holds a polygon that is not a list of at least three points")
    x0, y0 = corners[0::2], corners[1::2]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    mask = np.zeros((height, width), dtype=bool)
    columns = np.arange(width) + 0.5
    for row in range(max(0, int(y0.min() - 1)), min(height, int(y0.max() + 1))):
        y = row + 0.5
        crosses = (y0 <= y) != (y1 <= y)
        x = np.sort(x0[crosses] + (y - y0[crosses]) * (x1[crosses] - x0[crosses]) / (y1[crosses] - y0[crosses]))
        mask[row] = np.searchsorted(x, columns, side="right") % 2 == 1
    return mask


def _as_text(latin: str) -> str:
    """A string as written, from one that was read a character a byte."""
    try:
        return latin.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return latin


def _draw_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        for polygon in segmentation:
            mask |= draw_polygon(polygon, height, width)
        return mask
    size, counts = tuple(segmentation["size"]), segmentation["counts"]
    if size != (height, width):
        raise DecodeError(f"holds a mask of size {size} for an image of {height}x{width} (height x width)")
    return draw_runs(decode_counts(counts) if isinstance(counts, str) else counts, height, width)
