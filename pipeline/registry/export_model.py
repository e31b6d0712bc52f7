"""A registered model, or a checkpoint, as one file for other runtimes, published only if it computes the same."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import segvit
from pipeline import storage
from pipeline.causes import one_line
from pipeline.errors import UserError
from pipeline.records import Record
from pipeline.storage.names import WEIGHTS_FILE
from segvit.inference.export import replace_pair
from segvit.inference.parity import import_onnxruntime, measure_parity, onnx_runner, program_runner

ExportFormat = Literal["onnx", "torch"]
SUFFIXES: Mapping[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2"}


class ExportedModel(Record):
    """What was written, and how it compares with the model on a random image of `image_size` (height, width)."""

    files: tuple[str, ...]
    format: str
    image_size: tuple[int, int]
    max_difference: float
    max_logit: float
    equal_labels: float
    metadata: dict[str, Any]


def export_model(
    checkpoint_folder: Path,
    model_version: str | None,
    format: ExportFormat,
    path: Path,
    *,
    image_size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> ExportedModel:
    """Export a checkpoint to `path` for images of one size, by default that of its training; checked, then renamed.

    `model_version` (`models:/NAME/3`) goes into the file's metadata, beside the sha256 of the weights, class names,
    palette, image size and normalisation. Raises UserError for a file that exists, a missing extra, and an export
    that does not compute what the model does; then no file is left.
    """
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another --out")
    try:
        model, own = segvit.load_checkpoint(checkpoint_folder)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    size = image_size or model.config.image_size
    metadata = {
        **own,
        "image_size": list(size),
        # The program does this itself; it takes images as they are.
        "normalization": {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(), "scale": 1 / 255},
        "model_version": model_version,
        "checkpoint_digest": storage.file_digest(str(checkpoint_folder / WEIGHTS_FILE)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            if format == "onnx":
                # Before the export, which takes minutes.
                import_onnxruntime()
                segvit.export_onnx(model, partial, size, metadata)
                run = onnx_runner(partial)
            else:
                segvit.save_program(model, partial, size, metadata)
                run = program_runner(partial)
            parity = measure_parity(model, run, size)
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(f"the model cannot be exported: {error}") from error
        except OSError as error:
            raise UserError(f"{path} cannot be written: {one_line(error)}") from error
        if not parity.holds:
            raise UserError(
                f"the exported file computes something else: logits up to {parity.max_logit:.3g} differ by up to "
                f"{parity.max_difference:.3g}, {parity.equal_labels:.3%} of labels are equal; no file is left, "
                f"try --format {'torch' if format == 'onnx' else 'onnx'} or other versions of torch and onnxscript"
            )
        files = [str(path.with_name(file.name)) for file in sorted(Path(scratch).iterdir())]
        replace_pair(partial, path)
    return ExportedModel(
        files=tuple(files),
        format=format,
        image_size=size,
        max_difference=parity.max_difference,
        max_logit=parity.max_logit,
        equal_labels=parity.equal_labels,
        metadata=metadata,
    )
