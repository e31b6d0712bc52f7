from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import segvit
from pipeline.config import SearchRange, TuneConfig
from pipeline.records import (
    BackboneRecord,
    Check,
    Checkpoint,
    DecidedOn,
    Evaluation,
    ModelVersion,
    PromotionDecision,
    SearchResult,
    ShardSet,
    SplitInfo,
)
from pipeline.reports.run_page import ReportInput, build_report, load_report_input
from pipeline.reports.style import LINE, TEXT
from pipeline.storage import publish_bytes, publish_json
from pipeline.tuning.record import SearchRecord, TrialRecord, TrialScore, best_trial
from pipeline.workflow.lease import take_lease
from segvit.checkpoint import FORMAT_VERSION

CREATED_AT = datetime(2031, 4, 5, 6, 7, tzinfo=UTC)
DASH = "\N{EN DASH}"


def write_run(
    folder: Path,
    class_names: tuple[str, ...] = ("road", "sky", "tree"),
    variants: tuple[str, ...] = ("full", "shrunk"),
    num_trials: int = 5,
    num_steps: int = 40,
    image_size: tuple[int, int] = (24, 32),
    num_examples: int = 2,
    absent: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Write all files that a run leaves and return the arguments of `load_report_input`."""
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (len(class_names), 3))
    publish_json(f"{folder}/shards/manifest.json", {"classes": class_names, "palette": palette.tolist()})
    checkpoints, evaluations, versions = [], [], []
    for index, variant in enumerate(variants):
        checkpoint = Checkpoint(
            variant=variant,
            uri=f"{folder}/{variant}",
            digest=f"{index}" * 64,
            step=num_steps,
            miou=0.6,
            history_uri=f"{folder}/{variant}/history.jsonl",
            train_seconds=3700.0 + index,
        )
        publish_bytes(f"{folder}/{variant}/history.jsonl", _history(rng, num_steps, index).encode())
        model = segvit.ModelConfig(backbone="vit_tiny_patch16_224", image_size=image_size)
        publish_json(f"{folder}/{variant}/config.json", checkpoint_config(model, len(class_names)))
        evaluation = _write_evaluation(
            f"{folder}/{variant}/evaluation",
            variant,
            index,
            rng,
            class_names,
            absent,
            image_size,
            num_examples,
        )
        checkpoints.append(checkpoint)
        evaluations.append(evaluation)
        versions.append(
            ModelVersion(
                name="scenes",
                version=index + 1,
                model_uri=f"models:/scenes/{index + 1}",
                variant=variant,
                evaluation=evaluation,
                checkpoint_digest=checkpoint.digest,
                run_id="f" * 32,
            )
        )
    return {
        "experiment": "scenes",
        "run_id": "0123456789abcdef",
        "created_at": CREATED_AT,
        "config_yaml": "name: scenes\ntrain:\n  steps: 40  # <few> & cheap\n",
        "shard_set": ShardSet(
            name="street",
            uri=f"{folder}/shards",
            digest="d" * 64,
            num_classes=len(class_names),
            splits={
                "train": SplitInfo(num_samples=1367, num_shards=11, digest="a" * 64),
                "val": SplitInfo(num_samples=101, num_shards=1, digest="b" * 64),
            },
        ),
        "backbones": [
            BackboneRecord(
                backbone="vit_small_patch14_dinov2",
                uri=f"{folder}/backbone.safetensors",
                digest="c" * 64,
                source="local file",
                message="read from weights.safetensors",
            )
        ],
        "search": _write_search(f"{folder}/search", rng, num_trials) if num_trials else None,
        "checkpoints": checkpoints,
        "evaluations": evaluations,
        "versions": versions,
        "decision": PromotionDecision(
            name="scenes",
            version=1,
            promoted=True,
            reason="mIoU 0.612 is at least 0.550 and no champion stands in the way",
            checks=(Check(name="min_miou", passed=True, detail="0.612 >= 0.550"),),
            champion_before=None,
            champion_after=1,
        ),
    }


def checkpoint_config(model: segvit.ModelConfig, num_classes: int) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "model": model.to_dict(), "num_classes": num_classes, "metadata": {}}


def test_report__the_paper_s_figures_stand_beside_those_of_its_models(tmp_path: Path) -> None:
    arguments = write_run(tmp_path)
    assert "the paper" not in build_report(load_report_input(**arguments))
    preset = segvit.find_preset("ade20k_vit_large_shrunk")
    publish_json(f"{tmp_path}/shrunk/config.json", checkpoint_config(preset.model, preset.num_classes))
    page = build_report(load_report_input(**arguments))
    rows = dict(re.findall(r"<th[^>]*>(the paper's [^<]*)</th>(.*?)</tr>", page.replace("&#39;", "'"), re.DOTALL))
    cells = {label: re.findall(r"<td[^>]*>\s*([^<]*?)\s*</td>", row) for label, row in rows.items()}
    assert cells == {
        "the paper's mIoU, over scales and flips": [DASH, "0.539, 0.551"],
        "the paper's GFLOPs": [DASH, "373.5"],
    }


def test_report__other_ways_of_predicting_stand_beside_the_one_that_counts(tmp_path: Path) -> None:
    arguments = write_run(tmp_path)
    evaluations = arguments["evaluations"]
    flipped = [one.model_copy(update={"inference": {"flip": True}, "miou": one.miou + 0.01}) for one in evaluations]
    page = Page(build_report(load_report_input(**arguments, also={"with_flip": flipped[::-1]})))
    assert page.row("val mIoU, with_flip") == [f"{one.miou:.3f}" for one in flipped]
    assert page.row("val mIoU") == [f"{one.miou:.3f}" for one in evaluations]


def test_report__a_champion_that_was_scored_again_is_told(tmp_path: Path) -> None:
    arguments = write_run(tmp_path)
    assert "scored again" not in build_report(load_report_input(**arguments))
    scores = DecidedOn(version=7, run_id="r", rescored=True, digest="d", data_digest="e", miou=0.4876)
    decision = arguments["decision"].model_copy(update={"champion_before": 7, "champion_scores": scores})
    page = " ".join(build_report(load_report_input(**arguments | {"decision": decision})).split())
    assert "Champion before: version 7, scored again on this data: mIoU 0.4876. Champion after: version 1." in page


def _history(rng: np.random.Generator, num_steps: int, index: int) -> str:
    rows: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        decay = math.exp(-3 * step / num_steps) + 0.1
        terms = {
            name: scale * decay * (1 + 0.15 * rng.standard_normal()) * (1 + 0.2 * index)
            for name, scale in (("class", 1.2), ("focal", 0.8), ("boundary", 1.0), ("auxiliary", 3.0))
        }
        rows.append(
            {
                "step": step,
                **terms,
                "total": sum(terms.values()),
                "learning_rate": 3e-4 * (1 - step / num_steps),
                "images_per_s": 12 + 4 * index + rng.standard_normal(),
                "seconds": 1.5 * step,
            }
        )
        if step % max(1, num_steps // 8) == 0:
            rows.append({"step": step, "val_miou": 0.62 - 0.05 * index - 0.4 * decay})
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def _write_evaluation(
    uri: str,
    variant: str,
    index: int,
    rng: np.random.Generator,
    class_names: tuple[str, ...],
    absent: tuple[int, ...],
    image_size: tuple[int, int],
    num_examples: int,
) -> Evaluation:
    count = len(class_names)
    matrix = (rng.random((count, count)) ** 6 * 4000).astype(int) + np.diag(rng.integers(3000, 90000, count))
    matrix[list(absent)] = 0
    matrix[:, list(absent)] = 0
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou = [None if not total else float(hit / total) for hit, total in zip(matrix.diagonal(), union, strict=True)]
    publish_json(f"{uri}/confusion.json", {"class_names": class_names, "matrix": matrix.tolist()})
    scores = [{"key": f"{number:04d}", "miou": float(rng.beta(6, 3)), "accuracy": 0.9} for number in range(101)]
    publish_json(f"{uri}/images.json", scores)
    examples = []
    for kind in ("best", "worst"):
        for number in range(num_examples):
            name = f"{kind}-{number}"
            row: dict[str, Any] = {
                "key": f"scene-{name}",
                "kind": kind,
                "miou": 0.9 if kind == "best" else 0.2,
            }
            for part in ("image", "truth", "prediction"):
                row[part] = f"examples/{name}-{part}.jpg"
                publish_bytes(f"{uri}/{row[part]}", _jpeg(rng, image_size))
            examples.append(row)
    publish_json(f"{uri}/examples.json", examples)
    return Evaluation(
        variant=variant,
        checkpoint_digest=f"{index}" * 64,
        data_digest="d" * 64,
        split="val",
        num_images=101,
        miou=0.6123 - 0.03 * index,
        macc=0.7012,
        aacc=0.9034,
        boundary_iou=0.4321 - 0.02 * index,
        class_names=class_names,
        per_class_iou=tuple(iou),
        per_class_accuracy=tuple(iou),
        gflops=31.44 - 12 * index,
        parameters=22_345_678 + 1_000_000 * index,
        latency_ms=81.25 - 20 * index,
        cost_size=(336, 448),
        uri=uri,
    )


def _jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    height, width = size
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def _write_search(uri: str, rng: np.random.Generator, count: int) -> SearchResult:
    space = {
        "loss.focal": SearchRange(log_uniform=(5.0, 80.0)),
        "model.decoder_layers": SearchRange(choice=(1, 2, 3)),
        "train.augmentation.scale_range": SearchRange(choice=([0.5, 2.0], [0.8, 1.2])),
    }
    record = SearchRecord.take_over(
        f"{uri}/trials", TuneConfig(num_trials=count, space=space), take_lease(f"{uri}/lease", "the search")
    )
    for number in range(count):
        focal = float(np.exp(rng.uniform(np.log(5), np.log(80))))
        failed, last = number == count - 1, 60 if number % 3 == 0 else 20
        score = TrialScore(step=last, miou=0.5 - 0.08 * abs(math.log(focal / 20)), order=number)
        record.save(
            TrialRecord(
                number=number,
                values={
                    "loss.focal": focal,
                    "model.decoder_layers": 1 + number % 3,
                    "train.augmentation.scale_range": [0.8, 1.2],
                },
                scores=() if failed else (score,),
                state="failed" if failed else "finished" if last == 60 else "stopped",
                cause="out of <memory>" if failed else None,
            )
        )
    best = best_trial(record.trials.values())
    values = best.values if best is not None else {}
    return SearchResult(
        variant="full",
        values=values,
        miou=best.miou if best is not None else None,
        num_trials=count,
        trials_uri=f"{uri}/trials.json",
        trials_digest="",
    )


class Page(HTMLParser):
    """The page taken apart: every tag with its attributes, table rows as text, headings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.text[tag][-1] += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        return next([cell.strip() for cell in row[1:]] for row in self.rows if row[0].strip() == label)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = ("road", "<sky> & $cloud$", "tree")
    return write_run(tmp_path_factory.mktemp("run"), class_names=names, absent=(2,))


@pytest.fixture(scope="module")
def loaded(arguments: dict[str, Any]) -> ReportInput:
    return load_report_input(**arguments)


@pytest.fixture(scope="module")
def html(loaded: ReportInput) -> str:
    return build_report(loaded)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_load_report_input__files_of_both_variants_are_read(loaded: ReportInput) -> None:
    assert [variant.name for variant in loaded.variants] == ["full", "shrunk"]
    full = loaded.variants[0]
    assert full.confusion.shape == (3, 3)
    assert full.confusion[2].sum() == 0
    assert len(full.image_mious) == 101
    assert [example.kind for example in full.examples] == ["best", "best", "worst", "worst"]
    assert full.history[0]["step"] == 1
    assert full.version is not None
    assert full.version.version == 1
    assert loaded.search is not None
    assert [trial.miou is None for trial in loaded.search.trials] == [False] * 4 + [True]
    assert loaded.class_names == ("road", "<sky> & $cloud$", "tree")


def test_load_report_input__evaluation_of_another_checkpoint_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="variant 'full' has no matching checkpoint"):
        load_report_input(**{**arguments, "checkpoints": arguments["checkpoints"][1:]})


