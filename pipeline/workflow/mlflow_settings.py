"""What MLflow reads from the environment, set before it is imported, and how much it says."""

from __future__ import annotations

import logging
import os

_SETTINGS = {
    # MLflow's own retries, 0 + 2 + 4 + ... + 120 + 120 s: as long as pipeline.workflow.tracking.PATIENCE_S.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "9",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # Else it asks the server first what it can do, once for each file that is read.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def import_mlflow() -> None:
    """Import MLflow, told to be quiet; what the user's environment says goes first."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints the traceback of every error that it raises.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
