"""What values a tensor takes, in one pass and constant memory, and the range that INT8 should represent of them.

A tensor's magnitudes are counted in a histogram of fixed size whose range doubles when a larger value comes: two bins
become one (as in PyTorch's HistogramObserver and ONNX Runtime's collectors, here with powers of two, so that nothing is
interpolated and the result is the histogram that knowing the range beforehand would give).

Four rules choose the threshold T, the magnitude that becomes 127; larger values saturate:

- ``max``: the largest magnitude.
- ``percentile``: the magnitude that 99.99 % of the values do not exceed (Wu et al. 2020, "Integer Quantization for Deep
  Learning Inference", arXiv 2004.09602, section 5.2).
- ``entropy``: the T for which the quantized distribution diverges least from the real one, by Kullback and Leibler
  (Migacz 2017, "8-bit Inference with TensorRT", GTC).
- ``mse``: the T with the least mean squared error, rounding and saturation together (Wu et al. 2020; Choukroun et al.
  2019, arXiv 1902.06822).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.network.quantize import INT8_MAX
from yolotrt.network.ranges import whole_range_step

Counts = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

BINS = 4096
"""32 bins a step of INT8; at least half of them lie below the largest value."""

MIN_LIMIT = 2.0**-64
"""Smaller values are zeros for a detector; with smaller ranges the bins' width would leave float32."""

PERCENTILE = 99.99

MSE_CANDIDATES = 160
MSE_LEAST_PART = 1 / 64
"""Thresholds tried: from this part of the largest magnitude to all of it, evenly on a logarithmic scale."""

ENTROPY_LEVELS = 128
ENTROPY_STEP = 16
"""Thresholds tried: every so many bins."""


class Histogram:
    """Magnitudes of one tensor.

    Attributes:
        counts: Values in each bin; bin i holds magnitudes from i to below i + 1 times `width`.
        limit: The range's end, the power of two above `largest`; 0 as long as all values are 0.
        largest: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return self.limit / BINS

    def add(self, values: npt.NDArray[np.floating[Any]]) -> None:
        """Count finite values of any shape.

        Raises:
            ValueError: if a value is NaN or infinite.
        """
        magnitudes = np.abs(values.ravel())
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("NaN or infinite")
        self._widen(largest)
        if self.limit == 0.0:
            self.counts[0] += magnitudes.size
            return
        # the factor is a power of two: the product is exact
        index = (magnitudes * magnitudes.dtype.type(BINS / self.limit)).astype(np.intp)
        self.counts += np.bincount(index, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Count the values of another histogram as well."""
        self._widen(other.largest)
        counts = other.counts
        for _ in range(_doublings(other.limit, self.limit)):
            counts = _halved(counts)
        self.counts += counts

    def _widen(self, largest: float) -> None:
        """Make room for a magnitude."""
        self.largest = max(self.largest, largest)
        if largest < self.limit or largest == 0.0:
            return
        limit = max(math.ldexp(1.0, math.frexp(largest)[1]), MIN_LIMIT)
        for _ in range(_doublings(self.limit, limit)):
            self.counts = _halved(self.counts)
        self.limit = limit


def threshold(histogram: Histogram, method: str, lowest: float | None = None) -> float:
    """The magnitude that INT8's largest integer should stand for, positive unless all values are 0.

    Args:
        histogram: What was observed.
        method: ``max``, ``percentile``, ``entropy`` or ``mse``.
        lowest: Where the range begins if it has a zero point, see `yolotrt.network.ranges`; None for symmetric ones.
            ``mse`` weighs the rounding of such a range.
    """
    if histogram.largest == 0.0:
        return 0.0
    found = _mse(histogram, lowest) if method == "mse" else _METHODS[method](histogram)
    return min(found, histogram.largest)


def _max(histogram: Histogram) -> float:
    return histogram.largest


def _percentile(histogram: Histogram) -> float:
    """The upper edge of the bin in which the percentile falls."""
    below = np.cumsum(histogram.counts)
    index = int(np.searchsorted(below, below[-1] * (PERCENTILE / 100)))
    return (index + 1) * histogram.width


def _mse(histogram: Histogram, lowest: float | None) -> float:
    candidates = np.geomspace(MSE_LEAST_PART, 1.0, MSE_CANDIDATES) * histogram.largest
    used = np.flatnonzero(histogram.counts)
    centres = np.asarray((used + 0.5) * histogram.width, np.float64)
    counts = histogram.counts[used].astype(np.float64)
    errors = [_squared_error(centres, counts, float(candidate), lowest) for candidate in candidates]
    return float(candidates[int(np.argmin(errors))])


def _squared_error(values: Float, counts: Float, largest: float, lowest: float | None) -> float:
    """Sum of squared errors of quantizing each value `counts` times with `largest` as the largest integer."""
    scale = largest / INT8_MAX if lowest is None else whole_range_step(largest, lowest)
    error = values - np.rint(np.minimum(values, largest) / scale) * scale
    return float(counts @ (error * error))


def _entropy(histogram: Histogram) -> float:
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]  # exact zeros say nothing about the range (pytorch-quantization, calib/histogram.py)
    end = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else BINS
    candidates = range(ENTROPY_LEVELS, max(end, ENTROPY_LEVELS) + ENTROPY_STEP, ENTROPY_STEP)
    sizes = [min(size, BINS) for size in candidates]
    divergences = [_divergence(counts, size) for size in sizes]
    return (sizes[int(np.argmin(divergences))]) * histogram.width


def _divergence(counts: Float, size: int) -> float:
    """KL divergence of the first `size` bins, with all beyond saturated into the last, from their 128-level copy."""
    real = counts[:size].copy()
    level = np.arange(size) * ENTROPY_LEVELS // size
    sums = np.bincount(level, real, ENTROPY_LEVELS)
    real[-1] += counts[size:].sum()
    filled = real > 0
    shares = np.bincount(level, filled, ENTROPY_LEVELS)
    copy = np.where(filled, (sums / np.maximum(shares, 1))[level], 0.0)
    if copy.sum() == 0:
        return float("inf")
    p, q = real[filled] / real.sum(), copy[filled] / copy.sum()
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-12))))


_METHODS: Mapping[str, Callable[[Histogram], float]] = {
    "max": _max,
    "percentile": _percentile,
    "entropy": _entropy,
}


def _doublings(low: float, high: float) -> int:
    """How often `low` doubles to give `high`; at most as often as it matters to a histogram."""
    return 0 if low == 0.0 else min(round(np.log2(high / low)), BINS.bit_length())


def _halved(counts: Counts) -> Counts:
    """The same counts in bins of twice the width."""
    result = np.zeros_like(counts)
    result[: BINS // 2] = counts.reshape(-1, 2).sum(axis=1)
    return result
