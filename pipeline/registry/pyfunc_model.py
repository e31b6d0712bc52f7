"""The registered model as MLflow runs it.

MLflow copies this file into the model, beside the `segvit` package and the checkpoint, and runs the copy to load it.
So it knows of neither this package nor its tree, and nothing of ours is pickled.

Arrays give arrays, and files give files, so that what comes back never has to be guessed:

- uint8 RGB images (B, H, W, 3) give label maps (B, H, W) int64; images of several sizes, as an object array of
  (H, W, 3) arrays or nested lists in JSON, give an object array of (H, W) maps in their order.
- Files (JPEG, PNG, TIFF, WebP, BMP), as base64 text or bytes, give a list with each image's label map as base64 PNG,
  whose pixel values are class ids. As JSON integers the map of a 2048 x 1024 image would be 6 MB.

A request is bounded: MAX_IMAGES images, of MAX_PIXELS pixels together (or as many as SEGVIT_SERVE_MAX_PIXELS says), and
MAX_SECONDS until the last of them is begun.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

T = TypeVar("T")
MAX_IMAGES = 256
_BATCH_PIXELS = 1 << 22  # of arrays of one size that are predicted at once
MAX_PIXELS = 1 << 24
MAX_PIXELS_VARIABLE = "SEGVIT_SERVE_MAX_PIXELS"
MAX_SECONDS = 50.0  # MLflow's server gives up after 60


class UnusableInputError(MlflowException):  # type: ignore[misc, unused-ignore]
    """Images that cannot be predicted; a scoring server answers 400 with the reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """The answer's body. The server has put the whole request, megabytes of it, into `self.message`."""
        return json.dumps({"error_code": self.error_code, "message": str(self)})


