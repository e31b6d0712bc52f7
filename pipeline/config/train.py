"""Optimisation and augmentation of one training run; lengths are pixels."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.section import Fraction, Positive, PositiveFloat, Range, Section
from pipeline.workflow.step import NotFingerprinted


class AugmentationConfig(Section):
    """Training augmentation (SegViT section 6): resize, crop, flip, photometric distortion.

    The image is scaled to fit `resize_long` x `resize_short` (both None: its own size), times a factor drawn from
    `scale_range`; a crop is drawn again, `crop_tries` times at most, while one class covers more than
    `max_class_fraction` of it. Brightness is in levels, hue in half degrees.
    `strength` fills in what is not given: `published`, the values below, which the paper trains with, or `strong`,
    large-scale jitter from a tenth to twice the size, smaller images padded to the crop.
    """

    strength: Literal["published", "strong"] = "published"
    resize_long: Positive | None = None
    resize_short: Positive | None = None
    scale_range: Range = (0.5, 2.0)
    max_class_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    crop_tries: Positive = 10
    flip_probability: Fraction = 0.5
    brightness: Annotated[float, Field(ge=0.0, le=128.0)] = 32.0
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue: Annotated[float, Field(ge=0.0, le=75.0)] = 18.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("strength") == "strong":
            return {"scale_range": (0.1, 2.0), **given}
        return given

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.resize_long is None) != (self.resize_short is None):
            raise ValueError("resize_long and resize_short go together; give both or neither")
        return self


class _Named(BaseModel):
    """Something that is looked up by name, and its options: a name alone stands for it with its own defaults."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @property
    def options(self) -> dict[str, Any]:
        """What is given beside the name."""
        return dict(self.model_extra or {})


class ScheduleConfig(_Named):
    """The learning rate over the steps after the warm-up: `poly`, `cosine`, `constant`, or one that was registered.

    Other keys than the name are its options (`power` of poly).
    """

    name: str = "poly"


class OptimizerConfig(_Named):
    """What takes a step: `adamw`, `lion`, `muon`, or one that was registered.

    Other keys than the name are its options (`betas`).
    """

    name: str = "adamw"


class TrainConfig(Section):
    """Optimisation. `batch_size` is global: over all workers and accumulation steps of one optimizer step.

    `steps`: 0 for a variant that is kept as it starts from another one.
    `continue_after`: this training goes on from the last state, optimizer included, of the training that is the same
    but for being of so many `steps`, which is done first where it has not been; the learning rate is then that of the
    schedule over all of `steps`. It is another training than one of as many steps in one go, with other results. Of
    no steps it says nothing.
    `precision`: tf32 is fp32 whose matrix products a GPU computes from 10 bits of mantissa, several times as fast;
    bf16 is mixed precision, parameters in float32; bf16_params computes in bf16 parameters too, and the
    optimizer keeps float32 masters, which are what is saved; with runtime.sharding full, bf16 is the same. All compute
    in fp32 on a device without such instructions, and the log says so.
    `activation_checkpointing`: keep of each trained backbone block its input alone, and compute the rest again in the
    backward pass: less memory, a forward pass of these blocks more, the same loss and gradients.
    `layer_decay`: the learning rate of each backbone block over that of the one after it (BEiT).
    `gradient_clip`: whether `gradient_clip_norm` bounds the norm of all gradients together, or that of the backbone's
    and of the decoder's (with `layer_decay`: of every block's) by itself.
    `ema_decay`: an average of the weights, which forgets this factor a step (after few steps: less), is validated,
    too, and saved and published where it is better; left out, there is none.
    `average_best`: at the end the mean of the weights of so many best validations is validated, too, likewise.
    `stop_after`: training ends early after so many validations in a row that found nothing better.
    `repeat_factor_threshold`: images with a class that fewer than this share of the images hold come more often,
    sqrt(threshold / share) times an epoch (LVIS); left out, every image comes once.
    `stream_buffer`: read shards from front to back, this many samples a request, for storage where a request is
    slow; left out, samples are read one by one in a full shuffle.
    `keep_checkpoints`: so many of the best checkpoints are kept while training runs, and always the last one.
    """

    steps: Annotated[int, Field(ge=0)]
    continue_after: Positive | None = None
    batch_size: Positive
    accumulation_steps: Positive = 1
    precision: Literal["fp32", "tf32", "bf16", "bf16_params"] = "fp32"
    activation_checkpointing: Annotated[bool, NotFingerprinted] = False
    freeze_blocks: Annotated[int, Field(ge=0)] = 0
    learning_rate: PositiveFloat = 2e-5
    decoder_lr_multiplier: PositiveFloat = 10.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: Annotated[int, Field(ge=0)] = 1500
    schedule: ScheduleConfig = ScheduleConfig()
    gradient_clip_norm: PositiveFloat = 35.0
    gradient_clip: Literal["together", "by_group"] = "together"
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    average_best: Annotated[int, Field(ge=2, le=16)] | None = None
    validate_every_steps: Positive
    checkpoint_every_steps: Annotated[Positive, NotFingerprinted]
    stop_after: Positive | None = None
    keep: Literal["best", "last"] = "best"
    keep_checkpoints: Annotated[Positive, NotFingerprinted] = 2
    seed: int = 0
    repeat_factor_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    stream_buffer: Positive | None = None
    augmentation: AugmentationConfig = AugmentationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation_steps {self.accumulation_steps}"
            )
        if self.continue_after is not None and self.continue_after >= self.steps > 0:
            raise ValueError(
                f"continue_after {self.continue_after} must be below steps {self.steps}, those before included"
            )
        if self.warmup_steps >= self.steps > 0:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}; lower it")
        return self
