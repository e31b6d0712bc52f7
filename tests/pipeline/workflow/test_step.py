from __future__ import annotations

import enum
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from pipeline.config import DataConfig, EvaluateConfig, InferenceConfig, LossConfig, TrainConfig, TuneConfig
from pipeline.records import Report, SearchResult
from pipeline.workflow.lease import Lease, Rank
from pipeline.workflow.step import CountedWhenSet, NotFingerprinted, Step, StepContext, canonical, missing_outputs, step
from pipeline.workflow.tracking import Tracking

ROOT = Path(__file__).parents[3]
TRAIN = TrainConfig(steps=9, batch_size=2, warmup_steps=1, validate_every_steps=3, checkpoint_every_steps=3)
TRACKING = Tracking("sqlite:////nowhere/mlflow.db")


def context() -> StepContext:
    return StepContext(
        workspace="/space",
        tracking=TRACKING,
        flow_run_id="f",
        run_id="r",
        step="report",
        label="l",
        fingerprint="ab" * 32,
        lease=Lease("report", "/space/leases/report", Rank(1, "r")),
    )


def make_step(version: int = 1, name: str = "report") -> Step[..., Report]:
    @step(version=version, name=name)
    def report(context: StepContext, config: Any, weights: SearchResult | None = None, *, scale: float = 1.0) -> Report:
        """Make a report."""
        return Report(uri=f"/x/{scale}", digest=str(config))

    return report


def fingerprint(*args: Any, version: int = 1, name: str = "report", **params: Any) -> str:
    made = make_step(version, name)
    return made.fingerprint(made.bind(args, params))


def weights(miou: float | None = None, class_weight: float = 1.0) -> SearchResult:
    values = {"loss.class": class_weight}
    return SearchResult(variant="full", values=values, miou=miou, num_trials=3, trials_uri="/t", trials_digest="d")


def test_fingerprint__equal_for_positional_keyword_and_default() -> None:
    expected = fingerprint(LossConfig(), None, scale=1.0)
    assert fingerprint(LossConfig()) == expected
    assert fingerprint(config=LossConfig(), weights=None) == expected


def test_fingerprint__a_new_parameter_left_at_none_keeps_it() -> None:
    def older(context: StepContext, config: int) -> Report:
        raise NotImplementedError

    def newer(context: StepContext, config: int, inference: str | None = None) -> Report:
        raise NotImplementedError

    made = [step(version=1, name="train")(fn) for fn in (older, newer)]
    first, second = (one.fingerprint(one.bind((5,), {})) for one in made)
    assert first == second
    assert made[1].fingerprint(made[1].bind((5, "slide"), {})) != first


def test_fingerprint__changes_with_name_version_and_every_parameter() -> None:
    train = TrainConfig(steps=9, batch_size=2, warmup_steps=1, validate_every_steps=3, checkpoint_every_steps=3)
    longer = train.model_copy(update={"steps": 10})
    seen = {
        fingerprint(train),
        fingerprint(train, version=2),
        fingerprint(train, name="other"),
        fingerprint(train, scale=2.0),
        fingerprint(longer),
        fingerprint(train, weights()),
        fingerprint(train, weights(class_weight=2.0)),
    }
    assert len(seen) == 7


def test_fingerprint__records_count_by_identity() -> None:
    assert fingerprint({}, weights(miou=0.4)) == fingerprint({}, weights(miou=0.5))


def test_fingerprint__same_in_processes_with_other_hash_seeds() -> None:
    code = (
        "from pipeline.workflow.step import step, StepContext\n"
        "from pipeline.records import Report\n"
        "@step(version=3)\n"
        "def s(context: StepContext, names, table) -> Report: ...\n"
        "print(s.fingerprint(s.bind((frozenset({'a', 'b', 'c'}), {KEYS}), {})))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code.replace("KEYS", keys)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, keys in (("1", "'x': 1, 'y': 2.5"), ("2", "'y': 2.5, 'x': 1"))
    }
    # Frozen: another value would make every finished step of every user run again.
    assert outputs == {"018e931170abcfadaf02a0609437bc1e272e5b71e770d2432f4ecd8092cf183b\n"}


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False) | st.lists(st.booleans())))
def test_canonical__ignores_dict_order(table: dict[str, Any]) -> None:
    backwards = dict(reversed(list(table.items())))
    assert fingerprint(table) == fingerprint(backwards)


@dataclass(frozen=True)
class Size:
    height: int
    width: int


class Mode(enum.Enum):
    FAST = "fast"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Size(2, 3), {"Size": {"height": 2, "width": 3}}),
        (Mode.FAST, {"Mode": "fast"}),
        (Path("/a/b"), "/a/b"),
        ((1, [2.0, None]), [1, [2.0, None]]),
        ({3, 1, 2}, {"set": [1, 2, 3]}),
        ({(1, 2): "x"}, {"mapping": [[[1, 2], "x"]]}),
        (float("inf"), {"float": "inf"}),
        (True, True),
    ],
)
def test_canonical__values(value: Any, expected: Any) -> None:
    assert canonical(value) == expected


