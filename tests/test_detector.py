from __future__ import annotations

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.official_masks import iou, letterboxed, official_masks
from yolotrt import BuildOptions, Classification, Detections, Detector, build_engine, load_weights
from yolotrt.engines.base import Timing
from yolotrt.engines.file import EngineFile
from yolotrt.errors import EngineFileError, ImageError, InputError
from yolotrt.preprocess import CentreCrop, Letterbox

PICTURE_SIZES = {"bus": (1080, 810), "zidane": (720, 1280)}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8)


def assert_same(found: Detections, expected: Detections) -> None:
    assert found.names == expected.names
    assert found.image_size == expected.image_size
    # ONNX Runtime may add up in another order for another batch size: some 1e-6 of confidences and of 64 pixels
    np.testing.assert_allclose(found.confidence, expected.confidence, rtol=0, atol=1e-5)
    scale = max(expected.image_size) / 64
    np.testing.assert_allclose(found.xyxy, expected.xyxy, rtol=0, atol=1e-3 * scale)


# --- against the official code ---


@pytest.fixture(scope="module")
def golden_detector(golden: Path, yolov5n_engine: EngineFile):
    """A detector of a golden checkpoint, by its name; each is made once."""
    detectors = {"yolov5n": Detector(yolov5n_engine, threads=2)}

    def make(tag: str) -> Detector:
        if tag not in detectors:
            engine = build_engine(load_weights(golden / "weights" / f"{tag}.pt"), backend="onnxruntime")
            detectors[tag] = Detector(engine, threads=2)
        return detectors[tag]

    yield make
    for detector in detectors.values():
        detector.close()


