"""How a model is scored, and how images are predicted; sizes are (height, width) in pixels."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.section import Positive, Section
from pipeline.workflow.step import CountedWhenSet, NotFingerprinted

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class InferenceConfig(Section):
    """How images are predicted, in validation while training, in evaluation and by the registered model.

    `mode` slide goes window by window, of `crop` (height, width) pixels in steps of `stride`, by default the
    training crop and two thirds of it. `resize` (long, short) brings the image to a longer and a shorter side of at
    most those before that. Scores are averaged over `scales` and, with `flip`, mirror images. `precision` bf16 computes
    in bf16 where the machine has it. See segvit.predict.
    """

    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[Positive, Positive] | None = None
    stride: tuple[Positive, Positive] | None = None
    resize: tuple[Positive, Positive] | None = None
    scales: Annotated[tuple[Annotated[float, Field(gt=0.0, le=8.0)], ...], Field(min_length=1)] = (1.0,)
    flip: bool = False
    precision: Annotated[Literal["bf16"] | None, CountedWhenSet] = None

    @model_validator(mode="after")
    def _windows_cover(self) -> Self:
        if self.mode == "whole" and (self.crop or self.stride):
            raise ValueError("crop and stride have no meaning in mode whole; use mode slide, or leave them out")
        if self.resize and self.resize[1] > self.resize[0]:
            raise ValueError(f"resize {self.resize} must be (long, short); swap them")
        if self.crop and self.stride and (self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]):
            raise ValueError(f"stride {self.stride} exceeds crop {self.crop} and would leave pixels out; lower it")
        return self

    def options(self) -> dict[str, Any]:
        """The keyword arguments of segvit.predict that are not its defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


class EvaluateConfig(Section):
    """Scoring on a split of the shard set.

    A registered model predicts by `inference`, and the gate decides by its scores. `also`: further ways of predicting
    that every variant is scored by, each by its name, as over several scales.
    """

    split: str = "val"
    inference: InferenceConfig = InferenceConfig()
    also: Annotated[dict[Name, InferenceConfig], NotFingerprinted] = Field(default_factory=dict)
    num_examples: Annotated[int, Field(ge=0, le=16)] = 4
    latency_repeats: Annotated[Positive, NotFingerprinted] = 10
