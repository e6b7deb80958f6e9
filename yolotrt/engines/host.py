"""The session of engines that give raw heads in host memory: everything around them is done by NumPy and OpenCV."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from yolotrt.engines.base import Finished, Frame, Pending, Session, Timing
from yolotrt.engines.file import EngineHeader
from yolotrt.errors import InputError
from yolotrt.postprocess import Boxes, NmsOptions, YoloLayer, non_max_suppression


class HostSession(Session):
    """Letterbox before and YoloLayer and NMS after an engine that `run` computes; see `Session`."""

    def __init__(self, header: EngineHeader) -> None:
        model = header.model
        self.header = header
        self.timing = Timing()
        self._yolo_layer = YoloLayer(model.anchors, model.strides, len(model.names))
        self._input = np.zeros((header.max_batch, 3, *header.imgsz), np.float32)

    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:
        """See `Session.submit`; here the batch is finished when this returns."""
        from yolotrt.preprocess import Letterbox  # OpenCV, which building an engine does without

        self.check_frame_count(len(frames))
        if not all(isinstance(frame, np.ndarray) for frame in frames):
            raise InputError("a picture lies in device memory, and this engine runs on the CPU: pass NumPy arrays")
        began = time.perf_counter()
        for frame, out in zip(frames, self._input, strict=False):
            Letterbox.fit(frame.shape[:2], self.header.imgsz).to_input(frame, out)
        prepared = time.perf_counter()
        # a static or larger smallest batch is filled up: the surplus is stale input whose results nobody reads
        heads = self.run(self._input[: max(len(frames), self.header.batch_range[0])])
        inferred = time.perf_counter()
        boxes = self._decode([head[: len(frames)] for head in heads], options)
        self._count(began, prepared, inferred, len(frames))
        return Finished(boxes)

    def _decode(self, heads: list[np.ndarray], options: NmsOptions) -> list[Boxes]:
        """Raw heads as boxes in network-input pixels."""
        rows = self._yolo_layer.candidates(heads, options.confidence)
        return [non_max_suppression(candidates, options) for candidates in rows]

    def _count(self, began: float, prepared: float, inferred: float, pictures: int) -> None:
        """Add one batch to the timing."""
        self.timing.preprocess_ms += (prepared - began) * 1e3
        self.timing.inference_ms += (inferred - prepared) * 1e3
        self.timing.postprocess_ms += (time.perf_counter() - inferred) * 1e3
        self.timing.pictures += pictures
