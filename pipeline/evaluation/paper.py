"""The paper's figures for a checkpoint in the workspace."""

from __future__ import annotations

import tempfile

import segvit
from pipeline import storage
from pipeline.records import Checkpoint
from pipeline.storage.names import CONFIG_FILE
from segvit.checkpoint import read_config


def figure_of(checkpoint: Checkpoint) -> segvit.PaperFigure | None:
    """What the paper reports for the model of a checkpoint; None where the model is not in the paper."""
    with tempfile.TemporaryDirectory(prefix="segvit-config-") as scratch:
        config = read_config(storage.fetch_file(storage.join(checkpoint.uri, CONFIG_FILE), scratch))
    return segvit.paper_figure(segvit.ModelConfig.from_dict(config["model"]), config["num_classes"])
