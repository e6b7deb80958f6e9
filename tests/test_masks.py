"""Masks: from coefficients and prototypes to windows, outlines and run lengths."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from yolotrt.masks import Masks, compress_runs
from yolotrt.postprocess import Boxes, MaskCrop, with_masks
from yolotrt.preprocess import Letterbox

NETWORK = (64, 96)
GRID = (16, 24)


def boxes_of(*xyxy: tuple[float, float, float, float], seed: int = 0, prototypes: int = 4) -> Boxes:
    count = len(xyxy)
    weights = np.random.RandomState(seed).standard_normal((count, prototypes)).astype(np.float32)
    return Boxes(np.array(xyxy, np.float32), np.ones(count, np.float32), np.zeros(count, np.int64), weights)


def prototypes(seed: int = 1, count: int = 4) -> np.ndarray:
    """Smooth, so that the masks have shapes rather than noise."""
    planes = np.random.RandomState(seed).standard_normal((count, 5, 7)).astype(np.float32) * 3
    return np.stack([cv2.resize(plane, GRID[::-1], interpolation=cv2.INTER_CUBIC) for plane in planes])


def expected_cells(boxes: Boxes, planes: np.ndarray) -> np.ndarray:
    """The rule, cell by cell: the sigmoid of the weighed prototypes where the cell's corner is inside the box."""
    masks = np.zeros((len(boxes), *GRID))
    for mask, weights, box in zip(masks, boxes.coefficients, boxes.xyxy / 4, strict=True):
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                if box[0] <= column < box[2] and box[1] <= row < box[3]:
                    mask[row, column] = 1 / (1 + np.exp(-float(weights @ planes[:, row, column])))
    return masks


BOXES = (
    (10.0, 8.0, 50.0, 40.0),  # on cells' corners
    (10.3, 9.9, 51.7, 40.1),
    (-20.0, -5.0, 30.0, 30.0),  # beyond the left upper corner
    (60.0, 30.0, 120.0, 90.0),  # beyond the right lower corner
    (0.0, 0.0, 96.0, 64.0),
    (41.0, 21.0, 43.0, 23.0),  # between the corners: nothing
    (200.0, 200.0, 210.0, 210.0),
)


def test_a_crop_holds_what_the_rule_says_and_a_border_of_zeros():
    boxes, planes = boxes_of(*BOXES), prototypes()
    found = with_masks(boxes, planes, NETWORK)
    assert found.coefficients is None
    for crop, expected in zip(found.masks, expected_cells(boxes, planes), strict=True):
        grid = np.zeros(GRID, np.float32)
        height, width = crop.values.shape
        grid[crop.top : crop.top + height, crop.left : crop.left + width] = crop.values
        np.testing.assert_allclose(grid, expected, rtol=0, atol=1e-6)
        assert crop.grid_size == GRID
        if crop.values.size:  # whatever lies outside is as zero as the border
            inner = np.argwhere(expected > 0)
            assert crop.top == max(inner[:, 0].min() - 1, 0) and crop.left == max(inner[:, 1].min() - 1, 0)
            assert crop.top + height == min(inner[:, 0].max() + 2, GRID[0])
            assert crop.left + width == min(inner[:, 1].max() + 2, GRID[1])


def test_boxes_without_coefficients_have_no_masks():
    boxes = Boxes(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="without mask coefficients"):
        with_masks(boxes, prototypes(), NETWORK)


def test_taking_boxes_takes_their_masks():
    boxes = with_masks(boxes_of(*BOXES), prototypes(), NETWORK)
    taken = boxes.take(np.array([3, 0]))
    assert taken.masks == (boxes.masks[3], boxes.masks[0])
    assert boxes.take(boxes.xyxy[:, 0] > 30).masks == tuple(boxes.masks[index] for index in (3, 5, 6))