def test_build_report__same_input_gives_same_page(loaded: ReportInput, html: str) -> None:
    assert build_report(loaded) == html


def test_build_report__nothing_is_fetched_and_nothing_runs(html: str, page: Page) -> None:
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for attribute in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
        for target in page.values(attribute):
            assert target.startswith(("data:", "#")), (attribute, target[:80])
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]+)", html))
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_build_report__ids_are_unique_and_references_resolve(html: str, page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [target[1:] for name in ("href", "xlink:href") for target in page.values(name) if target[0] == "#"]
    targets += re.findall(r"url\(#([^)]+)\)", html) + page.values("aria-labelledby")
    assert set(targets) <= set(ids)


def test_build_report__pictures_tables_and_plots_are_described(page: Page) -> None:
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 2 * 4 * 3  # variants x examples x (image, truth, prediction)
    assert all(attrs["alt"] for attrs in images)
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    # Curves, class bars, a confusion matrix a variant, image scores, search.
    assert len(plots) == 6
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == sum(tag == "caption" for tag, _ in page.tags) == 6
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_build_report__embedded_pictures_decode(page: Page) -> None:
    for source in page.values("src"):
        head, _, body = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(body))).size == (32, 24)


def test_build_report__result_table_holds_the_records_values(page: Page) -> None:
    assert page.row("val mIoU") == ["0.612", "0.582"]
    assert page.row("boundary IoU") == ["0.432", "0.412"]
    assert page.row("GFLOPs at 336 x 448") == ["31.4", "19.4"]
    assert page.row("parameters") == ["22.35 M", "23.35 M"]
    assert page.row("latency at 336 x 448") == ["81.2 ms", "61.2 ms"]
    assert page.row("training time") == ["1 h 01 min", "1 h 01 min"]
    assert page.row("registered version") == ["scenes v1", "scenes v2"]
    assert page.row("decision") == ["promoted to champion", "not the candidate"]
    assert page.row("min_miou") == ["passed", "0.612 >= 0.550"]


