"""The forms of results, as YOLO labels and as JSON records, and the folder that they go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.detections import Detections
from yolotrt.errors import OutputError
from yolotrt.media.frames import Frame

_CONFIDENCE_DECIMALS = 5
_PIXEL_DECIMALS = 2
_TIME_DECIMALS = 3


def yolo_txt(detections: Detections, *, with_confidence: bool) -> str:
    """The detections in YOLO's label format, one line each: ``class x y width height [confidence]``.

    x and y are the box's centre; all four are fractions of the picture's size, clipped to 0..1. Numbers have six
    significant digits, as YOLOv5 writes them (detect.py --save-txt: ``%g``).

    Returns:
        Lines that each end with a line feed; an empty string for no detections.
    """
    height, width = detections.image_size
    lines = []
    for box, confidence, class_id, _ in detections:
        left, top, right, bottom = np.clip(box.astype(np.float64) / (width, height, width, height), 0, 1)
        values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        if with_confidence:
            values.append(confidence)
        lines.append(" ".join([str(class_id), *(f"{value:g}" for value in values)]) + "\n")
    return "".join(lines)


def json_record(path: Path, detections: Detections) -> dict[str, Any]:
    """One picture's entry in the JSON file: `image`, `width`, `height` and `detections`.

    Each detection has `class_id`, `name`, `confidence` (5 decimals) and `xyxy` (left, top, right, bottom in pixels of
    the picture, 2 decimals).
    """
    height, width = detections.image_size
    return {
        "image": str(path),
        "width": int(width),
        "height": int(height),
        "detections": [
            {
                "class_id": class_id,
                "name": name,
                "confidence": round(confidence, _CONFIDENCE_DECIMALS),
                "xyxy": [round(float(value), _PIXEL_DECIMALS) for value in box],
            }
            for box, confidence, class_id, name in detections
        ],
    }


def frame_record(frame: Frame, detections: Detections) -> dict[str, Any]:
    """One frame's entry in the JSON file: that of `json_record`; in a clip also `frame`, from 0, and `time_s`."""
    if frame.clip is None:
        return json_record(frame.path, detections)
    record = json_record(frame.path, detections)
    moment = {"frame": frame.index, "time_s": round(frame.time_s, _TIME_DECIMALS)}
    return {"image": frame.clip.source, **moment, **{key: record[key] for key in ("width", "height", "detections")}}


def next_run_folder(base: Path) -> Path:
    """Make and return the first folder of ``base``, ``base2``, ``base3``, ... that does not exist yet, as YOLOv5 does.

    Two runs that start at once get two folders: making the folder is what claims it.

    Raises:
        OutputError: if the folder cannot be made.
    """
    try:
        if base.name in ("", ".."):  # "." and the like: the number goes to the folder's real name
            base = base.resolve()
        if not base.name:
            raise OutputError(f"cannot make the output folder {base}: name a folder below it")
        base.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = base if number == 1 else base.parent / f"{base.name}{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise OutputError(f"cannot make the output folder {base} ({reason}): choose a writable place") from problem
