"""Frames that lie in device memory already: arrays of CuPy, PyTorch, Numba, PyNvVideoCodec and others, without a copy.

Two protocols say where an array is: the CUDA Array Interface (Numba documentation, "CUDA Array Interface") and DLPack
(Python Array API standard, "Data interchange mechanisms"). The second needs CuPy to be read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from yolotrt.errors import ImageError

_CHANNELS = 3
_LEGACY_STREAM = 1
"""The default stream of the CUDA runtime, as a handle that says so (cudaStreamLegacy)."""


@dataclass(frozen=True)
class DevicePixels:
    """A frame in device memory.

    Attributes:
        address: Its first byte.
        size: Height and width in pixels.
        pitch: Bytes from one row to the next.
        stream: The stream on which the frame is made, as a `cudaStream_t`, to be waited for; None if it is ready.
        owner: What keeps it alive.
    """

    address: int
    size: tuple[int, int]
    pitch: int
    stream: int | None
    owner: Any


def device_pixels(frame: Any, stream: int) -> DevicePixels:
    """Find a frame in device memory.

    Args:
        frame: uint8 BGR (height, width, 3); rows may be apart, the pixels of a row not.
        stream: The `cudaStream_t` that will read it.

    Raises:
        ImageError: if it is no such array, or lies on the host.
    """
    interface = getattr(frame, "__cuda_array_interface__", None)
    is_old = interface is not None and interface.get("version", 0) < 3  # such arrays, as PyTorch's, name no stream
    if interface is None or (is_old and _can_exchange(frame)):
        frame = _from_dlpack(frame, stream)
        interface = {**frame.__cuda_array_interface__, "stream": None}  # the exchange has ordered the streams
    elif is_old:
        interface = {**interface, "stream": _LEGACY_STREAM}
    shape, dtype = tuple(interface["shape"]), interface["typestr"]
    if len(shape) != 3 or shape[2] != _CHANNELS or dtype[1:] != "u1" or 0 in shape:
        raise ImageError(f"a frame must be uint8 BGR (height, width, 3), not {dtype} {shape}: convert it on the GPU")
    height, width = shape[:2]
    row, pixel, byte = interface.get("strides") or (width * _CHANNELS, _CHANNELS, 1)
    if (pixel, byte) != (_CHANNELS, 1) or row < width * _CHANNELS:
        raise ImageError(f"a frame's rows must be contiguous, its strides are {(row, pixel, byte)}: make it contiguous")
    return DevicePixels(int(interface["data"][0]), (height, width), row, interface.get("stream"), frame)


def _can_exchange(frame: Any) -> bool:
    """Whether DLPack can be used without more ado: it knows on which stream PyTorch makes a frame."""
    return hasattr(frame, "__dlpack__") and sys.modules.get("cupy") is not None


def _from_dlpack(frame: Any, stream: int) -> Any:
    """The frame as a CuPy array, ready on `stream`."""
    if not hasattr(frame, "__dlpack__"):
        raise ImageError(f"a frame of type {type(frame).__name__} is no array: pass NumPy or device arrays")
    try:
        import cupy
    except ImportError as problem:
        raise ImageError(
            f"a frame of type {type(frame).__name__} is only read with CuPy ({problem}): install yolotrtx[gpu], "
            "or give an array with the CUDA array interface"
        ) from problem
    try:
        with cupy.cuda.ExternalStream(stream):
            return cupy.from_dlpack(frame)
    except Exception as problem:  # the producer's library may raise anything
        raise ImageError(
            f"a frame of type {type(frame).__name__} cannot be read as a device array ({problem}): "
            "pass NumPy or device arrays"
        ) from problem
