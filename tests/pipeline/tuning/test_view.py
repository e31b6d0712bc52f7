from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from flows.present.search import search_view
from pipeline.config import TuneConfig
from pipeline.errors import UserError
from pipeline.reports.search_page import write_search_report
from pipeline.tuning.record import SearchRecord, SearchSettings, TrialRecord, TrialScore
from pipeline.tuning.view import SearchFacts, load_facts, load_search
from pipeline.workflow.runs import StepSummary
from pipeline.workflow.tracking import RunState, Tag, Tracking

TUNE = TuneConfig(num_trials=6, steps=60, report_every_steps=20, reduction_factor=2)


def trial(number: int, state: str, *mious: float, **changes: Any) -> TrialRecord:
    values = {"class_weight": 1.0 + number, "focal_weight": 10.0 * (number + 1), "dice_weight": 0.5}
    scores = tuple(
        TrialScore(step=20 * place, miou=miou, order=10 * number + place, stopped=state == "stopped")
        for place, miou in enumerate(mious, 1)
    )
    return TrialRecord(number=number, values=values, scores=scores, state=state, attempts=1, **changes)  # type: ignore[arg-type]


def write_search(uri: Path, *, searched_rate: bool = False) -> None:
    tune = TUNE.model_copy(update={"learning_rate": (1e-5, 1e-3)}) if searched_rate else TUNE
    record = SearchRecord.take_over(str(uri / "trials"), SearchSettings(tune=tune, learning_rate=2e-5))
    trials = [
        trial(0, "finished", 0.1, 0.2, 0.3, seconds=12.5),
        trial(1, "stopped", 0.45),
        trial(2, "failed", 0.5, cause="the loss is nan at step 33 <b>"),
        trial(3, "finished", 0.2, 0.3, 0.4),
        trial(4, "running", 0.15),
    ]
    for one in trials:
        rate = {"learning_rate": 1e-5 * (one.number + 1)} if searched_rate else {}
        record.save(one.model_copy(update={"values": one.values | rate}))


def step(state: RunState) -> StepSummary:
    return StepSummary(
        run_id="s",
        label="tune",
        step="tune",
        version=2,
        state=state,
        depends_on=(),
        started=None,
        seconds=None,
        fingerprint="f" * 64,
        reused_from=None,
        error=None,
    )


@pytest.fixture
def facts(tmp_path: Path) -> SearchFacts:
    write_search(tmp_path / "search")
    return load_facts(str(tmp_path / "search"), "0123456789abcdef", "camvid", step(RunState.RUNNING))


def test_load_facts__best_first_failed_last(facts: SearchFacts, tmp_path: Path) -> None:
    assert facts.chosen == "0003"
    assert [row.trial_id for row in facts.trials] == ["0003", "0001", "0000", "0004", "0002"]
    assert [row.state for row in facts.trials] == ["finished", "stopped", "finished", "running", "failed"]
    assert (facts.num_trials, facts.steps, facts.rungs) == (6, 60, (20, 40))
    assert facts.searched == ("class_weight", "focal_weight", "dice_weight")
    assert {row.learning_rate for row in facts.trials} == {2e-5}
    killed = load_facts(str(tmp_path / "search"), "0123456789abcdef", "camvid", step(RunState.ABANDONED))
    assert [row.state for row in killed.trials] == ["finished", "stopped", "finished", "unfinished", "failed"]


def test_search_view__says_all_of_it(facts: SearchFacts) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(search_view(facts))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "camvid 0123456789ab  search running  4 of 6 trials ended" in printed
    lines = printed.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("│ 0")] == ["0003", "0001", "0000", "0004", "0002"]
    best = next(line for line in lines if "0003 *" in line)
    for text in ("4", "40", "0.5", "2.00e-05", "0.4000", "60/60", "finished"):
        assert text in best.split()
    assert "the loss is nan at step 33 <b>" in next(line for line in lines if "0002" in line)


@pytest.mark.parametrize("searched_rate", [False, True])
def test_write_search_report__three_plots_and_a_page_of_its_own(tmp_path: Path, searched_rate: bool) -> None:
    write_search(tmp_path / "search", searched_rate=searched_rate)
    facts = load_facts(str(tmp_path / "search"), "0123", "camvid", step(RunState.DONE))
    files = write_search_report(facts, tmp_path / "out")
    assert [file.name for file in files] == ["weights.png", "parallel.png", "rungs.png", "index.html"]
    for file in files[:3]:
        with Image.open(file) as picture:
            picture.load()
            assert picture.width == 1100
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    page = files[3].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "the loss is nan at step 33 &lt;b&gt;" in page
    assert page.index("<td>0003</td>") < page.index("<td>0001</td>") < page.index("<td>0002</td>")
    assert page.count('<tr class="chosen">') == 1
    before = [file.read_bytes() for file in files]
    with pytest.raises(UserError, match=r"weights\.png exists; choose another folder or use --overwrite"):
        write_search_report(facts, tmp_path / "out")
    write_search_report(facts, tmp_path / "out", overwrite=True)
    assert [file.read_bytes() for file in files] == before


def test_write_search_report__a_search_without_a_score(tmp_path: Path) -> None:
    record = SearchRecord.take_over(str(tmp_path / "trials"), SearchSettings(tune=TUNE, learning_rate=2e-5))
    record.save(trial(0, "running"))
    facts = load_facts(str(tmp_path), "0123", "camvid", step(RunState.RUNNING))
    assert facts.chosen is None
    assert len(write_search_report(facts, tmp_path / "out")) == 4


def test_load_search__finds_it_by_the_flows_run(tracking: Tracking, tmp_path: Path) -> None:
    client = tracking.client()
    flow_tags = {Tag.KIND: "flow", Tag.FLOW: "camvid", Tag.STATE: "finished", Tag.WORKSPACE: str(tmp_path)}
    flow = client.create_run(tracking.experiment_id(), tags=flow_tags).info.run_id
    client.set_terminated(flow, "FINISHED")
    with pytest.raises(UserError, match=f"run {flow[:12]} has no search; set tune.num_trials in its experiment file"):
        load_search(tracking, "latest")
    step_tags = {
        Tag.KIND: "step",
        Tag.PARENT: flow,
        Tag.LABEL: "tune",
        Tag.STEP: "tune",
        Tag.VERSION: "2",
        Tag.STATE: "skipped",
    }
    step_run = client.create_run(tracking.experiment_id(), tags=step_tags).info.run_id
    with pytest.raises(UserError, match=r"has not begun: its step is skipped"):
        load_search(tracking, flow[:8])
    tracking.set_tags(step_run, {Tag.FINGERPRINT: "ab" * 32, Tag.STATE: "reused"})
    with pytest.raises(UserError, match=r"nothing of the search of run \w+ lies at .*/tune/abababababababab"):
        load_search(tracking, flow[:8])
    write_search(tmp_path / "tune" / "abababababababab")
    facts = load_search(tracking, flow[:8])
    assert (facts.run_id, facts.flow, facts.state, facts.chosen) == (flow, "camvid", RunState.REUSED, "0003")
    json.dumps(facts.model_dump(mode="json"), allow_nan=False)
    (tmp_path / "tune" / "abababababababab" / "trials" / "search.json").write_text("{")
    with pytest.raises(UserError, match=r"search\.json in .* is damaged; run the experiment again"):
        load_search(tracking, flow)
