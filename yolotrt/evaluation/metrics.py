"""COCO's figures for boxes and labels, computed by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError
from yolotrt.evaluation.predict import Measured

Float = npt.NDArray[np.float64]

IOU_THRESHOLDS: Float = np.linspace(0.5, 0.95, 10)
RECALLS: Float = np.linspace(0, 1, 101)
"""Where COCO reads a precision-recall curve."""

COCO_DETECTIONS = 100
"""Boxes of a class and picture that COCO counts at most."""


@dataclass(frozen=True)
class ClassMetrics:
    """One class's figures; None where it has no label.

    Attributes:
        name: The class.
        labels: Number of its labels that are no crowds.
        pictures: Number of pictures that it is in.
        map: Average precision, mean over overlaps of 0.50 to 0.95.
        map50: At an overlap of 0.50.
        map75: At an overlap of 0.75.
        ar100: Average recall with at most 100 boxes a picture.
    """

    name: str
    labels: int
    pictures: int
    map: float | None
    map50: float | None
    map75: float | None
    ar100: float | None


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve figures, 0..1; None where nothing is to be measured, such as small objects in data without any.

    Attributes:
        map: Average precision, mean over classes and overlaps of 0.50 to 0.95 (mAP50-95).
        map50: At an overlap of 0.50.
        map75: At an overlap of 0.75.
        map_small: For objects below 32 x 32 pixels of area.
        map_medium: For objects up to 96 x 96 pixels.
        map_large: For larger ones.
        ar1: Average recall with one box a class and picture.
        ar10: With at most 10.
        ar100: With at most 100.
        ar_small: `ar100` for objects below 32 x 32 pixels.
        ar_medium: For objects up to 96 x 96 pixels.
        ar_large: For larger ones.
        classes: By class.
    """

    map: float | None
    map50: float | None
    map75: float | None
    map_small: float | None
    map_medium: float | None
    map_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    classes: tuple[ClassMetrics, ...]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The figures, and the curves behind them.

    Attributes:
        metrics: The figures.
        precision50: float64 (classes, 101): precision at an overlap of 0.50 for each of `RECALLS`; NaN for classes
            without a label.
    """

    metrics: Metrics
    precision50: Float


def measure(pictures: Sequence[Measured], class_names: Sequence[str]) -> Measurement:
    """Measure boxes against labels.

    Args:
        pictures: What was found and what is there.
        class_names: The model's class names.

    Raises:
        BackendUnavailableError: if faster-coco-eval is not installed.
    """
    evaluation = _run_coco(pictures, class_names)
    precision = _without_gaps(evaluation.eval["precision"])  # (overlaps, recalls, classes, areas, limits)
    recall = _without_gaps(evaluation.eval["recall"])  # (overlaps, classes, areas, limits)
    per_class = precision[:, :, :, 0, -1]
    areas = [_mean(precision[:, :, :, area, -1]) for area in (1, 2, 3)]
    metrics = Metrics(
        map=_mean(per_class),
        map50=_mean(per_class[0]),
        map75=_mean(per_class[5]),
        map_small=areas[0],
        map_medium=areas[1],
        map_large=areas[2],
        ar1=_mean(recall[:, :, 0, 0]),
        ar10=_mean(recall[:, :, 0, 1]),
        ar100=_mean(recall[:, :, 0, 2]),
        ar_small=_mean(recall[:, :, 1, 2]),
        ar_medium=_mean(recall[:, :, 2, 2]),
        ar_large=_mean(recall[:, :, 3, 2]),
        classes=tuple(_class_metrics(pictures, class_names, per_class, recall[:, :, 0, 2])),
    )
    return Measurement(metrics, per_class[0].T)


def _class_metrics(
    pictures: Sequence[Measured], class_names: Sequence[str], precision: Float, recall: Float
) -> Iterable[ClassMetrics]:
    """Each class's figures from precision (overlaps, recalls, classes) and recall (overlaps, classes)."""
    present = [item.labels.class_id[~item.labels.crowd] for item in pictures]
    counts = np.bincount(np.concatenate(present), minlength=len(class_names))
    spread = np.bincount(np.concatenate([np.unique(ids) for ids in present]), minlength=len(class_names))
    for index, name in enumerate(class_names):
        own = precision[:, :, index]
        figures = _mean(own), _mean(own[0]), _mean(own[5]), _mean(recall[:, index])
        yield ClassMetrics(name, int(counts[index]), int(spread[index]), *figures)


def _run_coco(pictures: Sequence[Measured], class_names: Sequence[str]) -> Any:
    """faster-coco-eval's evaluation, accumulated."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as problem:
        raise BackendUnavailableError(
            f'faster-coco-eval is not installed ({problem}): run pip install "yolotrtx[eval]"'
        ) from problem

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(_ground_truth(pictures, class_names))
        results = COCO({**_ground_truth([], class_names), "images": truth.dataset["images"], "annotations": []})
        if any(len(item.boxes) for item in pictures):
            results = truth.loadRes(_results(pictures))
        evaluation = COCOeval_faster(truth, results, iouType="bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _ground_truth(pictures: Sequence[Measured], class_names: Sequence[str]) -> dict[str, Any]:
    """The labels in COCO's form; pictures are numbered from 1, classes as the model's."""
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(pictures, 1):
        labels = item.labels
        for box, area, crowd, index in zip(_xywh(labels.xyxy), labels.area, labels.crowd, labels.class_id, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(index),
                    "bbox": box,
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [{"id": number, "file_name": item.picture.path.name} for number, item in enumerate(pictures, 1)],
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for index, name in enumerate(class_names)],
    }


def _results(pictures: Sequence[Measured]) -> list[dict[str, Any]]:
    """The boxes in COCO's form, numbered as `_ground_truth` does it."""
    return [
        {"image_id": number, "category_id": int(index), "bbox": box, "score": float(score)}
        for number, item in enumerate(pictures, 1)
        for box, score, index in zip(_xywh(item.boxes.xyxy), item.boxes.confidence, item.boxes.class_id, strict=True)
    ]


def _xywh(xyxy: npt.NDArray[np.floating]) -> list[list[float]]:
    """Left, top, right, bottom (N, 4) as lists of left, top, width, height."""
    corners = xyxy.astype(np.float64)
    boxes: list[list[float]] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    return boxes


def _without_gaps(values: Any) -> Float:
    """COCO marks what cannot be measured by -1; here it is NaN."""
    array = np.array(values, np.float64)
    array[array < 0] = np.nan
    return array


def _mean(values: Float) -> float | None:
    """The mean of what was measured; None if nothing was."""
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if measured.size else None
