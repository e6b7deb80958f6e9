from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yolotrt import postprocess
from yolotrt.postprocess import Boxes, NmsOptions, YoloLayer, greedy_nms, non_max_suppression, sigmoid

GOLDEN_TAGS = (
    "yolov5n",
    "yolov5n_v60",
    "pv_nc5_v70",
    "derived_v50_focus_spp_nc80",
    "derived_v31_csp_hswish_nc3",
    "derived_v20_leaky_nc2_legacy",
    "derived_p6_random_nc80",  # four levels
)


# --- YoloLayer ---


def test_mask_coefficients_follow_the_classes_undecoded():
    """YOLOv5 multiplies them by the objectness where rows become boxes."""
    plain, masked = make_layer(2, 3, 4), make_layer(2, 3, 4)
    masked = YoloLayer(masked.anchors.tolist(), masked.strides, 4, mask_count=3)
    heads = make_heads(plain, spread=1)
    coefficients = [
        np.random.RandomState(7).standard_normal((*head.shape[:1], 3, 3, *head.shape[2:])) for head in heads
    ]
    joined = [
        np.concatenate([head.reshape(len(head), 3, 9, *head.shape[2:]), extra], 2).astype(np.float32)
        for head, extra in zip(heads, coefficients, strict=True)
    ]
    joined = [head.reshape(len(head), 36, *head.shape[3:]) for head in joined]
    expected = [extra.transpose(0, 1, 3, 4, 2).reshape(len(extra), -1, 3) for extra in coefficients]
    expected = np.concatenate(expected, 1).astype(np.float32)  # (batch, rows, coefficients)
    full, best = masked.full(joined), masked.best(joined)
    np.testing.assert_array_equal(full[..., :-3], plain.full(heads))
    np.testing.assert_array_equal(full[..., -3:], expected)
    np.testing.assert_array_equal(best[..., :6], plain.best(heads))
    np.testing.assert_array_equal(best[..., 6:], expected * full[..., 4:5])
    options = NmsOptions(confidence=0.2, iou=0.6)
    for picture, rows in enumerate(masked.candidates(joined, 0.2)):
        boxes = non_max_suppression(rows, options, mask_count=3)
        without = non_max_suppression(plain.full(heads)[picture], options)
        np.testing.assert_array_equal(boxes.xyxy, without.xyxy)
        np.testing.assert_array_equal(boxes.class_id, without.class_id)
        assert without.coefficients is None
        for box, weights in zip(boxes.xyxy, boxes.coefficients, strict=True):
            (row,) = np.flatnonzero((best[picture, :, :4] == box).all(1))
            np.testing.assert_array_equal(weights, best[picture, row, 6:])
        assert len(boxes)


@pytest.mark.parametrize("multi_label", [False, True])
def test_boxes_of_one_row_share_its_coefficients(multi_label):
    row = [50, 50, 20, 20, 0.5, 0.8, 0.9, 3.0, -4.0]
    boxes = non_max_suppression(np.array([row], np.float32), NmsOptions(multi_label=multi_label), mask_count=2)
    assert boxes.class_id.tolist() == ([1, 0] if multi_label else [1])
    assert boxes.coefficients.tolist() == [[1.5, -2.0]] * len(boxes)


def make_layer(levels: int, anchors: int, classes: int) -> YoloLayer:
    sides = np.random.RandomState(1).randint(4, 200, (levels, anchors, 2)).tolist()
    table = tuple(tuple((float(w), float(h)) for w, h in level) for level in sides)
    return YoloLayer(table, [8 << level for level in range(levels)], classes)


def make_heads(layer: YoloLayer, batch: int = 2, spread: float = 3, seed: int = 0) -> list[np.ndarray]:
    """Raw heads of a picture that is 1.5 times as wide as high."""
    random = np.random.RandomState(seed)
    channels = layer.anchors.shape[1] * (5 + layer.class_count)
    cells = 2 ** np.arange(len(layer.strides))[::-1]
    return [(random.standard_normal((batch, channels, 2 * n, 3 * n)) * spread).astype(np.float32) for n in cells]


