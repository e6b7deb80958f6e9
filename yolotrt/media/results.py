"""The forms of results, as YOLO labels and as JSON records, and the folder that they go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.detections import Classification, Detections
from yolotrt.errors import OutputError
from yolotrt.media.frames import Frame

_CONFIDENCE_DECIMALS = 5
_PIXEL_DECIMALS = 2
_TIME_DECIMALS = 3


def yolo_txt(detections: Detections | Classification, *, with_confidence: bool) -> str:
    """The result in YOLO's label format, one line each.

    Boxes: ``class x y width height [confidence]``, x and y being the centre. Objects with masks:
    ``class x1 y1 x2 y2 ... [confidence]``, the outline of the mask's largest part, or the box's corners where it has
    none. All coordinates are fractions of the picture's size, clipped to 0..1. Numbers have six significant digits, as
    YOLOv5 writes them (detect.py --save-txt: ``%g``). Classifications: the best five as ``probability name``
    (classify/predict.py).

    Returns:
        Lines that each end with a line feed; an empty string for no detections.
    """
    if isinstance(detections, Classification):
        return "".join(f"{probability:.2f} {name}\n" for _, name, probability in detections.top())
    lines = []
    for index, (_, confidence, class_id, _) in enumerate(detections):
        values = [*_label_values(detections, index), *([confidence] if with_confidence else [])]
        lines.append(" ".join([str(class_id), *(f"{value:g}" for value in values)]) + "\n")
    return "".join(lines)


def _label_values(detections: Detections, index: int) -> list[float]:
    """The coordinates of one detection in a label file."""
    height, width = detections.image_size
    left, top, right, bottom = np.clip(detections.xyxy[index].astype(np.float64) / (width, height, width, height), 0, 1)
    if detections.masks is None:
        return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    outline = detections.masks.polygon(index) / (width, height)
    if not len(outline):
        return [left, top, right, top, right, bottom, left, bottom]
    return [float(value) for value in outline.ravel()]


def json_record(path: Path, detections: Detections | Classification) -> dict[str, Any]:
    """One picture's entry in the JSON file: `image`, `width`, `height` and `detections`, or of a classifier `classes`.

    Each detection has `class_id`, `name`, `confidence` (5 decimals), `xyxy` (left, top, right, bottom in pixels of
    the picture, 2 decimals) and, if it has a mask, `segmentation` (COCO's run-length encoding). `classes` has the best
    five, without `xyxy`.
    """
    height, width = detections.image_size
    record = {"image": str(path), "width": int(width), "height": int(height)}
    if isinstance(detections, Classification):
        return {**record, "classes": [_json_class(*best) for best in detections.top()]}
    return {**record, "detections": [_json_detection(detections, index) for index in range(len(detections))]}


def _json_class(class_id: int, name: str, confidence: float) -> dict[str, Any]:
    """What all entries have."""
    return {"class_id": class_id, "name": name, "confidence": round(confidence, _CONFIDENCE_DECIMALS)}


def _json_detection(detections: Detections, index: int) -> dict[str, Any]:
    """One detection's entry."""
    class_id = int(detections.class_id[index])
    entry = _json_class(class_id, detections.class_names[class_id], float(detections.confidence[index]))
    entry["xyxy"] = [round(float(value), _PIXEL_DECIMALS) for value in detections.xyxy[index]]
    if detections.masks is not None:
        entry["segmentation"] = detections.masks.rle(index)
    return entry


def frame_record(frame: Frame, detections: Detections | Classification) -> dict[str, Any]:
    """One frame's entry in the JSON file: that of `json_record`; in a clip also `frame`, from 0, and `time_s`."""
    record = json_record(frame.path, detections)
    if frame.clip is None:
        return record
    moment = {"frame": frame.index, "time_s": round(frame.time_s, _TIME_DECIMALS)}
    return {"image": frame.clip.source, **moment, **{key: value for key, value in record.items() if key != "image"}}


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