def test_fingerprint__refuses_what_has_no_lasting_form() -> None:
    with pytest.raises(TypeError, match=r"step report, parameter 'config': a value of type function has no"):
        fingerprint({"hook": [1, lambda: 1]})


def test_bind__tells_arguments_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"step report: got an unexpected keyword argument 'sclae'"):
        make_step().bind((1,), {"sclae": 2.0})


def test_step__called_directly_runs_and_keeps_its_doc() -> None:
    report = make_step()
    assert report(context(), "c", scale=2.0) == Report(uri="/x/2.0", digest="c")
    assert report.__doc__ == "Make a report."


def test_run__refuses_another_record_type() -> None:
    @step(version=1)
    def wrong(context: StepContext) -> Report:
        return weights()  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"step wrong returned SearchResult, not Report"):
        wrong.run(context(), {})


def test_step__refuses_version_zero_and_reserved_names() -> None:
    with pytest.raises(ValueError, match=r"step report: version must be >= 1, got 0"):
        make_step(version=0)
    with pytest.raises(ValueError, match=r"parameter 'label' is a keyword of Flow\.step; rename it"):

        @step(version=1)
        def labelled(context: StepContext, label: str) -> Report:
            raise AssertionError


def test_step__pickles_by_reference_where_it_can_be_imported() -> None:
    module = type(sys)("steps_of_a_flow")
    source = (
        "from pipeline.workflow.step import step, StepContext\n"
        "from pipeline.records import Report\n"
        "@step(version=1)\n"
        "def make(context: StepContext) -> Report: ...\n"
    )
    exec(source, module.__dict__)
    sys.modules["steps_of_a_flow"] = module
    try:
        assert pickle.loads(pickle.dumps(module.make)) is module.make
    finally:
        del sys.modules["steps_of_a_flow"]


def test_context__outputs_and_run_name_belong_to_the_fingerprint() -> None:
    assert context().output_uri("a", "b.json") == "/space/report/abababababababab/a/b.json"
    assert context().run_name == "report-abababababababab"


def test_missing_outputs__names_the_uri_that_is_gone(tmp_path: Path) -> None:
    there = tmp_path / "report.html"
    there.write_text("x")
    assert missing_outputs(Report(uri=str(there), digest="d")) is None
    there.unlink()
    assert missing_outputs(Report(uri=str(there), digest="d")) == f"{there} is gone"


def test_broken_outputs__a_verify_that_fails_is_a_reason(tmp_path: Path) -> None:
    def verify(record: Report, tracking: Tracking, arguments: Any) -> str | None:
        raise OSError(f"disk {arguments['disk']} on fire")

    @step(version=1, verify=verify)
    def report(context: StepContext) -> Report:
        raise AssertionError

    reason = report.broken_outputs(Report(uri=str(tmp_path), digest="d"), TRACKING, {"disk": 3})
    assert reason == "its outputs cannot be verified (disk 3 on fire)"


class Budget(BaseModel):
    model_config = ConfigDict(extra="allow")

    steps: int = 10
    retries: Annotated[int, NotFingerprinted] = 1


def test_fingerprint__leaves_out_what_changes_no_result() -> None:
    assert fingerprint(Budget()) == fingerprint(Budget(retries=5))
    assert fingerprint(Budget()) != fingerprint(Budget(steps=11))
    assert fingerprint([{"a": Budget()}]) == fingerprint([{"a": Budget(retries=5)}])
    # What a model that allows extra keys was given counts.
    assert fingerprint(Budget()) != fingerprint(Budget.model_validate({"power": 2.0}))


def test_fingerprint__a_field_that_came_later_counts_when_set() -> None:
    class Earlier(BaseModel):
        steps: int = 10

    class Later(Earlier):
        precision: Annotated[str | None, CountedWhenSet] = None
        limit: int | None = None

    assert canonical(Later()) == {"Later": {"steps": 10, "limit": None}}
    assert canonical(Later(precision="bf16")) == {"Later": {"steps": 10, "precision": "bf16", "limit": None}}
    assert fingerprint(InferenceConfig()) != fingerprint(InferenceConfig(precision="bf16"))


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (DataConfig(dataset="digits"), "max_quarantined_fraction", 0.5),
        (TuneConfig(), "num_trials", 9),
        (TuneConfig(), "max_failed_fraction", 0.9),
        (TuneConfig(), "trial_retries", 4),
        (TRAIN, "checkpoint_every_steps", 7),
        (TRAIN, "keep_checkpoints", 5),
        (EvaluateConfig(), "latency_repeats", 3),
    ],
)
def test_fingerprint__settings_that_may_be_raised_afterwards(section: BaseModel, field: str, value: Any) -> None:
    changed = section.model_copy(update={field: value})
    assert changed != section
    assert fingerprint(changed) == fingerprint(section)
