"""Video decoded by the GPU's NVDEC: frames stay in device memory on their way to the engine.

PyNvVideoCodec decodes and converts NV12 to RGB with its own CUDA code, by the matrix that the video declares; OpenCV
and FFmpeg on the CPU convert with BT.601 unless told otherwise and round in another way. Pixels, and so confidences,
differ a little from those of `read_video`: compare runs of one decoder with each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from yolotrt.errors import BackendUnavailableError, VideoError
from yolotrt.media.frames import Allocate, Clip, Frame, Image, Span, host_memory
from yolotrt.media.video import read_video

_INSTALL = 'run pip install "yolotrtx[gpu,nvdec]", or leave out --nvdec'


def read_video_on_gpu(path: Path, _allocate: Allocate, span: Span) -> Iterator[Frame]:
    """Decode a video file with NVDEC; see `read_video`.

    Frames are CuPy arrays, uint8 BGR (height, width, 3), upright, which an engine on the GPU takes as they are. Their
    times follow from the declared rate; the first frame is decoded on the CPU as well, for what else the file declares.

    Raises:
        VideoError: if the file or its codec cannot be read.
        BackendUnavailableError: if PyNvVideoCodec or CuPy is not installed.
    """
    codec, cupy = _load("PyNvVideoCodec"), _load("cupy")
    clip = _declared(path, span)
    try:
        decoder = codec.SimpleDecoder(
            str(path), gpu_id=0, use_device_memory=True, output_color_type=codec.OutputColorType.RGB
        )
        yield from _frames(path, decoder, cupy, clip, span)
    except RuntimeError as problem:  # what the library's C++ raises
        raise VideoError(f"video {path} cannot be decoded by this GPU ({problem}): leave out --nvdec") from problem


def to_host(image: Any) -> Image:
    """A picture in device memory, uint8 (height, width, 3), copied to the host.

    Raises:
        BackendUnavailableError: if CuPy is not installed.
    """
    host: Image = np.ascontiguousarray(_load("cupy").asnumpy(_load("cupy").asarray(image)))
    return host


def _declared(path: Path, span: Span) -> Clip:
    """The clip that the file declares."""
    with contextlib.closing(read_video(path, host_memory, Span(span.stride))) as frames:
        clip = next(frames).clip
    assert clip is not None
    return clip


def _frames(path: Path, decoder: Any, cupy: ModuleType, clip: Clip, span: Span) -> Iterator[Frame]:
    """The frames of the span; the decoder seeks to them."""
    rate = clip.rate * span.stride
    count = len(decoder)
    first = math.ceil(span.start_s * rate)
    end = count if span.end_s is None else min(count, math.ceil(span.end_s * rate))
    for index in range(first, end, span.stride):
        rgb = cupy.from_dlpack(decoder[index])  # (height, width, 3), in memory that the decoder uses again
        bgr = cupy.ascontiguousarray(cupy.rot90(rgb[..., ::-1], clip.rotation // 90))
        yield Frame(path, bgr, clip, index, round(index / (rate * clip.time_base)))


def _load(name: str) -> ModuleType:
    """A module that the extra brings."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as problem:
        raise BackendUnavailableError(f"{name} cannot be loaded ({problem}): {_INSTALL}") from problem
