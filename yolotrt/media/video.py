"""Video files: every frame upright, at its own time, in BGR as OpenCV gives it."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from yolotrt.errors import BackendUnavailableError, VideoError
from yolotrt.files import require_file
from yolotrt.media.frames import Allocate, Clip, ColorTags, Frame, Image, Span
from yolotrt.media.sources import is_url, public_name, source_name

log = logging.getLogger(__name__)

INSTALL_PYAV = 'run pip install "yolotrtx[video]"'
DEFAULT_RATE = Fraction(30)
"""Where a source declares no rate, or one that no camera has."""
MAX_RATE = 1000
_MISSING_S = 0.5
"""A file is cut off if its frames end this long before its declared end; less is the rounding of containers."""
_READ_TIMEOUT_S = 15.0
_ROTATIONS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_CLOCKWISE}
"""By the counterclockwise angle of the display matrix."""


def load_pyav() -> ModuleType:
    """The module av.

    Raises:
        BackendUnavailableError: if it is not installed.
    """
    try:
        import av
    except ImportError as problem:
        raise BackendUnavailableError(f"PyAV cannot be loaded ({problem}): {INSTALL_PYAV}") from problem
    return av


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    with contextlib.suppress(BackendUnavailableError):
        return bool(load_pyav())
    return False


def read_video(path: Path, allocate: Allocate, span: Span | None = None) -> Generator[Frame, None, None]:
    """Decode a video file, frame by frame.

    Frames have the file's own times. The display matrix (a phone held upright) is applied. BGR values are those of
    `cv2.VideoCapture`, byte for byte. PyAV decodes; without it OpenCV does, and a video that is cut off goes unnoticed.

    Args:
        path: The file, or an http(s) URL of one.
        allocate: Gives the memory of each frame.
        span: Which frames; None takes all.

    Yields:
        Frames in the order of display.

    Raises:
        VideoError: if the file is missing, empty, no video, in a codec that is not there, or ends before its declared
            end; in the last case after its frames.
    """
    if not is_url(path):
        require_file(path, "video", VideoError)
    if has_pyav():
        yield from _VideoFile(path).frames(allocate, span or Span())
    else:
        yield from _read_with_opencv(path, allocate, span or Span())


def count_frames(path: Path, span: Span) -> int | None:
    """About how many frames `read_video` will give, or None if that cannot be told without decoding."""
    if not has_pyav():
        return None
    try:
        with contextlib.closing(_VideoFile(path)) as video:
            return video.expected_frames(span)
    except VideoError:
        return None


def declared_duration_s(path: Path) -> float | None:
    """How long a video says that it is, in seconds, or None if that cannot be told without decoding."""
    if not has_pyav():
        return None
    try:
        with contextlib.closing(_VideoFile(path)) as video:
            return video.declared_duration_s()
    except VideoError:
        return None


@dataclass
class Damage:
    """What was wrong with a video while it was read."""

    packets: int = 0


class _VideoFile:
    """One video stream of a file, opened with PyAV."""

    def __init__(self, path: Path) -> None:
        self._av = load_pyav()
        self._path = path
        self._name = public_name(source_name(path))
        self._origin: int | None = None
        try:
            self._container = self._av.open(source_name(path), timeout=_READ_TIMEOUT_S)
        except (self._av.FFmpegError, OSError) as problem:
            remedy = ": check the address" if is_url(path) else ", it is damaged, cut off or no video: copy it again"
            raise VideoError(f"video {self._name} cannot be read ({reason(problem)}){remedy}") from problem
        try:
            self._stream = self._video_stream()
        except VideoError:
            self._container.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def expected_frames(self, span: Span) -> int | None:
        """Frames in the span, from the declared duration and rate."""
        if not self._stream.duration and not self._stream.frames:
            return None
        rate = declared_rate(self._stream)
        total: int = self._stream.frames or round(self._stream.duration * self._stream.time_base * rate)
        first = min(round(span.start_s * rate), total)
        last = total if span.end_s is None else min(round(span.end_s * rate), total)
        return math.ceil((last - first) / span.stride)

    def declared_duration_s(self) -> float | None:
        """Seconds from the first to the last frame, as the file declares them; None if it does not."""
        return float(self._stream.duration * self._stream.time_base) if self._stream.duration else None

    def frames(self, allocate: Allocate, span: Span) -> Generator[Frame, None, None]:
        """The frames of the span."""
        with contextlib.closing(self):
            damage = Damage()
            rate = declared_rate(self._stream)
            position, end_s = 0, 0.0
            clip: Clip | None = None
            for raw, pts in self._decoded(span, damage):
                clip = self._clip_of(raw, clip, span)
                time_s = float(pts * clip.time_base)
                end_s = time_s + float((raw.duration or 0) * clip.time_base or 1 / rate)
                if span.end_s is not None and time_s >= span.end_s:
                    return
                if time_s < span.start_s:
                    continue
                if position % span.stride == 0:
                    yield Frame(self._path, to_image(raw, allocate), clip, round(time_s * rate), pts)
                position += 1
            self._check_end(end_s, damage, span)

    def _video_stream(self) -> Any:
        """The first video stream, ready to decode."""
        streams = self._container.streams.video
        if not streams:
            raise VideoError(f"video {self._name} holds no moving pictures: name another file")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoError(
                f"video {self._name} is in a codec that this FFmpeg has no decoder for: "
                f"convert it, as with ffmpeg -i {self._path.name} -c:v libx264 new.mp4"
            )
        stream.thread_type = "AUTO"
        return stream

    def _decoded(self, span: Span, damage: Damage) -> Iterator[tuple[Any, int]]:
        """Decoded frames and their times from the source's first frame; damaged packets are passed over."""
        stream = self._stream
        if span.start_s > 0:
            self._seek(span.start_s)
        last = -1
        step = max(1, round(1 / (declared_rate(stream) * stream.time_base)))
        for packet in self._packets(damage):
            try:
                for raw in packet.decode():
                    if self._origin is None:
                        self._origin = raw.pts or 0
                    pts = last + step if raw.pts is None else raw.pts - self._origin
                    last = max(pts, last + 1)  # some files repeat times
                    yield raw, last
            except self._av.FFmpegError as problem:
                log.info("%s: a packet cannot be decoded: %s", self._name, reason(problem))
                damage.packets += 1

    def _seek(self, start_s: float) -> None:
        """Go to the key frame before a time, which counts from the first frame."""
        with contextlib.suppress(self._av.FFmpegError):  # what cannot seek is read from its beginning
            self._origin = next((raw.pts or 0 for raw in self._container.decode(self._stream)), 0)
            target = self._origin + int(start_s / self._stream.time_base)
            self._container.seek(target, stream=self._stream, backward=True)

    def _packets(self, damage: Damage) -> Iterator[Any]:
        """The stream's packets; one that cannot be read ends them."""
        try:
            yield from self._container.demux(self._stream)
        except (self._av.FFmpegError, OSError) as problem:
            log.info("%s: reading stopped: %s", self._name, reason(problem))
            damage.packets += 1

    def _clip_of(self, raw: Any, clip: Clip | None, span: Span) -> Clip:
        """The frame's clip: `clip`, unless the size has changed."""
        height, width = upright_size(raw)
        if clip is not None and (clip.height, clip.width) == (height, width):
            return clip
        context = self._stream.codec_context
        has_audio = clip is None and bool(self._container.streams.audio)
        return Clip(
            self._name,
            height,
            width,
            rate=declared_rate(self._stream) / span.stride,
            time_base=Fraction(self._stream.time_base),
            origin_s=float((self._origin or 0) * self._stream.time_base),
            audio=self._path if has_audio else None,
            colors=ColorTags(int(context.colorspace), int(context.color_primaries), int(context.color_trc)),
            sample_aspect_ratio=_upright_aspect(raw, context.sample_aspect_ratio),
            rotation=_angle(raw),
        )

    def _check_end(self, end_s: float, damage: Damage, span: Span) -> None:
        """Raise if the file ended too early.

        Raises:
            VideoError: if so, or if packets were damaged, or there was no frame at all.
        """
        if end_s == 0 and span.start_s == 0:
            raise VideoError(f"video {self._name} holds no frame that can be decoded: copy it again")
        if self._stream.duration is not None:
            declared_s = float(self._stream.duration * self._stream.time_base)
            if declared_s - max(end_s, span.start_s) > _MISSING_S and end_s > 0:
                raise VideoError(
                    f"video {self._name} is cut off, it ends at {end_s:.1f} of {declared_s:.1f} s: copy it again"
                )
        if damage.packets:
            raise VideoError(
                f"video {self._name} is damaged, {damage.packets} of its packets were left out: copy it again"
            )