def test_build_report__better_value_is_marked_and_ties_are_not(html: str) -> None:
    marked = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', html)
    best = {label: re.findall(r'<td class="best">([^<]*)</td>', cells) for label, cells in marked}
    assert best["val mIoU"] == ["0.612"]
    assert best["parameters"] == ["22.35 M"]
    assert best["latency at 336 x 448"] == ["61.2 ms"]
    assert best["aAcc"] == []


def test_build_report__absent_class_is_a_dash(page: Page) -> None:
    assert page.row("tree") == [DASH] * 4
    assert page.row("road")[0] != DASH


def test_build_report__strongest_confusion_comes_first(loaded: ReportInput, page: Page) -> None:
    matrix, names = loaded.variants[0].confusion, loaded.class_names
    wrong = matrix - np.diag(matrix.diagonal())
    true, predicted = divmod(int(wrong.argmax()), 3)
    pixels = int(wrong.max())
    header = page.rows.index(["true class", "taken for", "pixels", "of the true class"])
    share = f"{100 * pixels / matrix[true].sum():.1f} %"
    assert page.rows[header + 1] == [names[true], names[predicted], f"{pixels:,}", share]


def test_build_report__trial_whose_values_are_used_is_marked(loaded: ReportInput, html: str, page: Page) -> None:
    assert loaded.search is not None
    assert loaded.found is not None
    chosen = loaded.search.trials[0]
    assert (chosen.steps, chosen.values) == (60, loaded.found.values)
    row = html[html.index(f"<code>{chosen.trial_id}</code>") :]
    assert row.index('<td class="best">') < row.index("</tr>")
    assert len(re.findall(r"<code>\d{4}</code>.*class=.best.", html)) == 1
    header = next(index for index, row in enumerate(page.rows) if row[0] == "trial")
    assert page.rows[header][1:4] == ["focal", "decoder_layers", "scale_range"]
    focal = f"{chosen.values['loss.focal']:.3g}"
    layers = str(chosen.values["model.decoder_layers"])
    assert page.rows[header + 1][:4] == [chosen.trial_id, focal, layers, "[0.8, 1.2]"]
    assert page.rows[-1][0] == "0004"  # the trial without a score comes last
    used = f"training used: focal {focal}, decoder_layers {layers}, scale_range [0.8, 1.2]."
    assert used in " ".join(" ".join(page.text["p"]).split())


