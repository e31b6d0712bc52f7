"""The recipe of ablations: its cells, what is trained again when rows or seeds come, and what it leaves."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from pipeline.workflow.tracking import Tag, Tracking
from tests.faults.kill_flow import EXPERIMENT, Flow
from tests.flows.facts import facts


def written(folder: Path, variants: dict[str, Any], seeds: list[int]) -> str:
    experiment = {**EXPERIMENT, "recipe": "ablation", "seeds": seeds, "variants": variants, "name": "rows"}
    del experiment["tune"]
    experiment["train"] = {**experiment["train"], "steps": 2, "validate_every_steps": 2}
    experiment["data"] = {**experiment["data"], "digits": {"num_train": 4, "num_val": 2, "image_size": 96}}
    (folder / "rows.yaml").write_text(yaml.safe_dump(experiment))
    return str(folder / "rows.yaml")


def killed_after_a_training(config: Path, workspace: Path) -> set[str]:
    """Kill the cluster as soon as the cell is trained; the steps that had finished."""
    flow = Flow(config, workspace)
    while flow.states.get("train/full-3") != "done":
        assert not flow.ended, flow.tail()
        time.sleep(0.05)
    finished = {label for label, state in flow.states.items() if state == "done"}
    flow.kill("cluster")
    assert flow.wait_for_end(180), flow.tail()
    return finished


def test_ablation__cells_are_trained_once_and_the_table_holds_them_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = ("--workspace", str(tmp_path / "ws"))
    full = {"structure": "cascade", "out_layers": [1, 3]}
    linear = {"structure": "linear", "out_layers": [3], "loss": {"cross_entropy": 1.0}}
    finished = killed_after_a_training(Path(written(tmp_path, {"full": full}, [3])), tmp_path / "ws")
    config = written(tmp_path, {"full": full, "linear": linear}, [3])
    steps = {step["label"]: step for step in facts(capfd, "plan", config, *workspace)}
    assert {label for label, step in steps.items() if step["cached"]} >= finished
    assert not steps["study"]["cached"]
    summary = facts(capfd, "run", config, *workspace)
    runs = Tracking.for_workspace(workspace[1]).runs(f"tags.`{Tag.KIND}` = 'step'")
    done = Counter(run.data.tags[Tag.LABEL] for run in runs if Tag.DONE in run.data.tags)
    assert done == Counter(list(steps))  # each once, over both runs
    rows = pq.read_table(f"{summary['study']}/study.parquet").to_pylist()
    assert [(row["variant"], row["seeds"], row["weights"]) for row in rows] == [
        ("full", [3], "random"),
        ("linear", [3], "random"),
    ]
    assert set(summary["evaluations"]) == {"full-3", "linear-3"}
    for row in rows:
        assert row["mious"] == [summary["evaluations"][f"{row['variant']}-3"]["miou"]]
        assert row["low"] <= row["miou"] <= row["high"]
        assert row["step"] == 2
    assert "linear" in Path(summary["study"], "study.md").read_text()

    # One more seed and one more row: the cells that there are stay as they are.
    more = written(tmp_path, {"full": full, "linear": linear, "again": {**full, "start_from": "full"}}, [3, 4])
    steps = {step["label"]: step for step in facts(capfd, "plan", more, *workspace)}
    trained = {label: step["cached"] for label, step in steps.items() if label.startswith("train/")}
    assert trained == {
        "train/full-3": True,
        "train/linear-3": True,
        "train/again-3": False,
        "train/full-4": False,
        "train/linear-4": False,
        "train/again-4": False,
    }
    assert steps["train/again-4"]["depends_on"] == ["prepare", "fetch_backbone", "train/full-4"]
    assert not steps["study"]["cached"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["seeds=[1,1]"], "seeds [1, 1] must differ; the same seed trains the same model"),
        (["evaluate.also.flipped={flip: true}"], "evaluate.also flipped has no column in the table of recipe ablation"),
        (["tune.num_trials=2"], "tune.num_trials is 2, and recipe ablation searches nothing; set it to 0"),
    ],
)
def test_ablation__what_it_asks_of_an_experiment(
    changes: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, {"full": {"structure": "cascade", "out_layers": [1, 3]}}, [0])
    overrides = [word for one in changes for word in ("--set", one)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", config, *overrides, "--workspace", str(tmp_path / "ws")])
    assert ended.value.code == 1
    assert message in capfd.readouterr().err
