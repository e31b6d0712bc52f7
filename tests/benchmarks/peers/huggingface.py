"""Hugging Face transformers' EoMT, trained with its Trainer.

It ships the model, its losses and its image processor; augmentation and the annealing of the attention masks, which
the EoMT paper trains with, are the user's, and so are here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from tests.benchmarks.peers.common import MEAN, NUM_CLASSES, STD, UNLABELLED, Task, Trained, read_features, run

IGNORED = 255
# Of EoMT for semantic segmentation with a small backbone; the processor's and the losses' are the library's.
NUM_QUERIES, NUM_BLOCKS = 100, 3
LEARNING_RATE, WEIGHT_DECAY, ANNEALING_POWER = 1e-4, 0.05, 0.9
WIDTH, DEPTH, HEADS, PATCH = 384, 12, 6, 14


def fit(task: Task) -> Trained:
    """Train with the Trainer's defaults, but for EoMT's rate and weight decay."""
    from transformers import Trainer, TrainingArguments  # type: ignore[import-not-found]

    model = build_model(task)
    similarity = read_features(task).similarity(lambda images: backbone_tokens(model.eval(), images))
    arguments = TrainingArguments(
        output_dir=str(Path(task.folder) / "trainer"),
        max_steps=task.steps,
        per_device_train_batch_size=task.batch,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        bf16=task.precision == "bf16",
        use_cpu=task.device == "cpu",
        dataloader_num_workers=task.loader_workers,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Crops(task),
        data_collator=collate,
        callbacks=[annealing()],
    ).train()
    return Trained(predictor(model.eval(), task), similarity, ("transformers",))


def build_model(task: Task) -> Any:
    """EoMT of the crop's size on the weights."""
    from transformers import EomtConfig, EomtForUniversalSegmentation

    config = EomtConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=task.crop,
        num_register_tokens=0,
        num_queries=NUM_QUERIES,
        num_blocks=NUM_BLOCKS,
        num_labels=NUM_CLASSES,
    )
    torch.manual_seed(0)
    model = EomtForUniversalSegmentation(config)
    backbone = renamed(load_file(task.weights), task.crop // PATCH)
    missing, unexpected = model.load_state_dict(backbone, strict=False)
    heads = ("query.", "upscale_block.", "mask_head.", "class_predictor.", "criterion.", "attn_mask_probs")
    strange = [name for name in missing if not name.startswith(heads) and name != "embeddings.register_tokens"]
    if strange or unexpected:
        raise ValueError(f"the weights do not fit EoMT: missing {strange}, unexpected {unexpected}")
    return model.to(task.device)


def renamed(state: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """timm's names and fused attention as EoMT has them, positions (N, C) resized to a square grid."""
    state = {name: tensor.float() for name, tensor in state.items()}
    positions = state.pop("pos_embed")
    found = {
        "embeddings.cls_token": state.pop("cls_token") + positions[:, :1],
        "embeddings.position_embeddings.weight": resized_positions(positions[0, 1:], grid),
    }
    for name, tensor in state.items():
        new = name.replace("blocks.", "layers.").replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        new = new.replace("attn.proj", "attention.out_proj").replace("ls1.gamma", "layer_scale1.lambda1")
        new = new.replace("ls2.gamma", "layer_scale2.lambda1")
        if new.startswith("norm."):
            new = f"layer{new}"
        if "attn.qkv" not in new:
            found[new] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            found[new.replace("attn.qkv", f"attention.{part}_proj")] = rows
    return found


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """A square position embedding (N, C) at grid * grid patches."""
    side = round(len(positions) ** 0.5)
    cells = positions.T.reshape(1, -1, side, side)
    cells = F.interpolate(cells, size=(grid, grid), mode="bicubic", antialias=True)
    return cells.flatten(2)[0].T.contiguous()


def backbone_tokens(model: Any, images: Tensor) -> Tensor:
    """Patch tokens (B, N, C) of the network without its queries."""
    tokens = model.embeddings(images.to(model.device))
    for layer in model.layers:
        tokens = layer(tokens)
    last: Tensor = model.layernorm(tokens)[:, 1:].cpu()
    return last


class Crops(Dataset[dict[str, Tensor]]):
    """CamVid's train images, augmented as EoMT is trained: size, crop, flip, colour."""

    def __init__(self, task: Task) -> None:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        self.files = sorted((Path(task.data) / "train").glob("*.png"))
        self.masks = Path(task.data) / "trainannot"
        self.tv_tensors = tv_tensors
        height = Image.open(self.files[0]).height
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
        self.augment = v2.Compose(
            [
                v2.RandomResize(height // 2, height * 2),
                v2.RandomCrop(task.crop, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(32 / 255, 0.5, 0.5, 18 / 360)]),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self.files[index]
        image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        labels = torch.from_numpy(np.array(Image.open(self.masks / file.name)))
        labels[labels == UNLABELLED] = IGNORED
        pixels, mask = self.augment(self.tv_tensors.Image(image), self.tv_tensors.Mask(labels))
        present = mask.unique()
        present = present[present != IGNORED].long()
        return {
            "pixel_values": pixels,
            "mask_labels": (mask[None] == present[:, None, None]).float(),
            "class_labels": present,
        }


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Masks stay a list: images have different numbers of classes."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "mask_labels": [sample["mask_labels"] for sample in samples],
        "class_labels": [sample["class_labels"] for sample in samples],
    }


def annealed(step: int, steps: int) -> list[float]:
    """The share of queries whose attention is masked, of each block, at a step: one block after the other ends at 0.

    Phases of equal length, a first without annealing and a last without masks, as EoMT is trained.
    """
    phase = steps / (NUM_BLOCKS + 2)
    progress = [(step - phase * (block + 1)) / phase for block in range(NUM_BLOCKS)]
    return [(1 - min(max(part, 0.0), 1.0)) ** ANNEALING_POWER for part in progress]


def annealing() -> Any:
    """The Trainer's callback that anneals the attention masks."""
    from transformers import TrainerCallback

    class Annealing(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_more: Any) -> None:
            del args, control
            model.attn_mask_probs.copy_(torch.tensor(annealed(state.global_step, state.max_steps)))

    return Annealing()


def predictor(model: Any, task: Task) -> Any:
    """Square windows over the image's longer side, as its processor makes them of semantic segmentation."""
    from transformers import EomtImageProcessor

    size = {"shortest_edge": task.crop, "longest_edge": None}
    processor = EomtImageProcessor(do_split_image=True, size=size)

    def predict(image: NDArray[np.uint8]) -> NDArray[np.int64]:
        inputs = processor(images=image, return_tensors="pt").to(task.device)
        outputs = model(**inputs)
        target = [(image.shape[0], image.shape[1])]
        [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=target)
        found: NDArray[np.int64] = labels.cpu().numpy()
        return found

    return predict


if __name__ == "__main__":
    run(fit)