def to_image(raw: Any, allocate: Allocate) -> Image:
    """A decoded frame of PyAV as an upright BGR picture, in allocated memory."""
    bgr = raw.reformat(format="bgr24")
    plane = bgr.planes[0]
    # rows are padded to whole cache lines                     # (height, line size) -> (height, width, 3)
    rows = np.frombuffer(plane, np.uint8, count=bgr.height * plane.line_size).reshape(bgr.height, plane.line_size)
    pixels = rows[:, : bgr.width * 3].reshape(bgr.height, bgr.width, 3)
    image = allocate(*upright_size(raw))
    turn = _ROTATIONS.get(_angle(raw))
    if turn is None:
        np.copyto(image, pixels)
    else:
        image[:] = cv2.rotate(np.ascontiguousarray(pixels), turn)
    return image


def upright_size(raw: Any) -> tuple[int, int]:
    """Height and width after the rotation."""
    return (raw.width, raw.height) if _angle(raw) in (90, 270) else (raw.height, raw.width)


def declared_rate(stream: Any) -> Fraction:
    """Frames a second of a PyAV stream."""
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and 0 < rate <= MAX_RATE:
            return Fraction(rate)
    return DEFAULT_RATE


def reason(problem: BaseException) -> str:
    """What FFmpeg or the system says, without its number and file name."""
    return str(getattr(problem, "strerror", None) or problem)


