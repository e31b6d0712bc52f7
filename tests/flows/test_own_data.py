"""docs/own_data.md, done: from each tool's export to predictions, with the right class pixels in the shards."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flows.cli import main
from pipeline.config.file import load_config
from pipeline.shards.prepare import prepare_shards
from tests.flows.facts import facts

_BLOCKS = re.findall(
    r"^```bash\n(.*?)^```$", (Path(__file__).parents[2] / "docs/own_data.md").read_text(), flags=re.M | re.S
)
PAGE = [[shlex.split(line)[1:] for line in block.splitlines()] for block in _BLOCKS]
HEIGHT, WIDTH = 64, 96
NUM_TRAIN, NUM_VAL = 6, 2
COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
NAMES = ("background", "road", "tree")
TINY = {
    "model.weights": "random",
    "model.image_size": "[64, 64]",
    "model.decoder_layers": "1",
    "variants": "{full: {structure: cascade, out_layers: [1, 3]}}",
    "train.steps": "2",
    "train.batch_size": "2",
    "train.freeze_blocks": "0",
    "train.warmup_steps": "1",
    "train.validate_every_steps": "2",
    "train.checkpoint_every_steps": "2",
    "evaluate.num_examples": "1",
    "evaluate.latency_repeats": "1",
    "runtime.cpus_per_worker": "1",
}


class Scene(NamedTuple):
    """A picture, where its two objects lie (x, y, width, height), and its class ids."""

    image: Image.Image
    road: tuple[int, int, int, int]
    tree: tuple[int, int, int, int]
    label: NDArray[np.uint8]


def scene(number: int) -> Scene:
    rng = np.random.default_rng(number)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    road, tree = ((int(rng.integers(4, 40)), int(rng.integers(4, 30)), 30, 20) for _ in range(2))
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for class_id, (x, y, width, height) in ((1, road), (2, tree)):
        label[y : y + height, x : x + width] = class_id
    return Scene(image, road, tree, label)


def each(root: Path) -> Iterator[tuple[str, str, Scene]]:
    """Split, name and content of every sample; the root is made."""
    root.mkdir(parents=True)
    for number in range(NUM_TRAIN + NUM_VAL):
        yield "train" if number < NUM_TRAIN else "val", f"frame {number}", scene(number)


def put(root: Path, path: str, picture: Image.Image | NDArray[np.uint8]) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, quality=95)


def cvat(root: Path) -> None:
    """CVAT's "Segmentation mask 1.1": colours, labelmap.txt, and one list of all."""
    names = []
    for _, name, one in each(root):
        put(root, f"JPEGImages/{name}.jpg", one.image)
        put(root, f"SegmentationClass/{name}.png", COLOURS[one.label])
        put(root, f"SegmentationObject/{name}.png", COLOURS[one.label])
        names.append(f'"{name}"')
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/default.txt").write_text("\n".join(names))
    lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in zip(NAMES, COLOURS.tolist(), strict=True)]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]))


def roboflow(root: Path) -> None:
    """Roboflow's "Semantic Segmentation Masks": both files side by side in a folder a split."""
    for split, name, one in each(root):
        folder, stem = {"val": "valid"}.get(split, split), f"{name.replace(' ', '-')}_jpg.rf.0a{name[-1]}"
        put(root, f"{folder}/{stem}.jpg", one.image)
        put(root, f"{folder}/{stem}_mask.png", one.label)
    for folder in ("train", "valid"):
        rows = [f"{number}, {name}" for number, name in enumerate(NAMES)]
        (root / folder / "_classes.csv").write_text("\n".join(["Pixel Value, Class", *rows]))