class SegmentationModel(PythonModel):  # type: ignore[misc, unused-ignore]
    """RGB images of any size to label maps; see the module for the forms they take."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the checkpoint that lies in the model, onto a GPU where there is one."""
        import torch

        from segvit.checkpoint import load_checkpoint
        from segvit.inference.precision import keep_for_precision

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, metadata = load_checkpoint(context.artifacts["checkpoint"], device=device)
        self.inference = metadata.get("inference", {})
        keep_for_precision(self.model, self.inference.get("precision"))
        self.grey_range: list[float] | None = metadata.get("grey_range")
        grey = [[value] * 3 for value in range(256)]
        self.palette: list[list[int]] = metadata.get("palette", grey)

    # Bare np.ndarray: of another type hint MLflow would make a schema, and refuse arrays.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> NDArray[Any] | list[str]:
        """Label maps of images, in their order; raises UnusableInputError naming the first that cannot be used."""
        given = _as_array(model_input, "the list of images")
        if given.ndim == 0:
            raise UnusableInputError("one image came without its batch; put it into a list")
        if len(given) == 0:
            raise UnusableInputError("no image came; give a list of one or more")
        if len(given) > MAX_IMAGES:
            raise UnusableInputError(f"{len(given)} images came, more than the {MAX_IMAGES} allowed; send fewer")
        items = given.tolist() if given.dtype.kind in "US" else list(given)
        bounds = _Bounds()
        if any(isinstance(item, str | bytes) for item in items):
            pictures = [_picture(number, item, self.grey_range, bounds) for number, item in enumerate(items)]
            return [self._encoded_map(bounds.in_time(picture)) for picture in pictures]
        arrays = [bounds.counted(number, _pixels(number, item)) for number, item in enumerate(items)]
        return self._maps(arrays, bounds)

    def _maps(self, images: Sequence[NDArray[np.uint8]], bounds: _Bounds) -> NDArray[Any]:
        import torch

        from segvit.inference.predict import predict, predict_batch, shares_batches

        if any(image.shape != images[0].shape for image in images):
            maps = np.empty(len(images), dtype=object)
            maps[:] = [predict(self.model, bounds.in_time(image), **self.inference).cpu().numpy() for image in images]
            return maps
        if not shares_batches(self.inference):
            labels = torch.stack([predict(self.model, bounds.in_time(image), **self.inference) for image in images])
        else:
            size = max(1, _BATCH_PIXELS // (images[0].shape[0] * images[0].shape[1]))
            parts = []
            for start in range(0, len(images), size):
                part = torch.from_numpy(np.stack(bounds.in_time(images[start : start + size])))
                parts.append(predict_batch(self.model, part.permute(0, 3, 1, 2), **self.inference))
            labels = torch.cat(parts)
        batch: NDArray[np.int64] = labels.cpu().numpy()
        return batch

    def _encoded_map(self, picture: NDArray[np.uint8]) -> str:
        from segvit.inference.predict import predict
        from segvit.visualize import palette_image

        labels = predict(self.model, picture, **self.inference).cpu().numpy()
        buffer = io.BytesIO()
        palette_image(labels, self.palette).save(buffer, format="PNG")
        return base64.b64encode(buffer.getvalue()).decode()


class _Bounds:
    """What is left of what a request may take."""

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_SECONDS
        self._most = self._left = int(os.environ.get(MAX_PIXELS_VARIABLE) or MAX_PIXELS)

    def counted(self, number: int, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """`image` (H, W, 3); raises UnusableInputError where it is more than what is left."""
        self.count(number, image.shape[1], image.shape[0])
        return image

    def count(self, number: int, width: int, height: int) -> None:
        """Take the pixels of an image from what is left; raises UnusableInputError."""
        self._left -= width * height
        if self._left < 0:
            raise UnusableInputError(
                f"image {number} of {width}x{height} pixels is beyond the {self._most} pixels allowed in all; scale it "
                f"down, send fewer at once, or set {MAX_PIXELS_VARIABLE} where the server starts"
            )

    def in_time(self, image: T) -> T:
        """`image`; raises UnusableInputError where there is no time left for it."""
        if time.monotonic() > self._end:
            raise UnusableInputError(f"the images take longer than the {MAX_SECONDS:g} s allowed; send fewer at once")
        return image


def _picture(number: int, item: Any, grey_range: Sequence[float] | None, bounds: _Bounds) -> NDArray[np.uint8]:
    """The upright RGB pixels (H, W, 3) of an image file; more than 8 bits a channel are scaled by the range."""
    from segvit.image_files import DecodeError, decode_image, image_size

    if not isinstance(item, str | bytes):
        raise UnusableInputError(f"image {number} is no base64 text as others are; send all images in one form")
    if isinstance(item, str):
        try:
            # Many encoders break lines.
            item = base64.b64decode("".join(item.split()), validate=True)
        except ValueError as error:
            raise UnusableInputError(f"image {number} is no base64 text of an image file ({error})") from None
    try:
        bounds.count(number, *image_size(item))
        pixels: NDArray[np.uint8] = decode_image(item, None if grey_range is None else (grey_range[0], grey_range[1]))
    except DecodeError as error:
        raise UnusableInputError(f"image {number} {error}; send a JPEG, PNG, TIFF, WebP or BMP file") from None
    return pixels


def _as_array(given: Any, what: str) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except ValueError:
        raise UnusableInputError(f"{what} has rows of different lengths or depths") from None


def _pixels(number: int, item: Any) -> NDArray[np.uint8]:
    """An image (H, W, 3) given as uint8 array, or as nested lists of integers, which is what JSON has."""
    array = _as_array(item, f"image {number}")
    if array.dtype == object:
        array = _as_array(array.tolist(), f"image {number}")
        if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
            array = array.astype(np.uint8)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UnusableInputError(f"image {number} has shape {array.shape}, not (height, width, 3); send a batch of RGB")
    if array.dtype != np.uint8:
        raise UnusableInputError(f"image {number} is {array.dtype} and not of integers from 0 to 255; send uint8 RGB")
    return array


set_model(SegmentationModel())
