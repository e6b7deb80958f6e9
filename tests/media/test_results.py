from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolotrt.detections import Detections
from yolotrt.errors import OutputError
from yolotrt.media.drawing import draw
from yolotrt.media.images import read_image, write_image
from yolotrt.media.results import ImageSink, json_record, next_run_folder, write_json, yolo_txt

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


def sink(folder: Path, *, save_images: bool = True, save_txt: bool = True, with_confidence: bool = False) -> ImageSink:
    return ImageSink(folder, save_images=save_images, save_txt=save_txt, with_confidence=with_confidence)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


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
def test_yolo_labels(detections: Detections, with_confidence: bool, expected: str) -> None:
    assert yolo_txt(detections, with_confidence=with_confidence) == expected


boxes = st.tuples(*[st.floats(-500, 500)] * 4, st.floats(0, 1), st.integers(0, 1))


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


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.json"
    empty = Detections.empty(NAMES, (5, 7))
    write_json(target, [json_record(Path("a/Größe.jpg"), ONE), json_record(Path("b.png"), empty)])
    assert json.loads(target.read_text(encoding="utf-8")) == [
        {
            "image": str(Path("a/Größe.jpg")),
            "width": WIDTH,
            "height": HEIGHT,
            "detections": [{"class_id": 1, "name": "Größe", "confidence": 0.87654, "xyxy": [20.0, 10.0, 60.0, 90.0]}],
        },
        {"image": "b.png", "width": 7, "height": 5, "detections": []},
    ]
    assert len(target.read_text(encoding="utf-8").splitlines()) == 4  # one picture a line
    assert files(tmp_path) == ["new/results.json"]


def test_json_numbers_are_rounded() -> None:
    record = json_record(Path("a.jpg"), found((1 / 3, 2 / 3, 100 / 7, 99.999, 1 / 3, 0)))
    assert record["detections"][0]["confidence"] == 0.33333
    assert record["detections"][0]["xyxy"] == [0.33, 0.67, 14.29, 100.0]


def test_json_of_no_pictures_is_an_empty_array(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", [])
    assert json.loads((tmp_path / "r.json").read_text()) == []


def test_json_can_name_any_file(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", [json_record(Path("not utf-8 \udcff.jpg"), found())])
    assert json.loads((tmp_path / "r.json").read_text())[0]["image"] == "not utf-8 \udcff.jpg"


def test_json_never_holds_nan_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "r.json", [json_record(Path("a.jpg"), found((math.nan, 0, 1, 1, 0.5, 0)))])
    assert files(tmp_path) == []


# --- the folder of results ---


@pytest.mark.parametrize(
    ("save_images", "save_txt", "expected"),
    [
        (True, True, ["labels/one.txt", "none.png", "one.png"]),
        (True, False, ["none.png", "one.png"]),
        (False, True, ["labels/one.txt"]),
        (False, False, []),
    ],
)
def test_only_what_was_asked_for_is_written(
    tmp_path: Path, save_images: bool, save_txt: bool, expected: list[str]
) -> None:
    results = sink(tmp_path / "out", save_images=save_images, save_txt=save_txt, with_confidence=True)
    results.write(Path("in/one.png"), PICTURE, ONE)
    results.write(Path("in/none.png"), PICTURE, found())  # nothing found: no label file, as in YOLOv5
    assert files(tmp_path / "out") == expected
    if save_images:
        np.testing.assert_array_equal(read_image(tmp_path / "out" / "one.png"), draw(PICTURE, ONE))
    if save_txt:
        assert (tmp_path / "out" / "labels" / "one.txt").read_text() == "1 0.2 0.5 0.2 0.8 0.876543\n"


def test_confidence_is_written_only_if_asked_for(tmp_path: Path) -> None:
    sink(tmp_path, with_confidence=False).write(Path("one.png"), PICTURE, ONE)
    assert (tmp_path / "labels" / "one.txt").read_text() == "1 0.2 0.5 0.2 0.8\n"


def test_equal_names_are_numbered(tmp_path: Path) -> None:
    results = sink(tmp_path)
    for source in ("a/x.jpg", "b/x.jpg", "c/x.png", "x_2.jpg", "d/X.JPG"):
        results.write(Path(source), PICTURE, ONE)
    pictures = ["x.jpg", "x_2.jpg", "x_3.png", "x_2_2.jpg", "X_4.JPG"]
    labels = [f"labels/{Path(name).stem}.txt" for name in pictures]
    assert files(tmp_path) == sorted(pictures + labels)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("x.JPG", "x.JPG"),
        ("x.webp", "x.webp"),
        ("x.tif", "x.tif"),
        ("x.jp2", "x.jpg"),
        ("x.pgm", "x.jpg"),
        ("x.raw", "x.jpg"),
        ("x", "x.jpg"),
        ("a.b.png", "a.b.png"),
        (".jpg", ".jpg.jpg"),
    ],
)
def test_a_format_that_cannot_be_written_becomes_jpeg(tmp_path: Path, source: str, written: str) -> None:
    sink(tmp_path, save_txt=False).write(Path(source), PICTURE, ONE)
    assert files(tmp_path) == [written]
    assert read_image(tmp_path / written).shape == PICTURE.shape


@pytest.mark.parametrize("out", ["in", "in/../in", "link"])
def test_the_source_is_never_replaced(tmp_path: Path, out: str) -> None:
    source = tmp_path / "in" / "x.png"
    write_image(source, PICTURE)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = source.read_bytes()
    with pytest.raises(OutputError, match=r"x\.png: it is the source picture: choose another output folder"):
        sink(tmp_path / out).write(source, PICTURE, ONE)
    assert source.read_bytes() == before
    assert files(tmp_path / "in") == ["x.png"]
    sink(tmp_path / out, save_images=False).write(source, PICTURE, ONE)  # labels alone are no danger
    assert files(tmp_path / "in") == ["labels/x.txt", "x.png"]


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match="cannot write"):
        sink(tmp_path / "file").write(Path("x.png"), PICTURE, ONE)


# --- the run's folder ---


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
