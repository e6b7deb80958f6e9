"""H.264 in fragmented MP4: a browser plays it, and what a kill leaves behind is whole and plays as well."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.errors import BackendUnavailableError, OutputError
from yolotrt.media.frames import Clip, Frame, Image
from yolotrt.media.sources import source_name
from yolotrt.media.video import load_pyav, reason

log = logging.getLogger(__name__)

VIDEO_SUFFIX = ".mp4"
FRAGMENT_S = 1
"""Length of a fragment: a kill loses at most this and what the encoder holds back."""

_H264_ENCODERS = ("libx264", "libopenh264")
# veryfast takes a fifth of medium's time for about a tenth more bytes. Without B-frames times start at 0, which the
# header of a fragmented file, written before the first frame, could not correct.
_X264_OPTIONS = {"preset": "veryfast", "crf": "20", "bf": "0"}
_MP4_OPTIONS = {"movflags": "frag_keyframe+empty_moov+delay_moov+default_base_moof"}
_PLAYABLE_SOUND = ("aac", "mp3", "opus", "flac")
"""What browsers play inside MP4."""
_LIMITED_RANGE = 1
_BOX_HEADER = 8


class VideoWriter:
    """Writes the frames of one clip, at their own times, with the clip's sound.

    Frames have the source's size; one whose height or width is odd gets a row or column repeated, as H.264 with 4:2:0
    needs. Sound that browsers play in MP4 is copied, other sound becomes AAC.

    Args:
        path: The file, which ends with ``.mp4``. It exists once its first second is written.
        clip: What is written.

    Raises:
        BackendUnavailableError: if PyAV is not installed or has no H.264 encoder.
        OutputError: if the file cannot be written.
    """

    def __init__(self, path: Path, clip: Clip) -> None:
        self._av = load_pyav()
        self._path = path
        self._clip = clip
        self._first_pts: int | None = None
        self._file = WholeFragments(path)
        self._container = self._av.open(self._file, "w", format="mp4", options=_MP4_OPTIONS)
        self._stream = self._make_stream()
        self._audio = _Sound.open(self._av, clip, self._container) if clip.audio is not None else None

    def write(self, frame: Frame, drawn: Image) -> None:
        """Append a frame.

        Args:
            frame: Gives the time.
            drawn: uint8 (H, W, 3), BGR, of the clip's size.

        Raises:
            OutputError: if the disk is full or the encoder fails.
        """
        if self._first_pts is None:
            self._first_pts = frame.pts
        raw = self._av.VideoFrame.from_ndarray(_even(drawn), format="bgr24")
        raw.pts = frame.pts - self._first_pts
        raw.time_base = self._clip.time_base
        raw.duration = round(1 / (self._clip.rate * self._clip.time_base))
        try:
            self._mux(self._stream.encode(raw))
            if self._audio is not None:
                first_s = float(self._first_pts * self._clip.time_base)
                self._audio.copy(first_s, frame.time_s + float(1 / self._clip.rate), self._container)
        except (self._av.FFmpegError, OSError) as problem:
            raise self._failure(problem) from problem

    def close(self) -> None:
        """Finish the file. After a failure it ends with its last whole fragment.

        Raises:
            OutputError: if the rest cannot be written.
        """
        try:
            try:
                self._mux(self._stream.encode(None))
            finally:
                if self._audio is not None:
                    self._audio.close()
                self._container.close()
        except (self._av.FFmpegError, OSError) as problem:
            raise self._failure(problem) from problem
        finally:
            self._file.finish()

    def _make_stream(self) -> Any:
        """The video stream, encoded in the clip's time base."""
        available = [name for name in _H264_ENCODERS if name in self._av.codecs_available]
        if not available:
            raise BackendUnavailableError(
                "this PyAV has no H.264 encoder: run pip install --force-reinstall av, whose wheels have one, "
                "or use --no-save"
            )
        clip = self._clip
        stream = self._container.add_stream(available[0], rate=clip.rate)
        stream.width, stream.height = clip.width + clip.width % 2, clip.height + clip.height % 2
        stream.pix_fmt = "yuv420p"
        stream.time_base = clip.time_base
        context = stream.codec_context
        context.time_base = clip.time_base
        context.gop_size = max(1, round(clip.rate * FRAGMENT_S))
        context.sample_aspect_ratio = clip.sample_aspect_ratio
        # BGR was made with swscale's default matrix and goes back with it, so the YUV values mean what they meant
        context.colorspace = clip.colors.matrix
        context.color_primaries = clip.colors.primaries
        context.color_trc = clip.colors.transfer
        context.color_range = _LIMITED_RANGE
        if available[0] == "libx264":
            context.options = _X264_OPTIONS
        return stream

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._container.mux(packet)

    def _failure(self, problem: BaseException) -> OutputError:
        """The error of a write or encode call."""
        cause = self._file.error or problem
        return OutputError(
            f"cannot write {self._path}: {reason(cause)}: choose a writable place with free space; "
            "what was written before is whole"
        )


