"""The experiment file: strict models for every section; `pipeline.config_file` reads it.

All lengths are pixels, counts are absolute, sizes are (height, width). What changes results sits in the sections
data, model, variants, loss, train, tune, evaluate and promote; what only changes speed sits in runtime.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError("a range is [low, high] with 0 < low <= high; swap or raise the bounds")
    return bounds


LossKind = Literal["mask", "cross_entropy"]
Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DigitsConfig(Section):
    """The embedded data set: scenes of real handwritten digits on textured ground."""

    num_train: Positive = 480
    num_val: Positive = 96
    image_size: Annotated[int, Field(ge=88)] = 112
    max_digits: Annotated[int, Field(ge=1, le=6)] = 3
    digit_size: tuple[Positive, Positive] = (44, 80)
    ink_threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.35

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.digit_size
        if not 8 <= low <= high <= self.image_size:
            raise ValueError(
                f"digit_size {low}-{high} must rise, from 8 to at most image_size {self.image_size}; "
                "lower digit_size or raise image_size"
            )
        return self


class FolderConfig(Section):
    """A data set of one's own; all paths are below data.root.

    `classes`: names a line in the order of their ids, or JSON or YAML with names and, if wanted, palette, ids and
    ignore_ids (255 by default).
    `val_fraction`: share of the images that a hash of data.seed and their name draws for val; None: the lists
    `splits`/train.txt and `splits`/val.txt say.
    """

    images: str = "images"
    labels: str = "labels"
    classes: str = "classes.txt"
    splits: str = "splits"
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None


class DataConfig(Section):
    """Which raw data set, and how it becomes shards.

    `root`: the data set's folder, the .zip or .tar that holds it, or a folder with the publisher's archives; a
    local path or any fsspec URL.
    `on_bad_sample`: `fail` at the first sample that cannot be read or used, or whose image is there twice; or
    `quarantine` them, at most `max_quarantined_fraction` of all.
    `max_long_side`: scale larger images and their label maps down to it, pixels; left out, images stay as they are.
    """

    dataset: str
    root: str | None = None
    seed: int = 0
    samples_per_shard: Positive = 128
    max_samples_per_split: Positive | None = None
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    max_quarantined_fraction: Fraction = 0.01
    max_long_side: Positive | None = None
    digits: DigitsConfig = DigitsConfig()
    folder: FolderConfig = FolderConfig()


class AugmentationConfig(Section):
    """Training augmentation (SegViT section 6): resize, crop, flip, photometric distortion.

    The image is scaled to fit `resize_long` x `resize_short` (both None: its own size), times a factor drawn from
    `scale_range`; a crop is drawn again, `crop_tries` times at most, while one class covers more than
    `max_class_fraction` of it. Brightness is in levels, hue in half degrees.
    `recipe` fills in what is not given: `published`, the values below, which the paper trains with, or `strong`,
    large-scale jitter from a tenth to twice the size, smaller images padded to the crop.
    """

    recipe: Literal["published", "strong"] = "published"
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
        if isinstance(given, dict) and given.get("recipe") == "strong":
            return {"scale_range": (0.1, 2.0), **given}
        return given

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.resize_long is None) != (self.resize_short is None):
            raise ValueError("resize_long and resize_short go together; give both or neither")
        return self


class ModelSettings(Section):
    """What all variants share. `weights`: auto, random, or a safetensors file."""

    backbone: str
    weights: str = "auto"
    crop: tuple[Positive, Positive]
    decoder_layers: Annotated[int, Field(ge=1, le=6)] = 3
    decoder_width: Positive | None = None
    decoder_heads: Positive | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1

    @model_validator(mode="after")
    def _crop_on_patch_grid(self) -> Self:
        found = re.search(r"patch(\d+)", self.backbone)
        if found is None:
            return self
        patch = int(found.group(1))
        for value in self.crop:
            if value % patch:
                below = value // patch * patch
                choices = f"{below} or {below + patch}" if below else f"{patch}"
                raise ValueError(f"crop {value} is not a multiple of patch size {patch}; use {choices}")
        return self


class VariantConfig(Section):
    """One model structure to train and compare; the settings mean what they mean in segvit.ModelConfig.

    `loss`: `mask`, the paper's, or `cross_entropy` per pixel, its ablation and all that `linear` can use.
    `decoder_layers`: of this variant, where model.decoder_layers does not suit it.
    `localize_upsampling`: start the upsampling layers of `shrunk` from least-squares position maps instead of
    at random, without which short training runs do not learn them (segvit.decoders.localize).
    `learning_rate`: of this variant, where train.learning_rate does not suit it.
    """

    structure: Literal["cascade", "single", "naive_qd", "shrunk", "linear"]
    out_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    chain_stages: bool = True
    share_queries: bool = True
    accumulate_masks: bool = True
    decoder_layers: Annotated[int, Field(ge=1, le=6)] | None = None
    shrink_at: Positive | None = None
    shrink_queries: Literal["nearest", "average", "convolution"] = "nearest"
    loss: LossKind = "mask"
    localize_upsampling: bool = False
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None

    @model_validator(mode="after")
    def _parts_match(self) -> Self:
        shrinks = self.structure in ("naive_qd", "shrunk")
        if shrinks and self.shrink_at is None:
            raise ValueError(f"structure {self.structure} needs shrink_at, the block before which tokens are halved")
        for name in ("shrink_at", "shrink_queries"):
            if not shrinks and name in self.model_fields_set:
                raise ValueError(f"structure {self.structure} does not shrink; leave {name} out")
        for name in ("chain_stages", "share_queries", "accumulate_masks"):
            if self.structure != "cascade" and name in self.model_fields_set:
                raise ValueError(f"structure {self.structure} has no stages; leave {name} out")
        if self.chain_stages and not self.share_queries:
            raise ValueError("share_queries false needs chain_stages false: chained stages start from one table")
        if self.localize_upsampling and self.structure != "shrunk":
            raise ValueError(f"structure {self.structure} has no upsampling layers; leave localize_upsampling out")
        if self.structure == "cascade" and not self.out_layers:
            raise ValueError("structure cascade needs out_layers, the backbone blocks it reads, such as [5, 7, 11]")
        most = {"single": 1, "naive_qd": 1, "shrunk": 2}.get(self.structure)
        if most is not None and self.out_layers is not None and not 1 <= len(self.out_layers) <= most:
            raise ValueError(f"structure {self.structure} reads 1 to {most} of out_layers, got {self.out_layers}")
        if self.structure == "linear" and self.loss != "cross_entropy":
            raise ValueError(f"loss {self.loss} compares masks, which structure linear has none of; use cross_entropy")
        return self


class LossConfig(Section):
    """Weights of the loss terms where no search chooses them."""

    weights: dict[str, Annotated[float, Field(ge=0.0)]] = {"class": 1.0, "focal": 20.0, "dice": 1.0}
    count_ignored_as_background: bool = True


class TrainConfig(Section):
    """Optimisation. `batch_size` is global: over all workers and accumulation steps of one optimizer step.

    `repeat_factor_threshold`: images with a class that fewer than this share of the images hold come more often,
    sqrt(threshold / share) times an epoch (LVIS); left out, every image comes once.
    `stream_buffer`: read shards from front to back, this many samples a request, for storage where a request is
    slow; left out, samples are read one by one in a full shuffle.
    `keep_checkpoints`: so many of the best checkpoints are kept while training runs, and always the last one.
    """

    steps: Positive
    batch_size: Positive
    accumulation_steps: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze_blocks: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    decoder_lr_multiplier: Annotated[float, Field(gt=0.0)] = 10.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 1500
    poly_power: Annotated[float, Field(gt=0.0)] = 1.0
    gradient_clip_norm: Annotated[float, Field(gt=0.0)] = 35.0
    validate_every_steps: Positive
    checkpoint_every_steps: Positive
    keep: Literal["best", "last"] = "best"
    keep_checkpoints: Positive = 2
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
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}; lower it")
        return self


class SearchRange(Section):
    """What one setting is searched in: exactly one of the four."""

    log_uniform: tuple[float, float] | None = None
    uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None
    choice: list[Any] | None = None


class TuneConfig(Section):
    """A search over any settings."""

    num_trials: Annotated[int, Field(ge=0)] = 0
    variant: str = "full"
    steps: Positive = 60
    report_every_steps: Positive = 20
    max_val_samples: Positive | None = None
    space: dict[str, SearchRange] = {}
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    max_failed_fraction: Fraction = 0.3
    trial_retries: Annotated[int, Field(ge=0)] = 1
    seed: int = 0


class VariantSettings(Section):
    """How one variant trains."""

    model: dict[str, Any]
    loss: LossConfig
    train: TrainConfig
    localize_upsampling: bool = False
    own: tuple[str, ...] = ()

    def value(self, path: str) -> Any:
        """The setting at a dotted path."""
        value: Any = self.model_dump(mode="python")
        value["loss"] |= value["loss"].pop("weights")
        for part in path.split("."):
            value = value[part]
        return value

    def with_values(self, values: Any) -> VariantSettings:
        """The settings with others at dotted paths."""
        content = self.model_dump(mode="python")
        for path, value in values.items():
            *parents, last = path.split(".")
            target = content
            for part in parents:
                target = target[part]
            if parents == ["loss"]:
                target = target["weights"]
            if parents == ["model"] and last not in target:
                raise ValueError(f"{path}: unknown")
            target[last] = value
        return VariantSettings.model_validate(content)


class InferenceConfig(Section):
    """How images are predicted, in evaluation and by the registered model; see segvit.predict.

    `mode` slide goes window by window, of `crop` (height, width) pixels in steps of `stride`, by default the
    training crop and two thirds of it. Scores are averaged over `scales` and, with `flip`, mirror images.
    """

    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[Positive, Positive] | None = None
    stride: tuple[Positive, Positive] | None = None
    scales: Annotated[tuple[Annotated[float, Field(gt=0.0, le=8.0)], ...], Field(min_length=1)] = (1.0,)
    flip: bool = False

    @model_validator(mode="after")
    def _windows_cover(self) -> Self:
        if self.mode == "whole" and (self.crop or self.stride):
            raise ValueError("crop and stride have no meaning in mode whole; use mode slide, or leave them out")
        if self.crop and self.stride and (self.stride[0] > self.crop[0] or self.stride[1] > self.crop[1]):
            raise ValueError(f"stride {self.stride} exceeds crop {self.crop} and would leave pixels out; lower it")
        return self

    def options(self) -> dict[str, Any]:
        """The keyword arguments of segvit.predict that are not its defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)


