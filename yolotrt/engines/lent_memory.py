"""Page-locked memory that a session lends for frames, and which frames lie in it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.device import Bytes, GpuDevice
from yolotrt.cuda.kernels import upload_bytes

_CHANNELS = 3


class _LentFrame(NamedTuple):
    """An array that was lent, and where it lies."""

    address: int
    shape: tuple[int, ...]
    array: weakref.ref[npt.NDArray[np.uint8]]  # the frame is forgotten when the array is no more


class LentMemory:
    """What a session has lent and somebody still refers to."""

    def __init__(self) -> None:
        self._blocks: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()  # by address
        self._frames: dict[int, _LentFrame] = {}  # by the array's identity, which is found sooner than its address

    def __len__(self) -> int:
        return len(self._blocks)

    def lend(self, device: GpuDevice, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A frame (height, width, 3) at the beginning of page-locked memory of `upload_bytes` of its size."""
        size = height * width * _CHANNELS
        memory = device.page_locked(upload_bytes(size))
        block = memory.base if isinstance(memory.base, np.ndarray) else memory  # what views of it keep alive
        address = block.ctypes.data
        self._blocks[address] = block
        frame = memory[:size].reshape(height, width, _CHANNELS)
        key, frames = id(frame), self._frames
        frames[key] = _LentFrame(address, frame.shape, weakref.ref(frame, lambda _: frames.pop(key, None)))
        return frame

    def find(self, frame: npt.NDArray[np.uint8]) -> tuple[int, object] | None:
        """Where a frame begins and what keeps its memory, if it is without gaps at the beginning of lent memory.

        Its `upload_bytes` can be read then. None for all other frames.
        """
        lent = self._frames.get(id(frame))
        if lent is not None and lent.array() is frame and frame.shape == lent.shape and frame.flags.c_contiguous:
            return lent.address, frame  # as it was lent, although its shape could be assigned
        address: int = frame.__array_interface__["data"][0]
        block = self._blocks.get(address)
        if block is None or not frame.flags.c_contiguous or block.nbytes < upload_bytes(frame.nbytes):
            return None
        return address, block
