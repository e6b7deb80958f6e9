"""Detection metrics without further packages: NMS, COCO's average precision, false boxes on empty pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0, 1, 101)
MAX_CANDIDATES, MAX_DETECTIONS = 1000, 100


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture: xyxy float32 (N, 4) in pixels, class_id int (N,), and the confidence (N,) of found ones."""

    xyxy: Array
    class_id: npt.NDArray[np.int64]
    confidence: Array


def iou_matrix(a: Array, b: Array) -> Array:
    """IoU of every pair: (N, 4) and (M, 4) to (N, M)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = (high - low).clip(0).prod(-1)
    areas = (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1)[None]
    return inner / (areas - inner + 1e-9)


def select(rows: Array, confidence: float, iou: float) -> Boxes:
    """Class-aware NMS with several classes a row.

    Args:
        rows: float32 (rows, 5 + nc): x, y, width, height, objectness, class probabilities.
        confidence: Least objectness x class probability.
        iou: Boxes of a class that overlap a better one by more are dropped.
    """
    rows = rows[rows[:, 4] > confidence]
    scores = rows[:, 5:] * rows[:, 4:5]
    index, class_id = np.nonzero(scores > confidence)
    score = scores[index, class_id]
    order = np.argsort(-score, kind="stable")[:MAX_CANDIDATES]
    index, class_id, score = index[order], class_id[order], score[order]
    half = rows[index, 2:4] / 2
    xyxy = np.concatenate([rows[index, :2] - half, rows[index, :2] + half], 1)
    alive, keep = np.ones(len(xyxy), bool), []
    overlaps = (iou_matrix(xyxy, xyxy) > iou) & (class_id[:, None] == class_id[None])
    for candidate in range(len(xyxy)):
        if alive[candidate]:
            keep.append(candidate)
            alive &= ~overlaps[candidate]
    keep = keep[:MAX_DETECTIONS]
    return Boxes(xyxy[keep], class_id[keep], score[keep])


def average_precision(
    found: Sequence[Boxes], truth: Sequence[Boxes], class_count: int, sides: tuple[float, float] = (0, 1e9)
) -> Array:
    """COCO's average precision, 101 recall points, greedy matching by confidence.

    Args:
        found: Detections, one `Boxes` a picture.
        truth: Labels, one `Boxes` a picture.
        class_count: Number of classes.
        sides: Only boxes whose longer side in pixels is in this half-open range count; others neither help nor harm.

    Returns:
        float32 (class_count, 10): one row a class, one column an IoU from 0.5 to 0.95; NaN for classes without labels.
    """
    result = np.full((class_count, len(IOU_THRESHOLDS)), np.nan, np.float32)
    for class_id in range(class_count):
        pairs = [_match(f, t, class_id, sides) for f, t in zip(found, truth, strict=True)]
        positives = sum(pair[3] for pair in pairs)
        if not positives:
            continue
        scores = np.concatenate([pair[0] for pair in pairs])
        order = np.argsort(-scores, kind="stable")
        hit = np.concatenate([pair[1] for pair in pairs], 1)[:, order]
        ignored = np.concatenate([pair[2] for pair in pairs], 1)[:, order]
        for column in range(len(IOU_THRESHOLDS)):
            result[class_id, column] = _area(hit[column][~ignored[column]], positives)
    return result


def _match(
    found: Boxes, truth: Boxes, class_id: int, sides: tuple[float, float]
) -> tuple[Array, npt.NDArray[np.bool_], npt.NDArray[np.bool_], int]:
    """Scores, hits and ignored detections (10, N) of one class in one picture, and its number of counted labels."""
    mine, theirs = found.class_id == class_id, truth.class_id == class_id
    order = np.argsort(-found.confidence[mine], kind="stable")
    boxes, labels = found.xyxy[mine][order], truth.xyxy[theirs]
    counted = _in_range(labels, sides)
    hit = np.zeros((len(IOU_THRESHOLDS), len(boxes)), bool)
    ignored = np.tile(~_in_range(boxes, sides), (len(IOU_THRESHOLDS), 1))
    overlap = iou_matrix(boxes, labels)
    for row, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(len(labels), bool)
        for column in range(len(boxes)):
            best = _best_label(overlap[column], free, counted, float(threshold))
            if best >= 0:
                free[best] = False
                hit[row, column], ignored[row, column] = counted[best], not counted[best]
    return found.confidence[mine][order], hit, ignored, int(counted.sum())


def _best_label(overlap: Array, free: npt.NDArray[np.bool_], counted: npt.NDArray[np.bool_], threshold: float) -> int:
    """The free label with the greatest overlap, counted ones first, or -1."""
    for pool in (free & counted, free & ~counted):
        if pool.any():
            best = int(np.argmax(np.where(pool, overlap, -1)))
            if overlap[best] >= threshold:
                return best
    return -1


def _in_range(boxes: Array, sides: tuple[float, float]) -> npt.NDArray[np.bool_]:
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1) if len(boxes) else np.zeros(0)
    return (longer >= sides[0]) & (longer < sides[1])


def _area(hit: npt.NDArray[np.bool_], positives: int) -> float:
    """Area under the precision-recall curve, precision made monotone, sampled at 101 recalls."""
    if not len(hit):
        return 0.0
    true = np.cumsum(hit)
    precision, recall = true / np.arange(1, len(hit) + 1), true / positives
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALL_POINTS, side="left")
    return float(np.where(index < len(precision), precision[np.minimum(index, len(precision) - 1)], 0).mean())