class EvaluateConfig(Section):
    """Scoring on a split of the shard set."""

    split: str = "val"
    inference: InferenceConfig = InferenceConfig()
    num_examples: Annotated[int, Field(ge=0, le=16)] = 4
    latency_repeats: Annotated[int, Field(ge=1)] = 10


class PromotionPolicy(Section):
    """What a candidate must hold to become champion."""

    min_miou: Fraction = 0.0
    max_regression: Fraction = 0.0
    protected_classes: tuple[str, ...] = ()
    max_class_regression: Fraction = 0.05
    max_gflops: Annotated[float, Field(gt=0.0)] | None = None
    max_parameters: Positive | None = None
    max_latency_ms: Annotated[float, Field(gt=0.0)] | None = None


class RuntimeConfig(Section):
    """Where and how fast it runs; none of this changes what is computed beyond rounding.

    Attributes:
        num_workers: training processes of one training run, one a GPU; or [least, most], as many as there is room
            for: a run goes on with fewer when nodes are lost, and with more when they come. The global batch stays.
        cpus_per_worker: CPU cores reserved for, and threads used by, each.
        use_gpu: None means: when the machine (or the cluster) has one.
        loader_workers: loader processes beside each training process.
        trials_at_once: concurrent trials of the search.
    """

    num_workers: Positive | tuple[Positive, Positive] = 1
    cpus_per_worker: Positive = 1
    use_gpu: bool | None = None
    loader_workers: Annotated[int, Field(ge=0)] = 0
    compile: bool = False
    trials_at_once: Positive = 2
    prepare_tasks: Positive = 8
    log_every_steps: Positive = 10
    max_failures: Annotated[int, Field(ge=-1)] = 2

    @field_validator("num_workers")
    @classmethod
    def _least_and_most(cls, num_workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(num_workers, tuple) and num_workers[0] > num_workers[1]:
            raise ValueError(f"num_workers {list(num_workers)} is [least, most]; swap them")
        return num_workers

    @property
    def max_workers(self) -> int:
        """The most training processes of one run."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class ExperimentConfig(Section):
    """A whole experiment: one file, no inheritance."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    data: DataConfig
    model: ModelSettings
    variants: dict[str, VariantConfig] = Field(min_length=1)
    loss: LossConfig = LossConfig()
    train: TrainConfig
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromotionPolicy = PromotionPolicy()
    runtime: RuntimeConfig = RuntimeConfig()

    @field_validator("variants")
    @classmethod
    def _variant_names(cls, variants: dict[str, VariantConfig]) -> dict[str, VariantConfig]:
        for name in variants:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"variant name {name!r} may hold a-z, 0-9 and _ only")
        return variants

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        if self.tune.num_trials and self.tune.variant not in self.variants:
            raise ValueError(
                f"tune.variant {self.tune.variant!r} is no variant; choose from {', '.join(self.variants)}"
            )
        if self.tune.num_trials and self.variants[self.tune.variant].loss != "mask":
            raise ValueError(
                f"tune.variant {self.tune.variant!r} trains with cross-entropy, which has no weights to search; "
                "choose a variant with loss mask, or set tune.num_trials to 0"
            )
        micro_batch = self.train.batch_size // self.train.accumulation_steps
        if micro_batch < self.runtime.max_workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} / train.accumulation_steps {self.train.accumulation_steps} "
                f"= {micro_batch} leaves some of runtime.num_workers {self.runtime.max_workers} without a sample; "
                "change one of them"
            )
        return self
