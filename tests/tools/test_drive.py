from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt.errors import OutputError

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo_model"
sys.path.insert(0, str(TOOLS))

import drive  # noqa: E402


@pytest.mark.parametrize("codec", ["H.264", "MPEG-4 part 2"])
def test_video_has_the_promised_size_and_rate_and_moves(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if codec == "H.264":
        pytest.importorskip("av", reason="H.264 needs PyAV")
    else:
        monkeypatch.setattr(drive, "_has_x264", lambda: False)
    path = tmp_path / "drive.mp4"
    assert drive.render_drive(path, seed=1, seconds=0.3) == (9, codec)
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(30)
    frames = []
    while (frame := video.read())[0]:
        frames.append(frame[1])
    assert len(frames) == 9
    assert frames[0].shape == (720, 1280, 3)
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1
    # Coding costs two or three grey levels on average; exchanged colour channels would cost ten times that.
    original = next(drive.frames(1))
    assert np.abs(frames[0].astype(int) - original).mean(axis=(0, 1)).max() < 6
    assert [item.name for item in tmp_path.iterdir()] == ["drive.mp4"]


def test_unwritable_video_is_an_output_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose a writable"):
        drive.render_drive(tmp_path / "drive.unknown", seed=1, seconds=0.1)
    assert not list(tmp_path.iterdir())
