"""Images per second of one core: the training loader, bare decoding, torchvision v2 over loose files, webdataset.

    SEGVIT_DATA=... python tests/benchmarks/bench_loader.py [--images 192] [--rounds 3] [--crop 512] [--json FILE]

The data: JPEGs of 683 x 512 and label PNGs in ADE20K's tree, made of mirrored, cut and enlarged parts of the three
real images in SEGVIT_DATA/ade20k_sample. All loaders do the published augmentation (scale 0.5-2.0, crop with at most
75 % of one class in 10 tries, flip, photometric distortion, padding) and give batches of 16 as uint8 images and int64
labels. Every measurement is a process of its own on one CPU and one thread, loading in that process; the measured
ones take turns round by round. The figure is images per second of CPU time, the best round's: waiting for other
processes of the machine does not count. "Bare decode" of a sample is image and label, with the fastest of the
decoders installed (simplejpeg and imagecodecs where they are); the image's part is given besides.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

IMAGE_SIZE = (512, 683)
BATCH = 16
DECODERS = ("pillow", "torchvision", "opencv", "simplejpeg", "imagecodecs")
LOADERS = ("ours", "torchvision_tensor", "torchvision_pil", "webdataset_tensor", "webdataset_pil")
TARGET_OF_LIMIT, TARGET_OF_TORCHVISION = 0.5, 1.5


def make_data(folder: Path, num_images: int) -> None:
    """An ADE20K tree of `num_images` training samples at `folder`/raw, and its shard set at `folder`/shards."""
    from pipeline.config import DataConfig
    from pipeline.shards.prepare import prepare_shards

    source = Path(os.environ["SEGVIT_DATA"]) / "ade20k_sample"
    originals = [
        (Image.open(image).convert("RGB"), Image.open(source / "annotations/validation" / f"{image.stem}.png"))
        for image in sorted((source / "images/validation").glob("*.jpg"))
    ]
    rng = np.random.default_rng(0)
    root = folder / "raw" / "ADEChallengeData2016"
    for split, count in (("training", num_images), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image: Image.Image
            label: Image.Image
            image, label = originals[number % len(originals)]
            part = rng.uniform(0.5, 1.0)
            width, height = image.width * part, image.height * part
            left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
            box = (left, top, left + width, top + height)
            size = IMAGE_SIZE[::-1]
            image = image.resize(size, Image.Resampling.LANCZOS, box)
            label = label.resize(size, Image.Resampling.NEAREST, box)
            if rng.random() < 0.5:
                image, label = (each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in (image, label))
            name = f"ADE_{split}_{number:08d}"
            image.save(root / "images" / split / f"{name}.jpg", quality=int(rng.integers(90, 96)))
            label.save(root / "annotations" / split / f"{name}.png")
    config = DataConfig(dataset="ade20k", root=str(folder / "raw"), samples_per_shard=64)
    prepare_shards(config, str(folder / "shards"), progress=lambda _: None)


def decoders() -> dict[str, tuple[Callable[[bytes], Any], Callable[[bytes], Any]]]:
    """By name: a JPEG decoder to RGB and a PNG decoder to ids; only what is installed."""
    import cv2
    import torch
    import torchvision.io as tvio

    cv2.setNumThreads(0)
    numbers = np.dtype(np.uint8)

    def pillow(data: bytes) -> Any:
        return np.asarray(Image.open(io.BytesIO(data)))

    def tensor(data: bytes) -> Any:
        return tvio.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def opencv(flag: int) -> Callable[[bytes], Any]:
        return lambda data: cv2.imdecode(np.frombuffer(data, numbers), flag)

    found = {
        "pillow": (pillow, pillow),
        "torchvision": (tensor, tensor),
        "opencv": (opencv(cv2.IMREAD_COLOR_RGB), opencv(cv2.IMREAD_UNCHANGED)),
    }
    for name, jpeg, png in (("simplejpeg", "decode_jpeg", None), ("imagecodecs", "jpeg8_decode", "png_decode")):
        if importlib.util.find_spec(name):
            module = importlib.import_module(name)
            found[name] = (getattr(module, jpeg), getattr(module, png) if png else found["opencv"][1])
    return found


def foreign_augment(crop: int, backend: str) -> Callable[[Any, Any, np.random.Generator], tuple[Any, Any]]:
    """The published augmentation from the parts of torchvision v2, on tensors or on Pillow images."""
    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    # The same strengths: brightness as a factor, hue as a share of the circle.
    colours = v2.RandomPhotometricDistort((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05), 0.5)

    def augment(image: Any, label: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        if backend == "tensor":
            image = tv_tensors.Image(image)
        label = tv_tensors.Mask(label)
        height, width = label.shape[-2:]
        scale = rng.uniform(0.5, 2.0)
        size = [round(height * scale), round(width * scale)]
        image = F.resize(image, size, antialias=True)
        label = F.resize(label, size, interpolation=v2.InterpolationMode.NEAREST)
        height, width = min(crop, size[0]), min(crop, size[1])
        for _ in range(10):
            top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
            part = F.crop(label, top, left, height, width)
            counts = torch.bincount(part.flatten(), minlength=256)[:255]
            if 0 < counts.max() <= 0.75 * counts.sum():
                break
        image, label = F.crop(image, top, left, height, width), part
        if rng.random() < 0.5:
            image, label = F.horizontal_flip(image), F.horizontal_flip(label)
        image = colours(image)
        if (height, width) != (crop, crop):
            border = [0, 0, crop - width, crop - height]
            image, label = F.pad(image, border, fill=[124, 116, 104]), F.pad(label, border, fill=255)
        return F.to_image(image).as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)[0]

    return augment


def batches(name: str, folder: Path, crop: int) -> Iterator[tuple[Any, Any]]:
    """Batches of a loader for ever: uint8 images (B, 3, H, W), int64 labels (B, H, W)."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision import io as tvio
    from torchvision.transforms.v2 import functional as F

    if name == "ours":
        from pipeline.config import AugmentationConfig
        from pipeline.shards.loader import TrainLoader

        recipe = AugmentationConfig(strength="published", resize_long=2048, resize_short=512)
        shards = str(folder / "shards")
        loader = TrainLoader(shards, crop=(crop, crop), augmentation=recipe, seed=0, global_batch_size=BATCH)
        for batch in loader:
            yield batch.images, batch.labels
        return
    backend = name.split("_")[1]
    augment, rng = foreign_augment(crop, backend), np.random.default_rng(0)

    def decode(image: bytes, label: bytes) -> tuple[Any, Any]:
        if backend == "tensor":
            parts = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (image, label))
            decoded = tuple(tvio.decode_image(part) for part in parts)
            return decoded[0], decoded[1]
        return Image.open(io.BytesIO(image)).convert("RGB"), F.pil_to_tensor(Image.open(io.BytesIO(label)))

    if name.startswith("torchvision"):
        files = sorted((folder / "raw").rglob("images/training/*.jpg"))

        class Loose(Dataset[tuple[Any, Any]]):
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, number: int) -> tuple[Any, Any]:
                file = files[number]
                annotation = file.parents[2] / "annotations/training" / f"{file.stem}.png"
                image, label = decode(file.read_bytes(), annotation.read_bytes())
                # Label 0 means ignored and becomes 255, as uint8 wraps around.
                return augment(image, label - 1, rng)

        foreign: Any = DataLoader(Loose(), batch_size=BATCH, shuffle=True, drop_last=True)
    else:
        import webdataset as wds

        shards_found = [str(file) for file in sorted((folder / "shards").glob("train-*.tar"))]
        samples = wds.WebDataset(shards_found, shardshuffle=len(shards_found)).shuffle(100)
        views = samples.to_tuple("jpg", "label.png").map(lambda pair: augment(*decode(*pair), rng))
        foreign = DataLoader(views, batch_size=BATCH, drop_last=True)
    while True:
        for images, labels in foreign:
            yield images, labels.long()


