from __future__ import annotations

import numpy as np
import pytest
from evaluation_cases import boxes, labels, measured, random_pictures

from yolotrt.evaluation.bootstrap import mean_precision
from yolotrt.evaluation.matching import (
    CONFIDENCES,
    confusion_matrix,
    match,
    match_boxes,
    mean_of_classes,
    operating_curves,
)
from yolotrt.evaluation.metrics import IOU_THRESHOLDS, measure

NAMES = ("cat", "dog", "bird", "fish")
BOX = (10.0, 10.0, 50.0, 50.0)


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_our_matching_gives_the_mean_precision_of_faster_coco_eval(seed, crowds):
    pictures = random_pictures(seed, crowds=crowds)
    metrics = measure(pictures, NAMES).metrics
    ours = mean_precision(match(pictures, len(NAMES)), np.ones((1, len(pictures)), np.int64))
    assert 0.05 < metrics.map < 0.95  # else the case is too easy to say anything
    assert ours[0] == pytest.approx([metrics.map, metrics.map50], abs=1e-12)


MATCH_CASES = [
    # boxes, labels, crowd, hit at 0.50, ignored at 0.50
    ([BOX], [BOX], [False], [True], [False]),
    ([BOX, BOX], [BOX], [False], [True, False], [False, False]),  # a label is found once
    ([BOX, BOX], [BOX], [True], [False, False], [True, True]),  # a crowd as often as one likes
    ([BOX], [BOX, BOX], [True, False], [True], [False]),  # a label goes before a crowd
    ([(0, 0, 4, 4)], [BOX], [False], [False], [False]),
    ([(20, 20, 30, 30)], [BOX], [True], [False], [True]),  # inside a crowd: all of the box overlaps it
    ([BOX], [], [], [False], [False]),
    ([], [BOX], [False], [], []),
]


@pytest.mark.parametrize(("found", "there", "crowd", "hit", "ignored"), MATCH_CASES)
def test_boxes_choose_labels_by_cocos_rule(found, there, crowd, hit, ignored):
    arrays = (np.array(rows, np.float64).reshape(-1, 4) for rows in (found, there))
    is_hit, is_ignored = match_boxes(*arrays, np.array(crowd, np.bool_))
    assert is_hit.shape == is_ignored.shape == (len(IOU_THRESHOLDS), len(found))
    assert is_hit[0].tolist() == hit
    assert is_ignored[0].tolist() == ignored


def test_curves_say_what_is_left_above_a_confidence():
    found = boxes([(0, 0.9, *BOX), (0, 0.5, 60, 60, 90, 90), (0, 0.3, 100, 100, 140, 140)])
    there = labels([(0, *BOX), (0, 100, 100, 140, 140)])
    curves = operating_curves(match([measured(there, found)], 2))
    place = {confidence: int(np.searchsorted(CONFIDENCES, confidence)) for confidence in (0.2, 0.4, 0.6, 0.95)}
    assert curves.recall[0, list(place.values())].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert curves.precision[0, list(place.values())] == pytest.approx([2 / 3, 1 / 2, 1, 1])
    assert np.isnan(curves.f1[1]).all()  # a class without labels has no curve
    assert mean_of_classes(curves.f1) == pytest.approx(curves.f1[0])
    assert CONFIDENCES[curves.best] < 0.3  # all three boxes give the best F1: 0.8


def test_the_confusion_matrix_counts_every_box_and_label_once():
    other = (100.0, 100.0, 140.0, 140.0)
    there = labels([(0, *BOX), (1, *other), (1, 200, 200, 240, 240)])
    found = boxes([(0, 0.9, *BOX), (2, 0.8, *other), (3, 0.7, 300, 300, 340, 340), (0, 0.1, *other)])
    matrix = confusion_matrix([measured(there, found)], 4)
    expected = np.zeros((5, 5), int)
    expected[0, 0] = 1
    expected[2, 1] = 1  # a dog taken for a bird
    expected[3, 4] = 1  # a fish where nothing is
    expected[4, 1] = 1  # a dog missed
    assert matrix.tolist() == expected.tolist()
