from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

import scene  # noqa: E402
import signs  # noqa: E402


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first, boxes, class_ids = scene.render_scene(5, (320, 256))
    again, same_boxes, same_ids = scene.render_scene(5, (320, 256))
    other, _, _ = scene.render_scene(6, (320, 256))
    assert np.array_equal(first, again)
    assert np.array_equal(boxes, same_boxes)
    assert np.array_equal(class_ids, same_ids)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", [(640, 640), (320, 200), (160, 160), (1280, 720)])
def test_arrays_have_the_promised_types_and_boxes_lie_inside(size: tuple[int, int]) -> None:
    for seed in range(12):
        image, boxes, class_ids = scene.render_scene(seed, size)
        assert (image.shape, image.dtype) == ((size[1], size[0], 3), np.uint8)
        assert (boxes.shape, boxes.dtype) == ((len(class_ids), 4), np.float32)
        assert class_ids.dtype == np.int32
        assert len(boxes) <= scene.MAX_SIGNS
        if len(boxes):
            sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
            assert boxes.min() >= 0
            assert (boxes[:, [0, 2]] <= size[0]).all()
            assert (boxes[:, [1, 3]] <= size[1]).all()
            assert sides.min() >= scene.SMALLEST - 1e-3
            assert sides.max() <= scene.LARGEST + 1e-3
            assert class_ids.max() < len(signs.CLASS_NAMES)


def test_all_classes_and_all_counts_occur() -> None:
    counts, seen = set(), set()
    for seed in range(150):
        _, _, class_ids = scene.render_scene(seed, (256, 256))
        counts.add(len(class_ids))
        seen.update(class_ids.tolist())
    assert seen == set(range(len(signs.CLASS_NAMES)))
    assert {0, 1, 2, 3, 4} <= counts


def test_zero_signs_gives_no_boxes_but_distractors() -> None:
    blank = [scene.render_scene(seed, (256, 256), max_signs=0) for seed in range(5)]
    assert all(boxes.shape == (0, 4) and len(class_ids) == 0 for _, boxes, class_ids in blank)


@pytest.mark.parametrize("class_id", range(len(signs.CLASS_NAMES)))
@pytest.mark.parametrize(("side", "angles"), [(14.0, (0, 0, 0)), (37.3, (0.6, 0.1, 0.2)), (220.5, (-0.8, -0.2, -0.3))])
def test_box_is_tight_around_the_drawn_face(class_id: int, side: float, angles: tuple[float, ...]) -> None:
    image = np.full((400, 400, 3), 90, np.uint8)
    sign = scene.place(signs.class_face(class_id), class_id, side, (190.4, 201.7), angles)
    opacity, (top, left) = scene.draw_face(image, sign, np.ones((32, 32), np.float32))
    rows, columns = np.nonzero(opacity > 0.02)
    drawn = np.array([left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1])
    # The box is continuous and pixels are whole: up to one pixel, and half a pixel of interpolation.
    assert np.abs(drawn - np.array(sign.box)).max() < 1.5
    assert max(sign.box[2] - sign.box[0], sign.box[3] - sign.box[1]) == pytest.approx(side, rel=1e-6)


def test_faces_of_all_classes_differ_at_24_pixels() -> None:
    small = [signs.class_face(index).levels[-1].astype(float) for index in range(len(signs.CLASS_NAMES))]
    for first in range(len(small)):
        for second in range(first):
            # Mean difference in grey levels; the two nearest (30 and 50) differ by about 6.
            assert np.abs(small[first] - small[second]).mean() > 3, (first, second)


def test_occluders_never_hide_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def wall(rng, rows, columns):  # hides everything, so it must be left out
        return np.ones((rows, columns), np.float32), np.zeros((rows, columns, 3), np.float32)

    monkeypatch.setattr(scene, "_cover", wall)
    image = np.full((64, 64, 3), 90, np.uint8)
    conditions = scene.pick_conditions(scene.random.Random(1))
    scene._hide_partly(image, scene.random.Random(1), (np.ones((20, 20), np.float32), (5, 5)), conditions)
    assert (image == 90).all()
