from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flows.present.search import search_view
from pipeline.config import SearchRange, TuneConfig
from pipeline.errors import UserError
from pipeline.reports.search_page import write_search_report
from pipeline.reports.search_plots import values_against_miou
from pipeline.tuning.record import SearchRecord, TrialRecord, TrialScore
from pipeline.tuning.space import short_names
from pipeline.tuning.view import SearchSummary, load_search, read_search
from pipeline.workflow.lease import take_lease
from pipeline.workflow.tracking import RunState, Tag, Tracking

SPACE = {
    "loss.dice": SearchRange(log_uniform=(0.3, 3.0)),
    "model.decoder_layers": SearchRange(int_uniform=(1, 6)),
}
MIXED = SPACE | {
    "train.learning_rate": SearchRange(log_uniform=(1e-6, 1e-3)),
    "train.weight_decay": SearchRange(uniform=(0.0, 0.1)),
    "model.shrink_queries": SearchRange(choice=("nearest", "average", None)),
    "train.augmentation.scale_range": SearchRange(choice=([0.5, 2.0], [0.8, 1.2])),
    "model.seed": SearchRange(choice=(1, 2)),
    "train.seed": SearchRange(int_uniform=(1, 9)),
}
TUNE = TuneConfig(num_trials=6, steps=60, report_every_steps=20, reduction_factor=2, space=SPACE)


def trial(number: int, state: str, *mious: float, **changes: Any) -> TrialRecord:
    values = {"loss.dice": 0.5 + number / 4, "model.decoder_layers": number + 1}
    scores = tuple(
        TrialScore(step=20 * index, miou=miou, order=10 * number + index, stopped=state == "stopped")
        for index, miou in enumerate(mious, 1)
    )
    return TrialRecord(number=number, values=values, scores=scores, state=state, attempts=1, **changes)  # type: ignore[arg-type]


def write_search(uri: Path, space: dict[str, SearchRange] = SPACE) -> None:
    record = SearchRecord.take_over(
        str(uri / "trials"), TUNE.model_copy(update={"space": space}), take_lease(str(uri / "lease"), "the search")
    )
    trials = [
        trial(0, "finished", 0.1, 0.2, 0.3, seconds=12.5),
        trial(1, "stopped", 0.45),
        trial(2, "failed", 0.5, cause="the loss is nan at step 33 <b>"),
        trial(3, "finished", 0.2, 0.3, 0.4),
        trial(4, "running", 0.15),
    ]
    for one in trials:
        values: dict[str, Any] = one.values | {
            "train.learning_rate": 1e-5 * (one.number + 1),
            "train.weight_decay": one.number / 50,
            "model.shrink_queries": ("nearest", "average", None)[one.number % 3],
            "train.augmentation.scale_range": ([0.5, 2.0], [0.8, 1.2])[one.number % 2],
            "model.seed": 1,
            "train.seed": 9 - one.number,
        }
        record.save(one.model_copy(update={"values": {path: values[path] for path in space}}))


@pytest.fixture
def summary(tmp_path: Path) -> SearchSummary:
    write_search(tmp_path / "search")
    return read_search(str(tmp_path / "search"), "0123456789abcdef", "camvid", RunState.RUNNING)


def test_read_search__best_first_failed_last(summary: SearchSummary, tmp_path: Path) -> None:
    assert summary.chosen == "0003"
    assert [row.trial_id for row in summary.trials] == ["0003", "0001", "0000", "0004", "0002"]
    assert [row.state for row in summary.trials] == ["finished", "stopped", "finished", "running", "failed"]
    assert (summary.num_trials, summary.steps, summary.rungs) == (6, 60, (20, 40))
    assert summary.space == SPACE
    killed = read_search(str(tmp_path / "search"), "0123456789abcdef", "camvid", RunState.ABANDONED)
    assert [row.state for row in killed.trials] == ["finished", "stopped", "finished", "unfinished", "failed"]


