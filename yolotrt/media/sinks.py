"""Where results go: annotated pictures and videos, labels and crops in a folder; JSON, JSON Lines and CSV files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from yolotrt.detections import Classification
from yolotrt.errors import InputError, OutputError
from yolotrt.files import atomic_write, atomic_write_text
from yolotrt.media.frames import Clip, Found
from yolotrt.media.images import WRITABLE_SUFFIXES, write_image
from yolotrt.media.results import frame_record, yolo_txt
from yolotrt.media.video_writer import VIDEO_SUFFIX, VideoWriter

LABELS_FOLDER = "labels"
CROPS_FOLDER = "crops"
FALLBACK_SUFFIX = ".jpg"
CSV_COLUMNS = ("image", "frame", "time_s", "class_id", "name", "confidence", "x1", "y1", "x2", "y2")


class Sink(Protocol):
    """Takes results one after the other."""

    def write(self, found: Found) -> None:
        """Take the result of one picture or frame.

        Raises:
            OutputError: if it cannot be written.
        """

    def close(self) -> None:
        """Finish; what was written is whole afterwards.

        Raises:
            OutputError: if the rest cannot be written.
        """


class PictureSink:
    """Annotated pictures ``NAME.EXT`` and videos ``NAME.mp4`` in a folder.

    A picture whose format cannot hold the result (``.pgm``, ``.jp2``, an unknown one) becomes ``.jpg``.

    Args:
        folder: Where to write; made with the first file.
        names: Gives the names.
    """

    def __init__(self, folder: Path, names: ResultNames) -> None:
        self._folder = folder
        self._names = names
        self._videos: dict[Clip, VideoWriter] = {}

    def write(self, found: Found) -> None:
        """See `Sink.write`; a file that would replace its source is refused."""
        frame = found.frame
        drawn = frame.pixels if found.drawn is None else found.drawn
        if frame.clip is None:
            write_image(self._target(found, _output_suffix(frame.path)), drawn)
            return
        if frame.clip not in self._videos:
            self._close_files()
            self._videos[frame.clip] = VideoWriter(self._target(found, VIDEO_SUFFIX), frame.clip)
        self._videos[frame.clip].write(frame, drawn)

    def close(self) -> None:
        """See `Sink.close`."""
        with contextlib.ExitStack() as stack:
            for video in self._videos.values():
                stack.callback(video.close)
            self._videos = {}

    def _close_files(self) -> None:
        """Finish the video before; those of live sources go on beside each other."""
        for clip in [clip for clip in self._videos if not clip.is_live]:
            self._videos.pop(clip).close()

    def _target(self, found: Found, suffix: str) -> Path:
        target = self._folder / f"{self._names.stem(found)}{suffix}"
        if _is_same_file(target, found.frame.path):
            what = "picture" if found.frame.clip is None else "video"
            raise OutputError(f"cannot write {target}: it is the source {what}: choose another output folder")
        return target


class LabelSink:
    """YOLO label files ``labels/NAME.txt``, of a video one a frame, ``labels/NAME_FRAME.txt``, from frame 0.

    As in YOLOv5, a picture without detections gets no label file; one of an earlier run is removed.

    Args:
        folder: Holds the folder ``labels``.
        names: Gives the names.
        with_confidence: Whether there is a sixth column.
    """

    def __init__(self, folder: Path, names: ResultNames, *, with_confidence: bool) -> None:
        self._folder = folder / LABELS_FOLDER
        self._names = names
        self._with_confidence = with_confidence

    def write(self, found: Found) -> None:
        """See `Sink.write`."""
        target = self._folder / f"{self._names.frame_stem(found)}.txt"
        text = yolo_txt(found.detections, with_confidence=self._with_confidence)
        if text:
            atomic_write_text(target, text)
            return
        try:
            target.unlink(missing_ok=True)
        except OSError as problem:
            raise OutputError(f"cannot remove the old labels {target}: {problem.strerror or problem}") from problem

    def close(self) -> None:
        """Each file is finished already."""


class CropSink:
    """What is inside each box: ``crops/CLASS/NAME_NUMBER.jpg``, of a video ``crops/CLASS/NAME_FRAME_NUMBER.jpg``.

    Numbers are those of the detections, from 0, best first.

    Args:
        folder: Holds the folder ``crops``.
        names: Gives the names.
    """

    def __init__(self, folder: Path, names: ResultNames) -> None:
        self._folder = folder / CROPS_FOLDER
        self._names = names

    def write(self, found: Found) -> None:
        """See `Sink.write`."""
        if isinstance(found.detections, Classification):
            raise InputError("a classifier finds no boxes to cut out: leave out --save-crops")
        pixels = found.frame.pixels
        height, width = pixels.shape[:2]
        stem = self._names.frame_stem(found)
        for number, (box, _, _, name) in enumerate(found.detections):
            left, top = np.clip(np.floor(box[:2]).astype(int), 0, (width, height))
            right, bottom = np.clip(np.ceil(box[2:]).astype(int), 0, (width, height))
            if right > left and bottom > top:
                write_image(self._folder / _folder_name(name) / f"{stem}_{number}.jpg", pixels[top:bottom, left:right])

    def close(self) -> None:
        """Each file is finished already."""


class JsonFile:
    """All results as one JSON array, one picture or frame a line; it appears, whole, at the end of the run.

    The text is ASCII (other characters are escaped), so that any file name can be written and any reader copes. Results
    go to the disk as they come, so memory stays flat.

    Args:
        path: The file.

    Raises:
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(atomic_write(path))
        self._count = 0

    def write(self, found: Found) -> None:
        """See `Sink.write`."""
        # JSON has no NaN: better a ValueError here than a file that strict readers refuse.
        line = json.dumps(frame_record(found.frame, found.detections), allow_nan=False)
        self._append((",\n" if self._count else "[\n") + line)
        self._count += 1

    def close(self) -> None:
        """See `Sink.close`."""
        self._append("\n]\n" if self._count else "[]\n")
        self._stack.close()

    def _append(self, text: str) -> None:
        try:
            self._file.write(text.encode())
        except OSError as problem:
            self._stack.__exit__(OSError, problem, problem.__traceback__)  # removes the file and explains


