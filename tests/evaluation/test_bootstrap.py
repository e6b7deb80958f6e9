from __future__ import annotations

import numpy as np
import pytest
from evaluation_cases import measured, random_pictures

from yolotrt.evaluation.bootstrap import compare, mean_precision
from yolotrt.evaluation.matching import match
from yolotrt.evaluation.metrics import measure
from yolotrt.evaluation.predict import Measured
from yolotrt.postprocess import Boxes

NAMES = ("cat", "dog", "bird", "fish")


def shifted(item: Measured, by: float) -> Measured:
    boxes = item.boxes
    return measured(item.labels, Boxes(boxes.xyxy + np.float32(by), boxes.confidence, boxes.class_id))


@pytest.mark.parametrize("seed", range(6))
def test_weighted_figures_are_those_of_data_in_which_pictures_stand_repeatedly(seed):
    # with four pictures, classes are missing in some draws
    pictures = random_pictures(seed, count=4 if seed > 2 else 12, crowds=seed % 2 == 1)
    draws = np.random.default_rng(seed).multinomial(len(pictures), np.full(len(pictures), 1 / len(pictures)), size=8)
    fast = mean_precision(match(pictures, len(NAMES)), draws)
    for weights, figures in zip(draws, fast, strict=True):
        copies = [item for item, weight in zip(pictures, weights, strict=True) for _ in range(weight)]
        metrics = measure(copies, NAMES).metrics  # brute force: everything is matched again
        assert figures == pytest.approx([metrics.map, metrics.map50], abs=1e-9)


def test_an_engine_does_not_differ_from_itself():
    matches = match(random_pictures(1), len(NAMES))
    result = compare(matches, matches, 12, draws=50)
    assert (result.map.value, result.map.low, result.map.high) == (0, 0, 0)
    assert not result.map.is_distinct


def test_a_worse_engine_is_told_from_chance_and_a_like_one_is_not():
    pictures = random_pictures(2, count=40)
    good = match(pictures, len(NAMES))
    bad = match([shifted(item, 9) for item in pictures], len(NAMES))
    result = compare(good, bad, len(pictures), draws=300)
    assert result.map.is_distinct
    assert result.map.low <= result.map.value <= result.map.high < 0
    like = match([shifted(item, 0.01) for item in pictures], len(NAMES))
    assert not compare(good, like, len(pictures), draws=300).map50.is_distinct


def test_the_interval_is_repeatable():
    first, second = (match(random_pictures(seed), len(NAMES)) for seed in (3, 3))
    assert compare(first, second, 12, draws=40) == compare(first, second, 12, draws=40)