def slow_full(layer: YoloLayer, heads: list[np.ndarray]) -> list[list[list[float]]]:
    """YOLOv5's Detect.forward, cell by cell in float64."""
    pictures = []
    for picture in range(len(heads[0])):
        rows = []
        for head, stride, anchors in zip(heads, layer.strides, layer.anchors.tolist(), strict=True):
            _, channels, height, width = head.shape
            values = channels // len(anchors)
            for (anchor, size), row, column in itertools.product(enumerate(anchors), range(height), range(width)):
                raw = head[picture, anchor * values : (anchor + 1) * values, row, column].tolist()
                s = [1 / (1 + math.exp(-value)) for value in raw]
                centre = [(2 * s[0] - 0.5 + column) * stride, (2 * s[1] - 0.5 + row) * stride]
                rows.append([*centre, (2 * s[2]) ** 2 * size[0], (2 * s[3]) ** 2 * size[1], *s[4:]])
        pictures.append(rows)
    return pictures


LAYERS = [(3, 3, 4), (4, 3, 1), (1, 1, 1), (2, 5, 80), (3, 2, 7)]


@pytest.mark.parametrize(("levels", "anchors", "classes"), LAYERS)
def test_decoding_equals_the_formula_cell_by_cell(levels, anchors, classes):
    layer = make_layer(levels, anchors, classes)
    heads = make_heads(layer)
    decoded = layer.full(heads)
    assert decoded.dtype == np.float32
    # float32 leaves a few units of 6e-8 of the value; the centre's -0.5 cancels, at a stride of up to 64 pixels
    np.testing.assert_allclose(decoded, slow_full(layer, heads), rtol=2e-6, atol=5e-5)


@pytest.mark.parametrize("tag", GOLDEN_TAGS)
def test_decoding_equals_the_official_code(golden, tag):
    raw = np.load(golden / "expected" / f"{tag}_raw.npz")
    said = json.loads((golden / "expected" / f"{tag}.json").read_text())
    anchors = tuple(tuple(zip(level[::2], level[1::2], strict=True)) for level in said["anchors_px"])
    layer = YoloLayer(anchors, [int(stride) for stride in said["stride"]], said["nc"])
    decoded = layer.full([raw[f"384x640_head{level}"] for level in range(len(anchors))])
    expected = raw["384x640_decoded"]
    assert decoded.shape == expected.shape
    # the noise floor of two fp32 implementations is 5e-4 px (golden/README); probabilities differ by some 1e-7
    np.testing.assert_allclose(decoded[..., :4], expected[..., :4], rtol=0, atol=5e-3)
    np.testing.assert_allclose(decoded[..., 4:], expected[..., 4:], rtol=0, atol=1e-6)


def test_rows_are_ordered_by_level_anchor_row_column():
    layer = YoloLayer((((10.0, 20.0), (30.0, 40.0)), ((50.0, 60.0), (70.0, 80.0))), (8, 16), 1)
    heads = [np.zeros((1, 12, 4, 6), np.float32), np.zeros((1, 12, 2, 3), np.float32)]  # every sigmoid is 1/2
    rows = layer.full(heads)[0]
    assert rows.shape == (2 * 4 * 6 + 2 * 2 * 3, 6)
    assert rows[0].tolist() == [4, 4, 10, 20, 0.5, 0.5]
    assert rows[1].tolist() == [12, 4, 10, 20, 0.5, 0.5]  # next column
    assert rows[6].tolist() == [4, 12, 10, 20, 0.5, 0.5]  # next row
    assert rows[24].tolist() == [4, 4, 30, 40, 0.5, 0.5]  # next anchor
    assert rows[48].tolist() == [8, 8, 50, 60, 0.5, 0.5]  # next level
    assert rows[-1].tolist() == [40, 24, 70, 80, 0.5, 0.5]


def assert_candidates_are_filtered_full(layer: YoloLayer, heads: list[np.ndarray], confidence: float) -> None:
    for rows, candidates in zip(layer.full(heads), layer.candidates(heads, confidence), strict=True):
        expected = rows[rows[:, 4] > confidence]
        assert candidates.shape == expected.shape
        assert candidates.dtype == np.float32
        assert candidates.tobytes() == expected.tobytes()  # to the last bit


@pytest.mark.parametrize(("levels", "anchors", "classes"), LAYERS)
@pytest.mark.parametrize("confidence", [0, 0.001, 0.25, 0.999, 0.99999, 1])
def test_candidates_are_the_rows_of_full_above_the_threshold(levels, anchors, classes, confidence):
    layer = make_layer(levels, anchors, classes)
    heads = make_heads(layer, spread=8)
    assert_candidates_are_filtered_full(layer, heads, confidence)
    if 0 < confidence < 0.9:
        counts = [len(rows) for rows in layer.candidates(heads, confidence)]
        assert all(0 < count < layer.full(heads).shape[1] for count in counts)  # the threshold divides them


