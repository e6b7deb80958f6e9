"""Programs in docs/ run as they stand there."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.media.test_video_writer import facts
from yolotrt import Detections
from yolotrt.media.frames import Clip, Frame
from yolotrt.media.video_writer import VideoWriter

DOCS = Path(__file__).resolve().parents[1] / "docs"


def program(page: str) -> dict:
    """The names that a page's Python program defines."""
    (source,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {"__name__": page}
    exec(compile(source, page, "exec"), names)  # our own page
    return names


class ScriptedDetector:
    """Finds two boxes that move: one to the right, one, slower, to the left."""

    def __init__(self, _engine: str, *, confidence: float) -> None:
        self._frame = 0

    def __enter__(self):
        return self

    def __exit__(self, *_error) -> None:
        pass

    def __call__(self, image: np.ndarray) -> Detections:
        right, left = 20 + 4 * self._frame, 260 - 3 * self._frame
        self._frame += 1
        boxes = np.array([[right, 20, right + 40, 60], [left, 100, left + 50, 150]], np.float32)
        return Detections(
            boxes, np.full(2, 0.9, np.float32), np.array([0, 1], np.int32), ("cat", "dog"), image.shape[:2]
        )


def test_the_tracking_example_counts_what_crosses_the_line(tmp_path, monkeypatch):
    pytest.importorskip("trackers")
    clip = Clip("x", 180, 320, Fraction(25), Fraction(1, 25))
    writer = VideoWriter(tmp_path / "in.mp4", clip)
    for index in range(60):
        picture = np.full((180, 320, 3), 100, np.uint8)
        writer.write(Frame(Path("x"), picture, clip, index, index), picture)
    writer.close()
    names = program("tracking.md")
    monkeypatch.setitem(names, "Detector", ScriptedDetector)
    assert names["track"]("unused.engine", str(tmp_path / "in.mp4"), str(tmp_path / "out.mp4")) == (1, 1)
    assert facts(tmp_path / "out.mp4")["count"] == 60


def test_the_tracking_example_runs_with_a_real_engine(tmp_path, tiny_engine):
    pytest.importorskip("trackers")
    tiny_engine.save(tmp_path / "tiny.engine")
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(10):
            noise = np.random.RandomState(index).randint(0, 256, (96, 128, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="bgr24")))
        container.mux(stream.encode(None))
    paths = [str(tmp_path / name) for name in ("tiny.engine", "in.mp4", "out.mp4")]
    program("tracking.md")["track"](*paths, 0.6)
    assert facts(tmp_path / "out.mp4")["count"] == 10
