"""nms.cu, run on the CPU, selects exactly the boxes that yolotrt.postprocess selects."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import (
    COCO_ANCHORS,
    COCO_STRIDES,
    decode,
    exact_overlap_case,
    expected_suppression,
    nms_case,
    nms_rows,
    random_heads,
    same_boxes,
    suppress,
)

from yolotrt.cuda.kernels import NmsKernel, NmsLayout
from yolotrt.errors import InputError
from yolotrt.postprocess import NmsOptions, YoloLayer, non_max_suppression


def check(machine, rows, options, classes, threads):
    for actual, picture in zip(suppress(machine, rows, options, classes=classes, threads=threads), rows, strict=True):
        assert same_boxes(actual, expected_suppression(picture, options)), f"{rows.shape}, {options}"


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_random_cases_are_identical_in_any_thread_order(machine, descending):
    rng = np.random.default_rng(int(descending))
    machine.device.descending = descending
    try:
        for case in range(200):
            rows, options, classes = nms_case(rng, 3000)
            check(machine, rows, options, classes, threads=1024 if case % 8 == 0 else 128)
    finally:
        machine.device.descending = False


@pytest.mark.parametrize(
    ("rows", "max_detections", "crowded"),
    [
        (30_500, 300, False),  # above the 30,000 that enter NMS
        (70_001, 300, True),  # every score ties with thousands; more than 65,535 keys
        (31_000, 100_000, True),  # no limit on the kept ones
    ],
)
def test_very_many_candidates_are_identical(machine, rows, max_detections, crowded):
    rng = np.random.default_rng(rows)
    values = nms_rows(rng, 1, rows, classes=3, crowded=crowded)
    values[..., 4] += 0.01
    check(machine, values, NmsOptions(0.0, 0.45, max_detections), 3, threads=1024)


def test_only_the_best_thirty_thousand_are_candidates(machine):
    # disjoint boxes: everything that enters is kept
    count = 30_100
    rows = np.zeros((1, count, 6), np.float32)
    rows[0, :, 0] = np.arange(count) * 2
    rows[0, :, 2], rows[0, :, 3] = rows[0, :, 0] + 1, 1
    rows[0, :, 4] = np.linspace(0.5, 0.9, count)
    kept = suppress(machine, rows[:, :, :], NmsOptions(0.25, 0.45, 40_000, agnostic=True), classes=1)[0]
    assert len(kept) == 30_000
    np.testing.assert_array_equal(kept.xyxy, rows[0, ::-1, :4][:30_000])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 511, 512, 513, 1024, 1025])
def test_every_tile_boundary(machine, count):
    rng = np.random.default_rng(count)
    rows = nms_rows(rng, 2, count, classes=2, crowded=True)
    rows[..., 4] += 0.01
    check(machine, rows, NmsOptions(0.0, 0.3, 1000), 2, threads=256)


def test_an_overlap_of_exactly_the_threshold_is_kept(machine):
    rows = np.array([[[0, 0, 3, 1, 0.9, 0], [1, 0, 4, 1, 0.8, 0], [0, 0, 3, 1.01, 0.7, 0]]], np.float32)
    kept = suppress(machine, rows, NmsOptions(0.25, 0.5, 10), classes=1)[0]
    np.testing.assert_array_equal(kept.confidence, np.float32([0.9, 0.8]))


def test_the_overlap_is_rounded_as_the_reference_rounds_it(machine):
    rng = np.random.default_rng(7)
    for _ in range(300):
        rows, options = exact_overlap_case(rng)
        assert len(suppress(machine, rows, options, classes=1, threads=128)[0]) == 2
        lower = NmsOptions(iou=float(np.nextafter(np.float32(options.iou), np.float32(0))), max_detections=10)
        assert len(suppress(machine, rows, lower, classes=1, threads=128)[0]) == 1


@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_more_rows_than_the_segments_hold_at_once(machine, descending):
    rng = np.random.default_rng(8)
    rows = nms_rows(rng, 2, 20_000, classes=3, crowded=True)
    assert NmsLayout(2, 20_000, 300, threads=32).segment_rows > 256
    machine.device.descending = descending
    try:
        check(machine, rows, NmsOptions(0.9, 0.45, 300), 3, threads=32)
    finally:
        machine.device.descending = False


def test_a_score_of_exactly_the_confidence_is_dropped(machine):
    rows = np.array(
        [[[0, 0, 3, 1, 0.25, 0], [9, 0, 12, 1, np.nextafter(np.float32(0.25), np.float32(1)), 0]]], np.float32
    )
    kept = suppress(machine, rows, NmsOptions(0.25, 0.5, 10), classes=1)[0]
    np.testing.assert_array_equal(kept.xyxy, [[9, 0, 12, 1]])


def test_a_picture_without_candidates_gives_zeros(machine):
    layout = NmsLayout(1, 100, 4)
    rows = machine.upload(np.zeros((1, 100, 6), np.float32))
    workspace, output = (np.full(size, 0xFF, np.uint8) for size in (layout.workspace_bytes, layout.output_bytes))
    kernel = NmsKernel(machine.device, layout, NmsOptions())
    kernel.launch(*map(machine.address, (rows, workspace, output)))
    assert len(layout.detections(output)[0]) == 0
    assert not output[layout.detections_offset :].any()


def test_segments_never_outnumber_the_selecting_threads():
    for rows in (1, 256, 25_200, 262_144, 262_145, 1_000_000):
        layout = NmsLayout(1, rows, 300)
        assert layout.segments <= layout.threads
        assert layout.segments * layout.segment_rows >= rows > (layout.segments - 1) * layout.segment_rows


def test_heads_to_detections_equal_the_cpu_path(machine):
    rng = np.random.default_rng(11)
    heads = random_heads(rng, [(40, 24), (20, 12), (10, 6)], 3, 20, 3, half=False)
    layer = YoloLayer(COCO_ANCHORS, COCO_STRIDES, 20)
    options = NmsOptions(confidence=0.6)
    detections = suppress(machine, decode(machine, heads, layer, "best"), options, classes=20)
    for actual, rows in zip(detections, layer.candidates(heads, options.confidence), strict=True):
        expected = non_max_suppression(rows, options)
        assert len(expected) > 20
        np.testing.assert_array_equal(actual.class_id, expected.class_id)
        # the two expf differ by some units in the last place
        np.testing.assert_allclose(actual.confidence, expected.confidence, rtol=2e-6)
        np.testing.assert_allclose(actual.xyxy, expected.xyxy, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NmsOptions(confidence=-0.1), "must be in 0..1"),
        (NmsOptions(iou=45), "must be in 0..1"),
        (NmsOptions(multi_label=True), "one label a box"),
    ],
)
def test_options_that_the_kernel_cannot_follow_are_refused(machine, options, message):
    with pytest.raises(InputError, match=message):
        NmsKernel(machine.device, NmsLayout(1, 100, 10), options)
