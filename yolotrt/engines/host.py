"""The session of engines that give raw heads in host memory: everything around them is done by NumPy and OpenCV."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from yolotrt.engines.base import Finished, Frame, Pending, Session, Timing
from yolotrt.engines.file import EngineHeader
from yolotrt.postprocess import Boxes, Float, NmsOptions, YoloLayer, non_max_suppression, with_masks


class HostDecoder:
    """Turns a network's outputs into boxes, and into masks where it is one for segmentation, with NumPy."""

    def __init__(self, header: EngineHeader) -> None:
        model = header.model
        self._mask_count = header.outputs[-1].shape[1] if model.task == "segment" else 0
        self._network_size = header.imgsz
        self._yolo_layer = YoloLayer(model.anchors, model.strides, len(model.names), self._mask_count)

    def boxes(self, outputs: Sequence[Float], options: NmsOptions) -> list[Boxes]:
        """Decode a batch.

        Args:
            outputs: The raw heads of all levels, float32 (batch, anchors x values, height, width), and for segmentation
                the prototypes (batch, coefficients, height, width).
            options: Thresholds.

        Returns:
            Per picture its boxes in network-input pixels, best first.
        """
        levels = len(self._yolo_layer.strides)
        rows = self._yolo_layer.candidates(outputs[:levels], options.confidence)
        found = [non_max_suppression(candidates, options, self._mask_count) for candidates in rows]
        if not self._mask_count:
            return found
        (prototypes,) = outputs[levels:]
        return [with_masks(boxes, planes, self._network_size) for boxes, planes in zip(found, prototypes, strict=True)]


class HostSession(Session):
    """Letterbox before and YoloLayer and NMS after an engine that `run` computes; see `Session`."""

    def __init__(self, header: EngineHeader) -> None:
        self.header = header
        self.timing = Timing()
        self._decoder = HostDecoder(header)
        self._input = np.zeros((header.max_batch, 3, *header.imgsz), np.float32)

    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:
        """See `Session.submit`; here the batch is finished when this returns."""
        from yolotrt.preprocess import Letterbox  # OpenCV, which building an engine does without

        self.check_frame_count(len(frames))
        self.check_in_host_memory(frames)
        began = time.perf_counter()
        for frame, out in zip(frames, self._input, strict=False):
            Letterbox.fit(frame.shape[:2], self.header.imgsz).to_input(frame, out)
        prepared = time.perf_counter()
        # a static or larger smallest batch is filled up: the surplus is stale input whose results nobody reads
        heads = self.run(self._input[: max(len(frames), self.header.batch_range[0])])
        inferred = time.perf_counter()
        boxes = self._decoder.boxes([head[: len(frames)] for head in heads], options)
        self._count(began, prepared, inferred, len(frames))
        return Finished(boxes)

    def _count(self, began: float, prepared: float, inferred: float, pictures: int) -> None:
        """Add one batch to the timing."""
        self.timing.preprocess_ms += (prepared - began) * 1e3
        self.timing.inference_ms += (inferred - prepared) * 1e3
        self.timing.postprocess_ms += (time.perf_counter() - inferred) * 1e3
        self.timing.pictures += pictures
