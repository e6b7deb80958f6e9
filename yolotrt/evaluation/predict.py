"""An engine's boxes in every picture of a dataset, by YOLOv5's protocol of evaluation."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.base import Session, Timing
from yolotrt.errors import ImageError, InputError
from yolotrt.evaluation.dataset import Dataset, Labels, Picture, Problem
from yolotrt.postprocess import Boxes, NmsOptions

Image = npt.NDArray[np.uint8]
ImageReader = Callable[[Path], Image]

PROTOCOL = NmsOptions(confidence=0.001, iou=0.6, max_detections=300, multi_label=True)
"""YOLOv5 val.py's own. Pictures are letterboxed to the engine's size, as every use of the engine does it."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One picture with what is in it and what was found.

    Attributes:
        picture: The picture.
        labels: Its labels in pixels.
        boxes: What the engine found, in pixels of the picture, best first.
    """

    picture: Picture
    labels: Labels
    boxes: Boxes


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an engine found in a dataset.

    Attributes:
        pictures: Every picture that can be read.
        timing: Where the session's time went.
    """

    pictures: tuple[Measured, ...]
    timing: Timing


def predict(session: Session, dataset: Dataset, options: NmsOptions = PROTOCOL) -> Predictions:
    """Detect in all pictures of a dataset, in batches as large as the engine takes.

    Args:
        session: An engine's session.
        dataset: The pictures. Those that cannot be read are added to its problems and left out.
        options: Thresholds.

    Raises:
        InputError: if no picture can be read.
        InferenceError: if the device failed.
    """
    from tqdm import tqdm

    from yolotrt.media.images import read_image

    measured: list[Measured] = []
    reader = _Reader(dataset, read_image)
    session.warm_up(options)
    with tqdm(total=len(dataset.pictures), unit="image", disable=None, file=sys.stderr, leave=False) as progress:
        size = session.header.max_batch
        for start in range(0, len(dataset.pictures), size):
            batch = dataset.pictures[start : start + size]
            measured.extend(_measure(session, list(reader.read(batch)), dataset, options))
            progress.update(len(batch))
    if not measured:
        raise InputError(f"no picture of dataset {dataset.name} can be read: check its paths, or give --images")
    return Predictions(tuple(measured), session.timing)


def _measure(
    session: Session, batch: Sequence[tuple[Picture, Image]], dataset: Dataset, options: NmsOptions
) -> Iterator[Measured]:
    """Detect in one batch."""
    from yolotrt.preprocess import Letterbox

    if not batch:
        return
    found = session.detect([image for _, image in batch], options)
    for (picture, image), boxes in zip(batch, found, strict=True):
        size = (image.shape[0], image.shape[1])
        in_picture = Letterbox.fit(size, session.header.imgsz).inverse(boxes.xyxy)
        labels = picture.labels_in(size, dataset.problems)
        yield Measured(picture, labels, Boxes(in_picture, boxes.confidence, boxes.class_id))


class _Reader:
    """Reads pictures and notes those that cannot be read or are there twice."""

    def __init__(self, dataset: Dataset, read_image: ImageReader) -> None:
        self._problems = dataset.problems
        self._read_image = read_image
        self._first_of: dict[bytes, str] = {}

    def read(self, pictures: Sequence[Picture]) -> Iterator[tuple[Picture, Image]]:
        """The pictures that can be read."""
        for picture in pictures:
            try:
                image = self._read_image(picture.path)
            except ImageError as error:
                self._problems.add(Problem.UNREADABLE, str(error))
                continue
            self._note(picture, image)
            yield picture, image

    def _note(self, picture: Picture, image: Image) -> None:
        """Compare a picture with the others and with its labels' idea of it."""
        height, width = image.shape[:2]
        if picture.size not in {None, (height, width)}:
            self._problems.add(Problem.OTHER_SIZE, f"{picture.path.name} ({width}x{height})")
        first = self._first_of.setdefault(_digest(image), picture.path.name)
        if first != picture.path.name:
            self._problems.add(Problem.TWICE_CONTENT, f"{picture.path.name} (as {first})")


def _digest(image: Any) -> bytes:
    """A short name for a picture's content."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
