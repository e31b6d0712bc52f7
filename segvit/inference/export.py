"""A model as one self-contained program, raw images in and label maps out: torch.export and ONNX.

An exported file needs neither this package nor PyTorch. With onnxruntime, images being uint8 RGB of (B, 3, H, W):

    import json, onnxruntime
    session = onnxruntime.InferenceSession("model.onnx")
    labels, mask_logits = session.run(["labels", "mask_logits"], {"images": images})
    class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    print(class_names[labels[0, 0, 0]])
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from segvit.checkpoint import check_metadata
from segvit.inference.predict import evaluating
from segvit.inference.scores import semantic_scores
from segvit.model import SegViT

# B batch, N classes, H W image pixels, h w mask grid

INPUT_NAME = "images"
OUTPUT_NAMES = ("class_logits", "mask_logits", "labels")
METADATA_FILE = "metadata.json"
# The exporter's own: a later one would shut out older runtimes, an earlier one would need a conversion.
OPSET_VERSION = 18
# A protobuf message ends at 2 GB, and torch itself writes no single file above 1.61 GB of weights.
SINGLE_FILE_MAX_BYTES = 1_600_000_000


class RawImageModel(nn.Module):
    """The model from raw images to named outputs: what is exported."""

    def __init__(self, model: SegViT, with_labels: bool) -> None:
        super().__init__()
        self.model = model
        self.with_labels = with_labels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of `export_program` for uint8 RGB images (B, 3, H, W)."""
        output = self.model(self.model.normalize(images))
        values = [output.class_logits, output.mask_logits]
        if self.with_labels:
            values.append(semantic_scores(output, output.image_size).argmax(1))
        return {name: value for name, value in zip(OUTPUT_NAMES, values, strict=False) if value is not None}


def export_program(model: SegViT, size: tuple[int, int], *, with_labels: bool = True) -> ExportedProgram:
    """The model as a `torch.export` program for images of one size, in any number.

    ``program.module()(images)`` runs it, `torch.export.save` writes it. It takes ``images``, uint8 RGB (B, 3, H, W)
    with any B, and normalises them itself, in float32. It gives a dictionary of

    - ``class_logits`` (B, N, N + 1), the last column being "no object"; missing for a linear head;
    - ``mask_logits`` (B, N, h, w), before the sigmoid;
    - ``labels`` (B, H, W) int64, the label maps, if asked for.

    The program shares the model's weights and device: save it before the model is trained on.

    Args:
        model: The bare model, in either mode; its mode is as before afterwards.
        size: (H, W) of the images in pixels; any, not only multiples of the patch size.
        with_labels: Whether label maps are made. They take two float32 maps of (B, N, H, W) of memory; without them
            the masks' grid is the finest.

    Raises:
        TypeError: A wrapper around the model.
        ValueError: A size below one pixel, or weights of another type than float32.
    """
    check_exportable(model, size)
    # A sample of one image would make the batch size a constant.
    images = torch.zeros(2, 3, *size, dtype=torch.uint8, device=model.mean.device)
    with evaluating(model), torch.no_grad():
        # Strict: the other tracer takes the len() of a tensor, the batch size, for a constant.
        return torch.export.export(
            RawImageModel(model, with_labels).eval(),
            (images,),
            dynamic_shapes=({0: Dim("batch", min=1)},),
            strict=True,
        )


def export_onnx(
    model: SegViT,
    path: str | Path,
    size: tuple[int, int],
    metadata: Mapping[str, Any] | None = None,
    *,
    with_labels: bool = True,
) -> None:
    """Write the program of `export_program` as an ONNX file, with the same input and outputs (opset 18).

    The file is self-contained. Only weights above 1.6 GB (a ViT-L has 1.4) lie beside it, in ``PATH.data``, which must
    then travel with it: ONNX ends at 2 GB a file. Both are published by rename once they are complete.

    Args:
        model: See `export_program`.
        path: The file, replaced if it exists; its folder is made if missing.
        size: See `export_program`.
        metadata: JSON-able, as of `load_checkpoint`; by convention with ``class_names`` and ``palette`` (RGB), one
            entry a class. Each entry becomes an ONNX metadata property, its value as JSON.
        with_labels: See `export_program`.

    Raises:
        ModuleNotFoundError: The package's extra ``export`` is not installed.
        TypeError: A wrapper around the model, or metadata that JSON cannot hold.
        ValueError: See `export_program`; or as many class names or colours as there are no classes.
    """
    try:
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
        from onnxscript import optimizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; ONNX export needs: pip install 'segvit-pipeline[export]'") from error
    check_exportable(model, size)
    check_metadata(metadata or {}, model.num_classes)
    properties = {name: json.dumps(value) for name, value in (metadata or {}).items()}
    program = export_program(model, size, with_labels=with_labels)
    names = OUTPUT_NAMES if with_labels else OUTPUT_NAMES[:-1]
    # With gradients, the exporter's passes lay out the result of attention with a mask (BEiT) differently and fail.
    with quiet(optimizer.__name__), torch.no_grad():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET_VERSION,
            input_names=[INPUT_NAME],
            # Only the first, the class logits, can be missing.
            output_names=names[-len(program.graph_signature.user_outputs) :],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert onnx_program is not None
    # Stack traces name files of this machine and differ from run to run.
    ClearMetadataAndDocStringPass()(onnx_program.model)
    onnx_program.model.metadata_props.update(properties)
    weights_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The model names its weights' file, so both must be written under their final names: in a folder of their own.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        onnx_program.save(partial, external_data=weights_bytes > SINGLE_FILE_MAX_BYTES)
        replace_pair(partial, path)


def save_program(
    model: SegViT, path: str | Path, size: tuple[int, int], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write the program of `export_program`, with labels, as `torch.export.load` reads it (by convention ``.pt2``).

    The metadata of `export_onnx` is the extra file ``metadata.json`` in it:

        extra = {"metadata.json": ""}
        program = torch.export.load("model.pt2", extra_files=extra).module()
        class_names = json.loads(extra["metadata.json"])["class_names"]

    Raises:
        TypeError: A wrapper around the model, or metadata that JSON cannot hold.
        ValueError: See `export_onnx`.
    """
    check_exportable(model, size)
    check_metadata(metadata or {}, model.num_classes)
    text = json.dumps(metadata or {})
    program = export_program(model, size)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of the suffix that torch knows, which a partial name beside it would not have.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        torch.export.save(program, partial, extra_files={METADATA_FILE: text})
        os.replace(partial, path)


def check_exportable(model: SegViT, size: tuple[int, int]) -> None:
    """Raise unless `model` is a float32 SegViT and `size` one of images."""
    if not isinstance(model, SegViT):
        raise TypeError(f"export takes the SegViT itself, got {type(model).__name__}; pass the wrapped module")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) of at least 1 pixel, got {size}")
    if others := {str(tensor.dtype) for tensor in model.parameters()} - {"torch.float32"}:
        raise ValueError(f"export needs float32 weights, got {', '.join(sorted(others))}; call model.float() first")


def replace_pair(partial: Path, path: Path) -> None:
    """Move an ONNX file, and the weights beside it if there are any, over an earlier one's."""
    partial_data, data = (file.with_name(f"{file.name}.data") for file in (partial, path))
    if partial_data.exists() or data.exists():
        # A model beside another one's weights would load and be wrong.
        path.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    if partial_data.exists():
        os.replace(partial_data, data)
    os.replace(partial, path)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A logger without warnings."""
    # One line for every stacked projection that the optimizer leaves split, which the runtime folds on loading.
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
