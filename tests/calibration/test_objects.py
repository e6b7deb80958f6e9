"""Objects are found where the float network sees them, and values elsewhere do not count."""

from __future__ import annotations

import numpy as np
import pytest

from yolotrt.calibration.calibrate import observe
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.objects import ObjectFinder, inside, objectness
from yolotrt.postprocess import sigmoid


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 1.0, 1.0), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        ((0.25, 0.5, 0.5, 1.0), [[0, 0, 0, 0], [0, 1, 0, 0]]),  # its edges are those of a cell
        ((0.24, 0.4, 0.51, 0.9), [[1, 1, 1, 0], [1, 1, 1, 0]]),  # touched cells count
        ((0.6, 0.6, 0.6, 0.6), [[0, 0, 0, 0], [0, 0, 1, 0]]),  # at least one cell
        ((-3.0, -1.0, 0.1, 0.1), [[1, 0, 0, 0], [0, 0, 0, 0]]),  # partly outside of the picture
        ((1.2, 1.2, 1.5, 1.5), [[0, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_cells_that_a_box_touches_are_inside(box, expected):
    np.testing.assert_array_equal(inside(np.array([box], np.float32), 2, 4), np.array(expected, bool))


def test_objectness_belongs_to_all_values_of_its_anchor_and_cell():
    head = np.random.default_rng(1).normal(size=(1, 3 * 7, 2, 4)).astype(np.float32)
    found = objectness(head, 3)
    assert found.shape == head.shape
    for channel in range(21):
        np.testing.assert_array_equal(found[0, channel], sigmoid(head[0, channel // 7 * 7 + 4]))


def test_a_picture_without_objects_shows_what_looks_most_like_one(tiny_weights, monkeypatch):
    monkeypatch.setattr("yolotrt.calibration.objects.MIN_OBJECTNESS", 0.999999)
    boxes = ObjectFinder(tiny_weights, (64, 64)).find(np.zeros((1, 3, 64, 64), np.float32))
    assert boxes.shape == (1, 4)
    assert (boxes[:, 2:] > boxes[:, :2]).all()


class _Finder:
    """Finds one object, in the left upper quarter."""

    def find(self, images):
        assert images.shape == (1, 3, 64, 64)
        return np.array([[0.0, 0.0, 0.5, 0.5]], np.float32)


class _Source:
    """A tensor with a large value beside the object."""

    groups = (("a",),)
    floors: dict[str, float] = {}  # noqa: RUF012 - a stub

    def observe(self, images):
        yield "a", np.array([[[[1.0, 9.0], [9.0, 9.0]], [[-2.0, 9.0], [9.0, 9.0]]]], np.float32)


def test_values_beside_objects_do_not_count(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    for index in range(16):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.zeros((8, 8, 3), np.uint8))
    feed = PictureFeed.find(tmp_path, (64, 64))
    histograms, _ = observe(_Source(), feed, _Finder())
    assert (histograms["a"].largest, histograms["a"].counts.sum()) == (2.0, 2 * 16)
    assert observe(_Source(), feed)[0]["a"].largest == 9.0
