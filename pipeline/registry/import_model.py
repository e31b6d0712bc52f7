"""Models from elsewhere, brought into the workspace as checkpoints: a checkpoint folder, the authors' own files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import segvit
from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Checkpoint, ShardSet
from pipeline.shards.shards import read_manifest
from pipeline.storage.names import CHECKPOINT_FILES, CONFIG_FILE, WEIGHTS_FILE
from pipeline.workflow.lease import Lease
from segvit.checkpoint import read_config
from segvit.weights.published_start import read_published_start

PUBLISHED = "published"


def import_folder(source_uri: str, digest: str, config_digest: str, target_uri: str, lease: Lease) -> Checkpoint:
    """Copy the checkpoint folder at `source_uri`, whose two files have those sha256 sums, to `target_uri`.

    Raises UserError for a folder that is no checkpoint, or whose files have changed since they were looked at.
    """
    with tempfile.TemporaryDirectory(prefix="segvit-import-") as scratch:
        source = storage.fetch_folder(source_uri, scratch)
        try:
            metadata = read_config(source / CONFIG_FILE)["metadata"]
        except (OSError, ValueError) as error:
            raise UserError(f"{source_uri} is no checkpoint folder ({error})") from error
        for file, known in zip(CHECKPOINT_FILES, (digest, config_digest), strict=True):
            if storage.file_digest(str(source / file)) != known:
                raise UserError(f"{source_uri}/{file} has changed meanwhile; run again")
        own = Path(scratch) / "checkpoint"
        own.mkdir()
        for file in CHECKPOINT_FILES:
            shutil.copyfile(source / file, own / file)
        lease.check()
        storage.publish_folder(own, target_uri, last=CONFIG_FILE)
    return Checkpoint(
        variant=str(metadata.get("variant") or source_uri.rstrip("/").rpartition("/")[2]),
        uri=target_uri,
        digest=digest,
        step=int(metadata.get("step", 0)),
        miou=None,
        history_uri=None,
        train_seconds=0.0,
        source_uri=source_uri,
        config_digest=config_digest,
    )


def import_published_start(
    source_uri: str, source_digest: str, model: Mapping[str, Any], target_uri: str, lease: Lease
) -> Checkpoint:
    """Convert a file of the published format to a checkpoint folder at `target_uri` that models can start from.

    Args:
        source_uri: A .pth or .safetensors file; no code in it is run.
        source_digest: Its sha256.
        model: The fields of segvit.ModelConfig of the model that is to start from it.
        target_uri: Where the folder goes.
        lease: The right to write there.

    Raises:
        UserError: The file cannot be read, or is of another backbone.
    """
    with tempfile.TemporaryDirectory(prefix="segvit-import-") as scratch:
        source = storage.fetch_file(source_uri, scratch)
        if storage.file_digest(str(source)) != source_digest:
            raise UserError(f"{source_uri} has changed meanwhile; run again")
        try:
            found = read_published_start(source, segvit.ModelConfig.from_dict(dict(model)))
            trained = found.build()
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{source_uri} is no model to start from: {error}") from error
        names = {"class_names": list(found.class_names)} if found.class_names else {}
        own = Path(scratch) / "checkpoint"
        segvit.save_checkpoint(own, trained, {"variant": PUBLISHED, **names})
        digest, config_digest = (storage.file_digest(str(own / file)) for file in CHECKPOINT_FILES)
        lease.check()
        storage.publish_folder(own, target_uri, last=CONFIG_FILE)
    return Checkpoint(
        variant=PUBLISHED,
        uri=target_uri,
        digest=digest,
        step=0,
        miou=None,
        history_uri=None,
        train_seconds=0.0,
        source_digest=source_digest,
        source_uri=source_uri,
        config_digest=config_digest,
    )


def import_published(
    source_uri: str,
    source_digest: str,
    name: str,
    arguments: Mapping[str, Any],
    shard_set: ShardSet,
    target_uri: str,
    lease: Lease,
) -> Checkpoint:
    """Convert a file of the published format to a checkpoint folder at `target_uri`.

    Args:
        source_uri: A .pth or .safetensors file; no code in it is run.
        source_digest: Its sha256.
        name: Stands for the variant in tables and tags.
        arguments: Those of `segvit.load_published`.
        shard_set: Gives the classes' names and colours, which the format does not hold.
        target_uri: Where the folder goes.
        lease: The right to write there.

    Raises:
        UserError: The file cannot be read, is of another model, or has other classes than the shard set.
    """
    with tempfile.TemporaryDirectory(prefix="segvit-import-") as scratch:
        source = storage.fetch_file(source_uri, scratch)
        if storage.file_digest(str(source)) != source_digest:
            raise UserError(f"{source_uri} has changed meanwhile; run again")
        try:
            model = segvit.load_published(source, **arguments)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{source_uri} cannot be scored: {error}") from error
        if model.num_classes != shard_set.num_classes:
            raise UserError(
                f"{source_uri} tells {model.num_classes} classes apart, {shard_set.name} has {shard_set.num_classes}; "
                "score it on the data set that it was trained for"
            )
        manifest = read_manifest(shard_set.uri)
        metadata: dict[str, Any] = {
            "variant": name,
            "class_names": list(manifest.classes),
            "palette": [list(colour) for colour in manifest.palette],
            "source": source_uri,
        }
        if manifest.grey_range is not None:
            metadata["grey_range"] = list(manifest.grey_range)
        own = Path(scratch) / "checkpoint"
        segvit.save_checkpoint(own, model, metadata)
        digest = storage.file_digest(str(own / WEIGHTS_FILE))
        lease.check()
        storage.publish_folder(own, target_uri, last=CONFIG_FILE)
    return Checkpoint(
        variant=name,
        uri=target_uri,
        digest=digest,
        step=0,
        miou=None,
        history_uri=None,
        train_seconds=0.0,
        source_digest=source_digest,
    )