def assert_equals_reference(boxes: np.ndarray, found: Detections, expected, prefix: str, key: str, corner: float):
    assert found.class_id.tolist() == expected[f"{prefix}_cls"].tolist()
    np.testing.assert_allclose(found.confidence, expected[f"{prefix}_conf"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(boxes, expected[f"{prefix}_{key}"], rtol=0, atol=corner)


@pytest.mark.parametrize("tag", ["yolov5n", "yolov5n_v60", "pv_nc5_v70"])
@pytest.mark.parametrize("name", ["bus", "zidane"])
def test_detections_equal_the_official_ones_on_its_own_input(golden, golden_detector, tag, name):
    expected = np.load(golden / "expected" / f"{tag}_det.npz")
    # the letterboxed input is the same for all models of 640 x 640
    planes = np.load(golden / "expected" / "yolov5n_det.npz")[f"{name}_square_input_u8_chw_rgb"]
    image = np.ascontiguousarray(planes[::-1].transpose(1, 2, 0))  # RGB planes -> BGR picture
    found = golden_detector(tag)(image)
    prefix = f"{name}_square"
    # 0.1 px both in the network's input and, scaled up, in the picture; the reference does not clip in the former
    network = {f"{prefix}_net": np.clip(expected[f"{prefix}_xyxy_net"], 0, 640)}
    assert_equals_reference(found.xyxy, found, {**expected, **network}, prefix, "net", 0.1)
    boxes = Letterbox.fit(PICTURE_SIZES[name], (640, 640)).inverse(found.xyxy)
    assert_equals_reference(boxes, found, expected, prefix, "xyxy", 0.1)


@pytest.mark.parametrize("tag", ["yolov5n", "yolov5n_v60", "pv_nc5_v70"])
@pytest.mark.parametrize("name", ["bus", "zidane"])
def test_detections_equal_the_official_ones_from_the_jpeg(golden, golden_detector, tag, name):
    expected = np.load(golden / "expected" / f"{tag}_det.npz")
    found = golden_detector(tag)(golden / "images" / f"{name}.jpg")
    assert found.image_size == PICTURE_SIZES[name]
    assert_equals_reference(found.xyxy, found, expected, f"{name}_square", "xyxy", 1.0)


def test_the_golden_data_have_something_to_find(golden):
    counts = {
        (tag, name): len(np.load(golden / "expected" / f"{tag}_det.npz")[f"{name}_square_cls"])
        for tag in ("yolov5n", "yolov5n_v60", "pv_nc5_v70")
        for name in PICTURE_SIZES
    }
    assert list(counts.values()) == [4, 3, 5, 4, 1, 0]


@pytest.mark.parametrize(("name", "size"), [("bus", (640, 480)), ("zidane", (384, 640))])
def test_a_rectangular_engine_equals_the_official_code(golden, name, size):
    weights = load_weights(golden / "weights" / "yolov5n.pt")
    engine = build_engine(weights, backend="onnxruntime", options=BuildOptions(imgsz=size))
    expected = np.load(golden / "expected" / "yolov5n_det.npz")
    with Detector(engine, threads=2) as detector:
        found = detector(golden / "images" / f"{name}.jpg")
    assert_equals_reference(found.xyxy, found, expected, f"{name}_auto", "xyxy", 1.0)


def test_a_batch_of_photos_equals_single_photos(golden, yolov5n_engine, golden_detector):
    weights = load_weights(golden / "weights" / "yolov5n.pt")
    engine = build_engine(weights, backend="onnxruntime", options=BuildOptions(max_batch=2))
    paths = [golden / "images" / f"{name}.jpg" for name in ("bus", "zidane")]
    with Detector(engine, threads=2) as detector:
        for found, path in zip(detector(paths), paths, strict=True):
            single = golden_detector("yolov5n")(path)
            assert found.names == single.names
            np.testing.assert_allclose(found.xyxy, single.xyxy, rtol=0, atol=0.01)
            np.testing.assert_allclose(found.confidence, single.confidence, rtol=0, atol=1e-4)


# --- segmentation ---


@pytest.mark.parametrize("name", ["bus", "zidane"])
def test_masks_equal_the_official_ones(golden, golden_detector, name):
    class_ids, masks = official_masks(golden, name)
    found = golden_detector("derived_seg_nc80")(letterboxed(golden, name))
    assert found.class_id.tolist() == class_ids
    assert found.mask.shape == masks.shape == (5, 640, 640)
    for mask, official in zip(found.mask, masks, strict=True):
        assert iou(mask, official) > 0.999  # measured: not a pixel differs


@pytest.mark.parametrize("name", ["bus", "zidane"])
def test_masks_of_a_photo_lie_where_those_of_its_letterboxed_input_do(golden, golden_detector, name):
    _, masks = official_masks(golden, name)
    found = golden_detector("derived_seg_nc80")(golden / "images" / f"{name}.jpg")
    height, width = found.image_size
    letterbox = Letterbox.fit((height, width), (640, 640))
    for mask, official in zip(found.mask, masks, strict=True):
        inner = official[letterbox._rows, letterbox._columns].astype(np.uint8)
        # the official masks have the network's pixels, two of the picture's in zidane: half of one at the borders
        assert iou(mask, cv2.resize(inner, (width, height), interpolation=cv2.INTER_NEAREST) > 0) > 0.94


def test_a_segmentation_engine_gives_masks_in_batches(tiny_segment_engine):
    pictures = [noise(48, 80, seed=index) for index in range(5)]
    with Detector(tiny_segment_engine, confidence=0.3, max_detections=20) as detector:
        found = detector(pictures)
        for picture, detections in zip(pictures, found, strict=True):
            assert len(detections) == len(detections.masks) > 0
            assert detections.mask.shape == (len(detections), 48, 80)
            np.testing.assert_array_equal(detector(picture).mask, detections.mask)
        nothing = detector(np.zeros((8, 8, 3), np.uint8))
        assert nothing.mask.shape == (len(nothing), 8, 8)
    assert any(detections.mask.any() for detections in found)


def test_a_detection_engine_gives_no_masks(detector):
    assert detector(noise(48, 80)).mask is None


def test_supervision_gets_the_masks(tiny_segment_engine):
    pytest.importorskip("supervision")
    with Detector(tiny_segment_engine, confidence=0.3) as detector:
        found = detector(noise(48, 80))
    np.testing.assert_array_equal(found.to_supervision().mask, found.mask)


# --- classification ---


def test_a_classifier_gives_probabilities(tiny_classifier_engine):
    pictures = [noise(40, 60, seed=index) for index in range(5)]
    with Detector(tiny_classifier_engine) as detector:
        found = detector(pictures)
        for picture, classification in zip(pictures, found, strict=True):
            assert isinstance(classification, Classification)
            assert classification.probabilities.shape == (7,)
            assert classification.probabilities.sum() == pytest.approx(1, abs=1e-6)
            assert classification.image_size == (40, 60)
            np.testing.assert_allclose(detector(picture).probabilities, classification.probabilities, atol=1e-6)
            assert isinstance(detector.submit([picture]).result()[0], Classification)
        assert detector.timing.pictures == 15
    assert len({classification.probabilities.tobytes() for classification in found}) == 5


def test_a_classifiers_probabilities_are_the_softmax_of_its_scores(tiny_classifier_engine):
    picture = noise(50, 50)
    with Detector(tiny_classifier_engine) as detector:
        found = detector(picture)
        image = np.zeros((1, 3, 32, 32), np.float32)
        CentreCrop((32, 32)).to_input(picture, image[0])
        (logits,) = detector._session.run(image)
        powers = np.exp(logits[0].astype(np.float64))
        np.testing.assert_allclose(found.probabilities, powers / powers.sum(), rtol=1e-5)


def test_classes_cannot_be_chosen_of_a_classifier(tiny_classifier_engine):
    with pytest.raises(InputError, match="a classifier weighs all its classes against each other: choose none"):
        Detector(tiny_classifier_engine, classes=["ant"])


# --- what goes in ---


@pytest.fixture(scope="module")
def detector(tiny_engine: EngineFile):
    with Detector(tiny_engine, confidence=0.5) as opened:
        yield opened


def test_a_path_and_its_array_are_the_same_picture(tmp_path, detector):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), noise(50, 90))
    expected = detector(noise(50, 90))
    assert len(expected) > 5
    for source in (path, str(path), [path], [str(path)], (noise(50, 90),)):
        found = detector(source)
        assert_same(found[0] if isinstance(found, list) else found, expected)


