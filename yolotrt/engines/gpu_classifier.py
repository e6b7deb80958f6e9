"""Classifiers on a GPU: pictures are prepared on the CPU, and a CUDA graph of kernels does the rest.

A classifier's input is small (224 x 224 pixels usually), and its rule (a square crop, resized, with ImageNet's mean and
deviation) is not the letterbox's. So `CentreCrop` prepares it on the CPU, the same for every backend; the graph fetches
it from page-locked memory, runs the engine, and writes the scores into page-locked memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.device import GpuDevice
from yolotrt.cuda.kernels import CopyKernel, upload_bytes
from yolotrt.engines.base import Frame, Pending
from yolotrt.engines.file import TensorInfo
from yolotrt.engines.gpu_engine import EngineSession, EngineStream, tensor_bytes
from yolotrt.engines.trt_engine import TrtEngine
from yolotrt.errors import InputError
from yolotrt.postprocess import NmsOptions


class GpuClassifier(EngineSession["_Lane"]):
    """A classifier's engine on one GPU; see `Session.classify`."""

    def __init__(self, engine: TrtEngine) -> None:
        """Prepare to run.

        Args:
            engine: The engine of a classifier.

        Raises:
            InferenceError: if the GPU's memory does not suffice.
        """
        super().__init__(engine)
        with self._on_device():
            self._lanes.append(_Lane(engine))

    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:  # noqa: ARG002
        """Refuse: see `Session.classify`.

        Raises:
            InputError: always.
        """
        raise InputError("this engine is a classifier's, which finds no boxes: classify the pictures")

    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """See `Session.run`; the scores are the caller's."""
        self.check_input(images)
        self._require_open()
        with self._on_device():
            return [self._lanes[0].scores(images)]


class _Lane:
    """An engine between two tensors in page-locked memory."""

    def __init__(self, engine: TrtEngine) -> None:
        header = engine.header
        (images,), (scores,) = header.inputs, header.outputs
        self._run = EngineStream(engine)
        self._copy = CopyKernel(engine.device)
        self._images = _HostTensor(engine.device, images, header.max_batch)
        self._scores = _HostTensor(engine.device, scores, header.max_batch)

    def scores(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the engine on a batch: float32 (batch, classes)."""
        batch = len(images)
        np.copyto(self._images.values[:batch], images, casting="same_kind")
        self._run.start(batch, self._enqueue)
        self._run.wait(spin=True)
        return self._scores.values[:batch].astype(np.float32)

    def close(self) -> None:
        """Free everything."""
        self._run.close()

    def _enqueue(self, batch: int) -> None:
        images, scores, tensors = self._images, self._scores, self._run.tensors
        self._copy.launch(tensors[images.name].address, images.address, images.copied_bytes(batch), self._run.stream)
        self._run.enqueue(batch)
        self._copy.launch(scores.address, tensors[scores.name].address, scores.copied_bytes(batch), self._run.stream)


class _HostTensor:
    """A network input or output in page-locked memory.

    Attributes:
        name: Its name in the network.
        values: (largest batch, ...).
        address: Where it lies.
    """

    def __init__(self, device: GpuDevice, info: TensorInfo, largest_batch: int) -> None:
        self.name = info.name
        self._info = info
        memory = device.page_locked(self.copied_bytes(largest_batch))
        memory[:] = 0
        values = memory[: tensor_bytes(info, largest_batch)].view(info.dtype)
        self.values = values.reshape(largest_batch, *info.shape[1:])
        self.address = memory.ctypes.data

    def copied_bytes(self, batch: int) -> int:
        """Bytes of a batch in the units of `CopyKernel`."""
        return upload_bytes(tensor_bytes(self._info, batch))
