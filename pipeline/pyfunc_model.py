"""The registered model as MLflow runs it.

MLflow copies this file into the model, beside the `segvit` package and the checkpoint, and runs the copy to
load it. So it knows of neither this package nor its tree, and nothing of ours is pickled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray


class SegmentationModel(PythonModel):  # type: ignore[misc, unused-ignore]
    """uint8 RGB images (B, H, W, 3) of any size to label maps (B, H, W) int64."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint that lies in the model, onto a GPU where there is one."""
        import torch

        from segvit.checkpoint import load_checkpoint

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, metadata = load_checkpoint(context.artifacts["checkpoint"], device=device)
        self.inference = metadata.get("inference", {})

    # Bare np.ndarray: of another type hint MLflow would make a schema, and refuse arrays.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> NDArray[np.int64]:
        """Label maps (B, H, W) of a batch of uint8 images (B, H, W, 3)."""
        import torch

        from segvit.inference import predict, predict_batch

        images = torch.from_numpy(np.ascontiguousarray(model_input, dtype=np.uint8)).permute(0, 3, 1, 2)
        if self.inference:
            labels = torch.stack([predict(self.model, image, **self.inference) for image in images])
        else:
            labels = predict_batch(self.model, images)
        maps: NDArray[np.int64] = labels.cpu().numpy()
        return maps


set_model(SegmentationModel())
