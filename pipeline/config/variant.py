"""What is trained: the model section, its variants, the loss, and all of it resolved for one variant.

A model is described by the fields of segvit.ModelConfig, flat: those that all structures share and the options of the
variant's own. They are judged by segvit, in the preflight; here they only come together.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.section import Positive, Section
from pipeline.config.train import TrainConfig

Weight = Annotated[float, Field(ge=0.0)]


class LossConfig(Section):
    """Weights of the loss terms (SegViT section 5), by the terms' names; 0 leaves a term out.

    Attributes:
        with_published: whether terms that are not named have their published weights, or none.
        count_ignored_as_background: whether ignored pixels count as "not this class" in mask terms, as published.
        label_smoothing: share of the targets of `class` and of the cross-entropies that goes to all classes alike.
    """

    weights: dict[str, Weight] = Field(default_factory=dict)
    with_published: bool = True
    count_ignored_as_background: bool = True
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _weights_by_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        own = {name: value for name, value in given.items() if name in cls.model_fields}
        return {**own, "weights": {**given.get("weights", {}), **{k: v for k, v in given.items() if k not in own}}}

    def resolved(self) -> dict[str, float]:
        """The weights of all terms that there are."""
        from segvit.losses.segmentation_loss import PUBLISHED_WEIGHTS

        return {**PUBLISHED_WEIGHTS, **self.weights} if self.with_published else dict(self.weights)


class _ModelFields(BaseModel):
    """Fields of segvit.ModelConfig, kept as they are given."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    preset: str | None = None
    weights: str | None = None
    start_from: str | None = None
    source_grid: tuple[Positive, Positive] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of segvit.ModelConfig that are given."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


class ModelSection(_ModelFields):
    """What all variants share: any field of segvit.ModelConfig, over those of a `preset` where one is named.

    `weights`: of the backbone: auto, random, or a safetensors file.
    `source_grid`: rows and columns of patches that such a file was trained with, where neither the file nor the
    architecture's published size tells.
    `start_from`: the model that every variant starts from which names no other: a registered version, a checkpoint
    folder or a file of the published format, as of a variant.
    """


class DistillConfig(Section):
    """How a variant learns from the model that it starts from.

    Attributes:
        images: crops of the train split that its restored features are fitted on.
    """

    images: int = Field(default=128, ge=1)


class VariantConfig(_ModelFields):
    """One model to train and compare: any field of segvit.ModelConfig, over the model section's; or a preset.

    What is written out, here or in the model section, wins over what a preset says.

    Attributes:
        loss: weights of all loss terms that this variant trains with; left out, those of the experiment (of a
            preset that is trained with another loss: the preset's).
        start_from: the trained model that this one starts from, of the same backbone: another variant, a registered
            version (`models:/NAME@champion`, `models:/NAME/3`), a checkpoint folder, or a file of the published
            format (`.pth`). What both have alike is taken, classes by their names (segvit.take_weights); left out,
            the model section's; null, only the backbone's pretrained weights.
        distill: fit what it restores to the features of the model that it starts from, before its first step
            (segvit.fit_upsampling); only for structure `anchored`.
        train: settings of the train section that do not suit it, such as `steps` or `learning_rate`.
    """

    loss: dict[str, Weight] | None = None
    distill: DistillConfig | None = None
    train: dict[str, Any] | None = None


def merged_train(train: TrainConfig, own: Mapping[str, Any]) -> TrainConfig:
    """The train section with a variant's own settings; raises ValueError naming the setting that breaks a rule."""

    def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        nested = {
            name: merge(below[name], value)
            for name, value in above.items()
            if isinstance(value, Mapping) and isinstance(below.get(name), Mapping)
        }
        return {**below, **above, **nested}

    try:
        # What was not given is filled in anew: it may depend on what is.
        return TrainConfig.model_validate(merge(train.model_dump(exclude_unset=True), own))
    except ValidationError as error:
        problems = (
            ": ".join([".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")]).removeprefix(": ")
            for one in error.errors()
        )
        raise ValueError("; ".join(problems)) from None


class VariantSettings(Section):
    """How one variant trains, resolved; what a search may change, by dotted path.

    Attributes:
        model: fields of segvit.ModelConfig.
        own: dotted paths that the variant sets itself; what another variant's search found does not change them.
    """

    model: dict[str, Any]
    loss: LossConfig
    train: TrainConfig
    distill: DistillConfig | None = None
    own: tuple[str, ...] = ()

    def value(self, path: str) -> Any:
        """The setting at a dotted path, as JSON has it; raises ValueError, naming the nearest, for one that is not."""
        node: Any = self._tree()
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                raise ValueError(f"{path} is no setting of a training run; {self._nearest(path)}")
            node = node[part]
        return node

    def with_values(self, values: Mapping[str, Any]) -> VariantSettings:
        """With other values at dotted paths; raises ValueError naming the path and the rule that a value breaks."""
        from segvit.config import ModelConfig

        tree = self._tree()
        for path, value in values.items():
            self.value(path)
            *above, last = path.split(".")
            node = tree
            for part in above:
                node = node[part]
            node[last] = value
        changed = {path.split(".")[1] for path in values if path.startswith("model.")}
        model = ModelConfig.from_dict(self.model).replace(**{name: tree["model"][name] for name in changed})
        try:
            return VariantSettings.model_validate({**tree, "model": model.to_dict(), "own": self.own})
        except ValidationError as error:
            problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError("; ".join(problems)) from None

    def for_search_of(self, variant: str, own_name: str, values: Mapping[str, Any]) -> VariantSettings:
        """With what a search found on `variant`: all of it on that variant, else what this one does not set itself."""
        if variant != own_name:
            known = [*setting_paths(self._tree())]
            values = {path: value for path, value in values.items() if path in known and path not in self.own}
        return self.with_values(values)

    def _tree(self) -> dict[str, Any]:
        """All settings as an experiment file would have them, defaults included."""
        from segvit.config import ModelConfig

        return {
            "model": ModelConfig.from_dict(self.model).to_dict(),
            "loss": {
                **self.loss.resolved(),
                "with_published": False,
                "count_ignored_as_background": self.loss.count_ignored_as_background,
                "label_smoothing": self.loss.label_smoothing,
            },
            "train": self.train.model_dump(mode="json"),
            "distill": self.distill and self.distill.model_dump(mode="json"),
        }

    def _nearest(self, path: str) -> str:
        known = [*setting_paths(self._tree())]
        close = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
        close = close or [one for one in known if one.rpartition(".")[2] == path.rpartition(".")[2]]
        return f"did you mean {', '.join(close)}?" if close else f"it begins with {', '.join(self._tree())}"


def setting_paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted paths of all settings of a tree, sections before what is in them."""
    found = []
    for name, value in tree.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found += setting_paths(value, f"{prefix}{name}.")
    return found
