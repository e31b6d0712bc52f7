"""The annotations of PASCAL-Context: label maps from trainval_merged.json of the PASCAL in Detail challenge.

What is read of the file, an object of arrays:
- `images`: image_id, file_name, height, width, phase (train or val; the split where there are no list files);
- `annos_segmentation`: image_id, category_id, segmentation. A segmentation is COCO's run-length encoding
  ({"size": [height, width], "counts": a string in COCO's compression, or a list}) or a list of polygons
  ([[x0, y0, x1, y1, ...], ...] in pixels from the upper left corner).
`annos_occlusion`, `annos_boundary`, `categories` and `parts` are passed over.

A map starts as 0 (background) and takes the annotations in the file's order, later ones over earlier ones, as the
publisher's tool draws them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.json_stream import Element, as_text, read_elements
from pipeline.datasets.rasterise import Canvas, checked_size, draw_segmentation
from pipeline.storage import parse_json
from segvit.image_files import DecodeError

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
        if not isinstance(element.value, dict) or not isinstance(element.value.get("image_id"), int | str):
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
        name = as_text(str(record.value.get("file_name", "")))
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
        image = parse_json(parts[0])
        height, width = checked_size(image["height"], image["width"])
        canvas = Canvas(np.zeros((height, width), dtype=np.int32))
        for part in parts[1:]:
            for annotation in parse_json(b"[" + part + b"]"):
                patches = draw_segmentation(annotation["segmentation"], height, width)
                canvas.paint(patches, int(annotation["category_id"]))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"holds an annotation that is not of the format ({error!r})") from error
    return canvas.label
