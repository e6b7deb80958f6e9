from __future__ import annotations

import math

import numpy as np
import pytest
from evaluation_cases import boxes, labels, measured

from yolotrt.evaluation.metrics import measure

NAMES = ("cat", "dog")
BOX = (10.0, 10.0, 60.0, 60.0)
OTHER = (100.0, 100.0, 300.0, 300.0)

CASES = [
    # labels, boxes, mAP50-95, mAP50, AR100
    ([(0, *BOX)], [(0, 0.9, *BOX)], 1.0, 1.0, 1.0),
    ([(0, *BOX)], [], 0.0, 0.0, 0.0),
    ([(0, *BOX)], [(1, 0.9, *BOX)], 0.0, 0.0, 0.0),  # another class
    ([(0, *BOX)], [(0, 0.9, *OTHER), (0, 0.8, *BOX)], 0.5, 0.5, 1.0),  # a false box before the right one
    ([(0, *BOX)], [(0, 0.9, *BOX), (0, 0.8, *OTHER)], 1.0, 1.0, 1.0),  # and after it
    ([(0, *BOX)], [(0, 0.9, 10, 10, 60, 46)], 0.5, 1.0, 0.5),  # an overlap of 0.72 passes 5 of 10 thresholds
    ([(0, *BOX), (1, *OTHER)], [(0, 0.9, *BOX)], 0.5, 0.5, 0.5),  # the mean of two classes
]


@pytest.mark.parametrize(("there", "found", "mean", "mean50", "recall"), CASES)
def test_figures_are_cocos(there, found, mean, mean50, recall):
    metrics = measure([measured(labels(there), boxes(found))], NAMES).metrics
    assert (metrics.map, metrics.map50, metrics.ar100) == pytest.approx((mean, mean50, recall))


def test_what_cannot_be_measured_is_none():
    measurement = measure([measured(labels([(0, *OTHER)]), boxes([(0, 0.9, *OTHER)]))], NAMES)
    metrics = measurement.metrics
    assert (metrics.map_small, metrics.map_medium, metrics.map_large) == (None, None, pytest.approx(1.0))
    cat, dog = metrics.classes
    assert (cat.labels, cat.pictures, cat.map50) == (1, 1, pytest.approx(1.0))
    assert (dog.labels, dog.pictures, dog.map50) == (0, 0, None)
    assert math.isnan(measurement.precision50[1, 0])


def test_crowds_count_neither_for_nor_against():
    there = labels([(0, *BOX), (0, *OTHER)], crowd=[False, True])
    found = boxes([(0, 0.9, 120, 120, 160, 160), (0, 0.8, *BOX)])
    metrics = measure([measured(there, found)], NAMES).metrics
    assert metrics.map == pytest.approx(1.0)
    assert metrics.classes[0].labels == 1


def test_figures_do_not_depend_on_the_order_of_pictures():
    pictures = [
        measured(labels([(0, *BOX)]), boxes([(0, confidence, *BOX), (1, 0.3, *OTHER)]), str(confidence))
        for confidence in np.linspace(0.1, 0.9, 5)
    ]
    assert measure(pictures, NAMES).metrics == measure(pictures[::-1], NAMES).metrics
