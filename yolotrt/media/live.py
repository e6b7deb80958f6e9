"""Cameras and streams: the newest frame wins, what nobody took in time is dropped and counted."""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from yolotrt.errors import VideoError
from yolotrt.media.frames import LIVE_TIME_BASE, RECONNECT_S, Allocate, Clip, Frame, Image, Span, host_memory
from yolotrt.media.images import opencv_quiet
from yolotrt.media.sources import public_name
from yolotrt.media.video import (
    DEFAULT_RATE,
    declared_rate,
    has_pyav,
    load_pyav,
    read_video,
    reason,
    sensible_rate,
    to_image,
)
from yolotrt.shell import THREAD_PREFIX

log = logging.getLogger(__name__)

_OPEN_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 5.0
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 15.0
_WAKE_S = 0.1
"""How often a waiting reader looks whether the run ends."""
_JOIN_S = 1.0

CONNECTING, LIVE, LOST, ENDED = "connecting", "live", "lost", "ended"
"""States of a source."""

Take = Callable[[Allocate], Image]
"""Gives a frame's picture in allocated memory. Frames that are dropped are never converted."""


class Reader(abc.ABC):
    """An open camera or stream.

    Attributes:
        rate: Frames a second, as declared.
    """

    rate: Fraction

    @abc.abstractmethod
    def frames(self) -> Iterator[Take]:
        """Frames as they come in, until the source ends.

        Raises:
            VideoError: if it fails.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release it."""


class StreamReader(Reader):
    """A network stream, read by PyAV; RTSP over TCP, so that no packet is lost on the way."""

    def __init__(self, url: str) -> None:
        self._av = load_pyav()
        options = {"fflags": "nobuffer", "flags": "low_delay"}
        if url.lower().startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        try:
            self._container = self._av.open(url, options=options, timeout=(_OPEN_TIMEOUT_S, _READ_TIMEOUT_S))
        except (self._av.FFmpegError, OSError) as problem:
            raise VideoError(
                f"stream {public_name(url)} cannot be opened ({reason(problem)}): check the address and its sender"
            ) from problem
        if not self._container.streams.video or self._container.streams.video[0].codec_context is None:
            self._container.close()
            raise VideoError(f"stream {public_name(url)} has no pictures that can be decoded: check its sender")
        self._url = url
        self._stream = self._container.streams.video[0]
        self.rate = declared_rate(self._stream)

    def frames(self) -> Iterator[Take]:
        """See `Reader.frames`."""
        try:
            for packet in self._container.demux(self._stream):
                with contextlib.suppress(self._av.error.InvalidDataError):  # the first ones may lack their key frame
                    for raw in packet.decode():
                        yield lambda allocate, raw=raw: to_image(raw, allocate)  # type: ignore[misc]
        except (self._av.FFmpegError, OSError) as problem:
            raise VideoError(
                f"stream {public_name(self._url)} was lost ({reason(problem)}): check its sender"
            ) from problem

    def close(self) -> None:
        """See `Reader.close`."""
        self._container.close()


class CameraReader(Reader):
    """A camera of this machine, or a stream where PyAV is missing, read by OpenCV."""

    def __init__(self, source: int | str) -> None:
        self._name = public_name(str(source))
        # of a device that is not there FFmpeg, inside OpenCV, would print a line of its own
        can_be_opened = not _is_device(source) or os.access(source, os.R_OK | os.W_OK)
        with opencv_quiet():
            self._capture = cv2.VideoCapture(source) if can_be_opened else cv2.VideoCapture()
        if not self._capture.isOpened():
            self._capture.release()
            raise VideoError(
                f"camera {self._name} cannot be opened: check that it is plugged in, that no other program uses it, "
                "and that you may read /dev/video*"
            )
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        self.rate = sensible_rate(self._capture.get(cv2.CAP_PROP_FPS))

    def frames(self) -> Iterator[Take]:
        """See `Reader.frames`."""
        while True:
            with opencv_quiet():
                is_there, image = self._capture.read()
            if not is_there:
                raise VideoError(f"camera {self._name} gives no more pictures: check its cable")
            yield lambda allocate, image=image: _copied(image, allocate)  # type: ignore[misc]

    def close(self) -> None:
        """See `Reader.close`."""
        self._capture.release()


