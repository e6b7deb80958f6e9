"""masks.cu, run on the CPU, gives the masks of yolotrt.postprocess and yolotrt.masks."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import COCO_ANCHORS, COCO_STRIDES, decode_error, detect_masks

from yolotrt.cuda.kernels import YoloLayerKernel
from yolotrt.masks import Masks
from yolotrt.postprocess import NmsOptions, YoloLayer, non_max_suppression, with_masks
from yolotrt.preprocess import Letterbox

NETWORK = (96, 160)
GRID = (24, 40)
SIZES = [(12, 20), (6, 10), (3, 5)]
OPTIONS = NmsOptions(confidence=0.3, iou=0.02, max_detections=9)  # many boxes between the kept ones are dropped
PICTURES = ((50, 83), (130, 90), (96, 160))


def model(classes: int, masks: int, *, half: bool, seed: int = 0) -> tuple[YoloLayer, list[np.ndarray], np.ndarray]:
    """A layer, heads of three pictures and prototypes as a network gives them."""
    random = np.random.default_rng(seed)
    layer = YoloLayer(COCO_ANCHORS, COCO_STRIDES, classes, masks)
    kind = np.float16 if half else np.float32
    heads = [(random.standard_normal((3, 3 * layer.row_values, *size)) * 1.5).astype(kind) for size in SIZES]
    return layer, heads, random.standard_normal((3, masks, *GRID)).astype(kind)


@pytest.mark.parametrize(
    ("classes", "masks", "half"), [(3, 8, False), (80, 40, True), (1, 1, True)], ids=["fp32", "fp16", "one-class-fp16"]
)
def test_masks_equal_the_reference(machine, classes, masks, half):
    layer, heads, prototypes = model(classes, masks, half=half)
    letterboxes = [Letterbox.fit(size, NETWORK) for size in PICTURES]
    found, cells, bits = detect_masks(machine, layer, heads, prototypes, OPTIONS, letterboxes)
    rows = layer.candidates([head.astype(np.float32) for head in heads], OPTIONS.confidence)
    for picture, candidates in enumerate(rows):
        expected = non_max_suppression(candidates, OPTIONS, masks)
        assert len(found[picture]) == len(expected) == OPTIONS.max_detections
        np.testing.assert_array_equal(found[picture].class_id, expected.class_id)
        expected = with_masks(expected, prototypes[picture].astype(np.float32), NETWORK)
        for detection, crop in enumerate(expected.masks):
            grid = np.zeros(GRID, np.float32)
            height, width = crop.values.shape
            grid[crop.top : crop.top + height, crop.left : crop.left + width] = crop.values
            # sums of at most 40 products of values around 1, in another order, and two exponentials
            np.testing.assert_allclose(cells[picture, detection], grid, rtol=0, atol=1e-5)
        dense = Masks(expected.masks, letterboxes[picture]).dense()
        assert bits[picture].shape == dense.shape
        # OpenCV may round places to 1/32 of a cell; where the values of noise cross the threshold, pixels change sides
        assert (bits[picture] != dense).mean() < 0.005
        assert bits[picture].any()


def test_bits_are_interpolated_exactly(machine):
    """Against linear interpolation in float64, wherever it is not within rounding of the threshold."""
    layer, heads, prototypes = model(3, 8, half=False, seed=1)
    letterboxes = [Letterbox.fit(size, NETWORK) for size in PICTURES]
    _, cells, bits = detect_masks(machine, layer, heads, prototypes, OPTIONS, letterboxes)
    for letterbox, grids, masks in zip(letterboxes, cells.astype(np.float64), bits, strict=True):
        (scale_x, scale_y), (height, width) = letterbox.scale, letterbox.source_size
        rows = np.clip(((np.arange(height) + 0.5) * scale_y + letterbox.top) / 4 - 0.5, 0, GRID[0] - 1)
        columns = np.clip(((np.arange(width) + 0.5) * scale_x + letterbox.left) / 4 - 0.5, 0, GRID[1] - 1)
        for grid, mask in zip(grids, masks, strict=True):
            along_rows = np.array([np.interp(rows, np.arange(GRID[0]), column) for column in grid.T])
            values = np.array([np.interp(columns, np.arange(GRID[1]), row) for row in along_rows.T])
            sure = np.abs(values - 0.5) > 1e-4
            np.testing.assert_array_equal(mask[sure], (values > 0.5)[sure])


def test_detections_that_are_not_there_cost_nothing(machine):
    layer, heads, prototypes = model(3, 8, half=False)
    letterboxes = [Letterbox.fit(size, NETWORK) for size in PICTURES]
    options = NmsOptions(confidence=0.97, max_detections=9)
    found, cells, _ = detect_masks(machine, layer, heads, prototypes, options, letterboxes)
    for boxes, grids in zip(found, cells, strict=True):
        assert len(boxes) < 9
        assert not np.isnan(grids[: len(boxes)]).any()
        assert np.isnan(grids[len(boxes) :]).all()


def test_full_rows_have_the_coefficients(machine):
    layer, heads, _ = model(5, 6, half=True)
    kernel = YoloLayerKernel(machine.device, COCO_ANCHORS, COCO_STRIDES, 5, "full", half=True, mask_count=6)
    assert kernel.row_values == 16
    buffers = [machine.upload(head) for head in heads]
    output = machine.upload(np.full((3, kernel.row_count(SIZES), 16), np.nan, np.float32))
    kernel.launch([machine.address(buffer) for buffer in buffers], SIZES, 3, machine.address(output))
    expected = layer.full([head.astype(np.float32) for head in heads])
    actual = machine.download(output)
    np.testing.assert_array_equal(actual[..., 10:], expected[..., 10:])
    assert decode_error(actual[..., :10], expected[..., :10]) <= 8
