"""yololayer.cu, run on the CPU, gives the rows of yolotrt.postprocess.YoloLayer."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import COCO_ANCHORS, COCO_STRIDES, decode, decode_error, random_heads

from yolotrt.cuda.kernels import yololayer_defines
from yolotrt.errors import InputError
from yolotrt.postprocess import YoloLayer, raw_threshold

# The two expf (C library, NumPy) may differ by some units in the last place, and three roundings follow.
LAST_PLACES = 8

SIZES = [(12, 20), (6, 10), (3, 5)]  # 900 rows: not a multiple of a block's 32


@pytest.mark.parametrize("variant", ["best", "full"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("anchors", "strides", "classes"),
    [
        (COCO_ANCHORS, COCO_STRIDES, 80),
        (COCO_ANCHORS, COCO_STRIDES, 1),
        (COCO_ANCHORS, COCO_STRIDES, 27),  # 32 channels: a whole tile of the full variant
        (COCO_ANCHORS, COCO_STRIDES, 365),  # more classes than a thread loads at once
        ((*COCO_ANCHORS, COCO_ANCHORS[2]), (8, 16, 32, 64), 3),  # P6
        (tuple(level[:1] for level in COCO_ANCHORS), COCO_STRIDES, 5),
        (tuple((*level, (1.5, 7.25)) for level in COCO_ANCHORS), COCO_STRIDES, 2),
        (COCO_ANCHORS[:1], (8,), 4),
    ],
    ids=["coco", "one-class", "27-classes", "365-classes", "four-levels", "one-anchor", "four-anchors", "one-level"],
)
def test_rows_equal_the_reference(machine, anchors, strides, classes, half, variant):
    rng = np.random.default_rng(classes)
    sizes = [*SIZES, (2, 3)][: len(anchors)]
    heads = random_heads(rng, sizes, len(anchors[0]), classes, 2, half=half)
    layer = YoloLayer(anchors, strides, classes)
    actual = decode(machine, heads, layer, variant)
    expected = getattr(layer, variant)([head.astype(np.float32) for head in heads])
    assert decode_error(actual, expected) <= LAST_PLACES
    if variant == "best":
        np.testing.assert_array_equal(actual[..., 5], expected[..., 5])


@pytest.mark.parametrize(
    ("scores", "winner"),
    [
        ([0.5, 0.5, 0.5], 0),
        ([-1.0, 2.0, 2.0], 1),
        ([20.0, 30.0, 90.0], 0),  # all sigmoids are 1
        ([3.0, 25.0, 19.0], 1),
        ([-95.0, -90.0, -99.0], 0),  # all sigmoids are 0
        ([-95.0, -60.0, -50.0], 2),  # tiny, but not equal
        ([-np.inf, -90.0, -89.0], 0),
        ([9.0, 9.0000019, 9.0], 0),  # one last place apart before the sigmoid, equal after it
        ([5.0, 5.000001, 5.0], 0),  # the same where raw values usually decide
        ([1.0, 1.01, 1.0], 1),
    ],
)
@pytest.mark.parametrize("shift", [0, 2, 60], ids=["same-slice", "next-slice", "far"])
def test_the_first_of_equal_sigmoids_wins_even_if_a_later_raw_value_is_higher(machine, scores, winner, shift):
    classes = 80
    raw = np.full((1, 85, 1, 1), -np.inf, np.float32)
    raw[0, :5] = 1.0
    at = [0, 1 + shift // 2, 2 + shift]
    if scores[0] <= -80:
        raw[0, 5:] = -np.inf  # the other classes tie at zero as well, and come later than class 0
    raw[0, [5 + index for index in at], 0, 0] = scores
    layer = YoloLayer((((10.0, 20.0),),), (8,), classes)
    actual = decode(machine, [raw], layer, "best")[0, 0, 5]
    assert actual == layer.best([raw])[0, 0, 5] == at[winner]


def test_thread_order_does_not_matter(machine):
    rng = np.random.default_rng(5)
    heads = random_heads(rng, SIZES, 3, 80, 1, half=False)
    layer = YoloLayer(COCO_ANCHORS, COCO_STRIDES, 80)
    for variant in ("best", "full"):
        ascending = decode(machine, heads, layer, variant)
        machine.device.descending = True
        try:
            descending = decode(machine, heads, layer, variant)
        finally:
            machine.device.descending = False
        np.testing.assert_array_equal(ascending, descending)


@pytest.mark.parametrize(("levels", "strides"), [(0, 0), (5, 5), (3, 2)])
def test_a_wrong_number_of_levels_is_refused(levels, strides):
    anchors = (((10.0, 20.0),),) * levels
    with pytest.raises(InputError, match="YoloLayer takes 1 to 4 levels"):
        yololayer_defines(anchors, (8,) * strides, 80, "best", half=False)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("confidence", [0.0, 0.25, 0.9, 1.0])
def test_rows_that_cannot_reach_the_confidence_become_zeros_and_no_others(machine, half, confidence):
    heads = random_heads(np.random.default_rng(7), SIZES, 3, 80, 2, half=half)
    heads[0][0, 4, 0, :4] = -np.inf, np.inf, np.nan, 0.0
    layer = YoloLayer(COCO_ANCHORS, COCO_STRIDES, 80)
    everything = decode(machine, heads, layer, "best")
    rows = decode(machine, heads, layer, "best", raw_threshold(confidence))
    objectness = layer.full([head.astype(np.float32) for head in heads])[..., 4]
    kept = (rows != 0).any(-1)
    np.testing.assert_array_equal(rows[kept], everything[kept])
    assert not (objectness[~kept] > confidence).any()
    # the threshold is four last places early at most
    assert not (objectness[kept] < confidence - 1e-6).any()