def test_search_view__says_all_of_it(summary: SearchSummary) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(search_view(summary))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "camvid 0123456789ab  search running  4 of 6 trials ended" in printed
    lines = printed.splitlines()
    assert lines[2].replace("┃", "").split()[:3] == ["trial", "dice", "decoder_layers"]
    assert [line.split()[1] for line in lines if line.startswith("│ 0")] == ["0003", "0001", "0000", "0004", "0002"]
    best = next(line for line in lines if "0003 *" in line)
    for text in ("4", "1.25", "0.4000", "60/60", "finished"):
        assert text in best.split()
    assert "the loss is nan at step 33 <b>" in next(line for line in lines if "0002" in line)


@pytest.mark.parametrize("space", [SPACE, MIXED, {"loss.dice": SPACE["loss.dice"]}])
def test_write_search_report__three_plots_and_a_page_of_its_own(tmp_path: Path, space: dict[str, SearchRange]) -> None:
    write_search(tmp_path / "search", space)
    summary = read_search(str(tmp_path / "search"), "0123", "camvid", RunState.FINISHED)
    files = write_search_report(summary, tmp_path / "out")
    assert [file.name for file in files] == ["values.png", "parallel.png", "steps.png", "index.html"]
    for file in files[:3]:
        with Image.open(file) as picture:
            picture.load()
            assert picture.width >= 1100
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    page = files[3].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert "the loss is nan at step 33 &lt;b&gt;" in page
    assert re.findall(r"<code>(\d{4})</code></th>", page) == ["0003", "0001", "0000", "0004", "0002"]
    assert page.count('class="best"') == 1
    for heading in short_names(space).values():
        assert f'<th scope="col">{heading}</th>' in page
    before = [file.read_bytes() for file in files]
    with pytest.raises(UserError, match=r"values\.png exists; choose another folder or use --overwrite"):
        write_search_report(summary, tmp_path / "out")
    write_search_report(summary, tmp_path / "out", overwrite=True)
    assert [file.read_bytes() for file in files] == before


def test_values_against_miou__the_ring_is_at_the_chosen_values(tmp_path: Path) -> None:
    write_search(tmp_path, MIXED)
    search = read_search(str(tmp_path), "0123", "camvid", RunState.FINISHED)
    axes = {axis.get_xlabel(): axis for axis in values_against_miou(search).axes[: len(MIXED)]}
    assert set(axes) == set(short_names(MIXED).values())
    rings = {name: np.asarray(axis.collections[-1].get_offsets()).tolist() for name, axis in axes.items()}
    chosen = search.trials[0]
    assert {tuple(y for _, y in ring) for ring in rings.values()} == {(chosen.miou,)}
    for path in ("loss.dice", "model.decoder_layers", "train.weight_decay", "train.seed"):
        assert rings[short_names(MIXED)[path]][0][0] == chosen.values[path]
    for name, word in (("scale_range", "[0.8, 1.2]"), ("model.seed", "1"), ("shrink_queries", "nearest")):
        words = [text.get_text() for text in axes[name].get_xticklabels()]
        assert words[round(rings[name][0][0])] == word


def test_write_search_report__a_search_without_a_score(tmp_path: Path) -> None:
    record = SearchRecord.take_over(str(tmp_path / "trials"), TUNE, take_lease(str(tmp_path / "lease"), "the search"))
    record.save(trial(0, "running"))
    summary = read_search(str(tmp_path), "0123", "camvid", RunState.RUNNING)
    assert summary.chosen is None
    assert len(write_search_report(summary, tmp_path / "out")) == 4


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
    with pytest.raises(UserError, match=r"no search of run \w+ can be read at .*/tune/abababababababab"):
        load_search(tracking, flow[:8])
    write_search(tmp_path / "tune" / "abababababababab")
    summary = load_search(tracking, flow[:8])
    assert (summary.run_id, summary.flow, summary.state, summary.chosen) == (flow, "camvid", RunState.REUSED, "0003")
    json.dumps(summary.model_dump(mode="json"), allow_nan=False)
    file = tmp_path / "tune" / "abababababababab" / "trials" / "search.json"
    file.write_text('{"tune": {"class_weight": [0.3, 3.0]}, "learning_rate": 2e-5}')
    with pytest.raises(UserError, match=r"it has not begun, or it is of an older version"):
        load_search(tracking, flow)
    file.write_text("{")
    with pytest.raises(UserError, match=r"search\.json in .* is damaged; run the experiment again"):
        load_search(tracking, flow)
