"""What travels through a run: one picture or video frame, and what was found in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.detections import Classification, Detections
from yolotrt.errors import InputError

Image = npt.NDArray[np.uint8]
"""uint8 (height, width, 3), BGR."""

Allocate = Callable[[int, int], Image]
"""Gives memory for a frame of a height and width, such as `Detector.frame_buffer`."""


RECONNECT_S = 300.0
"""How long a lost camera or stream is tried again: long enough for one that starts anew."""

LIVE_TIME_BASE = Fraction(1, 1000)
"""Frames of cameras and streams are stamped in milliseconds, by the clock."""


def host_memory(height: int, width: int) -> Image:
    """Plain memory for a frame."""
    return np.empty((height, width, 3), np.uint8)


@dataclass(frozen=True)
class ColorTags:
    """How YUV values are meant, as numbers of ITU-T H.273; 2 is unspecified."""

    matrix: int = 2
    primaries: int = 2
    transfer: int = 2


@dataclass(frozen=True, eq=False)
class Clip:
    """A sequence of frames of one size: a video file, or what a camera or stream gives until its size changes.

    Attributes:
        source: The file, URL or camera as the user named it.
        height: Of its upright frames, in pixels.
        width: Likewise.
        rate: Frames a second: the declared ones, by the stride.
        time_base: Unit of `Frame.pts` in seconds.
        origin_s: Time that the file gives its first frame, in seconds; that of its sound counts from the same zero.
        audio: The file whose sound belongs to it, or None.
        is_live: Whether it is a camera or stream.
        colors: Of the source's YUV values.
        sample_aspect_ratio: Width by height of a pixel.
        rotation: Degrees counterclockwise by which stored frames are turned to be upright; a multiple of 90.
    """

    source: str
    height: int
    width: int
    rate: Fraction
    time_base: Fraction
    origin_s: float = 0.0
    audio: Path | None = None
    is_live: bool = False
    colors: ColorTags = ColorTags()
    sample_aspect_ratio: Fraction = Fraction(1)
    rotation: int = 0


@dataclass(frozen=True, eq=False)
class Frame:
    """A picture, or one frame of a clip.

    Attributes:
        path: The file or source; gives results their names.
        image: uint8 (height, width, 3), BGR, upright; or an array of that form in device memory, see `pixels`.
        clip: What it is a frame of; None for a picture.
        index: Its number in the source, from 0; a stride leaves gaps.
        pts: Its time in units of the clip's time base, from the source's first frame.
    """

    path: Path
    image: Any
    clip: Clip | None = None
    index: int = 0
    pts: int = 0

    @property
    def time_s(self) -> float:
        """Seconds from the source's first frame."""
        return 0.0 if self.clip is None else float(self.pts * self.clip.time_base)

    @property
    def pixels(self) -> Image:
        """The picture in host memory; copied from a device if it lies there."""
        if isinstance(self.image, np.ndarray):
            return self.image
        from yolotrt.media.nvdec import to_host

        return to_host(self.image)


@dataclass(frozen=True, eq=False)
class Found:
    """A frame and what was found in it.

    Attributes:
        frame: The frame.
        detections: What was found.
        drawn: The picture with boxes; None if nobody asked for it.
    """

    frame: Frame
    detections: Detections | Classification
    drawn: Image | None = None


@dataclass(frozen=True)
class Span:
    """Which frames of a video to take.

    Attributes:
        stride: Every n-th frame, from the first of the span.
        start_s: Frames at this time or later, in seconds.
        end_s: Frames before this time; None is the video's end.
    """

    stride: int = 1
    start_s: float = 0.0
    end_s: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: if one is out of range.
        """
        if self.stride < 1:
            raise InputError(f"--stride {self.stride} is out of range: choose at least 1")
        if self.end_s is not None and self.end_s <= self.start_s:
            raise InputError(f"--end {self.end_s:g} s is not after --start {self.start_s:g} s: choose a later end")
