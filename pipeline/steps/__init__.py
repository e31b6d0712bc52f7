"""The steps that recipes are made of: each a thin, cached wrapper around the module that does the work.

All arguments of a step are part of its fingerprint; what only changes speed is in `context.runtime`.
"""

from pipeline.steps.data import backbone_sources, fetch_backbone, open_shards, prepare
from pipeline.steps.registry import (
    fetch_model,
    import_checkpoint,
    import_published,
    import_start,
    promote,
    register,
    rescore_champion,
)
from pipeline.steps.reporting import report, study
from pipeline.steps.training import evaluate, train, tune

__all__ = [
    "backbone_sources",
    "evaluate",
    "fetch_backbone",
    "fetch_model",
    "import_checkpoint",
    "import_published",
    "import_start",
    "open_shards",
    "prepare",
    "promote",
    "register",
    "report",
    "rescore_champion",
    "study",
    "train",
    "tune",
]
