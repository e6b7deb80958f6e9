"""masks.cu, run on the CPU, gives the masks of yolotrt.postprocess and yolotrt.masks."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import (
    COCO_ANCHORS,
    crops_error,
    decode_error,
    detect_masks,
    expected_masks,
    mask_case,
    masks_of_found,
)

from yolotrt.cuda.kernels import YoloLayerKernel
from yolotrt.postprocess import NmsOptions
from yolotrt.preprocess import Letterbox

NETWORK = (96, 160)
GRID = (24, 40)
SIZES = [(12, 20), (6, 10), (3, 5)]
OPTIONS = NmsOptions(confidence=0.3, iou=0.02, max_detections=9)  # many boxes between the kept ones are dropped
LETTERBOXES = [Letterbox.fit(size, NETWORK) for size in ((50, 83), (130, 90), (96, 160))]

TOLERANCE = 1e-5
"""Of values in 0..1: sums of at most 40 products of values around 1, in another order, and two exponentials."""


@pytest.mark.parametrize(
    ("classes", "masks", "half"), [(3, 8, False), (80, 40, True), (1, 1, True)], ids=["fp32", "fp16", "one-class-fp16"]
)
def test_masks_equal_the_reference(machine, classes, masks, half):
    case = mask_case(np.random.default_rng(0), classes=classes, masks=masks, half=half)
    found, crops = detect_masks(machine, *case, OPTIONS, NETWORK)
    for picture, wanted in enumerate(expected_masks(*case, OPTIONS, NETWORK)):
        assert len(found[picture]) == len(wanted) == OPTIONS.max_detections
        np.testing.assert_array_equal(found[picture].class_id, wanted.class_id)
        assert crops_error(crops[picture], wanted.masks) <= TOLERANCE
        assert crops_error(crops[picture], masks_of_found(*case, found, NETWORK)[picture].masks) <= TOLERANCE


def test_pictures_may_have_fewer_detections_than_room(machine):
    case = mask_case(np.random.default_rng(0), classes=3, masks=8, half=False)
    options = NmsOptions(confidence=0.9, max_detections=9)
    found, crops = detect_masks(machine, *case, options, NETWORK)
    assert sum(map(len, found)) > 0
    for boxes, masks, wanted in zip(found, crops, expected_masks(*case, options, NETWORK), strict=True):
        assert len(boxes) < 9
        assert crops_error(masks, wanted.masks) <= TOLERANCE


def test_hundreds_of_masks_lie_side_by_side(machine):
    """More than one round of the block that places them."""
    case = mask_case(np.random.default_rng(2), classes=3, masks=1, half=False, batch=1)
    options = NmsOptions(confidence=0.05, iou=0.5, max_detections=300)
    found, (crops,) = detect_masks(machine, *case, options, NETWORK, whole_grids=200)
    assert len(found[0]) == 300
    (wanted,) = expected_masks(*case, options, NETWORK)
    assert crops_error(crops, wanted.masks) <= TOLERANCE


def test_where_room_is_short_that_is_told_and_nothing_is_written_beside_it(machine):
    case = mask_case(np.random.default_rng(0), classes=3, masks=8, half=False)
    sizes = [sum(crop.values.size for crop in wanted.masks) for wanted in expected_masks(*case, OPTIONS, NETWORK)]
    room = sum(sizes) // len(sizes) // (GRID[0] * GRID[1])
    _, crops = detect_masks(machine, *case, OPTIONS, NETWORK, whole_grids=room)
    assert [masks is None for masks in crops] == [size > room * GRID[0] * GRID[1] for size in sizes]
    assert None in crops


def test_full_rows_have_the_coefficients(machine):
    layer, heads, _ = mask_case(np.random.default_rng(0), classes=5, masks=6, half=True)
    kernel = YoloLayerKernel(machine.device, COCO_ANCHORS, layer.strides, 5, "full", half=True, mask_count=6)
    assert kernel.row_values == 16
    buffers = [machine.upload(head) for head in heads]
    output = machine.upload(np.full((3, kernel.row_count(SIZES), 16), np.nan, np.float32))
    kernel.launch([machine.address(buffer) for buffer in buffers], SIZES, 3, machine.address(output))
    expected = layer.full([head.astype(np.float32) for head in heads])
    actual = machine.download(output)
    np.testing.assert_array_equal(actual[..., 10:], expected[..., 10:])
    assert decode_error(actual[..., :10], expected[..., :10]) <= 8
