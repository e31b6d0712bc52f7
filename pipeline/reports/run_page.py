"""The run's report as one self-contained HTML page.

The page asks nothing of the network: pictures are data URIs, plots inline SVG, the style inline, and a
content policy forbids the rest. The same input gives the same page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pipeline.records import ModelVersion, PromotionDecision, latency_text
from pipeline.reports.pages import render_page
from pipeline.reports.run_page_input import ReportInput, VariantReport, load_report_input
from pipeline.reports.style import colours_of, finite, svg
from pipeline.tuning.space import short_names, value_text
from pipeline.tuning.view import SearchSummary

__all__ = ["ReportInput", "build_report", "load_report_input"]

_TEMPLATE = "run_page.html.j2"
_MISSING = "\N{EN DASH}"
_NUM_CONFUSIONS = 10


def build_report(report: ReportInput) -> str:
    """The HTML page; sections about variants are left out where none was trained."""
    from pipeline.reports import run_plots

    variants = {variant.name: variant for variant in report.variants}
    class_iou = {name: variant.evaluation.per_class_iou for name, variant in variants.items()}
    curves = run_plots.training_curves({name: variant.history for name, variant in variants.items()})
    return render_page(
        _TEMPLATE,
        {"number": _number, "percent": _percent, "value": value_text},
        report=report,
        variants=report.variants,
        colours=colours_of(variants),
        result_rows=_result_rows(report),
        legend=list(zip(report.class_names, (_hex(colour) for colour in report.palette), strict=True)),
        curves=Markup(curves) if curves else None,
        class_iou=Markup(run_plots.class_iou_bars(report.class_names, class_iou)) if variants else None,
        image_miou=Markup(run_plots.image_miou_histogram({name: item.image_mious for name, item in variants.items()})),
        confusion={
            name: Markup(run_plots.confusion_heat_map(item.confusion, report.class_names, f"confusion-{index}"))
            for index, (name, item) in enumerate(variants.items())
        },
        confusions={name: _strongest_confusions(item) for name, item in variants.items()},
        names=short_names(report.search.space) if report.search else {},
        search_plot=_search_plot(report.search) if report.search and report.search.chosen else None,
    )


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One line of the result table: a cell a variant, `best` marks the better ones where one is better."""

    label: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


def _result_rows(report: ReportInput) -> list[ResultRow]:
    evaluations = [variant.evaluation for variant in report.variants]
    sizes = {evaluation.cost_size for evaluation in evaluations}
    at_size = " at {} x {}".format(*sizes.pop()) if len(sizes) == 1 else ""

    def measured(
        label: str, values: Sequence[float | None], text: Callable[[float | None], str], higher: bool
    ) -> ResultRow:
        known = [value for value in map(finite, values) if value is not None]
        target = (max(known) if higher else min(known)) if len(known) > 1 and len(set(known)) > 1 else None
        best = tuple(target is not None and value == target for value in values)
        return ResultRow(label, tuple(text(value) for value in values), best)

    def stated(label: str, cells: Sequence[str]) -> ResultRow:
        return ResultRow(label, tuple(cells), (False,) * len(cells))

    split = evaluations[0].split if evaluations else "val"
    return [
        measured(f"{split} mIoU", [item.miou for item in evaluations], _number, higher=True),
        *(
            measured(f"{split} mIoU, {name}", [item.also[name].miou for item in report.variants], _number, higher=True)
            for name in sorted({name for item in report.variants for name in item.also})
        ),
        measured("mAcc", [item.macc for item in evaluations], _number, higher=True),
        measured("aAcc", [item.aacc for item in evaluations], _number, higher=True),
        measured("boundary IoU", [item.boundary_iou for item in evaluations], _number, higher=True),
        measured(f"GFLOPs{at_size}", [item.gflops for item in evaluations], _tenths, higher=False),
        measured("parameters", [item.parameters for item in evaluations], _millions, higher=False),
        measured(f"latency{at_size}", [item.latency_ms for item in evaluations], _milliseconds, higher=False)
        if all(item.latency_reliable for item in evaluations)
        else stated(
            f"latency{at_size} (~: timed beside other work)",
            [latency_text(item.latency_ms, item.latency_reliable) for item in evaluations],
        ),
        *_paper_rows(report),
        stated("step of the checkpoint", [f"{variant.checkpoint.step:,}" for variant in report.variants]),
        *_start_rows(report),
        stated("training time", [_duration(variant.checkpoint.train_seconds) for variant in report.variants]),
        stated("images scored", [f"{item.num_images:,}" for item in evaluations]),
        stated("registered version", [_version_text(variant.version) for variant in report.variants]),
        stated("decision", [_decision_text(variant.version, report.decision) for variant in report.variants]),
    ]