class VirtualCamera(Reader):
    """A video file that plays at its own rate, as a camera would give it."""

    def __init__(self, path: Path) -> None:
        self._frames = read_video(path, host_memory)
        first = next(self._frames)
        self._first = first
        self.rate = DEFAULT_RATE if first.clip is None else first.clip.rate

    def frames(self) -> Iterator[Take]:
        """See `Reader.frames`."""
        began = time.monotonic() - self._first.time_s
        yield lambda allocate: _copied(self._first.image, allocate)
        for frame in self._frames:
            time.sleep(max(0.0, began + frame.time_s - time.monotonic()))
            yield lambda allocate, image=frame.image: _copied(image, allocate)  # type: ignore[misc]

    def close(self) -> None:
        """See `Reader.close`."""
        self._frames.close()


def open_reader(source: str) -> Reader:
    """Open a camera (an index or a device), a URL, or a video file that plays as a camera.

    Raises:
        VideoError: if it cannot be opened.
        BackendUnavailableError: if a library is missing.
    """
    if source.isdecimal():
        return CameraReader(int(source))
    if _is_device(source):
        return CameraReader(source)
    if "://" in source:
        return StreamReader(source) if has_pyav() else CameraReader(source)
    return VirtualCamera(Path(source))


def _is_device(source: int | str) -> bool:
    return isinstance(source, str) and source.startswith("/dev/")


def result_stem(source: str) -> str:
    """A file name for the results of a source: ``camera0``, or a URL's host and path."""
    if source.isdecimal():
        return f"camera{source}"
    if "://" not in source:
        return Path(source).stem
    parts = urlsplit(public_name(source))
    return re.sub(r"[^\w.-]+", "_", f"{parts.hostname or ''}{parts.path}").strip("_.")[:80] or "stream"


@dataclass(frozen=True)
class Status:
    """How one source is doing.

    Attributes:
        name: The source, without passwords.
        state: ``connecting``, ``live``, ``lost`` or ``ended``.
        received: Frames that came in.
        dropped: Frames of them that a newer one replaced before they were taken.
    """

    name: str
    state: str
    received: int
    dropped: int