def measure_decoder(name: str, folder: Path, num_images: int) -> dict[str, float]:
    """Seconds of CPU time an image, for JPEG and label PNG."""
    files = sorted((folder / "raw").rglob("images/training/*.jpg"))[:num_images]
    images = [file.read_bytes() for file in files]
    labels = [(file.parents[2] / "annotations/training" / f"{file.stem}.png").read_bytes() for file in files]
    result = {}
    for kind, decode, data in zip(("image", "label"), decoders()[name], (images, labels), strict=True):
        for each in data[:BATCH]:
            decode(each)
        start = time.process_time()
        for each in data:
            decode(each)
        result[kind] = (time.process_time() - start) / len(data)
    return result


def measure_loader(name: str, folder: Path, num_images: int, crop: int) -> dict[str, float]:
    """Seconds of CPU time a sample of a batch."""
    import torch

    torch.manual_seed(0)
    steps = max(1, num_images // BATCH)
    stream = batches(name, folder, crop)
    images, labels = next(stream)
    assert images.shape == (BATCH, 3, crop, crop), images.shape
    assert labels.shape == (BATCH, crop, crop), labels.shape
    # Ours hands labels over as bytes; they become integers on the device.
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.uint8 if name == "ours" else torch.int64)
    next(stream)
    start = time.process_time()
    for _ in itertools.islice(stream, steps):
        pass
    return {"view": (time.process_time() - start) / (steps * BATCH)}


