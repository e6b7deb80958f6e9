from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from yolotrt import Classification, Detections
from yolotrt.errors import BackendUnavailableError

NAMES = ("person", "bus", "tie")


def make(class_ids: tuple[int, ...] = (1, 0, 1), names: tuple[str, ...] = NAMES) -> Detections:
    count = len(class_ids)
    return Detections(
        xyxy=np.arange(4 * count, dtype=np.float32).reshape(count, 4),
        confidence=np.linspace(0.9, 0.3, count, dtype=np.float32),
        class_id=np.array(class_ids, np.int32),
        class_names=names,
        image_size=(480, 640),
    )


def test_names_belong_to_the_detections_not_to_the_classes():
    assert make((2, 0, 1, 2)).names == ["tie", "person", "bus", "tie"]
    assert make(()).names == []


def test_length_is_the_number_of_detections():
    assert len(make((1, 0, 1))) == 3
    assert not make(())


def test_iteration_gives_plain_values_in_order():
    items = list(make((1, 0)))
    assert [(name, class_id) for _, _, class_id, name in items] == [("bus", 1), ("person", 0)]
    assert [confidence for _, confidence, _, _ in items] == pytest.approx([0.9, 0.3])
    assert all(type(confidence) is float and type(class_id) is int for _, confidence, class_id, _ in items)
    assert items[1][0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("class_ids", "counts"),
    [((), {}), ((1,), {"bus": 1}), ((2, 0, 2, 2), {"person": 1, "tie": 3})],
)
def test_counts_are_by_name_in_class_order(class_ids, counts):
    assert list(make(class_ids).counts().items()) == list(counts.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xyxy": np.zeros((2, 4), np.float32)}, "must be"),
        ({"xyxy": np.zeros((3, 5), np.float32)}, "must be"),
        ({"xyxy": np.zeros(12, np.float32)}, "must be"),
        ({"confidence": np.zeros(2, np.float32)}, "must be"),
        ({"confidence": np.zeros((3, 1), np.float32)}, "must be"),
        ({"class_id": np.zeros(4, np.int32)}, "must be"),
        ({"class_id": np.array([0, 3, 0], np.int32)}, "outside 0..2"),
        ({"class_id": np.array([0, -1, 0], np.int32)}, "outside 0..2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **changes)


def test_detections_cannot_be_changed_by_mistake():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().confidence = np.zeros(3, np.float32)  # type: ignore[misc]


def test_empty_has_the_types_of_any_other():
    empty, other = Detections.empty(NAMES, (480, 640)), make()
    assert len(empty) == 0
    assert (empty.class_names, empty.image_size) == (NAMES, (480, 640))
    for name in ("xyxy", "confidence", "class_id"):
        assert getattr(empty, name).dtype == getattr(other, name).dtype
        assert getattr(empty, name).ndim == getattr(other, name).ndim


@pytest.mark.parametrize("class_ids", [(1, 0, 1), ()])
def test_supervision_gets_the_same_detections(class_ids):
    supervision = pytest.importorskip("supervision")
    detections = make(class_ids)
    converted = detections.to_supervision()
    assert isinstance(converted, supervision.Detections)
    np.testing.assert_array_equal(converted.xyxy, detections.xyxy)
    np.testing.assert_array_equal(converted.confidence, detections.confidence)
    np.testing.assert_array_equal(converted.class_id, detections.class_id)
    assert list(converted.data["class_name"]) == detections.names


def test_supervision_can_filter_and_annotate():
    supervision = pytest.importorskip("supervision")
    converted = make((1, 0, 1)).to_supervision()
    assert list(converted[converted.class_id == 1].data["class_name"]) == ["bus", "bus"]
    canvas = supervision.BoxAnnotator().annotate(np.zeros((480, 640, 3), np.uint8), converted)
    assert canvas.any()
    converted.xyxy[:] = -1  # supervision's annotators may write into what they get
    assert make((1, 0, 1)).xyxy.min() == 0


def test_a_missing_supervision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(BackendUnavailableError, match="run pip install supervision"):
        make().to_supervision()


# --- classifications ---


def classification(*probabilities: float) -> Classification:
    return Classification(np.array(probabilities, np.float32), NAMES, (480, 640))


def test_the_best_class_is_the_first_of_equals():
    found = classification(0.2, 0.4, 0.4)
    assert (found.class_id, found.name, found.confidence) == (1, "bus", pytest.approx(0.4))
    assert found.counts() == {"bus": 1}


@pytest.mark.parametrize(("count", "names"), [(1, ["tie"]), (2, ["tie", "person"]), (5, ["tie", "person", "bus"])])
def test_the_best_classes_come_in_order(count, names):
    best = classification(0.3, 0.1, 0.6).top(count)
    assert [name for _, name, _ in best] == names
    assert best[0] == (2, "tie", pytest.approx(0.6))
    assert all(type(index) is int and type(probability) is float for index, _, probability in best)


def test_every_class_needs_a_probability():
    with pytest.raises(ValueError, match=r"probabilities \(2,\) for 3 classes"):
        classification(0.5, 0.5)


def test_every_detection_needs_a_mask():
    with pytest.raises(ValueError, match="1 masks for 3 detections"):
        dataclasses.replace(make(), masks=[np.zeros((480, 640), bool)])
