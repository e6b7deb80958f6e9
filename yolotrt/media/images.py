"""Pictures from and to files: every decoded picture is BGR uint8, upright, whole, or refused by name."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from yolotrt.errors import ImageError, OutputError
from yolotrt.files import atomic_write, require_file

WRITABLE_SUFFIXES = (".bmp", ".dib", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name endings of the formats that hold any BGR picture. PGM drops the colour and JPEG 2000 refuses small ones."""

JPEG_QUALITY = 95
MAX_FILE_BYTES = 2**31 - 1
"""OpenCV's arrays, and so its decode buffers, are measured in 32-bit signed integers."""

_ENCODE_OPTIONS = (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY, cv2.IMWRITE_WEBP_QUALITY, JPEG_QUALITY)

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JPEG_START_OF_SCAN = 0xDA
# A marker is 0xFF, fill bytes 0xFF, then its code (ITU-T T.81, B.1.1.2); 00, 01 and D0..D8 begin no segment.
_JPEG_SEGMENT = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_OVERHEAD = 12  # length, type and CRC, 4 bytes each


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read a picture, turned upright as its EXIF orientation says.

    Grey becomes three equal channels, alpha is dropped (not blended), CMYK and palettes become BGR, and 16-bit samples
    are scaled to 8 bit (PNG, PPM and JPEG 2000 keep the high byte, TIFF rounds). An animation gives its first frame.

    Args:
        path: A file in any format that this OpenCV reads; the content decides, not the suffix.

    Returns:
        uint8 (H, W, 3), BGR, contiguous.

    Raises:
        ImageError: if the file is missing, a directory, empty, cut off, damaged, no picture, or declares more pixels
            than OpenCV's limit (2**30 unless OPENCV_IO_MAX_IMAGE_PIXELS says otherwise).
    """
    return decode_image(_read_bytes(path), path)


def decode_image(data: bytes, name: Path | str) -> npt.NDArray[np.uint8]:
    """Decode a picture's file content; see `read_image`.

    Args:
        data: The whole file.
        name: What messages call it.

    Raises:
        ImageError: if it is empty, cut off, damaged, no picture, or declares too many pixels.
    """
    if not data:
        raise ImageError(f"picture {name} is empty: make or download it again")
    if _is_cut_off(data):
        raise ImageError(f"picture {name} is truncated, its end is missing: copy or download it again")
    try:
        with opencv_quiet():
            image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except (cv2.error, MemoryError) as problem:
        raise ImageError(_decode_failure(name, problem)) from problem
    if image is None:
        raise ImageError(
            f"picture {name} cannot be decoded, it is damaged or in no format that OpenCV reads: "
            "save it again as JPEG or PNG"
        )
    return np.ascontiguousarray(image, dtype=np.uint8)


def write_image(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write a picture atomically, in the format that the suffix names. JPEG and WebP get quality 95.

    Args:
        path: Target with one of `WRITABLE_SUFFIXES`, in any case. Missing folders are created.
        image: uint8 (H, W, 3), BGR, or (H, W), grey.

    Raises:
        OutputError: if the suffix is not supported, the format cannot hold the picture, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITABLE_SUFFIXES:
        raise OutputError(f"cannot write picture {path}: name it with one of {' '.join(WRITABLE_SUFFIXES)}")
    try:
        with opencv_quiet():
            encoded, data = cv2.imencode(suffix, image, _ENCODE_OPTIONS)
    except cv2.error as problem:  # OpenCV 4 raises where OpenCV 5 returns False
        raise OutputError(_encode_failure(path, image)) from problem
    if not encoded:
        raise OutputError(_encode_failure(path, image))
    with atomic_write(path) as file:
        file.write(data.tobytes())


def _read_bytes(path: Path) -> bytes:
    """The file's content, if it is a regular file of a sensible size."""
    require_file(path, "picture", ImageError)
    try:
        if not path.is_file():  # a device such as /dev/zero has no end
            raise ImageError(f"picture {path} is not a regular file: copy the picture to one")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(f"picture {path} has more than {MAX_FILE_BYTES} bytes: scale it down")
        return path.read_bytes()
    except OSError as problem:
        raise ImageError(
            f"picture {path} cannot be read ({problem.strerror or problem}): check the disk or copy it again"
        ) from problem


def _is_cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end; OpenCV 4 fills the rest of such a JPEG with grey and says nothing."""
    if data.startswith(_JPEG_START):
        return not _jpeg_has_end(data)
    if data.startswith(_PNG_START):
        return not _png_has_end(data)
    return False


def _jpeg_has_end(data: bytes) -> bool:
    """Whether an end-of-image marker follows the start of the first scan.

    The segments before it are skipped by their length, so that the end of an EXIF thumbnail does not count. In a scan
    0xFF is always stuffed (T.81, B.1.1.5), so the marker's two bytes are the marker.
    """
    position = 2
    while marker := _JPEG_SEGMENT.search(data, position):
        if marker[1][0] == _JPEG_START_OF_SCAN:
            return data.rfind(_JPEG_END, marker.end()) >= 0
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return False


def _png_has_end(data: bytes) -> bool:
    """Whether the chain of chunks arrives at IEND."""
    position = len(_PNG_START)
    while position + _PNG_CHUNK_OVERHEAD <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += int.from_bytes(data[position : position + 4], "big") + _PNG_CHUNK_OVERHEAD
    return False


def _decode_failure(name: Path | str, problem: BaseException) -> str:
    """The line for a decoder that raised."""
    text = str(problem)
    if "CV_IO_MAX_IMAGE" in text:
        return f"picture {name} declares more pixels than OpenCV's limit: scale it down"
    if isinstance(problem, MemoryError) or getattr(problem, "code", 0) == cv2.Error.StsNoMem:
        return f"picture {name} does not fit into memory: scale it down"
    return f"picture {name} is damaged: save it again as JPEG or PNG"


def _encode_failure(path: Path, image: npt.NDArray[np.uint8]) -> str:
    """The line for an encoder that refused; the formats' own limits are 65500 (JPEG) and 16383 (WebP) pixels a side."""
    height, width = (*image.shape, 0, 0)[:2]
    return f"cannot write picture {path}: {path.suffix} cannot hold {width}x{height} pixels: choose .png"


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_saved_level = 0


@contextlib.contextmanager
def opencv_quiet() -> Iterator[None]:
    """Keep OpenCV's own log off stderr. Its level is one per process, so the last thread out restores it.

    Lines that libpng and libjpeg print themselves remain.
    """
    global _quiet_depth, _quiet_saved_level  # noqa: PLW0603 - mirrors OpenCV's process-wide level
    log: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has the functions at the top level
    if not hasattr(log, "setLogLevel"):
        yield
        return
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_saved_level = log.setLogLevel(0)  # LOG_LEVEL_SILENT; returns the level before
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                log.setLogLevel(_quiet_saved_level)