def interpolated(cells: np.ndarray, letterbox: Letterbox) -> np.ndarray:
    """Linear interpolation between cells, in float64, at the centre of each of the picture's pixels."""
    (scale_x, scale_y), (height, width) = letterbox.scale, letterbox.source_size
    rows = ((np.arange(height) + 0.5) * scale_y + letterbox.top) * GRID[0] / NETWORK[0] - 0.5
    columns = ((np.arange(width) + 0.5) * scale_x + letterbox.left) * GRID[1] / NETWORK[1] - 0.5

    def along(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        places = np.clip(places, 0, len(values) - 1)
        low = np.minimum(places.astype(int), len(values) - 2)
        part = (places - low)[:, None]
        return values[low] * (1 - part) + values[low + 1] * part

    return along(along(cells, rows).T, columns).T


@pytest.mark.parametrize("size", [(64, 96), (128, 192), (300, 200), (51, 333), (20, 30), (7, 9)])
def test_masks_are_interpolated_to_the_picture(size):
    letterbox = Letterbox.fit(size, NETWORK)
    boxes, planes = boxes_of(*BOXES), prototypes()
    masks = Masks(with_masks(boxes, planes, NETWORK).masks, letterbox)
    assert len(masks) == len(BOXES)
    dense = masks.dense()
    assert dense.shape == (len(BOXES), *size) and dense.dtype == np.bool_
    for index, (mask, cells) in enumerate(zip(dense, expected_cells(boxes, planes), strict=True)):
        values = interpolated(cells, letterbox)
        # OpenCV may round a place to 1/32 of a cell, which moves values of a slope of up to 1 a cell by 1/64 each way
        sure = np.abs(values - 0.5) > 0.035
        np.testing.assert_array_equal(mask[sure], (values > 0.5)[sure])
        np.testing.assert_array_equal(masks[index], mask)
        window = masks.window(index)
        np.testing.assert_array_equal(mask[window.area], window.mask)
        assert mask.sum() == window.mask.sum(), "something of the mask is outside of its window"
    assert dense.any()


def test_a_mask_of_a_large_picture_costs_what_its_object_covers():
    """As a mask of a 4K picture takes 8.3 MB, three hundred took 2.5 GB."""
    letterbox = Letterbox.fit((2160, 3840), (640, 640))
    crop = MaskCrop(np.ones((10, 10), np.float32), 60, 60, (160, 160))
    masks = Masks([crop] * 300, letterbox)
    tracemalloc.start()
    areas = {int(masks.window(index).mask.sum()) for index in range(300)}
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert areas.pop() > 200 * 200


# --- outlines and run lengths ---


def masks_of(*pictures: np.ndarray) -> Masks:
    """Masks that are exactly these, bool (height, width): a cell is a pixel."""
    size = pictures[0].shape
    crops = [MaskCrop(picture.astype(np.float32), 0, 0, size) for picture in pictures]
    return Masks(crops, Letterbox.fit(size, size))


def painted(*areas: tuple[slice, slice], size: tuple[int, int] = (12, 16)) -> np.ndarray:
    mask = np.zeros(size, np.bool_)
    for area in areas:
        mask[area] = True
    return mask


LARGE, SMALL, DOT = (slice(2, 9), slice(3, 12)), (slice(10, 12), slice(13, 16)), (slice(0, 1), slice(0, 1))


def test_the_polygon_is_the_outline_of_the_largest_part():
    (polygon,) = [masks_of(painted(LARGE, SMALL, DOT)).polygon(0)]
    assert {tuple(point) for point in polygon.tolist()} == {(3, 2), (3, 8), (11, 8), (11, 2)}
    filled = cv2.fillPoly(np.zeros((12, 16), np.uint8), [polygon], 1).astype(bool)
    np.testing.assert_array_equal(filled, painted(LARGE))


@pytest.mark.parametrize("areas", [(), (DOT,), ((slice(3, 4), slice(2, 9)),)])
def test_a_mask_without_an_area_has_no_polygon(areas):
    assert masks_of(painted(*areas)).polygon(0).shape == (0, 2)


RLE_MASKS = {
    "empty": painted(),
    "full": painted((slice(None), slice(None))),
    "parts": painted(LARGE, SMALL, DOT),
    "last pixel": painted((slice(11, 12), slice(15, 16))),
    "noise": np.random.RandomState(3).rand(12, 16) > 0.5,
    "large": np.add.outer(np.arange(700) ** 2, np.arange(900) ** 2) < 250_000,
}


@pytest.mark.parametrize("mask", RLE_MASKS.values(), ids=RLE_MASKS)
def test_run_lengths_are_cocos(mask):
    coco = pytest.importorskip("faster_coco_eval.core.mask", reason="faster-coco-eval is not installed")
    rle = masks_of(mask).rle(0)
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    np.testing.assert_array_equal(coco.decode(rle), mask)


@pytest.mark.parametrize(
    ("runs", "text"),
    [([192], "P6"), ([0, 192], "0P6"), ([5, 3, 4], "534"), ([5, 3, 4, 3], "5340"), ([10, 9, 8, 1], ":98H")],
)
def test_runs_are_written_as_coco_does(runs, text):
    """A run after the third as the difference to the one before the last: 1 - 9 is -8."""
    assert compress_runs(runs) == text
