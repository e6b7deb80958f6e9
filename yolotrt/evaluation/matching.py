"""Which box found which label: COCO's rule, kept by class so that curves and resampling need no second matching.

COCO's rule (cocoeval.py, evaluateImg): within a picture and class the boxes choose in order of confidence; each takes
the label that it overlaps most among those not yet taken, if the overlap is at least the threshold. A box that finds
only a crowd, which may be taken often, counts neither for nor against. At most 100 boxes a class and picture choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolotrt.evaluation.metrics import COCO_DETECTIONS, IOU_THRESHOLDS
from yolotrt.evaluation.predict import Measured

Float = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CONFUSION_CONFIDENCE = 0.25
CONFUSION_IOU = 0.45
"""YOLOv5's own for its confusion matrix (utils/metrics.py, ConfusionMatrix)."""

CONFIDENCES: Float = np.linspace(0, 1, 1001)
"""Where the curve of F1 against confidence is read; YOLOv5 has 1000 places."""


@dataclass(frozen=True, eq=False)
class ClassMatches:
    """All boxes of one class, best first; equal confidences in the order of their pictures.

    Attributes:
        confidence: float32 (N,).
        picture: int64 (N,): index of the box's picture.
        is_hit: bool (overlaps, N): whether it found a label, by threshold of `IOU_THRESHOLDS`.
        is_ignored: bool (overlaps, N): whether it found only a crowd.
        labels: int64 (pictures,): number of labels that are no crowds.
    """

    confidence: npt.NDArray[np.float32]
    picture: Index
    is_hit: Mask
    is_ignored: Mask
    labels: Index


def match(pictures: Sequence[Measured], class_count: int) -> list[ClassMatches]:
    """Match the boxes of every picture, by class."""
    counts = np.zeros((class_count, len(pictures)), np.int64)
    found: list[list[tuple[npt.NDArray[np.float32], Index, Mask, Mask]]] = [[] for _ in range(class_count)]
    for number, item in enumerate(pictures):
        labels, boxes = item.labels, item.boxes
        np.add.at(counts[:, number], labels.class_id[~labels.crowd], 1)
        for index in np.unique(boxes.class_id):
            chosen = np.flatnonzero(boxes.class_id == index)[:COCO_DETECTIONS]  # boxes are sorted, best first
            own = labels.class_id == index
            hit, ignored = match_boxes(boxes.xyxy[chosen].astype(np.float64), labels.xyxy[own], labels.crowd[own])
            found[index].append((boxes.confidence[chosen], np.full(len(chosen), number), hit, ignored))
    return [_joined(parts, counts[index]) for index, parts in enumerate(found)]


def match_boxes(boxes: Float, labels: Float, crowd: Mask) -> tuple[Mask, Mask]:
    """Match boxes with labels of one class and picture.

    Args:
        boxes: float64 (N, 4): left, top, right, bottom, best first.
        labels: float64 (M, 4): the same of the labels.
        crowd: bool (M,): which labels are crowds.

    Returns:
        Two bool (overlaps, N): which boxes found a label, and which found only a crowd, by `IOU_THRESHOLDS`.
    """
    overlaps = iou_matrix(boxes, labels, crowd)  # (N, M)
    limits = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    hit = np.zeros((len(limits), len(boxes)), np.bool_)
    ignored = np.zeros_like(hit)
    is_free = np.ones((len(limits), len(labels)), np.bool_)
    for row in np.flatnonzero(overlaps.max(axis=1, initial=0) >= limits[0]):
        enough = overlaps[row] >= limits[:, None]  # (overlaps, M)
        for kind, marks in ((~crowd, hit), (crowd, ignored)):
            possible = enough & is_free & kind & ~hit[:, row, None]
            candidates = np.where(possible, overlaps[row], -1.0)
            last = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)  # of equals COCO takes the last
            taken = np.flatnonzero(possible.any(axis=1))
            marks[taken, row] = True
            is_free[taken, last[taken]] = crowd[last[taken]]
    return hit, ignored


def iou_matrix(boxes: Float, labels: Float, crowd: Mask) -> Float:
    """Overlaps (N, M) of boxes (N, 4) with labels (M, 4): of a crowd the share of the box that lies in it."""
    sides = np.minimum(boxes[:, None, 2:], labels[None, :, 2:]) - np.maximum(boxes[:, None, :2], labels[None, :, :2])
    intersection = np.prod(np.maximum(sides, 0), axis=-1)
    box_area, label_area = (np.prod(xyxy[:, 2:] - xyxy[:, :2], axis=1) for xyxy in (boxes, labels))
    union = box_area[:, None] + np.where(crowd, 0.0, label_area - np.where(crowd, 0.0, intersection))
    overlaps: Float = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return overlaps


