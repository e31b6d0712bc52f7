"""What the pipeline itself wrote, and what people write for it: shards, records, experiments, policies."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import DataConfig, DigitsConfig
from pipeline.config.file import load_config
from pipeline.errors import UserError
from pipeline.registry.policy_file import load_policy
from pipeline.reports.data_summary import summarize_shard_set
from pipeline.shards.prepare import prepare_shards
from pipeline.shards.shard_reader import open_shard_set
from segvit.image_files import DecodeError
from tests.faults.fuzz.case import Case, SeveralLinesError
from tests.faults.fuzz.trees import mutate_json, mutate_tree
from tests.faults.mutations import BYTES

CONFIGS = Path(__file__).resolve().parents[3] / "flows" / "configs"
_KINDS = ("truncated", "bits flipped", "overwritten", "spliced", "numbers")


@cache
def _shards() -> dict[str, bytes]:
    """The files of a small shard set."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        digits = DigitsConfig(num_train=4, num_val=2, image_size=96)
        config = DataConfig(dataset="digits", samples_per_shard=2, digits=digits)
        prepare_shards(config, folder, progress=lambda _line: None)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def shards(folder: Path, rng: random.Random) -> Case:
    """The manifest, the index or a tar of a shard set."""
    from pipeline.fast_decode import decode_ids, decode_reduced

    for name, data in _shards().items():
        (folder / name).write_bytes(data)
    name = rng.choice(["manifest.json", "manifest.json", "index.parquet", "index.parquet", "train-00000.tar"])
    if name == "manifest.json":
        kind, data = mutate_json(_shards()[name], rng)
    else:
        kind = rng.choice(_KINDS)
        data = BYTES[kind][1](_shards()[name], rng)
    (folder / name).write_bytes(data)

    def read() -> None:
        reader = open_shard_set(str(folder))
        summarize_shard_set(str(folder))
        for split in reader.manifest.splits:
            index = reader.index(split)
            for number in range(len(index)):
                sample = reader.read(index, number)
                for decode, content in ((decode_reduced, sample.image), (decode_ids, sample.label)):
                    try:
                        decode(content)
                    except DecodeError:
                        continue

    return Case(kind, read)


def record(_folder: Path, rng: random.Random) -> Case:
    """A record of each kind, as MLflow keeps it."""
    made = rng.choice(_records())
    kind, text = mutate_json(made.to_json().encode(), rng)

    def read() -> None:
        try:
            type(made).from_json(text.decode("utf-8", "replace"))
        except ValidationError as error:
            # As whoever looks for a cached result does.
            raise UserError("the record is of another form") from error

    return Case(kind, read)


@cache
def _records() -> tuple[Any, ...]:
    from pipeline import records

    split = records.SplitInfo(num_samples=3, num_shards=1, digest="ab")
    evaluation = records.Evaluation(
        variant="a",
        checkpoint_digest="b",
        data_digest="c",
        split="val",
        num_images=3,
        miou=0.5,
        macc=0.5,
        aacc=0.5,
        boundary_iou=None,
        class_names=("a", "b"),
        per_class_iou=(0.1, None),
        per_class_accuracy=(0.1, None),
        gflops=1.0,
        parameters=9,
        latency_ms=1.0,
        cost_size=(32, 48),
        uri="/x",
    )
    return (
        records.ShardSet(name="a", uri="/x", digest="d", num_classes=2, splits={"train": split}),
        records.SearchResult(
            variant="a", values={"loss.dice": 1.0}, miou=None, num_trials=1, trials_uri="/x", trials_digest="d"
        ),
        records.Checkpoint(variant="a", uri="/x", digest="d", step=1, miou=0.1, history_uri=None, train_seconds=1.0),
        evaluation,
        records.ModelVersion(
            name="m", version=1, model_uri="u", variant="a", evaluation=evaluation, checkpoint_digest="b", run_id="r"
        ),
        records.PromotionDecision(
            name="m",
            version=1,
            promoted=True,
            reason="r",
            checks=(records.Check(name="c", passed=True, detail="d"),),
            champion_before=None,
            champion_after=1,
        ),
    )


def experiment(folder: Path, rng: random.Random) -> Case:
    """An experiment file, as far as it is read before anything starts."""
    text = (CONFIGS / rng.choice(["quickstart.yaml", "camvid_cpu.yaml", "camvid.yaml"])).read_text()
    file = folder / "experiment.yaml"
    kind = _write_yaml(file, yaml.safe_load(text), text.encode(), rng)
    return Case(kind, lambda: _read_experiment(file))


def _read_experiment(file: Path) -> None:
    import segvit
    from segvit.model_check import model_problems

    try:
        config = load_config(file)
    except UserError as error:
        raise SeveralLinesError(error) from error
    for name in config.variants:
        settings = config.variant_settings(name)
        try:
            model = segvit.ModelConfig.from_dict(dict(settings.model))
        except ValueError:
            continue
        model_problems(model, 11)


def policy(folder: Path, rng: random.Random) -> Case:
    """A policy file of the gate."""
    content = {"min_miou": 0.4, "protected_classes": ["a"], "max_gflops": 9.0, "max_latency_ms": None}
    file = folder / "policy.yaml"
    kind = _write_yaml(file, content, yaml.safe_dump(content).encode(), rng)

    def read() -> None:
        try:
            load_policy(file)
        except UserError as error:
            raise SeveralLinesError(error) from error

    return Case(kind, read)


def _write_yaml(file: Path, tree: Any, text: bytes, rng: random.Random) -> str:
    kind = rng.choice(["tree", "tree", "tree", "json", "bytes", "aliases"])
    if kind == "tree":
        text = yaml.safe_dump(mutate_tree(tree, rng)).encode("utf-8", "surrogatepass")
    elif kind == "json":
        import json

        kind, text = mutate_json(json.dumps(tree).encode(), rng)
    elif kind == "bytes":
        kind = rng.choice(_KINDS)
        text = BYTES[kind][1](text, rng)
    else:
        width = rng.choice([2, 9])
        lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, 30)]
        text = "\n".join(["a0: &a0 [x]", *lines, text.decode()]).encode()
    file.write_bytes(text)
    return kind
