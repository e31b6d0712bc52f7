"""LightlyTrain's EoMT: `train_semantic_segmentation` on its defaults, weights from its own cache of downloads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks.peers.common import NUM_CLASSES, UNLABELLED, Task, Trained, read_features, run, val_images

# Its EoMT knows DINOv2 with registers alone; these weights have none, and its backbones know both.
BACKBONE = "dinov2/vits14-noreg"
MODEL = f"{BACKBONE}-eomt"
CACHED_FILE = "dinov2_vits14_pretrain.pth"
# Its warm-up of (500, 1000) steps belongs to 40,000: a short run gets the same share.
DEFAULT_STEPS, DEFAULT_WARMUP = 40_000, (500, 1000)


def fit(task: Task) -> Trained:
    """Train on its defaults but for what the comparison sets alike for all."""
    fill_cache(task)
    import lightly_train  # type: ignore[import-not-found]

    register_model()
    out = Path(task.folder) / "lightly"
    lightly_train.train_semantic_segmentation(
        out=out,
        data=data_of(task),
        model=MODEL,
        steps=task.steps,
        batch_size=task.batch,
        # Otherwise it adds up batches to its own batch size of 16.
        gradient_accumulation_steps=1,
        num_workers=task.loader_workers,
        accelerator=task.device,
        devices=1,
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        model_args={"lr_warmup_steps": warmup_steps(task.steps)},
        transform_args={"image_size": (task.crop, task.crop)},
    )
    model = lightly_train.load_model(out / "exported_models" / "exported_last.pt", device=task.device)

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = model.predict(torch.from_numpy(image).permute(2, 0, 1)).cpu().numpy()
        return labels

    return Trained(predict, read_features(task).similarity(backbone_tokens), ("lightly-train",))


def warmup_steps(steps: int) -> tuple[int, int]:
    """Of the new parts and of the backbone, in the share of the steps that its defaults have."""
    new, backbone = (round(default * steps / DEFAULT_STEPS) for default in DEFAULT_WARMUP)
    return new, backbone


def fill_cache(task: Task) -> None:
    """Put the weights, in the published file's form, where it looks before it downloads; to be called before import."""
    cache = Path(task.folder) / "cache"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(cache)
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    state = {name: tensor.float() for name, tensor in load_file(task.weights).items()}
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    (cache / "models").mkdir(parents=True)
    torch.save(state, cache / "models" / CACHED_FILE)


def register_model() -> None:
    """Its EoMT on its backbone without registers, by its own registry."""
    from lightly_train._task_models.dinov2_eomt_semantic_segmentation import (  # type: ignore[import-not-found]
        config,
    )

    backbone: Any = type(
        "ViTSmallWithoutRegisters",
        (config.EoMTSemanticSegmentationConfig,),
        {
            "__annotations__": {"backbone_name": str},
            "backbone_name": BACKBONE,
        },
    )
    config.DINOV2_EOMT_SEMANTIC_SEGMENTATION_MODEL_REGISTRY.register(MODEL)(backbone)


def data_of(task: Task) -> dict[str, Any]:
    """CamVid; as it validates after the last step in any case, on one image."""
    root, val = Path(task.data), Path(task.folder) / "one_val_image"
    for folder in ("images", "masks"):
        (val / folder).mkdir(parents=True)
    first = val_images(task.data)[0]
    shutil.copy(first, val / "images")
    shutil.copy(root / "valannot" / first.name, val / "masks")
    return {
        "train": {"images": str(root / "train"), "masks": str(root / "trainannot")},
        "val": {"images": str(val / "images"), "masks": str(val / "masks")},
        "classes": {index: f"class {index}" for index in range(NUM_CLASSES)} | {UNLABELLED: "unlabelled"},
        "ignore_classes": [UNLABELLED],
    }


def backbone_tokens(images: Tensor) -> Tensor:
    """Of the backbone as its EoMT gets it."""
    from lightly_train._models.dinov2_vit.dinov2_vit_package import (  # type: ignore[import-not-found]
        DINOV2_VIT_PACKAGE,
    )

    backbone = DINOV2_VIT_PACKAGE.get_model(BACKBONE.split("/")[1]).eval()
    tokens: Tensor = backbone.forward_features(images)["x_norm_patchtokens"]
    return tokens


if __name__ == "__main__":
    run(fit)