def _paper_rows(report: ReportInput) -> list[ResultRow]:
    """The paper's mIoU of every variant that is one of its models, in the unit of ours, and its GFLOPs."""
    figures = [variant.paper.result if variant.paper else None for variant in report.variants]
    if not any(figures):
        return []
    rows = {
        "the paper's mIoU, over scales and flips": [
            f"{one.miou / 100:.3f}, {one.miou_multi_scale / 100:.3f}" if one else _MISSING for one in figures
        ],
        "the paper's GFLOPs": [_tenths(one.gflops) if one else _MISSING for one in figures],
    }
    return [ResultRow(label, tuple(cells), (False,) * len(cells)) for label, cells in rows.items()]


def _start_rows(report: ReportInput) -> list[ResultRow]:
    starts = [variant.checkpoint.started_from for variant in report.variants]
    cells = tuple(start or "pretrained backbone" for start in starts)
    return [ResultRow("started from", cells, (False,) * len(cells))] if any(starts) else []


def _version_text(version: ModelVersion | None) -> str:
    return f"{version.name} v{version.version}" if version else "not registered"


def _decision_text(version: ModelVersion | None, decision: PromotionDecision | None) -> str:
    if version is None or decision is None:
        return _MISSING
    if version.version not in (decision.version, *decision.also_refused):
        return "not the candidate"
    return "promoted to champion" if decision.promoted and version.version == decision.version else "not promoted"


@dataclass(frozen=True, slots=True)
class Confusion:
    """Pixels of one class taken for another; `share` is of the true class's pixels."""

    true: str
    predicted: str
    pixels: int
    share: float


def _strongest_confusions(variant: VariantReport) -> list[Confusion]:
    wrong = variant.confusion * (1 - np.eye(len(variant.confusion), dtype=np.int64))
    names, totals = variant.evaluation.class_names, variant.confusion.sum(axis=1)
    found = []
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:_NUM_CONFUSIONS]:
        true, predicted = divmod(int(cell), len(names))
        if pixels := int(wrong[true, predicted]):
            found.append(Confusion(names[true], names[predicted], pixels, pixels / int(totals[true])))
    return found


def _search_plot(search: SearchSummary) -> Markup:
    from pipeline.reports.search_plots import values_against_miou

    names = ", ".join(short_names(search.space).values())
    return Markup(svg(values_against_miou(search), "search", f"mIoU of {len(search.trials)} trials against {names}"))


def _number(value: float | None, digits: int = 3) -> str:
    known = finite(value)
    return _MISSING if known is None else f"{known:.{digits}f}"


def _tenths(value: float | None) -> str:
    return _number(value, 1)


def _percent(value: float | None) -> str:
    known = finite(value)
    return _MISSING if known is None else f"{100 * known:.1f} %"


def _millions(value: float | None) -> str:
    known = finite(value)
    return _MISSING if known is None else f"{known / 1e6:.2f} M"


def _milliseconds(value: float | None) -> str:
    known = finite(value)
    return _MISSING if known is None else f"{known:.1f} ms"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
