from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.media.test_results import HEIGHT, NAMES, ONE, PICTURE, WIDTH, files, found
from yolotrt.detections import Detections
from yolotrt.errors import OutputError
from yolotrt.media.drawing import draw
from yolotrt.media.frames import Clip, Found, Frame
from yolotrt.media.images import read_image, write_image
from yolotrt.media.sinks import CropSink, CsvFile, JsonFile, JsonLinesFile, LabelSink, PictureSink, ResultNames

CLIP = Clip("in/clip.mov", HEIGHT, WIDTH, Fraction(25), Fraction(1, 1000))


def picture(path: str | Path, detections: Detections = ONE) -> Found:
    return Found(Frame(Path(path), PICTURE), detections, draw(PICTURE, detections))


def frame(index: int, detections: Detections = ONE, clip: Clip = CLIP) -> Found:
    return Found(Frame(Path(clip.source), PICTURE, clip, index, 40 * index), detections, draw(PICTURE, detections))


class Folder:
    """Sinks that write to one folder and share their names."""

    def __init__(self, folder: Path, *, save_images: bool, save_txt: bool, with_confidence: bool) -> None:
        names = ResultNames()
        self.sinks = [PictureSink(folder, names)] if save_images else []
        self.sinks += [LabelSink(folder, names, with_confidence=with_confidence)] if save_txt else []

    def write(self, result: Found) -> None:
        for each in self.sinks:
            each.write(result)

    def close(self) -> None:
        for each in self.sinks:
            each.close()


def sink(folder: Path, *, save_images: bool = True, save_txt: bool = True, with_confidence: bool = False) -> Folder:
    return Folder(folder, save_images=save_images, save_txt=save_txt, with_confidence=with_confidence)


# --- records ---


def write_json(path: Path, *results: Found) -> list:
    file = JsonFile(path)
    for result in results:
        assert not path.exists()  # it appears when it is whole
        file.write(result)
    file.close()
    return json.loads(path.read_text(encoding="utf-8"))


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    target = tmp_path / "new" / "results.json"
    boxes = [{"class_id": 1, "name": "Größe", "confidence": 0.87654, "xyxy": [20.0, 10.0, 60.0, 90.0]}]
    size = {"width": WIDTH, "height": HEIGHT}
    empty = Detections.empty(NAMES, (HEIGHT, WIDTH))
    assert write_json(target, picture("a/Größe.jpg"), picture("b.png", empty), frame(3)) == [
        {"image": str(Path("a/Größe.jpg")), **size, "detections": boxes},
        {"image": "b.png", **size, "detections": []},
        {"image": "in/clip.mov", "frame": 3, "time_s": 0.12, **size, "detections": boxes},
    ]
    assert len(target.read_text(encoding="utf-8").splitlines()) == 5  # one picture a line
    assert files(tmp_path) == ["new/results.json"]


def test_json_of_no_pictures_is_an_empty_array(tmp_path: Path) -> None:
    assert write_json(tmp_path / "r.json") == []


def test_json_can_name_any_file(tmp_path: Path) -> None:
    assert write_json(tmp_path / "r.json", picture("not utf-8 \udcff.jpg"))[0]["image"] == "not utf-8 \udcff.jpg"


def test_json_never_holds_nan(tmp_path: Path) -> None:
    file = JsonFile(tmp_path / "r.json")
    file.write(picture("a.jpg"))
    with pytest.raises(ValueError, match="JSON"):
        file.write(Found(Frame(Path("b.jpg"), PICTURE), found((math.nan, 0, 1, 1, 0.5, 0))))
    file.close()
    assert len(json.loads((tmp_path / "r.json").read_text())) == 1
    assert files(tmp_path) == ["r.json"]


def test_json_lines_and_csv_grow_by_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("old")
    lines, table = JsonLinesFile(tmp_path / "r.jsonl"), CsvFile(tmp_path / "r.csv")
    results = [picture("a,b.jpg"), frame(0, found()), frame(2)]
    for number, result in enumerate(results, start=1):
        lines.write(result)
        table.write(result)
        assert len((tmp_path / "r.jsonl").read_text().splitlines()) == number  # before it is closed
    expected = write_json(tmp_path / "r.json", *results)
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()] == expected
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["image"], row["frame"], row["time_s"]) for row in rows] == [
        ("a,b.jpg", "", ""),
        ("in/clip.mov", "2", "0.08"),
    ]
    assert [rows[1][key] for key in ("class_id", "name", "confidence", "x1", "y1", "x2", "y2")] == [
        "1", "Größe", "0.87654", "20.0", "10.0", "60.0", "90.0",
    ]  # fmt: skip
    lines.close()
    table.close()


