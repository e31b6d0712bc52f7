"""The experiment file as a whole; `pipeline.config.file` reads it.

All lengths are pixels, counts are absolute, sizes are (height, width). What changes results sits in the sections
data, model, variants, loss, train, tune, evaluate and promote; what only changes speed sits in runtime.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.data import DataConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.policy import PromotionPolicy
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.section import Section
from pipeline.config.train import TrainConfig
from pipeline.config.tune import TuneConfig
from pipeline.config.variant import LossConfig, ModelSection, VariantConfig, VariantSettings
from pipeline.errors import UserError


class ExperimentConfig(Section):
    """A whole experiment: one file, no inheritance. `recipe`: which steps it runs, by name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    recipe: str = "segmentation"
    data: DataConfig
    model: ModelSection = ModelSection()
    variants: dict[str, VariantConfig] = Field(min_length=1)
    loss: LossConfig = LossConfig()
    train: TrainConfig
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromotionPolicy = PromotionPolicy()
    runtime: RuntimeConfig = RuntimeConfig()

    def variant_settings(self, name: str) -> VariantSettings:
        """How a variant trains; raises UserError for an unknown preset, or fields that do not go with it."""
        variant, loss, train = self.variants[name], self.loss, self.train
        preset = variant.preset or self.model.preset
        given = {**self.model.fields, **variant.fields}
        fields: dict[str, Any] = {}
        if preset is not None:
            from segvit.losses.segmentation_loss import PUBLISHED_WEIGHTS
            from segvit.presets import find_preset

            try:
                found = find_preset(preset)
                fields = found.model.replace(**given).to_dict()
            except ValueError as error:
                raise UserError(f"variants.{name}: preset {preset}: {error}") from error
            if dict(found.loss) != dict(PUBLISHED_WEIGHTS):
                loss = loss.model_copy(update={"weights": dict(found.loss), "with_published": False})
        own = [f"model.{field}" for field in variant.fields]
        if variant.loss is not None:
            loss = loss.model_copy(update={"weights": variant.loss, "with_published": False})
            own += [f"loss.{term}" for term in variant.loss]
        if variant.learning_rate is not None:
            train = train.model_copy(update={"learning_rate": variant.learning_rate})
            own.append("train.learning_rate")
        return VariantSettings(
            model=fields or given,
            loss=loss,
            train=train,
            localize_upsampling=variant.localize_upsampling,
            own=tuple(own),
        )

    def backbone_weights(self, name: str) -> str:
        """Where a variant's backbone weights come from: auto, random, or a file."""
        return self.variants[name].weights or self.model.weights or "auto"

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
        micro_batch = self.train.batch_size // self.train.accumulation_steps
        if micro_batch < self.runtime.max_workers:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} / train.accumulation_steps {self.train.accumulation_steps} "
                f"= {micro_batch} leaves some of runtime.num_workers {self.runtime.max_workers} without a sample; "
                "change one of them"
            )
        return self
