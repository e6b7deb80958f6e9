"""What a run leaves on the disk: annotated pictures, YOLO label files and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.detections import Detections
from yolotrt.errors import OutputError
from yolotrt.files import atomic_write_text
from yolotrt.media.drawing import draw
from yolotrt.media.images import WRITABLE_SUFFIXES, write_image

LABELS_FOLDER = "labels"
FALLBACK_SUFFIX = ".jpg"
_CONFIDENCE_DECIMALS = 5
_PIXEL_DECIMALS = 2


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


def write_json(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write the records of `json_record` as a JSON array, one picture a line, atomically.

    The text is ASCII (other characters are escaped), so that any file name can be written and any reader copes.

    Raises:
        OutputError: if the file cannot be written.
    """
    # JSON has no NaN: better a ValueError here than a file that strict readers refuse.
    lines = [json.dumps(record, allow_nan=False) for record in records]
    atomic_write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


class ImageSink:
    """Writes each picture's results into a folder: ``NAME.EXT`` with boxes, and ``labels/NAME.txt``.

    A picture whose format cannot hold the result (``.pgm``, ``.jp2``, an unknown one) becomes ``.jpg``. If a name was
    already used in this run, for a picture of another folder or of another format, ``_2``, ``_3``, ... is added to it,
    in the order of writing, so a picture and its label file always share their name. As in YOLOv5, a picture without
    detections gets no label file.

    Args:
        folder: Where to write; made with the first file. See `next_run_folder`.
        save_images: Whether to write annotated pictures.
        save_txt: Whether to write label files.
        with_confidence: Whether label files have the confidence as a sixth column.
    """

    def __init__(self, folder: Path, *, save_images: bool, save_txt: bool, with_confidence: bool) -> None:
        self.folder = folder
        self._save_images = save_images
        self._save_txt = save_txt
        self._with_confidence = with_confidence
        self._used_names: set[str] = set()

    def write(self, path: Path, image: npt.NDArray[np.uint8], detections: Detections) -> None:
        """Write the results of one picture.

        Args:
            path: The source; gives the name. It is never written to.
            image: uint8 (H, W, 3), BGR, without boxes.
            detections: What was found in it.

        Raises:
            OutputError: if a file cannot be written, or the annotated picture would replace its source.
        """
        name = self._free_name(path.stem)
        if self._save_images:
            target = self.folder / f"{name}{_output_suffix(path)}"
            if _is_same_file(target, path):
                raise OutputError(f"cannot write {target}: it is the source picture: choose another output folder")
            write_image(target, draw(image, detections))
        if self._save_txt:
            self._write_labels(self.folder / LABELS_FOLDER / f"{name}.txt", detections)

    def _write_labels(self, target: Path, detections: Detections) -> None:
        """Write a label file, or remove that of an earlier run if nothing was found this time."""
        if len(detections):
            atomic_write_text(target, yolo_txt(detections, with_confidence=self._with_confidence))
            return
        try:
            target.unlink(missing_ok=True)
        except OSError as problem:
            raise OutputError(f"cannot remove the old labels {target}: {problem.strerror or problem}") from problem

    def _free_name(self, stem: str) -> str:
        """The stem, with a number if it was used before; upper and lower case are one name on some file systems."""
        name, number = stem, 1
        while name.casefold() in self._used_names:
            number += 1
            name = f"{stem}_{number}"
        self._used_names.add(name.casefold())
        return name


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


def _output_suffix(path: Path) -> str:
    """The source's suffix if a colour picture can be written so, else JPEG's."""
    return path.suffix if path.suffix.lower() in WRITABLE_SUFFIXES else FALLBACK_SUFFIX


def _is_same_file(target: Path, source: Path) -> bool:
    """Whether writing `target` would replace `source`."""
    try:
        return target.samefile(source)
    except OSError:  # one of them does not exist
        return False