class _Feed:
    """One source: a thread reads it and keeps its newest frame."""

    def __init__(self, source: str, changed: threading.Condition, reconnect_s: float) -> None:
        self.source = source
        self.state = CONNECTING
        self.received = 0
        self.dropped = 0
        self.error: VideoError | None = None
        self._changed = changed
        self._reconnect_s = reconnect_s
        self._newest: tuple[Take, int, float] | None = None
        self._rate = DEFAULT_RATE
        self._clip: Clip | None = None
        self._began: float | None = None
        self._last_pts = -1
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._work, name=f"{THREAD_PREFIX}-read-{result_stem(source)}", daemon=True
        )
        self._thread.start()

    @property
    def has_frame(self) -> bool:
        """Whether a frame that nobody took is there."""
        return self._newest is not None

    def take(self, allocate: Allocate) -> Frame:
        """The newest frame."""
        with self._changed:
            assert self._newest is not None
            (convert, index, arrived), self._newest = self._newest, None
        image = convert(allocate)
        height, width = image.shape[:2]
        if self._clip is None or (self._clip.height, self._clip.width) != (height, width):
            self._clip = Clip(
                public_name(self.source), height, width, self._rate, time_base=LIVE_TIME_BASE, is_live=True
            )
        if self._began is None:
            self._began = arrived
        # two frames of a burst may arrive in one millisecond
        self._last_pts = max(self._last_pts + 1, round((arrived - self._began) / LIVE_TIME_BASE))
        return Frame(Path(result_stem(self.source)), image, self._clip, index, self._last_pts)

    def close(self) -> None:
        """Stop reading. A thread that waits for the network ends with its time-out."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_JOIN_S)

    def _work(self) -> None:
        """Read, and open again what was lost, until closed."""
        delay, lost_at = _FIRST_DELAY_S, time.monotonic()
        while not self._is_closed:
            before = self.received
            error = self._read_once()
            if self.received > before:
                delay, lost_at = _FIRST_DELAY_S, time.monotonic()
            is_final = error is None or self.received == 0
            if self._is_closed or is_final or time.monotonic() - lost_at >= self._reconnect_s:
                self._finish(error)
                return
            self._set_state(LOST)
            log.warning("%s; trying again in %.3g s", error, delay)
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, delay)
            delay = min(2 * delay, _LONGEST_DELAY_S)

    def _read_once(self) -> VideoError | None:
        """Read until the source ends or fails; returns the failure, None for the end of a file."""
        try:
            with contextlib.closing(open_reader(self.source)) as reader:
                self._rate = reader.rate
                for take in reader.frames():
                    if self._is_closed:
                        return None
                    self._offer(take)
            if isinstance(reader, VirtualCamera):
                return None
            return VideoError(f"stream {public_name(self.source)} has ended: check its sender")
        except VideoError as error:
            return error
        except Exception as problem:  # noqa: BLE001 - a thread's failure has to reach the run
            return VideoError(f"{public_name(self.source)} cannot be read ({problem}): check it")

    def _offer(self, take: Take) -> None:
        """Put a frame where it can be taken, in place of an older one."""
        with self._changed:
            self.dropped += self._newest is not None
            self._newest = take, self.received, time.monotonic()
            self.received += 1
            self.state = LIVE
            self._changed.notify_all()

    def _finish(self, error: VideoError | None) -> None:
        with self._changed:
            self.error = None if self._is_closed else error
        self._set_state(ENDED)

    def _set_state(self, state: str) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()


class LiveSources:
    """Several cameras and streams read at once, each in a thread of its own.

    Args:
        sources: Camera indices, devices, URLs, or video files that play as cameras.
        reconnect_s: How long a lost source is tried again before it is given up, in seconds.
    """

    def __init__(self, sources: Sequence[str], *, reconnect_s: float = RECONNECT_S) -> None:
        self._changed = threading.Condition()
        self._sources = sources
        self._reconnect_s = reconnect_s
        self._feeds: list[_Feed] = []

    def read(
        self, allocate: Allocate, span: Span, is_ending: Callable[[], bool], on_error: Callable[[VideoError], None]
    ) -> Iterator[Frame]:
        """Yield the newest frame of each source in turn, as soon as there is one.

        Args:
            allocate: Gives the memory of each frame.
            span: `stride` takes every n-th frame that was not dropped, `end_s` ends a source that long after its first.
            is_ending: Looked at every 0.1 s; reading ends when it says so.
            on_error: Gets the failure of each source that is given up; the others go on.
        """
        self._feeds = [_Feed(source, self._changed, self._reconnect_s) for source in self._sources]
        taken = dict.fromkeys(range(len(self._feeds)), 0)
        open_feeds = dict(enumerate(self._feeds))
        try:
            while open_feeds and not is_ending():
                self._wait(open_feeds)
                for number, feed in list(open_feeds.items()):
                    if feed.has_frame:
                        frame = feed.take(allocate)
                        if span.end_s is not None and frame.time_s >= span.end_s:
                            del open_feeds[number]
                            continue
                        if taken[number] % span.stride == 0:
                            yield frame
                        taken[number] += 1
                    elif feed.state == ENDED:
                        del open_feeds[number]
                        if feed.error is not None:
                            on_error(feed.error)
        finally:
            for feed in self._feeds:
                feed.close()

    def statuses(self) -> list[Status]:
        """How the sources are doing, in their order."""
        return [Status(public_name(feed.source), feed.state, feed.received, feed.dropped) for feed in self._feeds]

    def _wait(self, feeds: dict[int, _Feed]) -> None:
        """Wait until a source has a frame or has ended, but not long."""
        with self._changed:
            self._changed.wait_for(
                lambda: any(feed.has_frame or feed.state == ENDED for feed in feeds.values()), _WAKE_S
            )


def _copied(image: Any, allocate: Allocate) -> Image:
    """The picture in allocated memory."""
    buffer = allocate(*image.shape[:2])
    np.copyto(buffer, image)
    return buffer