def test_build_report__curves_of_all_loss_terms_that_there_are(page: Page) -> None:
    curves = next(attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    assert curves == (
        "Training curves of full, shrunk: "
        "val_miou, total, class, focal, boundary, auxiliary, learning_rate, images_per_s over steps"
    )
    assert "loss, boundary term" in [text.strip() for text in page.text["text"]]


def test_build_report__text_of_others_is_escaped(html: str, page: Page) -> None:
    assert "<sky>" not in html
    assert "<few>" not in html
    assert any("<sky> & $cloud$" in text for text in page.text["text"])  # as an axis label, no mathematics
    assert page.text["pre"] == ["name: scenes\ntrain:\n  steps: 40  # <few> & cheap\n"]


def test_build_report__plots_take_the_pages_colours(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    svg = html[html.index("<svg") : html.rindex("</svg>")]
    assert "currentColor" in svg
    assert "var(--line)" in svg
    assert not {TEXT, LINE} & set(re.findall("#[0-9a-f]{6}", svg))


def test_build_report__one_variant_no_search_no_decision(tmp_path: Path) -> None:
    arguments = write_run(tmp_path, variants=("full",), num_trials=0, num_examples=0)
    page = Page(build_report(load_report_input(**{**arguments, "versions": [], "decision": None})))
    text = " ".join(page.text["p"])
    assert "No search was run" in text
    assert "No promotion decision was made" in text
    assert "No examples were kept" in text
    assert page.row("registered version") == ["not registered"]
    assert page.row("decision") == [DASH]
    assert sum(tag == "svg" for tag, _ in page.tags) == 4


def test_build_report__a_search_alone_has_no_sections_about_variants(tmp_path: Path) -> None:
    arguments = write_run(tmp_path, variants=())
    page = Page(build_report(load_report_input(**{**arguments, "decision": None})))
    assert [text.strip() for text in page.text["h2"]] == ["Search", "Configuration"]
    assert [target for target in page.values("href") if target.startswith("#s")] == ["#search"]
    assert [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"] == [
        "mIoU of 5 trials against focal, decoder_layers, scale_range"
    ]


def test_build_report__refused_candidate_keeps_the_champion(loaded: ReportInput) -> None:
    assert loaded.decision is not None
    refused = loaded.decision.model_copy(
        update={"promoted": False, "reason": "mIoU fell", "champion_before": 7, "champion_after": 7}
    )
    page = Page(build_report(replace(loaded, decision=refused)))
    text = " ".join(" ".join(page.text["p"]).split())
    assert "scenes version 1 was not promoted. mIoU fell" in text
    assert "Champion before: version 7. Champion after: version 7." in text
    assert page.row("decision") == ["not promoted", "not the candidate"]


def test_build_report__not_a_number_is_a_dash(loaded: ReportInput) -> None:
    first = loaded.variants[0]
    evaluation = first.evaluation.model_copy(
        update={"boundary_iou": None, "per_class_iou": (math.nan, 0.5, None), "miou": math.nan}
    )
    history = ({"step": 1, "total": math.nan}, {"step": 2, "val_miou": None})
    variants = (replace(first, evaluation=evaluation, history=history),)
    assert loaded.search is not None
    search = loaded.search.model_copy(update={"trials": loaded.search.trials[-1:], "chosen": None})
    page = Page(build_report(replace(loaded, variants=variants, search=search)))
    assert page.row("boundary IoU") == [DASH]
    assert page.row("val mIoU") == [DASH]
    assert page.row("road")[0] == DASH
    assert "No training history was recorded." in " ".join(page.text["p"])
    assert page.row("0004")[1:] == ["2", "[0.8, 1.2]", DASH, "0", "0.0 s", "0", "failed", "out of <memory>"]


def test_build_report__150_classes_fit_a_scrolled_matrix(tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(150))
    arguments = write_run(tmp_path, class_names=names, variants=("full",), num_trials=1, num_examples=0)
    html = build_report(load_report_input(**arguments))
    page = Page(html)
    assert "150 classes: scroll in both directions." in html
    labels = [text.strip() for text in page.text["text"]]
    # On the bars once; on all four sides of the matrix.
    assert labels.count("class 149") == 5
    natural = next(attrs for tag, attrs in page.tags if tag == "svg" and "Confusion" in (attrs["aria-label"] or ""))
    assert int(natural["width"] or 0) > 1600
    assert len(html) < 3_000_000
