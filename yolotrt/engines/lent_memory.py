"""Page-locked memory that a session lends for frames, and which frames lie in it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.device import Bytes
from yolotrt.cuda.kernels import upload_bytes

_CHANNELS = 3


class _LentFrame(NamedTuple):
    """An array that was lent, and where it lies."""

    address: int
    shape: tuple[int, ...]
    array: weakref.ref[npt.NDArray[np.uint8]]  # which forgets this when the array is no more


class LentMemory:
    """What a session has lent and somebody still refers to."""

    def __init__(self) -> None:
        self._blocks: weakref.WeakValueDictionary[int, Bytes] = weakref.WeakValueDictionary()  # by address
        self._frames: dict[int, _LentFrame] = {}  # by the array's identity, which is found sooner than its address

    def __len__(self) -> int:
        return len(self._blocks)

    def lend(self, memory: Bytes, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A frame (height, width, 3) at the beginning of memory of at least `upload_bytes` of its size."""
        block = memory.base if isinstance(memory.base, np.ndarray) else memory  # what views of it keep alive
        address = block.ctypes.data
        self._blocks[address] = block
        frame = memory[: height * width * _CHANNELS].reshape(height, width, _CHANNELS)
        key, frames = id(frame), self._frames
        frames[key] = _LentFrame(address, frame.shape, weakref.ref(frame, lambda _: frames.pop(key, None)))
        return frame

    def address_of(self, frame: npt.NDArray[np.uint8]) -> int | None:
        """Where a frame begins, if it is without gaps at the beginning of lent memory, and None otherwise.

        Its `upload_bytes` can be read then.
        """
        lent = self._frames.get(id(frame))
        if lent is not None and frame.shape == lent.shape and frame.flags.c_contiguous:  # which can be assigned
            return lent.address
        address: int = frame.__array_interface__["data"][0]
        block = self._blocks.get(address)
        if block is None or not frame.flags.c_contiguous or block.nbytes < upload_bytes(frame.nbytes):
            return None
        return address
