"""The experiment file as a whole; `pipeline.config.file` reads it.

All lengths are pixels, counts are absolute, sizes are (height, width). What changes results sits in the sections
data, model, variants, loss, train, tune, evaluate and promote; what only changes speed sits in runtime.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config.data import DataConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.policy import PromotionPolicy
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.section import Section
from pipeline.config.train import TrainConfig
from pipeline.config.tune import TuneConfig
from pipeline.config.variant import (
    LossConfig,
    ModelSection,
    VariantConfig,
    VariantSettings,
    merged_train,
    setting_paths,
)
from pipeline.errors import UserError
from pipeline.storage.names import PUBLISHED_SUFFIXES

MODEL_SCHEME = "models:/"
_ELSEWHERE = (
    "a registered version (models:/NAME@champion, models:/NAME/VERSION), a checkpoint folder (./FOLDER) or a file of "
    f"the published format ({', '.join(PUBLISHED_SUFFIXES)})"
)


def lies_elsewhere(source: str) -> bool:
    """Whether a start is a registered version, or names files: no variant's name holds such signs."""
    return source.startswith(MODEL_SCHEME) or "/" in source or source.endswith(PUBLISHED_SUFFIXES)


def _start_of(variant: VariantConfig, model: ModelSection) -> str | None:
    return variant.start_from if "start_from" in variant.model_fields_set else model.start_from


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
        if variant.train is not None:
            train = merged_train(train, variant.train)
            own += [f"train.{path}" for path in setting_paths(variant.train)]
        return VariantSettings(
            model=fields or given,
            loss=loss,
            train=train,
            distill=variant.distill,
            own=tuple(own),
        )

    def backbone_weights(self, name: str) -> str:
        """Where a variant's backbone weights come from: auto, random, or a file."""
        return self.variants[name].weights or self.model.weights or "auto"

    def source_grid(self, name: str) -> tuple[int, int] | None:
        """Rows and columns of patches that a variant's weights file was trained with, where they are told."""
        return self.variants[name].source_grid or self.model.source_grid

    def start_from(self, name: str) -> str | None:
        """What a variant starts from: its own `start_from`, else the model section's; None: the backbone's weights."""
        return _start_of(self.variants[name], self.model)

    def training_order(self) -> tuple[str, ...]:
        """The variants, each after the one that it starts from, else as the file has them."""
        order: list[str] = []

        def add(name: str) -> None:
            if name not in order:
                source = self.start_from(name)
                if source in self.variants:
                    add(source)
                order.append(name)

        for name in self.variants:
            add(name)
        return tuple(order)

    @field_validator("variants")
    @classmethod
    def _variant_names(cls, variants: dict[str, VariantConfig], given: ValidationInfo) -> dict[str, VariantConfig]:
        model = given.data.get("model", ModelSection())
        if model.start_from is not None and not lies_elsewhere(model.start_from):
            raise ValueError(
                f"model.start_from {model.start_from!r} is for all variants, and is {_ELSEWHERE}; a variant that "
                "starts from another one says so itself"
            )
        for name in variants:
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"variant name {name!r} may hold a-z, 0-9 and _ only")
        for name, variant in variants.items():
            if variant.distill and _start_of(variant, model) is None:
                raise ValueError(f"{name}.distill needs a teacher: name it with {name}.start_from")
            cls._check_start(name, _start_of(variant, model), variants)
        return variants

    @staticmethod
    def _check_start(name: str, source: str | None, variants: dict[str, VariantConfig]) -> None:
        path = [name]
        while source is not None and not lies_elsewhere(source):
            if source not in variants:
                others = ", ".join(other for other in variants if other != path[-1])
                raise ValueError(
                    f"{path[-1]}.start_from {source!r} is no variant; choose from {others or 'no other'}, or "
                    f"name {_ELSEWHERE}"
                )
            path.append(source)
            if source in path[:-1]:
                raise ValueError(f"start_from goes in a circle: {' from '.join(path)}; one of them must start anew")
            source = variants[source].start_from

    @model_validator(mode="after")
    def _across_sections(self) -> Self:
        if self.tune.num_trials and self.tune.variant not in self.variants:
            raise ValueError(
                f"tune.variant {self.tune.variant!r} is no variant; choose from {', '.join(self.variants)}"
            )
        source = self.start_from(self.tune.variant) if self.tune.num_trials else None
        if source in self.variants:
            raise ValueError(
                f"tune.variant {self.tune.variant} starts from {source}, whose training waits for the search; "
                f"search {source}"
            )
        self._check_batch("train", self.train)
        for name, variant in self.variants.items():
            own = self.train
            if variant.train is not None:
                try:
                    own = merged_train(self.train, variant.train)
                except ValueError as error:
                    raise ValueError(f"variants.{name}.train: {error}") from None
                self._check_batch(f"variants.{name}.train", own)
            if own.steps == 0 and self.start_from(name) is None:
                raise ValueError(f"{name} has no steps and starts from no other: give it train.steps or start_from")
        return self

    def _check_batch(self, section: str, train: TrainConfig) -> None:
        micro_batch = train.batch_size // train.accumulation_steps
        if micro_batch < self.runtime.max_workers:
            raise ValueError(
                f"{section}.batch_size {train.batch_size} / {section}.accumulation_steps {train.accumulation_steps} "
                f"= {micro_batch} leaves some of runtime.num_workers {self.runtime.max_workers} without a sample; "
                "change one of them"
            )
