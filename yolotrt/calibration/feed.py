"""Calibration pictures: found, read and letterboxed exactly as for inference."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolotrt.errors import ImageError, InputError
from yolotrt.media.images import read_image
from yolotrt.media.sources import expand_sources, is_url, is_video
from yolotrt.preprocess import Letterbox

_log = logging.getLogger(__name__)

MIN_PICTURES = 16
"""Fewer do not show what values a network takes."""

DEFAULT_FOLDER = Path("calib_images")


@dataclass(frozen=True)
class PictureFeed:
    """Pictures as the network's input.

    Attributes:
        paths: The files.
        imgsz: Network input height and width in pixels.
    """

    paths: tuple[Path, ...]
    imgsz: tuple[int, int]

    @classmethod
    def find(cls, source: Path | None, imgsz: tuple[int, int]) -> PictureFeed:
        """Find the pictures.

        Args:
            source: A folder, glob or .txt list; None takes ``calib_images`` in the current folder.
            imgsz: Network input height and width in pixels.

        Raises:
            InputError: if there are none, or fewer than `MIN_PICTURES`; it names the option ``--calib``.
        """
        if source is None and not DEFAULT_FOLDER.is_dir():
            raise InputError(
                f"INT8 needs pictures to calibrate with, and there is no folder {DEFAULT_FOLDER} here: "
                "name yours with --calib"
            )
        try:
            found = expand_sources([source or DEFAULT_FOLDER])
        except InputError as problem:
            origin = "without --calib" if source is None else "--calib"
            raise InputError(f"{origin}: {problem}") from problem
        paths = tuple(path for path in found if isinstance(path, Path) and not is_url(path) and not is_video(path))
        if len(paths) < len(found):
            _log.warning("left out of the calibration: %d of %d are no pictures", len(found) - len(paths), len(found))
        _require_enough(len(paths), len(paths))
        return cls(paths, imgsz)

    def batches(self) -> Iterator[npt.NDArray[np.float32]]:
        """Read and letterbox one picture after the other; one that cannot be read is named and left out.

        Yields:
            float32 (1, 3, height, width), RGB in 0..1, the same array each time.

        Raises:
            InputError: at the end, if fewer than `MIN_PICTURES` could be read.
        """
        count = 0
        for picture in self.readable():
            count += 1
            yield picture
        _require_enough(count, len(self.paths))

    def readable(self) -> Iterator[npt.NDArray[np.float32]]:
        """As `batches`, however few they are."""
        out = np.zeros((1, 3, *self.imgsz), np.float32)
        for path in self.paths:
            try:
                image = read_image(path)
            except ImageError as problem:
                _log.warning("left out of the calibration: %s", problem)
                continue
            Letterbox.fit((image.shape[0], image.shape[1]), self.imgsz).to_input(image, out[0])
            yield out

    def checksum(self) -> str:
        """SHA-256 over the contents of all files, in whatever order and under whatever names they lie."""
        digests = []
        for path in self.paths:
            try:
                digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError:  # it is named when it is read
                digests.append("unreadable")
        return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _require_enough(count: int, found: int) -> None:
    """Raise InputError if there are too few pictures to calibrate with."""
    if count < MIN_PICTURES:
        number = f"{count}" if count == found else f"{count} of {found}"
        pictures = "picture" if found == 1 else "pictures"
        raise InputError(
            f"{number} calibration {pictures} can be read, at least {MIN_PICTURES} are needed: "
            "give more with --calib; 64 to 500 that look like those of later use are best"
        )