@given(st.floats(-1, 1), st.floats(-110, 110, width=32))
@example(0.5, 12.0)
@example(0.5, 17.0)
def test_candidates_are_exact_at_the_threshold_itself(offset, raw):
    """Thresholds that are some cell's objectness, where a float32 step decides."""
    layer = YoloLayer((((8.0, 8.0),),), (8,), 1)
    near = np.float32(raw) + np.linspace(-abs(offset), abs(offset), 41, dtype=np.float32)
    head = np.zeros((1, 6, 1, 41), np.float32)
    head[0, 4, 0] = near
    for objectness in {0.0, 1.0, *sigmoid(near).tolist()}:
        below, above = (float(np.nextafter(np.float32(objectness), np.float32(side))) for side in (-1, 2))
        rounded_down = below + 0.4 * (objectness - below)  # compared as `below`, since float32 has nothing between
        for confidence in (objectness, max(0.0, below), max(0.0, rounded_down), above):
            assert_candidates_are_filtered_full(layer, [head], confidence)


def test_candidates_of_extreme_heads():
    layer = make_layer(3, 3, 4)
    heads = make_heads(layer)
    heads[0][:] = np.inf
    heads[1][:] = -np.inf
    heads[2][:] = np.nan
    assert [len(rows) for rows in layer.candidates(heads, 0.25)] == [3 * heads[0][0, 0].size] * 2


@pytest.mark.parametrize(("levels", "anchors", "classes"), LAYERS)
def test_best_has_corners_and_the_best_class_of_each_row(levels, anchors, classes):
    layer = make_layer(levels, anchors, classes)
    heads = make_heads(layer)
    best = layer.best(heads)
    assert best.dtype == np.float32
    assert best.shape == (*layer.full(heads).shape[:2], 6)
    for row, found in zip(layer.full(heads)[1].tolist(), best[1], strict=True):
        class_id = row[5:].index(max(row[5:]))
        x, y, w, h = row[:4]
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        # corners of some 1e3 px in float32
        np.testing.assert_allclose(found[:4], corners, rtol=0, atol=2e-4)
        assert found[4] == np.float32(row[4]) * np.float32(row[5 + class_id])
        assert found[5] == class_id


def test_the_first_of_equal_classes_is_the_best():
    layer = YoloLayer((((8.0, 8.0),),), (8,), 3)
    head = np.zeros((1, 8, 1, 1), np.float32)
    assert layer.best([head])[0, 0, 4:].tolist() == [0.25, 0]
    head[0, 6:] = 2
    assert layer.best([head])[0, 0, 5] == 1


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(0, 0.5), (math.inf, 1), (-math.inf, 0), (1e30, 1), (-1e30, 0), (-104, 0), (20, 1), (math.log(3), 0.75)],
)
def test_sigmoid_has_its_exact_values(raw, expected):
    values = sigmoid(np.array([raw], np.float32))
    assert values.dtype == np.float32
    assert values[0] == np.float32(expected)


@pytest.mark.filterwarnings("error")
def test_sigmoid_is_silent_and_leaves_its_input():
    raw = np.array([-1e30, 0, 1e30, np.nan], np.float32)
    sigmoid(raw)
    assert raw[0] == np.float32(-1e30)
    assert np.isnan(sigmoid(raw)[3])


# --- non-maximum suppression ---