def test_boxes_lie_in_the_picture_and_the_best_is_first(detector):
    for size in [(50, 90), (200, 31), (1, 1), (10_000, 50), (64, 64)]:
        found = detector(noise(*size))
        assert len(found) > 5
        assert found.image_size == size
        assert (found.xyxy.dtype, found.confidence.dtype, found.class_id.dtype) == (np.float32, np.float32, np.int32)
        assert (np.diff(found.confidence) <= 0).all()
        assert found.xyxy.min() >= 0
        assert (found.xyxy <= (size[1], size[0]) * 2).all()
        assert (found.xyxy[:, 2:] >= found.xyxy[:, :2]).all()


@pytest.mark.parametrize("view", [lambda image: image[::-1], lambda image: image[..., ::-1], np.asfortranarray])
def test_a_view_is_a_picture_like_its_copy(detector, view):
    image = view(noise(50, 90))
    assert_same(detector(image), detector(image.copy(order="C")))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"must be uint8 BGR \(height, width, 3\), not uint8 \(8, 8\): convert"),
        (np.zeros((8, 8, 4), np.uint8), r"not uint8 \(8, 8, 4\)"),
        (np.zeros((8, 8, 1), np.uint8), r"not uint8 \(8, 8, 1\)"),
        (np.zeros((3, 8, 8), np.uint8), r"not uint8 \(3, 8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"not uint8 \(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), r"not float32 \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.uint16), r"not uint16 \(8, 8, 3\)"),
        (np.zeros((8, 8, 3), bool), r"not bool \(8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.zeros((8, 0, 3), np.uint8), "has no pixels"),
        (np.uint8(5), r"must be an array or a path, not uint8"),
        (None, r"a picture is None, as cv2.imread gives it"),
        (5, "must be an array or a path, not int"),
        (b"bus.jpg", "must be an array or a path, not bytes"),
        ({"a": 1}, "must be an array or a path, not dict"),
        ([np.zeros((8, 8, 3), np.uint8), None], "a picture is None"),
        ([[1, 2], [3, 4]], "must be an array or a path, not list"),
        ("missing.jpg", r"picture missing\.jpg does not exist: check the path"),
        ([Path("missing.jpg")], r"picture missing\.jpg does not exist: check the path"),
        ("", "is a directory: name a file"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(detector, images, message):
    with pytest.raises(ImageError, match=message) as caught:
        detector(images)
    assert "\n" not in str(caught.value)
    assert len(detector(noise(64, 64))) > 5  # it goes on working


# --- batches ---


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        BuildOptions(min_batch=4, opt_batch=4, max_batch=4),
        BuildOptions(min_batch=1, opt_batch=2, max_batch=4),
        BuildOptions(min_batch=2, opt_batch=3, max_batch=4),
    ],
    ids=["1", "static 4", "1 to 4", "2 to 4"],
)
def test_any_number_of_pictures_of_any_sizes_equals_single_pictures(tiny_weights, detector, options, count):
    sizes = [(64, 64), (50, 90), (90, 50), (1, 1), (300, 20), (64, 64), (20, 300), (7, 5), (128, 128)]
    images = [noise(*size, seed=index) for index, size in enumerate(sizes[:count])]
    engine = build_engine(tiny_weights, backend="onnxruntime", options=options)
    with Detector(engine, confidence=0.5) as batched:
        found = batched(images)
        assert len(found) == count
        for detections, image in zip(found, images, strict=True):
            assert_same(detections, detector(image))
        assert batched.timing.pictures == count


def test_detections_stay_when_the_next_pictures_come(detector):
    first = detector(noise(50, 90))
    before = [array.copy() for array in (first.xyxy, first.confidence, first.class_id)]
    detector(noise(90, 50, seed=1))
    for array, copy in zip((first.xyxy, first.confidence, first.class_id), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_two_detectors_of_one_engine_do_not_disturb_each_other(tiny_engine, detector):
    with Detector(tiny_engine, confidence=0.5) as other:
        expected = detector(noise(50, 90))
        other(noise(64, 64, seed=3))
        assert_same(detector(noise(50, 90)), expected)
        assert_same(other(noise(50, 90)), expected)


# --- options ---


def test_options_are_the_thresholds_of_the_detection(tiny_engine):
    image = noise(50, 90)

    def found(**options) -> Detections:
        with Detector(tiny_engine, **options) as opened:
            return opened(image)

    usual = found()
    assert usual.confidence.min() > 0.25
    assert found(confidence=0.6).confidence.tolist() == usual.confidence[usual.confidence > 0.6].tolist()
    assert found(max_detections=7).confidence.tolist() == usual.confidence[:7].tolist()
    assert len(found(iou=0.1)) < len(usual) < len(found(iou=0.9))
    assert set(found(classes=[2, 0]).names) == {"cat", "bird"}
    assert set(found(classes=np.array([1])).names) == {"dog"}
    assert len(found(agnostic=True)) < len(usual)
    assert len(found(confidence=1)) == 0
    assert len(found(classes=[])) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": -0.1}, r"confidence -0.1 is out of range: choose a value from 0 to 1"),
        ({"confidence": 1.1}, "confidence 1.1 is out of range"),
        ({"confidence": float("nan")}, "confidence nan is out of range"),
        ({"confidence": 25}, "confidence 25 is out of range"),
        ({"iou": 1.5}, "iou 1.5 is out of range"),
        ({"iou": -1}, "iou -1 is out of range"),
        ({"iou": float("nan")}, "iou nan is out of range"),
        ({"max_detections": 0}, "max_detections 0: choose a number from 1 to 30000"),
        ({"max_detections": 30_001}, "max_detections 30001: choose"),
        ({"classes": [3]}, "class 3 does not exist: the model has classes 0 to 2"),
        ({"classes": [0, -1]}, "class -1 does not exist"),
    ],
)
def test_an_option_out_of_range_is_refused(tiny_engine, options, message):
    with pytest.raises(InputError, match=message):
        Detector(tiny_engine, **options)


