"""Files that come with the package: the demo model's weights, and pictures to try it on."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

DEMO_WEIGHTS = _HERE / "signs-yolov5n.safetensors"
"""A YOLOv5n for twelve road signs; see README.md beside it."""


def sample_pictures() -> Path:
    """The folder of sample pictures: inside an installed package, at the top of a checkout."""
    installed = _HERE / "samples"
    return installed if installed.is_dir() else _HERE.parents[1] / "samples"
