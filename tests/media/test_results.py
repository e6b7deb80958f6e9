from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolotrt.detections import Classification, Detections
from yolotrt.errors import OutputError
from yolotrt.masks import Masks
from yolotrt.media.results import json_record, next_run_folder, yolo_txt
from yolotrt.postprocess import MaskCrop
from yolotrt.preprocess import Letterbox

NAMES = ("person", "Größe")
HEIGHT, WIDTH = 100, 200


def found(*rows: tuple[float, float, float, float, float, int], size: tuple[int, int] = (HEIGHT, WIDTH)) -> Detections:
    """Detections from rows of x1, y1, x2, y2, confidence, class."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(
        table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int32), NAMES, size
    )


ONE = found((20, 10, 60, 90, 0.87654321, 1))
PICTURE = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def masked(*masks: np.ndarray) -> Detections:
    """A detection for each mask, bool (HEIGHT, WIDTH), with a box all around."""
    crops = [MaskCrop(mask.astype(np.float32), 0, 0, (HEIGHT, WIDTH)) for mask in masks]
    letterbox = Letterbox.fit((HEIGHT, WIDTH), (HEIGHT, WIDTH))
    return replace(found(*[(20, 10, 60, 90, 0.5, 1)] * len(masks)), masks=Masks(crops, letterbox))


def square_mask() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:71, 40:101] = True
    return mask


CLASSIFICATION = Classification(np.array([0.25, 0.75], np.float32), NAMES, (HEIGHT, WIDTH))


# --- YOLO labels ---


@pytest.mark.parametrize(
    ("detections", "with_confidence", "expected"),
    [
        (found(), True, ""),
        (ONE, False, "1 0.2 0.5 0.2 0.8\n"),
        (ONE, True, "1 0.2 0.5 0.2 0.8 0.876543\n"),
        # Six significant digits: 1/3 and 2/3 of the width.
        (found((200 / 3, 0, 400 / 3, 100, 1, 0)), True, "0 0.5 0.5 0.333333 1 1\n"),
        # Beyond the edges is clipped, and the centre is that of the clipped box.
        (found((-20, 50, 100, 130, 0.5, 0)), False, "0 0.25 0.75 0.5 0.5\n"),
        (found((0, 0, 200, 100, 0.5, 0), (20, 10, 60, 90, 0.25, 1)), False, "0 0.5 0.5 1 1\n1 0.2 0.5 0.2 0.8\n"),
    ],
)
def test_yolo_labels_of_boxes(detections: Detections, with_confidence: bool, expected: str) -> None:
    assert yolo_txt(detections, with_confidence=with_confidence) == expected


boxes = st.tuples(*[st.floats(-500, 500)] * 4, st.floats(0, 1), st.integers(0, 1))


@pytest.mark.parametrize(("with_confidence", "end"), [(True, [0.5]), (False, [])])
def test_labels_of_masks_are_polygons(with_confidence: bool, end: list[float]) -> None:
    class_id, *values = map(float, yolo_txt(masked(square_mask()), with_confidence=with_confidence).split())
    assert class_id == 1
    assert values[8:] == end
    points = {(round(x * WIDTH), round(y * HEIGHT)) for x, y in zip(values[:8:2], values[1:8:2], strict=True)}
    assert points == {(40, 20), (40, 70), (100, 70), (100, 20)}


def test_a_label_without_an_outline_has_the_corners_of_its_box() -> None:
    assert (
        yolo_txt(masked(np.zeros((HEIGHT, WIDTH), bool)), with_confidence=False)
        == "1 0.1 0.1 0.3 0.1 0.3 0.9 0.1 0.9\n"
    )


def test_the_text_of_a_classification_is_yolov5s() -> None:
    assert yolo_txt(CLASSIFICATION, with_confidence=False) == "0.75 Größe\n0.25 person\n"


@given(st.lists(boxes, max_size=5), st.integers(1, 400), st.integers(1, 400))
def test_label_values_are_fractions_of_the_picture(rows, height: int, width: int) -> None:
    ordered = [(min(a, c), min(b, d), max(a, c), max(b, d), p, k) for a, b, c, d, p, k in rows]
    detections = found(*ordered, size=(height, width))
    lines = yolo_txt(detections, with_confidence=True).splitlines()
    assert len(lines) == len(rows)
    for line, box, class_id in zip(lines, detections.xyxy, detections.class_id, strict=True):
        name, *numbers = line.split(" ")
        assert int(name) == class_id
        assert all(0 <= float(number) <= 1 for number in numbers)
        x, y, w, h, _ = map(float, numbers)
        restored = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * (width, height, width, height)
        clipped = np.clip(box, 0, (width, height, width, height))
        # Six digits of a fraction: at most 1e-6 x 400 pixels, for centre and half size together.
        np.testing.assert_allclose(restored, clipped, atol=5e-4)


def test_labels_equal_those_of_yolov5(golden: Path) -> None:
    expected = np.load(golden / "expected" / "yolov5n_det.npz")
    key = next(name for name in expected.files if "bus" in name and "square" in name and name.endswith("_xyxy"))
    xyxy = expected[key].astype(np.float32)
    rows = [(*box, 0.5, 0) for box in xyxy]
    lines = yolo_txt(found(*rows, size=(1080, 810)), with_confidence=False).splitlines()
    # ultralytics' formula: xyxy2xywh(xyxy) / (w, h, w, h); float32 there, so the sixth digit may differ.
    centre_form = np.column_stack([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]]) / (810, 1080, 810, 1080)
    values = np.array([[float(v) for v in line.split()[1:]] for line in lines])
    np.testing.assert_allclose(values, centre_form, rtol=1e-5)


# --- JSON ---


def test_json_of_masks_has_run_lengths() -> None:
    coco = pytest.importorskip("faster_coco_eval.core.mask", reason="faster-coco-eval is not installed")
    record = json.loads(json.dumps(json_record(Path("a.jpg"), masked(square_mask()))))
    segmentation = record["detections"][0]["segmentation"]
    assert segmentation["size"] == [HEIGHT, WIDTH]
    np.testing.assert_array_equal(coco.decode(segmentation), square_mask())


def test_json_of_a_classification_has_its_best_classes() -> None:
    assert json_record(Path("a.jpg"), CLASSIFICATION) == {
        "image": "a.jpg",
        "width": WIDTH,
        "height": HEIGHT,
        "classes": [
            {"class_id": 1, "name": "Größe", "confidence": 0.75},
            {"class_id": 0, "name": "person", "confidence": 0.25},
        ],
    }


def test_json_numbers_are_rounded() -> None:
    record = json_record(Path("a.jpg"), found((1 / 3, 2 / 3, 100 / 7, 99.999, 1 / 3, 0)))
    assert record["detections"][0]["confidence"] == 0.33333
    assert record["detections"][0]["xyxy"] == [0.33, 0.67, 14.29, 100.0]


# --- the folder of results ---


def test_runs_are_counted_as_in_yolov5(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "detect"
    made = [next_run_folder(base).name for _ in range(4)]
    assert made == ["detect", "detect2", "detect3", "detect4"]
    (base.parent / "detect2").rmdir()
    (base.parent / "detect5").write_bytes(b"a file takes the name too")
    assert [next_run_folder(base).name for _ in range(2)] == ["detect2", "detect6"]


def test_a_suffix_is_part_of_the_name(tmp_path: Path) -> None:
    assert [next_run_folder(tmp_path / "v1.5").name for _ in range(2)] == ["v1.5", "v1.52"]


def test_the_current_folder_gets_a_numbered_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert next_run_folder(Path()) == tmp_path / "here2"


def test_concurrent_runs_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: next_run_folder(tmp_path / "runs" / "detect"), range(40)))
    assert len(set(made)) == 40
    assert all(folder.is_dir() for folder in made)


@pytest.mark.parametrize("name", ["file/detect", "file/deep/detect", "a\0b", "x" * 300])
def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot make the output folder .*: choose a writable place"):
        next_run_folder(tmp_path / name)


def test_the_root_is_no_output_folder() -> None:
    with pytest.raises(OutputError, match="cannot make the output folder /: name a folder below it"):
        next_run_folder(Path("/"))
