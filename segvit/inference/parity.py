"""Whether an exported file computes what its model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segvit.inference.export import INPUT_NAME, RawImageModel
from segvit.inference.predict import evaluating
from segvit.model import SegViT

# Sums in float32 come in another order: it shows beside large logits, and in labels where two scores are near equal.
MAX_RELATIVE_DIFFERENCE = 1e-3
MIN_EQUAL_LABELS = 0.999

RunProgram = Callable[[Tensor], Mapping[str, Tensor]]  # uint8 images (B, 3, H, W) to the outputs of `export_program`


class Parity(NamedTuple):
    """How far two programs' outputs are apart on the same image."""

    max_difference: float
    """Of all class and mask logits."""
    max_logit: float
    """The largest of the model's own, without sign: differences are to be seen beside it."""
    equal_labels: float
    """Share of pixels, 0 to 1."""

    @property
    def holds(self) -> bool:
        """Whether the difference is that of rounding."""
        limit = MAX_RELATIVE_DIFFERENCE * max(1.0, self.max_logit)
        return self.max_difference <= limit and self.equal_labels >= MIN_EQUAL_LABELS


def measure_parity(model: SegViT, run: RunProgram, size: tuple[int, int], *, seed: int = 0) -> Parity:
    """Compare a program with the model on one random image of (H, W) pixels.

    Raises:
        ValueError: The program gives other outputs, or outputs of other shapes.
    """
    # Coarse blobs, not noise, so that patches differ.
    coarse = torch.randint(0, 256, (1, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    images = nn.functional.interpolate(coarse, size=size, mode="nearest")
    with evaluating(model), torch.no_grad():
        expected = RawImageModel(model, with_labels=True).eval()(images.to(model.mean.device))
        found = run(images)
    shapes = [{name: tuple(value.shape) for name, value in outputs.items()} for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the program gives {shapes[1]}, the model {shapes[0]}")
    logits = [(found[name].cpu(), value.cpu()) for name, value in expected.items() if name != "labels"]
    return Parity(
        max(float((one - other).abs().nan_to_num(nan=torch.inf).max()) for one, other in logits),
        max(float(other.abs().max()) for _, other in logits),
        float((found["labels"].cpu() == expected["labels"].cpu()).double().mean()),
    )


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime; raises ModuleNotFoundError naming the extra that has it."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; checking an ONNX file needs: pip install 'segvit-pipeline[export]'"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]


def onnx_runner(path: str | Path) -> RunProgram:
    """The ONNX file at `path`, run on the CPU; raises as `import_onnxruntime`."""
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {INPUT_NAME: images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def program_runner(path: str | Path) -> RunProgram:
    """The `torch.export` file at `path`, on the CPU."""
    return torch.export.load(path).module()
