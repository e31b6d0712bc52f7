"""What all sides of the comparison share: the task, the clock, the measuring. Runs in the peers' environments, too.

    python -m tests.benchmarks.peers.NAME TASK.json

Needs NumPy, Pillow and PyTorch alone. H W pixels, N patches, C channels.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

NUM_CLASSES = 11
UNLABELLED = 11  # in CamVid's label maps
# LightlyTrain draws pictures of its first three batches.
WARMUP_STEPS = 3
WARMUP_IMAGES = 2
# Two ways to resize the position embedding differ in the third decimal; other weights give about 0.
MIN_SIMILARITY = 0.98
LABEL_MAPS, DERIVED_LABEL_MAPS = "label_maps", "derived_label_maps"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process's work; paths are absolute.

    Attributes:
        folder: the process's own; it leaves its result and label maps there.
        data: CamVid in the SegNet layout.
        weights: safetensors, timm's names of vit_small_patch14_dinov2.
        features: crops and what the weights make of them, see `Features`.
        config: the experiment whose settings ours trains with.
        shard_set: JSON of the shard set that ours reads.
        crop: side of the square crops in pixels.
        steps: optimizer steps.
        num_timed: val images whose prediction is timed.
        predict: whether to leave a label map of each val image, by the trained model and by what was made of it.
    """

    folder: str
    data: str
    weights: str
    features: str
    config: str
    shard_set: str
    crop: int
    batch: int
    threads: int
    loader_workers: int
    device: str
    precision: str
    steps: int
    num_timed: int
    predict: bool

    def write(self, file: Path) -> None:
        """Leave the task for a process to read."""
        file.write_text(json.dumps(asdict(self)))


Predict = Callable[[NDArray[np.uint8]], NDArray[np.integer[Any]]]
"""The label map (H, W) of an image (H, W, 3) uint8."""


class Derived(NamedTuple):
    """A model that was made of the trained one in so many seconds."""

    predict: Predict
    seconds: float


class Trained(NamedTuple):
    """A trained model, and what was made of it."""

    predict: Predict
    similarity: float
    packages: tuple[str, ...]
    derived: Derived | None = None


class Features(NamedTuple):
    """Crops (B, H, W, 3) uint8, and timm's normalised last patch tokens of them (B, N, C) float32."""

    crops: NDArray[np.uint8]
    tokens: NDArray[np.float32]

    def similarity(self, tokens_of: Callable[[Tensor], Tensor]) -> float:
        """Mean cosine similarity to the patch tokens (B, N, C) that a backbone makes of normalised (B, 3, H, W)."""
        images = torch.from_numpy(self.crops).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            tokens = tokens_of((images - mean) / std).float()
        return float(torch.cosine_similarity(tokens, torch.from_numpy(self.tokens), dim=-1).mean())


def read_features(task: Task) -> Features:
    """The reference that a side's backbone is compared with."""
    with np.load(task.features, allow_pickle=False) as arrays:
        return Features(arrays["crops"], arrays["tokens"])


def val_images(data: str) -> list[Path]:
    """CamVid's val images, by name."""
    return sorted((Path(data) / "val").glob("*.png"))


def read_image(file: Path) -> NDArray[np.uint8]:
    """RGB (H, W, 3)."""
    return np.asarray(Image.open(file).convert("RGB"))


def square_crop(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The middle of an image (H, W, 3)."""
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + side, left : left + side])


class StepClock:
    """When optimizer steps ended, and the memory at the last of them; the first optimizer that steps is the one.

    The hook is PyTorch's own, so all sides' steps are timed alike, loader and logging included.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.peak_bytes = 0
        self._optimizer: torch.optim.Optimizer | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the time of every step within."""
        handle = register_optimizer_step_post_hook(self._stepped)
        try:
            yield
        finally:
            handle.remove()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_arguments: Any) -> None:
        self._optimizer = self._optimizer or optimizer
        if optimizer is self._optimizer:
            wait_for(self.device)
            self.ends.append(time.perf_counter())
            self.cpu_ends.append(time.process_time())
            self.peak_bytes = peak_bytes(self.device)

    def seconds(self) -> list[float]:
        """Of each step after the warm-up, from the end of the one before it."""
        return [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)][WARMUP_STEPS - 1 :]

    def cores(self) -> float:
        """How many the process had in the steps after the warm-up; fewer than its threads where others ran beside."""
        first = WARMUP_STEPS - 1
        return (self.cpu_ends[-1] - self.cpu_ends[first]) / (self.ends[-1] - self.ends[first])

    def train_seconds(self) -> float:
        """Of all steps; the first one, which has no begin, counts as the mean of the others."""
        return (self.ends[-1] - self.ends[0]) * len(self.ends) / (len(self.ends) - 1)


def wait_for(device: str) -> None:
    """Wait for queued GPU work."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """The most memory this process has held: resident, on a GPU the allocator's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def autocast(task: Task) -> torch.autocast:
    """The precision that all sides predict in."""
    return torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16")


def prediction_seconds(predict: Predict, images: Sequence[NDArray[np.uint8]], task: Task) -> list[float]:
    """Of each image, one at a time, after a warm-up."""
    seconds = []
    for image in [*[images[0]] * WARMUP_IMAGES, *images]:
        begin = time.perf_counter()
        with autocast(task), torch.no_grad():
            predict(image)
        wait_for(task.device)
        seconds.append(time.perf_counter() - begin)
    return seconds[WARMUP_IMAGES:]


def run(fit: Callable[[Task], Trained]) -> None:
    """Do the task that the command line names, and leave `result.json` in its folder."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    folder = Path(task.folder)
    torch.set_num_threads(task.threads)
    clock = StepClock(task.device)
    with clock.listening():
        trained = fit(task)
    files = val_images(task.data)
    images = [read_image(file) for file in files[: task.num_timed]]
    crops = [square_crop(image, task.crop) for image in images]
    result = {
        "packages": {name: version(name) for name in ("torch", *trained.packages)},
        "similarity": trained.similarity,
        "steps": len(clock.ends),
        "step_seconds": clock.seconds(),
        "cores": clock.cores(),
        "train_seconds": clock.train_seconds(),
        "peak_bytes": clock.peak_bytes,
        "image_seconds": prediction_seconds(trained.predict, images, task),
        "crop_seconds": prediction_seconds(trained.predict, crops, task),
    }
    if trained.derived is not None:
        result["derived"] = {
            "train_seconds": clock.train_seconds() + trained.derived.seconds,
            "image_seconds": prediction_seconds(trained.derived.predict, images, task),
            "crop_seconds": prediction_seconds(trained.derived.predict, crops, task),
        }
    if task.predict:
        write_label_maps(trained.predict, files, folder / LABEL_MAPS, task)
    if task.predict and trained.derived is not None:
        write_label_maps(trained.derived.predict, files, folder / DERIVED_LABEL_MAPS, task)
    (folder / "result.json").write_text(json.dumps(result))


def write_label_maps(predict: Predict, files: Sequence[Path], folder: Path, task: Task) -> None:
    """A PNG of class ids for each image."""
    folder.mkdir()
    for file in files:
        with autocast(task), torch.no_grad():
            labels = predict(read_image(file))
        Image.fromarray(labels.astype(np.uint8)).save(folder / file.name)