def _joined(parts: Sequence[tuple[npt.NDArray[np.float32], Index, Mask, Mask]], labels: Index) -> ClassMatches:
    """The boxes of one class in all pictures."""
    if not parts:
        empty = np.zeros((len(IOU_THRESHOLDS), 0), np.bool_)
        return ClassMatches(np.zeros(0, np.float32), np.zeros(0, np.int64), empty, empty, labels)
    confidence, picture, hit, ignored = (np.concatenate(column, axis=-1) for column in zip(*parts, strict=True))
    order = np.argsort(-confidence, kind="stable")
    return ClassMatches(confidence[order], picture[order], hit[:, order], ignored[:, order], labels)


@dataclass(frozen=True, eq=False)
class OperatingCurves:
    """Precision, recall and F1 of every class, at an overlap of 0.50, against the least confidence.

    Attributes:
        precision: float64 (classes, places of `CONFIDENCES`); NaN for classes without a label. Where no box is left it
            is 1, as YOLOv5 takes it.
        recall: The same of recall.
        f1: Their harmonic mean.
    """

    precision: Float
    recall: Float
    f1: Float

    @property
    def best(self) -> int:
        """The place where the mean F1 of the classes is highest."""
        return int(mean_of_classes(self.f1).argmax())


def mean_of_classes(values: Float) -> Float:
    """Means (places,) over the classes of (classes, places) that have labels; zeros if none has any."""
    known = values[~np.isnan(values[:, 0])]
    mean: Float = known.mean(axis=0) if len(known) else np.zeros(values.shape[1])
    return mean


def operating_curves(matches: Sequence[ClassMatches]) -> OperatingCurves:
    """Curves over the confidence that a user may choose."""
    precision = np.full((len(matches), len(CONFIDENCES)), np.nan)
    recall = precision.copy()
    for index, own in enumerate(matches):
        total = int(own.labels.sum())
        if not total:
            continue
        counted = ~own.is_ignored[0]
        left = np.searchsorted(-own.confidence[counted], -CONFIDENCES, side="left")  # boxes above each confidence
        hits = np.concatenate([[0], np.cumsum(own.is_hit[0][counted])])[left]
        precision[index] = np.divide(hits, left, out=np.ones(len(left)), where=left > 0)
        recall[index] = hits / total
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.where(np.isnan(both), np.nan, 0.0), where=both > 0)
    return OperatingCurves(precision, recall, f1)


def confusion_matrix(pictures: Sequence[Measured], class_count: int) -> Index:
    """Which class was taken for which.

    Boxes of at least `CONFUSION_CONFIDENCE` are paired with labels that they overlap by more than `CONFUSION_IOU`,
    whatever their classes, the largest overlap first, each box and label once. A picture's crowds take no part.

    Returns:
        int64 (classes + 1, classes + 1): rows are what was found, columns what is there; the last row is missed labels,
        the last column boxes without a label.
    """
    matrix = np.zeros((class_count + 1, class_count + 1), np.int64)
    for item in pictures:
        labels = item.labels.take(~item.labels.crowd)
        boxes = item.boxes.take(item.boxes.confidence > CONFUSION_CONFIDENCE)
        overlaps = iou_matrix(boxes.xyxy.astype(np.float64), labels.xyxy, labels.crowd)
        box, label = _pairs(overlaps)
        np.add.at(matrix, (boxes.class_id[box], labels.class_id[label]), 1)
        np.add.at(matrix[:, class_count], np.delete(boxes.class_id, box), 1)
        np.add.at(matrix[class_count], np.delete(labels.class_id, label), 1)
    return matrix


def _pairs(overlaps: Float) -> tuple[Index, Index]:
    """Rows and columns of (N, M) that are paired, the largest overlap first, each once."""
    rows, columns = np.nonzero(overlaps > CONFUSION_IOU)
    order = np.argsort(-overlaps[rows, columns], kind="stable")
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in pairs and column not in taken:
            pairs[row] = column
            taken.add(column)
    return np.array(list(pairs.keys()), np.int64), np.array(list(pairs.values()), np.int64)