# --- life ---


def test_an_engine_is_opened_by_its_path(tmp_path, tiny_engine, detector):
    path = tmp_path / "a.engine"
    tiny_engine.save(path)
    for source in (path, str(path)):
        with Detector(source, confidence=0.5, threads=1) as opened:
            assert opened.class_names == ("cat", "dog", "bird")
            assert_same(opened(noise(50, 90)), detector(noise(50, 90)))


def test_a_missing_engine_is_named(tmp_path):
    with pytest.raises(EngineFileError, match=r"engine .*missing\.engine does not exist: check the path"):
        Detector(tmp_path / "missing.engine")


def test_a_closed_detector_says_so(tiny_engine):
    with Detector(tiny_engine) as opened:
        opened(noise(64, 64))
    opened.close()
    for images in (noise(64, 64), [noise(64, 64)], []):
        with pytest.raises(InputError, match="the detector is closed: open a new one"):
            opened(images)


def test_leaving_the_context_closes_and_lets_errors_through(tiny_engine):
    with pytest.raises(ZeroDivisionError), Detector(tiny_engine) as opened:
        _ = 1 / 0
    with pytest.raises(InputError, match="closed"):
        opened(noise(64, 64))


def test_a_classifier_can_be_warmed(tiny_classifier_engine):
    with Detector(tiny_classifier_engine) as opened:
        opened.warm_up()
        assert opened.timing.pictures == 0


