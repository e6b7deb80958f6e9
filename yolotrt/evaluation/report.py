"""An evaluation as files: figures and predictions as JSON, plots as PNG, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.evaluation import plots
from yolotrt.evaluation.bootstrap import Comparison
from yolotrt.evaluation.matching import CONFIDENCES, mean_of_classes
from yolotrt.evaluation.run import Evaluation
from yolotrt.evaluation.text import (
    COLUMNS,
    OVERALL,
    PROTOCOL_TEXT,
    best_line,
    class_rows,
    comparison_lines,
    data_line,
    engine_line,
    figure,
    timing_line,
    verdict,
)
from yolotrt.files import atomic_write, atomic_write_text
from yolotrt.machine import describe_machine

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.json"
GROUND_TRUTH_FILE = "groundtruth.json"
REPORT_FILE = "report.html"

_NAMED_PROBLEMS = 50
"""Names that the page and the JSON list of one kind of problem."""

_HEADLINE = ("mAP50-95", "mAP50", "mAP75", "AR100")


def write_report(
    folder: Path,
    evaluation: Evaluation,
    other: tuple[Evaluation, Comparison] | None = None,
) -> None:
    """Write all files of an evaluation into a folder, which is created if it is missing.

    Args:
        folder: Where to write.
        evaluation: What was measured.
        other: A second engine's evaluation and its comparison with this one.

    Raises:
        OutputError: if a file cannot be written.
        BackendUnavailableError: if matplotlib is not installed.
    """
    machine = describe_machine()
    figures = {
        "precision_recall": plots.precision_recall(evaluation.measurement),
        "f1_confidence": plots.f1_confidence(evaluation.curves, evaluation.dataset.class_names),
        "confusion": plots.confusion(evaluation.confusion, evaluation.dataset.class_names),
    }
    pngs = {name: plots.to_png(drawn) for name, drawn in figures.items()}
    for name, png in pngs.items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(png)
    atomic_write_text(folder / PREDICTIONS_FILE, json.dumps(prediction_records(evaluation)))
    if evaluation.dataset.pictures[0].is_normalised:  # a COCO json is there already
        atomic_write_text(folder / GROUND_TRUTH_FILE, json.dumps(ground_truth(evaluation)))
    atomic_write_text(folder / METRICS_FILE, json.dumps(metrics_record(evaluation, machine, other), indent=2))
    svgs = {name: plots.to_svg(figures[name]) for name in ("precision_recall", "f1_confidence")}
    atomic_write_text(folder / REPORT_FILE, page(evaluation, machine, svgs, pngs["confusion"], other))


def prediction_records(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every box in COCO's form of results: image_id, category_id, bbox (left, top, width, height), score."""
    category_ids = evaluation.dataset.category_ids
    records = []
    for item in evaluation.pictures:
        corners = item.boxes.xyxy.astype(np.float64)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
        for box, score, index in zip(boxes, item.boxes.confidence, item.boxes.class_id, strict=True):
            category = category_ids[index]
            if category is None:  # a class that the data do not know
                continue
            records.append(
                {
                    "image_id": item.picture.image_id,
                    "category_id": category,
                    "bbox": box,
                    "score": round(float(score), 8),
                }
            )
    return records


def ground_truth(evaluation: Evaluation) -> dict[str, Any]:
    """The labels as they were evaluated, as a COCO json, so that other tools can check the predictions against them."""
    category_ids = evaluation.dataset.category_ids
    annotations: list[dict[str, Any]] = []
    for item in evaluation.pictures:
        for box, area, index in zip(item.labels.xyxy, item.labels.area, item.labels.class_id, strict=True):
            left, top, right, bottom = (round(float(value), 3) for value in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": item.picture.image_id,
                    "category_id": category_ids[index],
                    "bbox": [left, top, round(right - left, 3), round(bottom - top, 3)],
                    "area": round(float(area), 3),
                    "iscrowd": 0,
                }
            )
    names = evaluation.dataset.class_names
    return {
        "images": [{"id": item.picture.image_id, "file_name": item.picture.path.name} for item in evaluation.pictures],
        "annotations": annotations,
        "categories": [
            {"id": category, "name": name}
            for category, name in zip(category_ids, names, strict=True)
            if category is not None
        ],
    }


