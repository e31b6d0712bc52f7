"""Checkpoints, weights and requests to a served model."""

from __future__ import annotations

import asyncio
import base64
import collections
import io
import json
import random
import struct
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import segvit
from pipeline.registry.scoring_app import ScoringApp
from pipeline.training.checkpoint_files import damage_of
from segvit.weights.pretrained import read_file, read_grid, read_shapes
from segvit.weights.published import published_state_dict
from tests.faults.fuzz.case import Case
from tests.faults.fuzz.trees import EXTREMES, mutate_json, mutate_tree
from tests.faults.mutations import BYTES

_KINDS = ("truncated", "bits flipped", "overwritten", "spliced", "numbers")


@cache
def _model() -> segvit.SegViT:
    torch.manual_seed(0)
    config = segvit.ModelConfig(
        backbone="vit_tiny_patch16_224",
        image_size=(32, 32),
        out_layers=(0, 1),
        decoder_layers=1,
        class_token=False,
        backbone_options={"embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    return segvit.build_model(config, 3).eval()


@cache
def _checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        segvit.save_checkpoint(folder, _model(), {"class_names": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3})
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _mutate_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.5:
        kind = rng.choice(_KINDS)
        return kind, BYTES[kind][1](data, rng)
    (size,) = struct.unpack_from("<Q", data)
    kind, header = mutate_json(data[8 : 8 + size], rng)
    size = len(header) if rng.random() < 0.9 else rng.choice([0, 1 << 20, 1 << 40, (1 << 64) - 1])
    return f"header: {kind}", struct.pack("<Q", size) + header + data[8 + size :]


def checkpoint(folder: Path, rng: random.Random) -> Case:
    """The configuration or the weights of a checkpoint."""
    files = dict(_checkpoint())
    if rng.random() < 0.6:
        config = json.loads(files["config.json"])
        if rng.random() < 0.6:
            config["model"] = mutate_tree(config["model"], rng)
            kind, text = "model", json.dumps(config).encode("utf-8", "surrogatepass")
        else:
            kind, text = mutate_json(files["config.json"], rng)
        files["config.json"] = text
    else:
        kind, files["model.safetensors"] = _mutate_safetensors(files["model.safetensors"], rng)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Case(kind, lambda: segvit.load_checkpoint(folder), (ValueError, FileNotFoundError))


def backbone_weights(folder: Path, rng: random.Random) -> Case:
    """A safetensors file of a backbone."""
    kind, data = _mutate_safetensors(_checkpoint()["model.safetensors"], rng)
    file = folder / "weights.safetensors"
    file.write_bytes(data)

    def read() -> None:
        read_shapes(file)
        read_grid(file)
        read_file(file)

    return Case(kind, read, (ValueError, FileNotFoundError))


def training_state(folder: Path, rng: random.Random) -> Case:
    """The sums of a training checkpoint, which tell whether it is whole."""
    text = json.dumps(dict.fromkeys(("model.safetensors", "config.json", "optimizer.safetensors"), "ab" * 32))
    kind, data = mutate_json(text.encode(), rng)
    (folder / "sums.json").write_bytes(data)
    return Case(kind, lambda: damage_of(str(folder)), ())


class _Zeros:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 33,)


def published(folder: Path, rng: random.Random) -> Case:
    """A .pth file of the published format: damaged, swelling, or with more than tensors."""
    state: dict[str, Any] = dict(published_state_dict(_model()))
    kind = rng.choice([*_KINDS, *_KINDS, "zeros", "strides", "packed", "names", "values", "class"])
    file = folder / "model.pth"
    if kind == "zeros":
        state["x"] = _Zeros()
    elif kind == "strides":
        name = rng.choice(list(state))
        state[name] = torch.zeros(1).expand(rng.choice([(1 << 40,), (1, 1 << 30, 24), (1 << 20, 24, 16, 16)]))
    elif kind == "names":
        state[f"backbone.layers.{10**9}.x"] = torch.zeros(1)
        state[f"decode_head.decoder_{10**9}.x"] = torch.zeros(1)
    elif kind == "values":
        state[rng.choice(list(state))] = rng.choice(EXTREMES)
    elif kind == "class":
        state["x"] = collections.UserDict()
    torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if kind == "packed":
        _pack_anew(file)
    elif kind in _KINDS:
        file.write_bytes(BYTES[kind][1](file.read_bytes(), rng))

    def read() -> None:
        segvit.load_published(file, num_heads=2, out_layers=(0, 1), image_size=32)

    return Case(kind, read, (ValueError, FileNotFoundError))


def _pack_anew(file: Path) -> None:
    """With members that deflate shrinks a thousand times, where the file is one of PyTorch's zip files."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 26 if name.endswith("data.pkl") else 0))


@cache
def _served() -> ScoringApp:
    """What `segvit serve` runs."""
    import mlflow.pyfunc

    from pipeline.registry.model_package import save_pyfunc

    folder = Path(tempfile.mkdtemp())
    for name, data in _checkpoint().items():
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / name).write_bytes(data)
    save_pyfunc(folder / "model", folder / "checkpoint")
    return ScoringApp(mlflow.pyfunc.load_model(str(folder / "model")))


def serving_request(_folder: Path, rng: random.Random) -> Case:
    """The body of a request to a served model."""

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    if rng.random() < 0.3:
        kind = rng.choice([*_KINDS, "bomb", "odd picture", "wrong type", "absurd size"])
        text = base64.b64encode(BYTES[kind][1](picture, rng)).decode()
        body = json.dumps({"inputs": [text]}).encode()
    else:
        pixels = np.random.default_rng(2).integers(0, 256, (2, 4, 6, 3)).tolist()
        text = base64.b64encode(picture).decode()
        forms: tuple[Any, ...] = (
            {"inputs": [text, text]},
            {"inputs": pixels},
            {"instances": [text]},
            {"dataframe_split": {"columns": ["x"], "data": [[text]]}},
            {"inputs": {"images": pixels}},
            {"inputs": [text], "params": {"x": 1}},
        )
        kind, body = mutate_json(json.dumps(rng.choice(forms)).encode(), rng)
    content_type = rng.choice(["application/json"] * 8 + ["text/csv", "application/vnd.apache.parquet", "x/y", None])
    return Case(kind, lambda: _ask(body, content_type), ())


def _ask(body: bytes, content_type: str | None) -> None:
    """One request to the server's application; raises AssertionError for an answer that is none."""
    status, text = asyncio.run(ask(_served(), body, content_type))
    assert status in (200, 400, 408, 413, 415), f"status {status}: {text[:400]!r}"
    answer = json.loads(text)
    if status != 200:
        assert set(answer) == {"error_code", "message"}, text[:400]
        assert "Traceback" not in answer["message"], text[:400]
        assert len(answer["message"]) <= 600, text[:1000]
        assert "\n" not in answer["message"], text[:400]


async def ask(app: ScoringApp, body: bytes, content_type: str | None) -> tuple[int, bytes]:
    """Status and text of the answer to a request that arrives in two parts."""
    parts = [body[:100], body[100:]]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    await app({"type": "http", "path": "/invocations", "method": "POST", "headers": headers}, receive, send)
    return int(sent[0]["status"]), bytes(sent[1]["body"])