class WholeFragments(io.RawIOBase):
    """A file that takes an MP4 muxer's bytes and writes whole fragments only.

    Top-level boxes are collected until one ends that completes something: the header (``moov``) or a fragment
    (``mdat`` after its ``moof``). A write that the disk has no room for is taken back.

    Attributes:
        error: The first failure, since FFmpeg passes on only its number.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._pending = bytearray()
        self._whole = 0
        self._descriptor: int | None = None
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes; those that complete a fragment go to the disk with all before them."""
        self._pending += data
        complete = _complete_length(self._pending)
        if complete:
            self._append(bytes(self._pending[:complete]))
            del self._pending[:complete]
        return len(data)

    def finish(self) -> None:
        """Flush to the disk and close; an incomplete rest is dropped.

        Raises:
            OutputError: if the disk refuses.
        """
        if self._descriptor is None:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as problem:
            raise OutputError(f"cannot write {self._path}: {reason(problem)}: check the disk") from problem
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, data: bytes) -> None:
        """Write all of `data` or nothing."""
        if self.error is not None:
            raise self.error
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            self._whole += len(data)
        except OSError as problem:
            self.error = problem
            if self._descriptor is not None:
                os.ftruncate(self._descriptor, self._whole)
            raise


def _complete_length(data: bytearray) -> int:
    """Length of the boxes up to the last ``moov`` or ``mdat`` that is all there."""
    position = complete = 0
    while position + _BOX_HEADER <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind = bytes(data[position + 4 : position + 8])
        if size < _BOX_HEADER or position + size > len(data):
            break
        position += size
        if kind in (b"moov", b"mdat"):
            complete = position
    return complete


class _Sound:
    """The sound of a video file, written beside the frames: as it is where browsers play that in MP4, else as AAC."""

    def __init__(self, av: Any, source: Any, target: Any, origin_s: float) -> None:
        self._source = source
        self._origin_s = origin_s
        self._waiting: Any = None
        stream = source.streams.audio[0]
        codec = stream.codec_context
        if codec.name in _PLAYABLE_SOUND and (codec.name != "aac" or codec.extradata):
            self._stream = target.add_stream_from_template(stream)
            self._packets: Iterator[Any] = (packet for packet in source.demux(stream) if packet.dts is not None)
        else:  # also AAC whose packets have headers of their own (ADTS), as in MPEG-TS
            self._stream = target.add_stream(
                "aac", rate=codec.sample_rate, layout="mono" if codec.channels == 1 else "stereo"
            )
            self._packets = _encoded(av, source, stream, self._stream)

    @classmethod
    def open(cls, av: Any, clip: Clip, target: Any) -> _Sound | None:
        """The clip's sound, or None, with a warning, if it cannot be written."""
        assert clip.audio is not None
        source = av.open(source_name(clip.audio))
        try:
            return cls(av, source, target, clip.origin_s)
        except (av.FFmpegError, AttributeError, ValueError) as problem:  # an unknown codec has no context
            log.warning("%s: its sound cannot be copied (%s): the result has none", clip.source, problem)
            source.close()
            return None

    def copy(self, first_s: float, end_s: float, target: Any) -> None:
        """Write the packets that begin from `first_s` to `end_s` of the source, in seconds, and are not yet written."""
        for packet in self._due(self._origin_s + first_s, self._origin_s + end_s):
            target.mux(packet)

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _due(self, first_s: float, end_s: float) -> Iterator[Any]:
        """Packets whose time has come, with their times in the target, which begins at `first_s`."""
        while True:
            packet = self._waiting or next(self._packets, None)
            self._waiting = None
            if packet is None:
                return
            time = packet.dts if packet.pts is None else packet.pts
            shift = round(first_s / packet.time_base)
            if time * packet.time_base >= end_s:
                self._waiting = packet
                return
            if time >= shift:
                packet.pts, packet.dts = time - shift, packet.dts - shift
                packet.stream = self._stream
                yield packet


def _encoded(av: Any, source: Any, stream: Any, target: Any) -> Iterator[Any]:
    """A stream's sound, encoded again."""
    resampler = av.AudioResampler(format="fltp", layout=target.layout, rate=target.rate)
    for frame in source.decode(stream):
        for samples in resampler.resample(frame):
            yield from target.encode(samples)
    yield from target.encode(None)


def _even(image: Image) -> Image:
    """The picture with a row and column repeated where its height or width is odd."""
    height, width = image.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return np.ascontiguousarray(image)
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