def coco(root: Path) -> None:
    """One COCO file with polygons."""
    images, annotations = list[Any](), list[Any]()
    for _, name, one in each(root):
        put(root, f"images/{name}.jpg", one.image)
        images.append({"id": len(images), "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        for category, (x, y, width, height) in ((1, one.road), (2, one.tree)):
            outline = [x, y, x + width, y, x + width, y + height, x, y + height]
            of_object = {"image_id": images[-1]["id"], "category_id": category, "segmentation": [outline], "iscrowd": 0}
            annotations.append({"id": len(annotations), **of_object})
    categories = [{"id": number, "name": NAMES[number]} for number in (1, 2)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))


def labelme(root: Path) -> None:
    """A JSON file beside each image."""
    for _, name, one in each(root):
        put(root, f"{name}.jpg", one.image)
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[x, y], [x + width, y + height]]}
            for label, (x, y, width, height) in (("road", one.road), ("tree", one.tree))
        ]
        content = {"imagePath": f"{name}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
        (root / f"{name}.json").write_text(json.dumps({"version": "5.4.1", "imageData": None, **content}))


def voc(root: Path) -> None:
    """Pascal VOC: palette PNG, a list a split."""
    names: dict[str, list[str]] = {"train": [], "val": []}
    for split, name, one in each(root):
        put(root, f"VOC2012/JPEGImages/{name}.jpg", one.image)
        picture = Image.fromarray(one.label)
        picture.putpalette(COLOURS.tobytes())
        put(root, f"VOC2012/SegmentationClass/{name}.png", picture)
        names[split].append(name)
    (root / "VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    for split, listed in names.items():
        (root / f"VOC2012/ImageSets/Segmentation/{split}.txt").write_text("\n".join(listed))
    (root / "VOC2012/classes.txt").write_text("\n".join(NAMES))


def split_folders(root: Path) -> None:
    """A folder a split below those of images and of label maps."""
    for split, name, one in each(root):
        put(root, f"img_dir/{split}/{name}.png", one.image)
        put(root, f"ann_dir/{split}/{name}.png", one.label)
    (root / "classes.txt").write_text("\n".join(NAMES))


def require_drawn_pixels(capfd: pytest.CaptureFixture[str], uri: str) -> None:
    """Raise AssertionError unless the shards hold the pixels that were drawn."""
    shards = facts(capfd, "data", uri)
    assert [one["name"] for one in shards["splits"]] == ["train", "val"]
    wanted = np.bincount(np.concatenate([scene(number).label.ravel() for number in range(NUM_TRAIN + NUM_VAL)]))
    pixels = {
        one["name"]: sum(split["classes"][number]["pixels"] for split in shards["splits"])
        for number, one in enumerate(shards["splits"][0]["classes"])
    }
    assert pixels == dict(zip(NAMES, wanted.tolist(), strict=True))
    assert sum(split["num_images"] for split in shards["splits"]) == NUM_TRAIN + NUM_VAL
    assert sum(split["ignored_share"] for split in shards["splits"]) == 0


def check_and_init(export: Callable[[Path], None], capfd: pytest.CaptureFixture[str]) -> None:
    export(Path("my data"))
    (check, init, *_), _ = PAGE
    assert facts(capfd, *check)["problems"] == []
    main([*init, "--backbone", "vit_tiny_patch16_224"])


# What follows the shards is the same for all.
@pytest.mark.parametrize("export", [cvat, roboflow, labelme, voc, split_folders])
def test_export__to_shards(
    export: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_and_init(export, capfd)
    prepare_shards(load_config("experiment.yaml").data, "shards")
    require_drawn_pixels(capfd, "shards")


@pytest.mark.usefixtures("one_ray")
def test_export__to_predictions_in_the_pages_four_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_and_init(coco, capfd)
    (_, _, run, predict), others = PAGE
    tiny = [argument for name, value in TINY.items() for argument in ("--set", f"{name}={value}")]
    summary = facts(capfd, *run, *tiny)
    require_drawn_pixels(capfd, summary["records"]["prepare"]["uri"])
    scene(99).image.save("new.png")
    main(predict)
    labels = np.asarray(Image.open("predicted/new.labels.png"))
    assert labels.shape == (HEIGHT, WIDTH)
    assert labels.max() < len(NAMES)
    for line in others:
        main(line)
    assert {file.name for file in Path("sheets").iterdir()} == {"samples-train.png", "samples-val.png"}