class LineFile:
    """A file that grows by whole lines while the run goes on: a kill leaves all lines before it.

    Args:
        path: The file; an older one is replaced with the first line, which `header` may be.
        header: The first line, or an empty text.

    Raises:
        OutputError: if the file cannot be opened.
    """

    def __init__(self, path: Path, header: str = "") -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as problem:
            raise self._failure(problem) from problem
        self._append(header)

    def close(self) -> None:
        """See `Sink.close`."""
        try:
            os.fsync(self._descriptor)
        except OSError as problem:
            raise self._failure(problem) from problem
        finally:
            os.close(self._descriptor)

    def _append(self, text: str) -> None:
        """Write whole lines, or nothing if there is no room."""
        data = memoryview(text.encode())
        try:
            whole = os.fstat(self._descriptor).st_size
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except OSError:
                    os.ftruncate(self._descriptor, whole)
                    raise
        except OSError as problem:
            raise self._failure(problem) from problem

    def _failure(self, problem: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._path}: {problem.strerror or problem}: choose a writable place with free space"
        )


class JsonLinesFile(LineFile):
    """JSON Lines: one picture or frame a line, in the form of `JsonFile`, written at once."""

    def write(self, found: Found) -> None:
        """See `Sink.write`."""
        self._append(json.dumps(frame_record(found.frame, found.detections), allow_nan=False) + "\n")


_NO_BOX = ("",) * 4


class CsvFile(LineFile):
    """CSV (RFC 4180) with a header: one detection a line, written at once. Pictures have no `frame` and `time_s`.

    A classification has a line for each of its best classes, without a box.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _csv_text([CSV_COLUMNS]))

    def write(self, found: Found) -> None:
        """See `Sink.write`."""
        record = frame_record(found.frame, found.detections)
        place = [record["image"], record.get("frame", ""), record.get("time_s", "")]
        self._append(
            _csv_text(
                [*place, item["class_id"], item["name"], item["confidence"], *item.get("xyxy", _NO_BOX)]
                for item in record.get("detections") or record.get("classes", ())
            )
        )


class ResultNames:
    """Names of results: those of their sources, each used once.

    If a name was already used in this run, for a picture of another folder or of another format, ``_2``, ``_3``, ... is
    added to it, in the order of asking. All results of one picture or clip share their name.
    """

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._of_clip: dict[Clip, str] = {}
        self._latest: tuple[object, str] | None = None

    def stem(self, found: Found) -> str:
        """The name of a picture's or a clip's results."""
        frame = found.frame
        if frame.clip is not None:
            if frame.clip not in self._of_clip:
                name = frame.path.name if frame.clip.is_live else frame.path.stem
                self._of_clip[frame.clip] = self._free(name)
            return self._of_clip[frame.clip]
        if self._latest is None or self._latest[0] is not frame:
            self._latest = frame, self._free(frame.path.stem)
        return self._latest[1]

    def frame_stem(self, found: Found) -> str:
        """The name of one frame's own results."""
        stem = self.stem(found)
        return stem if found.frame.clip is None else f"{stem}_{found.frame.index}"

    def _free(self, stem: str) -> str:
        """The stem, with a number if it was used before; upper and lower case are one name on some file systems."""
        name, number = stem, 1
        while name.casefold() in self._used:
            number += 1
            name = f"{stem}_{number}"
        self._used.add(name.casefold())
        return name


def _csv_text(rows: Any) -> str:
    """Rows as lines; a file name that is no text is escaped, as any reader needs UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode()


def _folder_name(name: str) -> str:
    """A class name as the name of one folder."""
    return re.sub(r"[^\w .-]", "_", name).strip(" .")[:100] or "_"


def _output_suffix(path: Path) -> str:
    """The source's suffix if a colour picture can be written so, else JPEG's."""
    return path.suffix if path.suffix.lower() in WRITABLE_SUFFIXES else FALLBACK_SUFFIX


def _is_same_file(target: Path, source: Path) -> bool:
    """Whether writing `target` would replace `source`."""
    try:
        return target.samefile(source)
    except OSError:  # one of them does not exist
        return False