def metrics_record(
    evaluation: Evaluation, machine: Mapping[str, str], other: tuple[Evaluation, Comparison] | None
) -> dict[str, Any]:
    """All figures for programs."""
    timing = evaluation.predictions.timing
    best = evaluation.curves.best
    problems = evaluation.dataset.problems
    record: dict[str, Any] = {
        "engine": _engine_record(evaluation),
        "dataset": {
            "name": evaluation.dataset.name,
            "pictures": len(evaluation.pictures),
            "labels": sum(item.labels for item in evaluation.metrics.classes),
        },
        "protocol": PROTOCOL_TEXT,
        **asdict(evaluation.metrics),
        "best_f1": {
            "confidence": float(CONFIDENCES[best]),
            "f1": float(mean_of_classes(evaluation.curves.f1)[best]),
            "precision": float(mean_of_classes(evaluation.curves.precision)[best]),
            "recall": float(mean_of_classes(evaluation.curves.recall)[best]),
        },
        "problems": {
            kind.name.lower(): {"count": count, "names": list(problems.names(kind)[:_NAMED_PROBLEMS])}
            for kind, count in problems.counts().items()
        },
        "timing_ms": {
            "preprocess": timing.preprocess_ms / timing.pictures,
            "inference": timing.inference_ms / timing.pictures,
            "postprocess": timing.postprocess_ms / timing.pictures,
        },
        "machine": dict(machine),
    }
    if other is not None:
        record["comparison"] = {"engine": _engine_record(other[0]), **asdict(other[1])}
    return record


def _engine_record(evaluation: Evaluation) -> dict[str, Any]:
    """The engine's identity."""
    header = evaluation.engine.header
    return {
        "file": evaluation.engine.label,
        "backend": header.backend,
        "backend_version": header.backend_version,
        "precision": header.precision,
        "imgsz": list(header.imgsz),
        "plan_sha256": header.plan_sha256,
        "weights_sha256": header.weights_sha256,
    }


_CSS = """
:root { --ink: #1b2733; --soft: #5b6b7b; --line: #e3e9ef; --accent: #0b6bcb; --good: #1e8a52; --bad: #c03946; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f7fa; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 14px; } p { margin: 4px 0; }
.soft { color: var(--soft); } .small { font-size: 13px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin-top: 24px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px; }
.card b { display: block; font-size: 34px; line-height: 1.2; letter-spacing: -0.5px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
svg, img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: 13px; } th:first-child, td:first-child { text-align: left; }
tr.all td { font-weight: 600; } tr:last-child td { border-bottom: 0; }
.bar { background: linear-gradient(to right, #d4e6f9 var(--share), transparent var(--share)); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
ul { margin: 0; padding-left: 20px; } details { margin-top: 4px; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 760px) { .cards { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; } }
"""


def page(
    evaluation: Evaluation,
    machine: Mapping[str, str],
    svgs: Mapping[str, str],
    confusion: bytes,
    other: tuple[Evaluation, Comparison] | None = None,
) -> str:
    """The HTML page: no scripts, and nothing is loaded from anywhere.

    Args:
        evaluation: What was measured.
        machine: See `describe_machine`.
        svgs: The plots ``precision_recall`` and ``f1_confidence``.
        confusion: The confusion matrix as PNG.
        other: As for `write_report`.
    """
    picture = base64.b64encode(confusion).decode()
    sections = [
        _comparison_section(evaluation, *other) if other else "",
        _section("COCO's figures", _html_table(list(OVERALL), [_overall_cells(evaluation)])),
        _section(
            "Curves",
            f'<div class="pair"><div>{svgs["precision_recall"]}</div><div>{svgs["f1_confidence"]}</div></div>'
            f'<p class="soft small">{_text(best_line(evaluation))}.</p>',
        ),
        _section("Classes", _class_table(evaluation)),
        _section("Confusion", f'<img alt="confusion matrix" src="data:image/png;base64,{picture}">'),
        _problem_section(evaluation),
        _section("How it was measured", _measured_how(evaluation, machine)),
    ]
    title = f"Evaluation of {Path(evaluation.engine.label).name}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_CSS}</style></head><body><main>"
        f'<h1>{_text(title)}</h1><p class="soft">{_text(data_line(evaluation))}</p>'
        f'<p class="soft">{_text(engine_line(evaluation.engine))}</p>'
        f"{_cards(evaluation)}{''.join(sections)}</main></body></html>\n"
    )