@pytest.mark.parametrize("kind", [JsonFile, JsonLinesFile, CsvFile])
def test_a_record_file_that_cannot_be_written_is_named(tmp_path: Path, kind: type) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot write .*file/r\.json"):
        kind(tmp_path / "file" / "r.json")


# --- labels and crops of frames ---


def test_labels_and_crops_of_frames_carry_their_numbers(tmp_path: Path) -> None:
    names = ResultNames()
    labels, crops = LabelSink(tmp_path, names, with_confidence=False), CropSink(tmp_path, names)
    two = found((20.4, 10, 60, 90.2, 0.9, 1), (-5, -5, 12, 300, 0.8, 0), (7, 7, 7, 9, 0.5, 0))
    for result in (picture("clip.png"), frame(0, two), frame(7, found())):
        labels.write(result)
        crops.write(result)
    assert files(tmp_path) == [
        "crops/Größe/clip_0.jpg", "crops/Größe/clip_2_0_0.jpg", "crops/person/clip_2_0_1.jpg",
        "labels/clip.txt", "labels/clip_2_0.txt",
    ]  # fmt: skip
    assert read_image(tmp_path / "crops/Größe/clip_2_0_0.jpg").shape == (81, 40, 3)
    assert read_image(tmp_path / "crops/person/clip_2_0_1.jpg").shape == (100, 12, 3)


@pytest.mark.parametrize(("name", "expected"), [("a/b", "a_b"), ("..", "_"), ("x\0y", "x_y"), ("Größe 2", "Größe 2")])
def test_a_class_name_becomes_one_folder(tmp_path: Path, name: str, expected: str) -> None:
    detections = Detections(ONE.xyxy, ONE.confidence, np.zeros(1, np.int32), (name,), (HEIGHT, WIDTH))
    CropSink(tmp_path, ResultNames()).write(Found(Frame(Path("a.png"), PICTURE), detections))
    assert files(tmp_path) == [f"crops/{expected}/a_0.jpg"]


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
    results.write(picture("in/one.png"))
    results.write(picture("in/none.png", found()))  # nothing found: no label file, as in YOLOv5
    assert files(tmp_path / "out") == expected
    if save_images:
        np.testing.assert_array_equal(read_image(tmp_path / "out" / "one.png"), draw(PICTURE, ONE))
    if save_txt:
        assert (tmp_path / "out" / "labels" / "one.txt").read_text() == "1 0.2 0.5 0.2 0.8 0.876543\n"


def test_confidence_is_written_only_if_asked_for(tmp_path: Path) -> None:
    sink(tmp_path, with_confidence=False).write(picture("one.png"))
    assert (tmp_path / "labels" / "one.txt").read_text() == "1 0.2 0.5 0.2 0.8\n"


def test_equal_names_are_numbered(tmp_path: Path) -> None:
    results = sink(tmp_path)
    for source in ("a/x.jpg", "b/x.jpg", "c/x.png", "x_2.jpg", "d/X.JPG"):
        results.write(picture(source))
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
    sink(tmp_path, save_txt=False).write(picture(source))
    assert files(tmp_path) == [written]
    assert read_image(tmp_path / written).shape == PICTURE.shape


@pytest.mark.parametrize("out", ["in", "in/../in", "link"])
def test_the_source_is_never_replaced(tmp_path: Path, out: str) -> None:
    source = tmp_path / "in" / "x.png"
    write_image(source, PICTURE)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = source.read_bytes()
    with pytest.raises(OutputError, match=r"x\.png: it is the source picture: choose another output folder"):
        sink(tmp_path / out).write(picture(source))
    assert source.read_bytes() == before
    assert files(tmp_path / "in") == ["x.png"]
    sink(tmp_path / out, save_images=False).write(picture(source))  # labels alone are no danger
    assert files(tmp_path / "in") == ["labels/x.txt", "x.png"]


def test_an_unwritable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match="cannot write"):
        sink(tmp_path / "file").write(picture("x.png"))


# --- the run's folder ---
