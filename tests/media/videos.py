"""Small videos for tests: each frame tells its number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_CELL = 8
_BITS = 8


def numbered(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose left upper cells are the bits of `index`, on a gradient."""
    image = np.empty((height, width, 3), np.uint8)
    image[:] = np.linspace(40, 200, width, dtype=np.uint8)[None, :, None]
    for bit in range(_BITS):
        image[:_CELL, bit * _CELL : (bit + 1) * _CELL] = 255 if index >> bit & 1 else 0
    return image


def number_of(image: np.ndarray) -> int:
    """The index that `numbered` drew, also after lossy coding."""
    cells = image[:_CELL, : _BITS * _CELL].reshape(_CELL, _BITS, _CELL, 3).mean((0, 2, 3))
    return sum(int(cell > 127) << bit for bit, cell in enumerate(cells))


def make_video(
    path: Path,
    count: int = 30,
    *,
    size: tuple[int, int] = (48, 64),
    rate: Fraction = Fraction(25),
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    rotation: int = 0,
    audio: str | None = None,
) -> Path:
    """Write a video of `numbered` frames.

    Args:
        path: Target; the suffix chooses the container.
        count: Number of frames.
        size: Height and width.
        rate: Frames a second.
        codec: Encoder.
        times: Time of each frame in milliseconds, for a variable rate.
        rotation: Degrees counterclockwise by which a player turns it.
        audio: Encoder of a second stream, a quiet tone as long as the pictures.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"preset": "ultrafast", "crf": "12"}
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream(audio, rate=16000, layout="mono") if audio else None
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(index, *size), format="bgr24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_tone(container, sound, float(count / rate))
    return path


def _add_tone(container: object, stream: object, seconds: float) -> None:
    samples = (np.sin(np.arange(round(16000 * seconds)) * 0.17) * 3000).astype(np.int16)[None]
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, start : start + 1024]), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