def _text(text: str) -> str:
    """Text for HTML, in which names of the data's makers do nothing."""
    return html.escape(text)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _cards(evaluation: Evaluation) -> str:
    """The four figures that people ask for first."""
    cards = (
        f'<div class="card"><span class="soft">{name}</span>'
        f"<b>{figure(getattr(evaluation.metrics, OVERALL[name]))}</b></div>"
        for name in _HEADLINE
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _overall_cells(evaluation: Evaluation) -> list[str]:
    return [figure(getattr(evaluation.metrics, name)) for name in OVERALL.values()]


def _html_table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table."""
    first = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    others = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{others}</table>"


def _class_table(evaluation: Evaluation) -> str:
    """The classes with a bar behind their average precision."""
    place = COLUMNS.index("mAP50-95")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"]
    for number, row in enumerate(class_rows(evaluation)):
        cells = [f"<td>{_text(cell)}</td>" for cell in row]
        share = 0.0 if row[place] == "-" else 100 * float(row[place])
        cells[place] = f'<td class="bar" style="--share: {share:.0f}%">{row[place]}</td>'
        begin = "<tr>" if number else '<tr class="all">'
        lines.append(begin + "".join(cells) + "</tr>")
    return "".join(lines) + "</table>"


def _comparison_section(evaluation: Evaluation, other: Evaluation, comparison: Comparison) -> str:
    """Two engines side by side, and what may be concluded."""
    rows = []
    for name, difference in (("mAP50-95", comparison.map), ("mAP50", comparison.map50)):
        kind = "" if not difference.is_distinct else "good" if difference.value > 0 else "bad"
        cells = (
            name,
            f"{difference.first:.4f}",
            f"{difference.second:.4f}",
            f"{difference.value:+.4f}",
            f"{difference.low:+.4f} to {difference.high:+.4f}",
        )
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr>{body}<td class="{kind}">{verdict(difference)}</td></tr>')
    head = ("", "this engine", "other engine", "difference", f"{comparison.level:.0%} interval", "")
    table = "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>" + "".join(rows) + "</table>"
    note = next(iter(comparison_lines(evaluation, other, comparison)))
    how = (
        f"Other engine: {engine_line(other.engine)}. The interval is a paired bootstrap's: {comparison.draws} draws of "
        f"{comparison.pictures} pictures with replacement, both engines measured on each draw."
    )
    return _section("Comparison", f'<p class="soft">{_text(note)}</p>{table}<p class="soft small">{_text(how)}</p>')


def _problem_section(evaluation: Evaluation) -> str:
    """What is wrong with the data, each kind with its names folded away."""
    problems = evaluation.dataset.problems
    if not problems.counts():
        return _section("The data", "<p>Nothing is wrong with the labels.</p>")
    items = []
    for kind, count in problems.counts().items():
        names = problems.names(kind)[:_NAMED_PROBLEMS]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        items.append(
            f"<details><summary>{count} {_text(kind.value)}</summary>"
            f'<p class="soft small">{_text(", ".join(names))}{more}</p></details>'
        )
    return _section("The data", "".join(items))


def _measured_how(evaluation: Evaluation, machine: Mapping[str, str]) -> str:
    """Protocol, engine and machine."""
    header = evaluation.engine.header
    facts = {
        "protocol": PROTOCOL_TEXT,
        "weights": f"SHA-256 {header.weights_sha256}",
        "plan": f"SHA-256 {header.plan_sha256}",
        "time": timing_line(evaluation),
        **machine,
    }
    lines = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return f'<dl class="small">{lines}</dl>'
