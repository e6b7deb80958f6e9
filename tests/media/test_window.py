from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt import Detections, Detector
from yolotrt.errors import OutputError
from yolotrt.media.frames import Clip, Found, Frame
from yolotrt.media.images import read_image
from yolotrt.media.window import FrameRate, Window, has_display

PICTURE = np.full((48, 64, 3), 90, np.uint8)
CLIP = Clip("0", 48, 64, Fraction(25), Fraction(1, 25), is_live=True)


def result(index: int = 0) -> Found:
    detections = Detections.empty(("cat",), (48, 64))
    return Found(Frame(Path("camera0"), PICTURE, CLIP, index, index), detections, PICTURE)


@pytest.fixture
def keys(monkeypatch) -> list[str]:
    """Keys that will be pressed, in order; none afterwards."""
    pressed: list[str] = []
    monkeypatch.setattr(cv2, "imshow", lambda *_: None)
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    monkeypatch.setattr(cv2, "destroyWindow", lambda _title: None)
    monkeypatch.setattr(cv2, "waitKey", lambda _delay: ord(pressed.pop(0)) if pressed else -1)
    return pressed


@pytest.fixture
def window(tiny_engine, tmp_path, keys):
    with Detector(tiny_engine, confidence=0.5) as detector:
        yield Window(detector, tmp_path)


@pytest.mark.parametrize(
    ("pressed", "goes_on", "confidence"),
    [
        ("", True, 0.5),
        ("q", False, 0.5),
        ("\x1b", False, 0.5),
        ("x", True, 0.5),
        ("+", True, 0.55),
        ("=", True, 0.55),
        ("-", True, 0.45),
        (" q", False, 0.5),  # paused, then quit
        (" ++ ", True, 0.6),  # keys work while paused
        (" x ", True, 0.5),
    ],
)
def test_keys(window, keys, pressed, goes_on, confidence):
    keys.extend(pressed)
    assert window.show(result()) is goes_on
    assert keys == []
    assert window._detector.options.confidence == pytest.approx(confidence)


def test_the_confidence_stays_in_its_range_and_matters(window, keys, tiny_engine):
    noise = np.random.RandomState(0).randint(0, 256, (50, 90, 3), np.uint8)
    counts = []
    for key in "+-":
        keys.extend(key * 30)
        while keys:
            window.idle() if window._shown is not None else window.show(result())
        counts.append(len(window._detector(noise)))
        assert window._detector.options.confidence == {"+": 0.95, "-": 0.05}[key]
    assert counts[0] < counts[1]


def test_a_snapshot_is_the_picture_with_its_boxes(window, keys, tmp_path, capsys):
    keys.append("s")
    assert window.show(result())
    (path,) = tmp_path.glob("snapshot-*.png")
    np.testing.assert_array_equal(read_image(path), PICTURE)
    assert str(path) in capsys.readouterr().err


def test_a_key_pressed_between_two_pictures_is_left_for_the_next_one(window, keys):
    keys.extend("xq")
    picture = result()
    picture = Found(Frame(Path("a.png"), PICTURE), picture.detections, PICTURE)
    assert window.show(picture)
    assert window.idle()
    assert keys == ["q"]


def test_keys_work_while_no_frame_comes(window, keys):
    assert window.idle()  # there is no window yet
    window.show(result())
    keys.append("q")
    assert window.idle() is False


def test_a_window_that_cannot_be_opened_is_an_output_error(window, monkeypatch):
    def fails(*_args):
        raise cv2.error("no GUI")

    monkeypatch.setattr(cv2, "imshow", fails)
    with pytest.raises(OutputError, match=r"--show needs a display: leave it out .*, or use --serve PORT"):
        window.show(result())


def test_the_frame_rate_is_that_of_the_last_two_seconds():
    rate = FrameRate()
    assert rate.tick(10.0) == 0
    for index in range(1, 101):
        value = rate.tick(10 + index * 0.04)
    assert value == pytest.approx(25)
    assert rate.tick(100.0) == 0


@pytest.mark.parametrize(
    ("variables", "expected"), [({}, False), ({"DISPLAY": ":0"}, True), ({"WAYLAND_DISPLAY": "w"}, True)]
)
def test_a_display_is_looked_for(monkeypatch, variables, expected):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_display() is expected