@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_dynamic_engine"])
def test_a_warm_up_is_not_counted_and_changes_no_result(request, engine):
    picture = noise(60, 80)
    with (
        Detector(request.getfixturevalue(engine), confidence=0.5) as cold,
        Detector(cold.engine, confidence=0.5) as warm,
    ):
        warm.warm_up()
        assert vars(warm.timing) == vars(Timing())
        assert_same(warm(picture), cold(picture))
        assert warm.timing.pictures == 1
        before = warm.timing
        warm.warm_up(batches=2)
        assert warm.timing is before
        assert before.pictures == 1
    with pytest.raises(InputError, match="the detector is closed"):
        warm.warm_up()


def test_a_warm_up_that_fails_leaves_the_timing(tiny_engine, monkeypatch):
    with Detector(tiny_engine) as opened:
        opened(noise(60, 80))
        before = opened.timing
        monkeypatch.setattr(opened._session, "detect", lambda *_: pytest.fail("the device"))
        with pytest.raises(pytest.fail.Exception, match="the device"):
            opened.warm_up()
        assert opened.timing is before
        assert before.pictures == 1


def test_timing_adds_up(tiny_engine):
    with Detector(tiny_engine) as opened:
        assert (opened.timing.pictures, opened.timing.inference_ms) == (0, 0)
        opened(noise(64, 64))
        first = vars(opened.timing).copy()
        opened([noise(64, 64)] * 2)
        assert opened.timing.pictures == 3
        for name in ("preprocess_ms", "inference_ms", "postprocess_ms"):
            assert 0 < first[name] < getattr(opened.timing, name)


def test_extreme_pictures_raise_no_warning(detector):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (0, 255):
            detector(np.full((64, 64, 3), value, np.uint8))


def test_supervision_gets_the_detections(detector):
    pytest.importorskip("supervision")
    found = detector(noise(50, 90))
    converted = found.to_supervision()
    np.testing.assert_array_equal(converted.xyxy, found.xyxy)
    assert list(converted.data["class_name"]) == found.names