def measure_memory(folder: Path, num_images: int, crop: int) -> dict[str, float]:
    """Resident MiB of the process with our loader, after each of three epochs."""
    stream = batches("ours", folder, crop)
    result = {}
    for epoch in range(4):
        for _ in itertools.islice(stream, num_images // BATCH):
            pass
        # The first epoch, unreported, grows to what a batch needs.
        result[f"epoch_{epoch}"] = psutil.Process().memory_info().rss / 2**20
    return result


def run_child(what: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """One measurement in a process of its own, on one CPU."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
    command += ["--images", str(options.images), "--crop", str(options.crop)]
    ended = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{what} failed:\n{ended.stderr}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def child(options: argparse.Namespace) -> None:
    """Measure what `--child` names and print it as JSON."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kind, _, name = options.child.partition(":")
    if kind == "decode":
        result = measure_decoder(name, options.folder, options.images)
    elif kind == "load":
        result = measure_loader(name, options.folder, options.images, options.crop)
    else:
        result = measure_memory(options.folder, options.images, options.crop)
    print(json.dumps(result))


def report(times: dict[str, float], memory: dict[str, float]) -> dict[str, float]:
    """Print the table; the ratios by name."""
    for name, seconds in times.items():
        print(f"{name:32s} {seconds * 1e3:7.2f} ms {1 / seconds:8.1f} images/s a core")
    image = min(seconds for name, seconds in times.items() if name.endswith("image"))
    label = min(seconds for name, seconds in times.items() if name.endswith("label"))
    ours = times["load:ours view"]
    rivals = {
        kind: min(seconds for name, seconds in times.items() if name.startswith(f"load:{kind}"))
        for kind in ("torchvision", "webdataset")
    }
    ratios = {
        "of_bare_decode": (image + label) / ours,
        "of_bare_image_decode": image / ours,
        "of_torchvision": rivals["torchvision"] / ours,
        "of_webdataset": rivals["webdataset"] / ours,
    }
    print(f"(a) bare decode of image and label {1 / (image + label):.0f} images/s; image alone {1 / image:.0f}")
    print(f"ours is {ratios['of_bare_decode']:.2f} of (a), target {TARGET_OF_LIMIT};", end=" ")
    print(f"{ratios['of_bare_image_decode']:.2f} of decoding the image alone")
    print(f"ours is {ratios['of_torchvision']:.2f} x (b) torchvision v2, target {TARGET_OF_TORCHVISION};", end=" ")
    print(f"{ratios['of_webdataset']:.2f} x (c) webdataset")
    print("resident MiB after epochs 1 to 4:", " ".join(f"{value:.0f}" for value in memory.values()))
    return ratios


def main() -> None:
    """Make the data, measure in rounds, print, and write `--json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if "SEGVIT_DATA" not in os.environ:
        raise SystemExit("SEGVIT_DATA is not set; export it, the folder that holds ade20k_sample")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_data(folder, options.images)
        whats = [f"decode:{name}" for name in decoders()] + [f"load:{name}" for name in LOADERS]
        times: dict[str, float] = {}
        for _ in range(options.rounds):
            for what in whats:
                for kind, seconds in run_child(what, folder, options).items():
                    times[f"{what} {kind}"] = min(seconds, times.get(f"{what} {kind}", seconds))
        memory = run_child("memory", folder, options)
    ratios = report(times, memory)
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, "memory_mib": memory, "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