def slow_overlap(a: list[Fraction], b: list[Fraction]) -> Fraction:
    """Intersection over union of two boxes x1, y1, x2, y2; boxes without area overlap nothing."""
    width = max(Fraction(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(Fraction(0), min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else Fraction(0)


def slow_nms(rows, options: NmsOptions, iou: Fraction, max_candidates: int) -> list[tuple[list, Fraction, int]]:
    """Boxes, confidences and classes that stay, in exact arithmetic."""
    found = []
    for row in rows:
        x, y, w, h, objectness, *classes = map(Fraction, row)
        if objectness <= options.confidence:
            continue
        scores = [objectness * probability for probability in classes]
        chosen = range(len(scores)) if options.multi_label else [scores.index(max(scores))]
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        found += [(corners, scores[label], label) for label in chosen if scores[label] > options.confidence]
    if options.classes is not None:
        found = [box for box in found if box[2] in options.classes]
    found = sorted(found, key=lambda box: -box[1])[:max_candidates]
    kept = []
    for box in found:
        rivals = [better for better in kept if options.agnostic or better[2] == box[2]]
        if len(kept) < options.max_detections and all(slow_overlap(box[0], rival[0]) <= iou for rival in rivals):
            kept.append(box)
    return kept


# Small whole and half pixels and eighths of probabilities: float32 computes with them exactly, boxes overlap often,
# and many are equal, without area or of equal confidence.
EIGHTHS = st.integers(0, 8).map(lambda eighths: eighths / 8)
ROWS = st.lists(
    st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 8)] * 2, EIGHTHS, EIGHTHS, EIGHTHS, EIGHTHS), max_size=40
)
# With sides of at most 8 no overlap lies within float32's rounding of these fractions but those that equal them.
OVERLAPS = st.sampled_from([Fraction(0), Fraction(1, 4), Fraction(9, 20), Fraction(1, 2), Fraction(7, 10), Fraction(1)])
OPTIONS = st.builds(
    NmsOptions,
    confidence=st.sampled_from([0.0, 0.125, 0.25, 0.75, 1.0]),
    max_detections=st.sampled_from([1, 2, 5, 300]),
    classes=st.sampled_from([None, None, (), (0,), (2, 0), (1,)]),
    agnostic=st.booleans(),
    multi_label=st.booleans(),
)
SAME = (4, 4, 4, 4, 1.0, 0.5, 0.5, 0.5)


@settings(max_examples=300)
@given(ROWS, OPTIONS, OVERLAPS, st.sampled_from([1, 3, 7, 30_000]))
@example([SAME] * 3, NmsOptions(), Fraction(1), 30_000)
@example([SAME] * 3, NmsOptions(multi_label=True), Fraction(0), 30_000)
@example([SAME] * 3, NmsOptions(multi_label=True, agnostic=True), Fraction(0), 30_000)
@example([(4, 4, 0, 4, 1.0, 1.0, 0.0, 0.0)] * 2, NmsOptions(), Fraction(0), 30_000)
def test_nms_equals_a_slow_reference(rows, options, iou, max_candidates):
    options = NmsOptions(**{**vars(options), "iou": float(iou)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "MAX_CANDIDATES", max_candidates)
        boxes = non_max_suppression(np.array(rows, np.float32).reshape(-1, 8), options)
    expected = slow_nms(rows, options, iou, max_candidates)
    found = zip(boxes.xyxy.tolist(), boxes.confidence.tolist(), boxes.class_id.tolist(), strict=True)
    assert list(found) == [(list(map(float, box)), float(score), label) for box, score, label in expected]
    assert (boxes.xyxy.dtype, boxes.confidence.dtype) == (np.float32, np.float32)
    assert np.issubdtype(boxes.class_id.dtype, np.integer)


def row(x1: float, y1: float, x2: float, y2: float, confidence: float, class_id: int = 0, classes: int = 3):
    probabilities = [1.0 if index == class_id else 0.0 for index in range(classes)]
    return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, confidence, *probabilities]


A = row(0, 0, 10, 10, 0.9)
SHIFTED = row(0, 2, 10, 12, 0.8)  # overlaps A by 80 of 120: 0.667
OTHER_CLASS = row(0, 0, 10, 10, 0.7, class_id=1)
FAR = row(50, 50, 60, 60, 0.6)


