"""Packing a checkpoint as an MLflow model that needs nothing of this source tree, and logging it.

The model is "from code": MLflow stores the loader script, the `segvit` package, a decoder that another package adds,
and the checkpoint as files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import UserError
from pipeline.records import Checkpoint
from pipeline.storage.file_stamps import folder_bytes
from pipeline.storage.names import CHECKPOINT_FILES, CONFIG_FILE, WEIGHTS_FILE
from pipeline.workflow.tracking import Tag, Tracking
from segvit.decoders import DECODERS

REQUIREMENTS = ("torch", "torchvision", "timm", "safetensors", "numpy", "pillow")
# Raise it when registered models are made another way; a checkpoint registered before then gets a new version.
PACKAGE_FORMAT = 4
DESCRIPTION = {
    "input": "uint8 RGB images (B, H, W, 3), an object array of (H, W, 3) images, or base64 files of JPEG, PNG, TIFF, "
    "WebP or BMP",
    "output": "label maps (B, H, W), an object array of (H, W) maps, or base64 PNG files of class ids",
}


class LoggedModel(NamedTuple):
    """Where MLflow keeps a logged model, and its id."""

    location: str
    model_id: str


def log_model(
    tracking: Tracking, title: str, checkpoint: Checkpoint, inference: Mapping[str, Any], run_id: str
) -> LoggedModel:
    """Pack a checkpoint and log it under a run; the model predicts with `inference`, as it was evaluated.

    Raises UserError for weights that changed since training.
    """
    client = tracking.client()
    with tempfile.TemporaryDirectory(prefix="segvit-register-") as scratch:
        source = storage.fetch_folder(checkpoint.uri, Path(scratch) / "fetched")
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        for file in CHECKPOINT_FILES:
            shutil.copyfile(source / file, folder / file)
        if inference:
            add_inference(folder / CONFIG_FILE, inference)
        if storage.file_digest(str(folder / WEIGHTS_FILE)) != checkpoint.digest:
            raise UserError(f"{checkpoint.uri}/{WEIGHTS_FILE} changed after training; remove the folder to train again")
        packed = Path(scratch) / "model"
        save_pyfunc(packed, folder)
        logged = client.create_logged_model(
            tracking.experiment_id(),
            name=title,
            source_run_id=run_id,
            tags={
                "segvit.variant": checkpoint.variant,
                "segvit.checkpoint_digest": checkpoint.digest,
                Tag.BYTES: str(folder_bytes(str(packed))),
            },
        )
        client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
    return LoggedModel(str(logged.artifact_location), str(logged.model_id))


def add_inference(config_file: Path, inference: Mapping[str, Any]) -> None:
    """Note in a checkpoint's metadata how images are to be predicted."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["metadata"]["inference"] = dict(inference)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_pyfunc(target: Path, checkpoint: Path) -> None:
    """Write the MLflow model of a checkpoint folder to the new folder `target`."""
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    package = find_spec("segvit")
    assert package is not None
    assert package.origin is not None
    # Images of any size, as arrays or as text: of all MLflow's types only this one takes them all.
    anything = Schema([TensorSpec(np.dtype("O"), (-1,))])
    with tempfile.TemporaryDirectory(prefix="segvit-code-") as scratch, warnings.catch_warnings():
        plugin = decoder_plugin(checkpoint_structure(checkpoint), Path(scratch))
        # It would have an input example and type hints; neither suits images of any size.
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(path) for path in (Path(package.origin).parent, *plugin)],
            signature=ModelSignature(inputs=anything, outputs=anything),
            metadata=DESCRIPTION,
            pip_requirements=[f"{name}=={installed_version(name).split('+')[0]}" for name in REQUIREMENTS],
        )


def decoder_plugin(structure: str, folder: Path) -> list[Path]:
    """The code of a decoder that another package adds, and the metadata by which it is found; none for a built-in one.

    The code is the module of its entry point, or all of the top-level package that the module is in. What else it
    imports has to be installed where the model is loaded. The metadata is written below `folder`. Raises UserError for
    a decoder whose module is not installed.
    """
    point, file = DECODERS.plugin(structure), DECODERS.plugin_file(structure)
    if point is None:
        return []
    if file is None:
        raise UserError(
            f"decoder {structure!r} is {point.value}, which is not installed here; install it, then run again"
        )
    module = file.parent if file.name == "__init__.py" else file
    for _ in range(point.module.count(".")):
        module = module.parent
    metadata = folder / f"segvit_decoder_{structure}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: segvit-decoder-{structure}\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{point.group}]\n{point.name} = {point.value}\n")
    return [module, metadata]


def checkpoint_structure(checkpoint: Path) -> str:
    """Name of the decoder that the model in a checkpoint folder has."""
    config = json.loads((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    return str(config["model"].get("structure", ""))
