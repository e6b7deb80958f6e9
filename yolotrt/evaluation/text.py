"""An evaluation in words and tables, for the terminal and the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from yolotrt import markdown
from yolotrt.engines.file import EngineFile
from yolotrt.evaluation.bootstrap import Comparison, Difference
from yolotrt.evaluation.matching import CONFIDENCES, mean_of_classes
from yolotrt.evaluation.predict import PROTOCOL
from yolotrt.evaluation.run import Evaluation

PROTOCOL_TEXT = (
    f"YOLOv5's protocol: square letterbox of the engine's size, confidence above {PROTOCOL.confidence:g}, NMS at IoU "
    f"{PROTOCOL.iou:g} by class, every class of a row that is good enough, at most {PROTOCOL.max_detections} boxes a "
    "picture. Figures are COCO's (101 recalls, at most 100 boxes a class and picture), by faster-coco-eval."
)

ALL = "all"
COLUMNS = ("class", "labels", "pictures", "mAP50-95", "mAP50", "mAP75", "AR100", "precision", "recall")

OVERALL = {
    "mAP50-95": "map",
    "mAP50": "map50",
    "mAP75": "map75",
    "small": "map_small",
    "medium": "map_medium",
    "large": "map_large",
    "AR1": "ar1",
    "AR10": "ar10",
    "AR100": "ar100",
    "AR small": "ar_small",
    "AR medium": "ar_medium",
    "AR large": "ar_large",
}
"""COCO's twelve figures as tables name them, and their attributes in `Metrics`."""


def figure(value: float | None) -> str:
    """Three decimals, or a dash for what cannot be measured."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def data_line(evaluation: Evaluation) -> str:
    """Such as ``data.yaml: 64 pictures, 440 labels of 60 classes``."""
    classes = [item for item in evaluation.metrics.classes if item.labels]
    labels = sum(item.labels for item in classes)
    crowds = sum(int(item.labels.crowd.sum()) for item in evaluation.pictures)
    return (
        f"{evaluation.dataset.name}: {len(evaluation.pictures)} pictures, {labels} labels of {len(classes)} classes"
        + (f", {crowds} crowds" if crowds else "")
    )


def engine_line(engine: EngineFile) -> str:
    """Such as ``a.engine: 640x640, batch 1, fp32, onnxruntime 1.17``."""
    header = engine.header
    low, _, high = header.batch_range
    return (
        f"{engine.label}: {header.imgsz[0]}x{header.imgsz[1]}, batch {low if low == high else f'{low} to {high}'}, "
        f"{header.precision}, {header.backend} {header.backend_version}"
    )


def timing_line(evaluation: Evaluation) -> str:
    """The session's time by part. Many boxes pass an evaluation's low threshold, so NMS takes longer than in use."""
    timing = evaluation.predictions.timing
    each = [value / timing.pictures for value in (timing.preprocess_ms, timing.inference_ms, timing.postprocess_ms)]
    return f"each: pre {each[0]:.1f} ms, infer {each[1]:.1f} ms, post {each[2]:.1f} ms, without reading"


def best_line(evaluation: Evaluation) -> str:
    """The confidence that balances precision and recall."""
    best = evaluation.curves.best
    f1 = mean_of_classes(evaluation.curves.f1)[best]
    return f"mean F1 is best, {f1:.3f}, at --conf {CONFIDENCES[best]:.3f}; precision and recall are given there"


def summary_lines(evaluation: Evaluation) -> Iterator[str]:
    """Everything for a terminal."""
    yield data_line(evaluation)
    yield from (f"note: {line}" for line in evaluation.dataset.problems.lines())
    yield engine_line(evaluation.engine)
    yield ""
    yield from columns([COLUMNS, *class_rows(evaluation)])
    yield ""
    yield from columns(overall_rows(evaluation))
    yield best_line(evaluation)
    yield timing_line(evaluation)


def class_rows(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """A row of `COLUMNS` for all classes together and for each that has labels."""
    metrics, curves = evaluation.metrics, evaluation.curves
    best = curves.best
    means = [float(mean_of_classes(values)[best]) for values in (curves.precision, curves.recall)]
    labels = sum(item.labels for item in metrics.classes)
    overall = (metrics.map, metrics.map50, metrics.map75, metrics.ar100, *means)
    yield ALL, str(labels), str(len(evaluation.pictures)), *map(figure, overall)
    for index, item in enumerate(metrics.classes):
        if item.labels:
            own = float(curves.precision[index, best]), float(curves.recall[index, best])
            figures = (item.map, item.map50, item.map75, item.ar100, *own)
            yield item.name, str(item.labels), str(item.pictures), *map(figure, figures)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def overall_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Names and values of COCO's twelve figures."""
    return [tuple(OVERALL), tuple(figure(getattr(evaluation.metrics, name)) for name in OVERALL.values())]


def comparison_lines(first: Evaluation, second: Evaluation, comparison: Comparison) -> Iterator[str]:
    """What a comparison says."""
    yield f"{second.engine.label} against {first.engine.label}, on the same {comparison.pictures} pictures:"
    for name, difference in (("mAP50-95", comparison.map), ("mAP50", comparison.map50)):
        yield (
            f"{name} {difference.first:.4f} -> {difference.second:.4f}, difference {difference.value:+.4f}, "
            f"{comparison.level:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}: {verdict(difference)}"
        )


def to_markdown(evaluation: Evaluation, other: tuple[Evaluation, Comparison] | None = None) -> str:
    """The figures without the classes, for a document."""
    head, values = overall_rows(evaluation)
    lines = [f"- {data_line(evaluation)}", f"- {engine_line(evaluation.engine)}", f"- {PROTOCOL_TEXT}"]
    lines += [f"- note: {line}" for line in evaluation.dataset.problems.lines()]
    lines += ["", markdown.table(head, [values])]
    if other is not None:
        lines += ["", *(f"- {line}" for line in comparison_lines(evaluation, *other))]
    return "\n".join(lines)


def verdict(difference: Difference) -> str:
    """A difference in one phrase."""
    if difference.is_distinct:
        return "better" if difference.value > 0 else "worse"
    return "no difference that these pictures can show"
