"""Histograms count exactly whatever comes when; thresholds follow their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolotrt.calibration.observers import BINS, MIN_LIMIT, MSE_CANDIDATES, MSE_LEAST_PART, Histogram, threshold
from yolotrt.calibration.options import RULES

VALUES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def histogram_of(*batches: np.ndarray) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.asarray(batch, np.float32))
    return histogram


def assert_equal(a: Histogram, b: Histogram) -> None:
    assert (a.limit, a.largest) == (b.limit, b.largest)
    np.testing.assert_array_equal(a.counts, b.counts)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6))
@example([[1.0], [2.0]])
def test_batches_give_the_histogram_of_all_values_at_once(batches):
    assert_equal(histogram_of(*batches), histogram_of(np.concatenate(batches)))


@settings(deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6))
@example([[1.0], [2.0]])
def test_merging_gives_the_histogram_of_all_values_at_once(batches):
    merged = Histogram()
    for batch in batches:
        merged.merge(histogram_of(batch))
    assert_equal(merged, histogram_of(np.concatenate(batches)))


@settings(deadline=None)
@given(VALUES)
def test_a_histogram_is_what_numpy_counts(values):
    magnitudes = np.abs(np.asarray(values, np.float32)).astype(np.float64)
    found = histogram_of(values)
    assert found.largest == magnitudes.max()
    if magnitudes.max() == 0:
        assert found.counts[0] == len(values)
        return
    assert found.largest < found.limit
    assert found.limit == MIN_LIMIT or found.limit <= 2 * found.largest
    expected, _ = np.histogram(magnitudes, BINS, (0, found.limit))
    np.testing.assert_array_equal(found.counts, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram_of([1.0, bad])


@pytest.mark.parametrize("method", RULES)
@settings(deadline=None)
@given(values=VALUES)
def test_no_threshold_exceeds_the_largest_value(method, values):
    histogram = histogram_of(values)
    found = threshold(histogram, method)
    assert 0 <= found <= histogram.largest
    assert (found > 0) == (histogram.largest > 0)


@pytest.mark.parametrize("method", RULES)
def test_thresholds_scale_with_the_values(method):
    values = np.random.default_rng(0).standard_normal(20_000)
    small, large = (threshold(histogram_of(values * factor), method) for factor in (1, 1024))
    assert large == pytest.approx(1024 * small)


@pytest.mark.parametrize("method", RULES)
def test_evenly_spread_values_need_their_whole_range(method):
    found = threshold(histogram_of(np.linspace(-1, 1, 200_001)), method)
    assert found == pytest.approx(1.0, abs=0.01)  # the step of the candidates


def test_max_is_the_largest_value():
    assert threshold(histogram_of([0.5, -3.25, 1.0]), "max") == 3.25


def test_percentile_leaves_one_value_in_ten_thousand_out():
    values = np.random.default_rng(1).uniform(0, 1, 100_000)
    values[:5] = 100.0
    expected = np.sort(values)[round(len(values) * 0.9999) - 1]
    histogram = histogram_of(values)
    assert threshold(histogram, "percentile") == pytest.approx(expected, abs=histogram.width)


@pytest.mark.parametrize("seed", range(5))
def test_mse_is_least_among_its_candidates(seed):
    values = (np.random.default_rng(seed).standard_t(3, 50_000)).astype(np.float32)
    histogram = histogram_of(values)

    def error(largest: float) -> float:
        scale = largest / 127
        return float(np.square(values - np.clip(np.rint(values / scale), -127, 127) * scale).sum())

    best = min(error(histogram.largest * part) for part in np.geomspace(MSE_LEAST_PART, 1, MSE_CANDIDATES))
    # the histogram knows each value to a bin's width
    assert error(threshold(histogram, "mse")) <= 1.02 * best


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_a_rare_outlier_does_not_set_the_range(method):
    values = np.random.default_rng(2).standard_normal(1_000_000)
    assert threshold(histogram_of(values, [30.0]), method) < 15