@pytest.mark.parametrize(
    ("rows", "options", "kept"),
    [
        ([A, SHIFTED, OTHER_CLASS, FAR], NmsOptions(), [0.9, 0.7, 0.6]),
        ([FAR, OTHER_CLASS, SHIFTED, A], NmsOptions(), [0.9, 0.7, 0.6]),
        ([A, SHIFTED], NmsOptions(iou=0.66), [0.9]),
        ([A, SHIFTED], NmsOptions(iou=0.67), [0.9, 0.8]),
        ([A, OTHER_CLASS], NmsOptions(agnostic=True), [0.9]),
        ([A, SHIFTED, OTHER_CLASS, FAR], NmsOptions(confidence=0.65), [0.9, 0.7]),
        ([A, SHIFTED, OTHER_CLASS, FAR], NmsOptions(max_detections=2), [0.9, 0.7]),
        ([A, SHIFTED, OTHER_CLASS, FAR], NmsOptions(classes=(1,)), [0.7]),
        ([A, SHIFTED, OTHER_CLASS, FAR], NmsOptions(classes=(2,)), []),
        ([], NmsOptions(), []),
        # a suppressed box suppresses nothing itself: C overlaps B but not A
        ([row(0, 0, 10, 10, 0.9), row(4, 0, 14, 10, 0.8), row(8, 0, 18, 10, 0.7)], NmsOptions(iou=0.4), [0.9, 0.7]),
        # what equals the threshold is dropped
        ([[5, 5, 9, 9, 0.5, 0.5, 0, 0]], NmsOptions(confidence=0.25), []),
        ([[5, 5, 9, 9, 0.5, 0.5, 0, 0]], NmsOptions(confidence=0.25, multi_label=True), []),
        ([[5, 5, 9, 9, 0.5, 0, 0, 0]], NmsOptions(confidence=0), []),
        # objectness is filtered on its own, and so is its product with the class probability
        ([[5, 5, 9, 9, 0.2, 1, 0, 0], [5, 5, 9, 9, 0.5, 0.4, 0, 0]], NmsOptions(confidence=0.25), []),
        ([[5, 5, 9, 9, 0.5, 0.6, 0, 0]], NmsOptions(confidence=0.25), [0.3]),
    ],
)
def test_nms_by_hand(rows, options, kept):
    boxes = non_max_suppression(np.array(rows, np.float32).reshape(-1, 8), options)
    assert boxes.confidence.tolist() == pytest.approx(kept, abs=1e-6)  # 0.5 x 0.6 in float32


def test_multi_label_gives_a_box_for_every_class_above_the_threshold():
    rows = np.array([[5, 5, 8, 8, 1.0, 0.5, 0.75, 0.125]], np.float32)
    boxes = non_max_suppression(rows, NmsOptions(multi_label=True))
    assert boxes.class_id.tolist() == [1, 0]
    assert boxes.confidence.tolist() == [0.75, 0.5]
    assert boxes.xyxy.tolist() == [[1, 1, 9, 9]] * 2


def test_of_equal_boxes_the_first_row_stays():
    rows = np.array([row(0, 0, 10, 10, 0.5), row(0, 1, 10, 11, 0.5), row(0, 0, 10, 10, 0.5)], np.float32)
    assert non_max_suppression(rows, NmsOptions()).xyxy.tolist() == [[0, 0, 10, 10]]
    assert non_max_suppression(rows[1:], NmsOptions()).xyxy.tolist() == [[0, 1, 10, 11]]


def test_only_the_best_30000_candidates_enter():
    same = np.tile(np.array(row(0, 0, 10, 10, 0.9), np.float32), (30_000, 1))
    far = np.array([row(50, 50, 60, 60, 0.8)], np.float32)
    # the far box is number 30,001: were it let in, it would stay, since nothing overlaps it
    assert len(non_max_suppression(np.concatenate([far, same]), NmsOptions())) == 1
    assert len(non_max_suppression(np.concatenate([far, same[1:]]), NmsOptions())) == 2


@pytest.mark.filterwarnings("error")
def test_rows_that_are_no_number_are_dropped_silently():
    rows = np.array([A, [np.nan] * 8, row(50, 50, 60, 60, 0.6)], np.float32)
    assert len(non_max_suppression(rows, NmsOptions())) == 2


@pytest.mark.filterwarnings("error")
def test_boxes_without_area_overlap_nothing():
    xyxy = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 5, 5], [1, 1, 1, 4]], np.float32)
    boxes = Boxes(xyxy, np.full(4, 0.5, np.float32), np.zeros(4, np.int64))
    assert greedy_nms(boxes, 0.0, 300).tolist() == [0, 1, 2, 3]


def test_boxes_are_taken_by_index_or_mask():
    boxes = Boxes(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([3, 2, 1], np.float32), np.array([7, 8, 9]))
    assert len(boxes) == 3
    assert boxes.take(np.array([2, 0])).class_id.tolist() == [9, 7]
    assert boxes.take(np.array([False, True, False])).xyxy.tolist() == [[4, 5, 6, 7]]
