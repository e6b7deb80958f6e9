"""From an engine and data to figures, and that a fault anywhere on the way shows in them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt import postprocess
from yolotrt.cli import main
from yolotrt.engines import host
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.errors import InputError
from yolotrt.evaluation.predict import PROTOCOL
from yolotrt.evaluation.run import Data, compare_evaluations, evaluate_engine
from yolotrt.media.images import read_image
from yolotrt.postprocess import Boxes, YoloLayer
from yolotrt.preprocess import Letterbox

REFERENCE_MAP, REFERENCE_MAP50 = 0.33601, 0.50044
"""Of the official YOLOv5 code and pycocotools with the golden pictures and weights."""


# --- the reference's figures ---


@pytest.fixture(scope="module")
def golden_evaluation(golden, yolov5n_engine):
    return evaluate_engine(yolov5n_engine, Data(golden / "coco/instances_val.json", golden / "coco/images/val"))


def test_yolov5n_has_the_references_accuracy(golden_evaluation):
    metrics = golden_evaluation.metrics
    assert metrics.map == pytest.approx(REFERENCE_MAP, abs=0.003)
    assert metrics.map50 == pytest.approx(REFERENCE_MAP50, abs=0.003)
    assert golden_evaluation.dataset.problems.counts() == {}


def test_yolo_labels_give_the_figures_of_the_coco_json(golden, yolov5n_engine, tmp_path):
    names = dict(enumerate(yolov5n_engine.header.model.names))
    data = tmp_path / "data.yaml"
    data.write_text(json.dumps({"path": str(golden / "coco"), "val": "images/val", "names": list(names.values())}))
    as_yolo, as_coco = (
        Data(data, limit=16),
        Data(golden / "coco/instances_val.json", golden / "coco/images/val", limit=16),
    )
    yolo, coco = (evaluate_engine(yolov5n_engine, either).metrics for either in (as_yolo, as_coco))
    # the files' labels are rounded, and have the box's area where COCO has the outline's
    assert (yolo.map, yolo.map50) == pytest.approx((coco.map, coco.map50), abs=0.002)


# --- faults ---


def make_data(engine: EngineFile, folder: Path) -> Data:
    """Pictures of noise, labelled with what the engine itself finds in them."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    random = np.random.RandomState(3)
    with open_session(engine) as session:
        for number, (height, width) in enumerate([(64, 90), (120, 70), (50, 50), (33, 200), (300, 200), (128, 192)]):
            image = cv2.resize(random.randint(0, 256, (6, 6, 3), np.uint8), (width, height))
            cv2.imwrite(str(folder / "images" / f"{number}.png"), image)
            (boxes,) = session.detect([image], dataclasses.replace(PROTOCOL, confidence=0.8))
            xyxy = Letterbox.fit((height, width), engine.header.imgsz).inverse(boxes.xyxy)
            centre = (xyxy[:, :2] + xyxy[:, 2:]) / 2 / [width, height]
            size = (xyxy[:, 2:] - xyxy[:, :2]) / [width, height]
            is_visible = (xyxy[:, 2:] - xyxy[:, :2] > 2).all(axis=1)
            rows = np.column_stack([boxes.class_id, centre, size])[is_visible]
            lines = [f"{int(row[0])} " + " ".join(f"{value:.9f}" for value in row[1:]) for row in rows]
            (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
    names = list(engine.header.model.names)
    (folder / "data.yaml").write_text(json.dumps({"val": "images", "names": names}))
    return Data(folder / "data.yaml")


@pytest.fixture(scope="module")
def own_data(tiny_engine, tmp_path_factory) -> Data:
    return make_data(tiny_engine, tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(scope="module")
def own_map(tiny_engine, own_data) -> float:
    """The figure without any fault."""
    metrics = evaluate_engine(tiny_engine, own_data).metrics
    assert metrics.ar100 > 0.95  # every label is found where it is, but for those beyond 100 a class and picture
    assert metrics.map > 0.5  # what is found in the padding, or is thin, has no label and counts against
    return metrics.map


def stretch(patch: pytest.MonkeyPatch) -> None:
    """The picture fills the input without regard to its proportions."""

    def to_input(self: Letterbox, image: np.ndarray, out: np.ndarray) -> None:
        scaled = cv2.resize(image, self.network_size[::-1])
        out[:] = scaled[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 255

    patch.setattr(Letterbox, "to_input", to_input)


def pad_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """The picture lies at the top left, the inverse takes it to be in the middle."""
    right = Letterbox.to_input

    def to_input(self: Letterbox, image: np.ndarray, out: np.ndarray) -> None:
        right(dataclasses.replace(self, top=0, left=0), image, out)

    patch.setattr(Letterbox, "to_input", to_input)


def keep_padding(patch: pytest.MonkeyPatch) -> None:
    """The inverse forgets the padding."""
    right = Letterbox.inverse
    patch.setattr(Letterbox, "inverse", lambda self, xy: right(dataclasses.replace(self, top=0, left=0), xy))


def swap_scale(patch: pytest.MonkeyPatch) -> None:
    """Coordinates are scaled by the other side's network size."""
    right = Letterbox.inverse
    patch.setattr(Letterbox, "inverse", lambda self, xy: right(self, xy[..., [1, 0, 3, 2]]))


def bgr(patch: pytest.MonkeyPatch) -> None:
    """Red and blue are exchanged."""
    right = Letterbox.to_input
    patch.setattr(
        Letterbox,
        "to_input",
        lambda self, image, out: right(self, np.ascontiguousarray(image[..., ::-1]), out),
    )


def decode(change: Callable[..., None]) -> Callable[[pytest.MonkeyPatch], None]:
    """YoloLayer's rows, changed."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = YoloLayer._decode

        def changed(self: YoloLayer, level: int, *cells: np.ndarray) -> np.ndarray:
            rows = right(self, level, *cells)
            change(rows, self.strides[level])
            return rows

        patch.setattr(YoloLayer, "_decode", changed)

    return mutate


def no_offset(rows: np.ndarray, stride: int) -> None:
    """Centres without the -0.5."""
    rows[..., :2] += stride / 2


def plain_sizes(rows: np.ndarray, stride: int) -> None:
    """Sizes as old versions of YOLO decode them, that is, not squared."""
    rows[..., 2:4] *= 1.6


def swap_axes(rows: np.ndarray, stride: int) -> None:
    """x and y exchanged."""
    rows[..., [0, 1, 2, 3]] = rows[..., [1, 0, 3, 2]]


def roll_classes(rows: np.ndarray, stride: int) -> None:
    """Each class takes the next one's probability."""
    rows[..., 5:] = np.roll(rows[..., 5:], 1, axis=-1)


def reversed_anchors(patch: pytest.MonkeyPatch) -> None:
    """Anchors of the coarsest level go to the finest."""
    right = YoloLayer.__init__
    patch.setattr(YoloLayer, "__init__", lambda self, anchors, *rest: right(self, anchors[::-1], *rest))


def change_nms(**options: float) -> Callable[[pytest.MonkeyPatch], None]:
    """NMS with other thresholds than those asked for."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        right = postprocess.non_max_suppression
        patch.setattr(
            host,
            "non_max_suppression",
            lambda rows, asked, masks: right(rows, dataclasses.replace(asked, **options), masks),
        )

    return mutate


def worst_first(patch: pytest.MonkeyPatch) -> None:
    """NMS keeps the worst boxes of an overlap."""

    def suppress(rows: np.ndarray, options: postprocess.NmsOptions, masks: int) -> Boxes:
        boxes = postprocess._select_classes(rows, options, masks)
        boxes = boxes.take(np.argsort(boxes.confidence, kind="stable"))
        kept = boxes.take(postprocess.greedy_nms(boxes, options.iou, options.max_detections))
        return kept.take(np.argsort(-kept.confidence, kind="stable"))

    patch.setattr(host, "non_max_suppression", suppress)


MUTATIONS = {
    "letterbox: stretched": stretch,
    "letterbox: padding at the end only": pad_at_the_end,
    "letterbox: inverse without padding": keep_padding,
    "letterbox: x and y exchanged": swap_scale,
    "letterbox: red and blue exchanged": bgr,
    "decode: no offset": decode(no_offset),
    "decode: sizes not squared": decode(plain_sizes),
    "decode: x and y exchanged": decode(swap_axes),
    "decode: anchors of another level": reversed_anchors,
    "classes: shifted by one": decode(roll_classes),
    "NMS: nothing suppressed": change_nms(iou=1.0),
    "NMS: all but distant boxes suppressed": change_nms(iou=0.05),
    "NMS: worst first": worst_first,
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_fault_shows_in_the_figures(tiny_engine, own_data, own_map, monkeypatch, mutate):
    mutate(monkeypatch)
    assert evaluate_engine(tiny_engine, own_data).metrics.map < own_map - 0.003


@pytest.fixture(scope="module")
def few_golden(golden, yolov5n_engine) -> tuple[Data, float]:
    """Eight pictures and the engine's figure in them."""
    data = Data(golden / "coco/instances_val.json", golden / "coco/images/val", limit=8)
    return data, evaluate_engine(yolov5n_engine, data).metrics.map


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_fault_shows_in_the_figures_of_a_real_model(yolov5n_engine, few_golden, monkeypatch, mutate):
    data, without_fault = few_golden
    mutate(monkeypatch)
    assert evaluate_engine(yolov5n_engine, data).metrics.map < without_fault - 0.003


# --- the command ---


def evaluate(*options: object) -> int:
    return main(["--eval", *map(str, options)])


@pytest.fixture
def work(tmp_path, monkeypatch, tiny_engine, own_data) -> Path:
    """The current folder: an engine under its default name, and data."""
    monkeypatch.chdir(tmp_path)
    tiny_engine.save("yolotrt.engine")
    shutil.copytree(own_data.path.parent, "data")
    return tmp_path


def test_the_command_writes_a_report_and_all_figures(work, capsys, own_map):
    assert evaluate("data/data.yaml", "--compare", "yolotrt.engine", "--markdown", "notes.md") == 0
    out = capsys.readouterr().out
    assert "no difference that these pictures can show" in out
    assert "mAP50-95" in out
    folder = work / "runs" / "eval"
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "predictions.json",
        "groundtruth.json",
        "report.html",
        "precision_recall.png",
        "f1_confidence.png",
        "confusion.png",
    }
    record = json.loads((folder / "metrics.json").read_text())
    assert record["map"] == pytest.approx(own_map)
    assert record["comparison"]["map"]["low"] == 0
    notes = (work / "notes.md").read_text()
    assert notes.startswith("<!-- begin accuracy -->")
    assert f"| {own_map:.3f} |" in notes
    assert all(read_image(path).shape[0] > 400 for path in folder.glob("*.png"))


def test_other_tools_come_to_the_same_figures_from_the_files(work, own_map):
    assert evaluate("data/data.yaml") == 0
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO("runs/eval/groundtruth.json")
    evaluation = COCOeval_faster(truth, truth.loadRes("runs/eval/predictions.json"), iouType="bbox")
    evaluation.run()
    assert evaluation.stats[0] == pytest.approx(own_map, abs=0.005)  # the files have three decimals of a pixel


def test_pictures_that_cannot_be_read_or_are_there_twice_are_named(work, capsys):
    images = work / "data" / "images"
    (images / "0.png").write_bytes(b"no picture")
    shutil.copy(images / "1.png", images / "copy.png")
    assert evaluate("data/data.yaml", "--out", "here") == 0
    out = capsys.readouterr().out
    assert "note: 1 pictures that cannot be read, left out with their labels: picture data/images/0.png" in out
    assert "note: 1 pictures with the content of another one, evaluated all the same: copy.png (as 1.png)" in out
    assert "note: 1 pictures without a label file, taken as background: copy.png" in out
    assert (work / "here" / "report.html").is_file()


BAD_CALLS = [
    (("data/data.yaml", "--engine", "other.engine"), "engine other.engine does not exist"),
    (("data/data.yaml", "--compare", "other.engine"), "engine other.engine does not exist"),
    (("data/data.yaml", "--split", "test"), "has no 'test' pictures"),
    (("data/data.yaml", "--limit", "0"), "--limit 0 leaves no picture"),
    (("data/data.yaml", "--images", "data"), "--images belongs to a COCO json"),
    (("data/data.yaml", "--conf", "0.5"), "--conf belongs to -d and has no effect on --eval"),
    (("data/data.yaml", "--out", "data/data.yaml"), "it is no folder"),
    (("nothing.yaml",), "dataset nothing.yaml does not exist"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_calls_get_one_line_and_leave_nothing(work, capsys, options, message):
    assert evaluate(*options) == 2
    err = capsys.readouterr().err
    assert err.startswith("yolotrt: error: ")
    assert message in err
    assert not (work / "runs").exists()


def test_a_classifier_is_refused(tiny_classifier_engine, own_data):
    with pytest.raises(InputError, match=r"is a classifier's and mAP is of boxes: choose an engine for detection"):
        evaluate_engine(tiny_classifier_engine, own_data)


def test_engines_of_different_classes_are_not_compared(tiny_engine, own_data):
    evaluation = evaluate_engine(tiny_engine, own_data)
    header = tiny_engine.header
    model = dataclasses.replace(header.model, names=("a", "b", "c"))
    other = dataclasses.replace(evaluation, engine=EngineFile(dataclasses.replace(header, model=model), b""))
    with pytest.raises(InputError, match="have different classes"):
        compare_evaluations(evaluation, other)
