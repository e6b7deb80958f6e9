"""Is the difference between two engines more than chance: a paired bootstrap over pictures.

Pictures are drawn with replacement, as many as there are, and both engines are measured on the same draw; the spread of
the differences over many draws says how far other pictures of the same kind would move the difference (B. Efron, R. J.
Tibshirani, An Introduction to the Bootstrap, 1993). The interval is the union of the percentile interval (chapter 13)
and the basic one, the percentile interval mirrored at the difference: where the spread is skewed, as with few pictures,
one of them is too narrow on the side that matters. Of 200 pairs of like engines with 40 random pictures, the union
called 5 % different in mAP50 and the percentile interval alone 6.5 %.

Nothing is matched again for a draw: a picture drawn k times weighs k in the cumulative sums from which precision and
recall are made. That equals COCO's evaluation of data in which the picture stands k times, up to the order of boxes of
exactly equal confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolotrt.evaluation.matching import ClassMatches
from yolotrt.evaluation.metrics import IOU_THRESHOLDS, RECALLS

Float = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

DRAWS = 2000
LEVEL = 0.95
SEED = 0

_CHUNK_VALUES = 4_000_000
"""Values of one cumulative sum at a time, 32 MB."""


@dataclass(frozen=True)
class Difference:
    """The second engine's figure minus the first's.

    Attributes:
        first: The first engine's figure.
        second: The second engine's.
        low: Lower end of the interval of the difference.
        high: Upper end.
    """

    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """The difference."""
        return self.second - self.first

    @property
    def is_distinct(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two engines on the same pictures.

    Attributes:
        map: Of mAP50-95.
        map50: Of mAP50.
        draws: Number of draws.
        level: Share of the draws inside the intervals.
        pictures: Number of pictures.
    """

    map: Difference
    map50: Difference
    draws: int
    level: float
    pictures: int


def compare(
    first: Sequence[ClassMatches], second: Sequence[ClassMatches], pictures: int, *, draws: int = DRAWS
) -> Comparison:
    """Compare two engines' matches in the same pictures.

    Args:
        first: By class.
        second: By class, of the same classes and pictures.
        pictures: Number of pictures.
        draws: How often to draw.
    """
    generator = np.random.default_rng(SEED)
    chances = np.full(pictures, 1 / pictures)
    weights = generator.multinomial(pictures, chances, size=draws)
    plain = np.ones((1, pictures), np.int64)
    all_weights = np.concatenate([plain, weights])
    figures = [mean_precision(matches, all_weights) for matches in (first, second)]
    mean, mean50 = (_difference(figures[0][:, column], figures[1][:, column]) for column in (0, 1))
    return Comparison(mean, mean50, draws, LEVEL, pictures)


def _difference(first: Float, second: Float) -> Difference:
    """From figures (1 + draws,) of both engines, the first of each without drawing."""
    outside = (1 - LEVEL) / 2
    value = float(second[0] - first[0])
    low, high = (float(end) for end in np.nanquantile(second[1:] - first[1:], [outside, 1 - outside]))
    return Difference(float(first[0]), float(second[0]), min(low, 2 * value - high), max(high, 2 * value - low))


def mean_precision(matches: Sequence[ClassMatches], weights: Index) -> Float:
    """mAP50-95 and mAP50 of weighted pictures.

    Args:
        matches: By class.
        weights: int64 (draws, pictures): how often each picture counts.

    Returns:
        float64 (draws, 2), each the mean over the classes that have a label in a draw; NaN if none has.
    """
    total = np.zeros((len(weights), 2))
    classes = np.zeros(len(weights))
    for own in matches:
        labels = weights @ own.labels  # (draws,)
        if not own.labels.any():
            continue
        precision = np.concatenate([_average_precision(own, part) for part in _chunks(weights, len(own.picture))])
        is_present = labels > 0
        total[is_present] += precision[is_present]
        classes += is_present
    with np.errstate(invalid="ignore"):
        return total / classes[:, None]


def _chunks(weights: Index, boxes: int) -> Sequence[Index]:
    """The draws in parts whose cumulative sums fit into memory."""
    return np.array_split(weights, max(1, len(weights) * boxes // _CHUNK_VALUES))


def _average_precision(own: ClassMatches, weights: Index) -> Float:
    """Average precision (draws, 2) of one class: the mean over all overlaps, and at 0.50."""
    labels = weights @ own.labels  # (draws,)
    drawn = weights[:, own.picture]  # (draws, boxes)
    all_counted = np.cumsum(drawn, axis=1)
    by_overlap = np.empty((len(IOU_THRESHOLDS), len(weights)))
    for level, (is_hit, is_ignored) in enumerate(zip(own.is_hit, own.is_ignored, strict=True)):
        counted = np.cumsum(drawn * ~is_ignored, axis=1) if is_ignored.any() else all_counted
        # only a hit can raise recall, and so be where COCO reads the curve
        hits = np.cumsum(drawn[:, is_hit], axis=1)  # (draws, hits)
        by_overlap[level] = _interpolated(hits, counted[:, is_hit], labels)
    return np.stack([by_overlap.mean(axis=0), by_overlap[0]], axis=1)


def _interpolated(hits: Index, counted: Index, labels: Index) -> Float:
    """COCO's mean (draws,) of the precisions at `RECALLS`.

    Args:
        hits: int64 (draws, n): hits up to each hit.
        counted: int64 (draws, n): boxes up to each hit.
        labels: int64 (draws,): labels.
    """
    if not hits.shape[1]:
        return np.zeros(len(hits))
    precision = hits / np.maximum(counted, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / np.maximum(labels, 1)[:, None]
    reached = np.searchsorted(RECALLS, recall, side="right")  # places of RECALLS that each hit has reached
    gained = np.diff(reached, axis=1, prepend=0)
    mean: Float = (envelope * gained).sum(axis=1) / len(RECALLS)
    return mean