def _angle(raw: Any) -> int:
    """Degrees to turn the frame counterclockwise, a multiple of 90 in 0..270."""
    return int(round(raw.rotation / 90) * 90 % 360)


def _upright_aspect(raw: Any, aspect: Fraction | None) -> Fraction:
    """Width by height of a pixel of the turned frame."""
    if not aspect:
        return Fraction(1)
    return 1 / Fraction(aspect) if _angle(raw) in (90, 270) else Fraction(aspect)


def _read_with_opencv(path: Path, allocate: Allocate, span: Span) -> Iterator[Frame]:
    """Decode with OpenCV's own FFmpeg, which gives no sound, and times only by the rate."""
    name = public_name(source_name(path))
    capture = cv2.VideoCapture(source_name(path))
    try:
        if not capture.isOpened():
            raise VideoError(f"video {name} cannot be read by OpenCV: copy it again, or {INSTALL_PYAV}")
        rate = sensible_rate(capture.get(cv2.CAP_PROP_FPS))
        clip: Clip | None = None
        for index in range(2**63):
            if (span.end_s is not None and float(index / rate) >= span.end_s) or not capture.grab():
                break
            skipped = index - math.ceil(span.start_s * rate)
            if skipped < 0 or skipped % span.stride:
                continue
            image = capture.retrieve()[1]
            height, width = image.shape[:2]
            if clip is None or (clip.height, clip.width) != (height, width):
                clip = Clip(name, height, width, rate / span.stride, time_base=1 / rate)
            buffer = allocate(height, width)
            np.copyto(buffer, image)
            yield Frame(path, buffer, clip, index, index)
        if clip is None and span.start_s == 0:
            raise VideoError(f"video {name} holds no frame that OpenCV can decode: copy it again, or {INSTALL_PYAV}")
    finally:
        capture.release()


def sensible_rate(rate: float) -> Fraction:
    """A rate that OpenCV gives as a number, as a fraction; NTSC's 29.97 becomes 30000/1001."""
    if not 0 < rate <= MAX_RATE:
        return DEFAULT_RATE
    return Fraction(rate).limit_denominator(1001)
