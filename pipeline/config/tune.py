"""What a search tries, and how long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Fraction, Positive, Range, Section
from pipeline.workflow.step import NotFingerprinted


class SearchRange(Section):
    """The values that a search may give one setting: exactly one of these.

    `log_uniform`, `uniform`: between two numbers; `int_uniform`: whole numbers, both ends included; `choice`: one of
    a list of any values.
    """

    log_uniform: Range | None = None
    uniform: tuple[float, float] | None = None
    int_uniform: tuple[int, int] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"a search range is exactly one of {kinds}, got {' and '.join(given) or 'none'}")
        for name in ("uniform", "int_uniform"):
            bounds = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{name} {list(bounds)} is [low, high]; swap the bounds")
        return self


class TuneConfig(Section):
    """A search with short training runs. `num_trials` 0 leaves it out.

    Attributes:
        num_trials: all trials of the search; a larger number later goes on with those that there are.
        variant: whose settings the trials run with.
        space: what is searched, a range by dotted path (loss.dice, train.learning_rate, model.decoder_layers); empty:
            the weights of the loss terms that the variant uses, each over the term's own range.
        hold_out: share of the train split that trials are scored on and do not train on, in runs of neighbours by key;
            0: they are scored on val, which the final figures are then no longer independent of.
        max_failed_fraction: more failed trials than this share of all, rounded up, end the search with an error.
        trial_retries: how often a trial whose process died goes on from its last checkpoint.
    """

    num_trials: Annotated[int, Field(ge=0), NotFingerprinted] = 0
    variant: str = "full"
    steps: Positive = 60
    report_every_steps: Positive = 20
    hold_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_val_samples: Positive | None = None
    space: dict[str, SearchRange] = Field(default_factory=dict)
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    max_failed_fraction: Annotated[Fraction, NotFingerprinted] = 0.3
    trial_retries: Annotated[int, Field(ge=0), NotFingerprinted] = 1
    seed: int = 0

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, given: Any) -> Any:
        return dict(_flat(given)) if isinstance(given, Mapping) else given


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Ranges by dotted path, whether the paths were written with dots or as nested mappings."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not set(value) & set(SearchRange.model_fields):
            yield from _flat(value, f"{path}.")
        else:
            yield path, value
