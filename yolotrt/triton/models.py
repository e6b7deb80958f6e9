"""What the Python models of a repository run; the server loads them in processes of its Python backend.

`triton_python_backend_utils` exists there only. A model's `execute` gets the requests of a dynamic batch, each with a
batch of its own, and gives a response for each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.base import Session
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.host import HostDecoder
from yolotrt.errors import ImageError
from yolotrt.media.images import decode_image
from yolotrt.postprocess import Boxes, NmsOptions, greedy_nms
from yolotrt.preprocess import Letterbox
from yolotrt.triton.repository import BOXES, CLASSES, COUNT, ENGINE_FILE, IMAGE, OPTIONS_FILE, SCORES, SIZE

NO_PICTURE = -1
"""`COUNT` of a picture that cannot be decoded: an error would fail the others of its request as well."""


class _Model:
    """What all models have: the engine's file and the thresholds."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Called once, with the model's place."""
        folder = Path(args["model_repository"]) / str(args["model_version"])
        self.engine = EngineFile.load(folder / ENGINE_FILE)
        values = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
        classes = values["classes"]
        self.options = NmsOptions(**{**values, "classes": None if classes is None else tuple(classes)})

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called for each dynamic batch; returns a response for each request, in order."""
        import triton_python_backend_utils as server

        names = self.input_names
        inputs = [[server.get_input_tensor_by_name(request, name).as_numpy() for name in names] for request in requests]
        counts = np.cumsum([len(arrays[0]) for arrays in inputs])
        outputs = self.compute(*(np.concatenate(arrays) for arrays in zip(*inputs, strict=True)))
        parts = {name: np.split(values, counts[:-1]) for name, values in outputs.items()}
        return [
            server.InferenceResponse(
                [server.Tensor(name, np.ascontiguousarray(part[i])) for name, part in parts.items()]
            )
            for i in range(len(requests))
        ]

    @property
    def input_names(self) -> list[str]:
        """What `compute` takes, in its order."""
        raise NotImplementedError

    def compute(self, *arrays: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name for all pictures of the batch together."""
        raise NotImplementedError

    def _output_names(self) -> list[str]:
        return [info.name for info in self.engine.header.outputs]


class LetterboxModel(_Model):
    """Picture files to the network's input."""

    @property
    def input_names(self) -> list[str]:
        """See `_Model.input_names`."""
        return [IMAGE]

    def compute(self, *arrays: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """IMAGE, bytes (pictures, 1), to the input (pictures, 3, height, width) and SIZE (pictures, 2).

        SIZE is height and width, or 0 and 0 for a picture that cannot be decoded.
        """
        header = self.engine.header
        files = arrays[0].ravel()
        pixels = np.zeros((len(files), 3, *header.imgsz), np.float32)
        sizes = np.zeros((len(files), 2), np.int32)
        for data, out, size in zip(files, pixels, sizes, strict=True):
            try:
                image = decode_image(bytes(data), IMAGE)
            except ImageError:
                continue
            Letterbox.fit(image.shape[:2], header.imgsz).to_input(image, out)
            size[:] = image.shape[:2]
        return {header.inputs[0].name: pixels.astype(header.inputs[0].dtype, copy=False), SIZE: sizes}


class EngineModel(_Model):
    """The network, where the server has no backend for it."""

    def initialize(self, args: dict[str, Any]) -> None:
        """See `_Model.initialize`."""
        super().initialize(args)
        self._session: Session = open_session(self.engine)

    @property
    def input_names(self) -> list[str]:
        """See `_Model.input_names`."""
        return [self.engine.header.inputs[0].name]

    def compute(self, *arrays: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Input (pictures, 3, height, width) to raw heads."""
        pixels = np.asarray(arrays[0], np.float32)
        low = self.engine.header.batch_range[0]
        missing = max(0, low - len(pixels))
        padded = np.concatenate([pixels, np.zeros((missing, *pixels.shape[1:]), np.float32)]) if missing else pixels
        heads = self._session.run(padded)
        # the arrays are the session's own
        return {name: head[: len(pixels)].copy() for name, head in zip(self._output_names(), heads, strict=True)}

    def finalize(self) -> None:
        """Called when the model is unloaded."""
        self._session.close()


class BoxesModel(_Model):
    """The network's outputs to boxes in the pictures."""

    def initialize(self, args: dict[str, Any]) -> None:
        """See `_Model.initialize`."""
        super().initialize(args)
        header = self.engine.header
        self._decoder = None if header.yololayer == "plugin" else HostDecoder(header)

    @property
    def input_names(self) -> list[str]:
        """See `_Model.input_names`."""
        return [*self._output_names(), SIZE]

    def compute(self, *arrays: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """The network's outputs and SIZE (pictures, 2) to COUNT, BOXES, SCORES and CLASSES, filled up with zeros."""
        *outputs, sizes = arrays
        limit = self.options.max_detections
        counts = np.zeros((len(sizes), 1), np.int32)
        boxes, scores = np.zeros((len(sizes), limit, 4), np.float32), np.zeros((len(sizes), limit), np.float32)
        classes = np.zeros((len(sizes), limit), np.int32)
        for number, (size, found) in enumerate(zip(sizes.tolist(), self._boxes(outputs), strict=True)):
            if not all(size):
                counts[number] = NO_PICTURE
                continue
            letterbox = Letterbox.fit((size[0], size[1]), self.engine.header.imgsz)
            counts[number] = kept = len(found)
            boxes[number, :kept] = letterbox.inverse(found.xyxy)
            scores[number, :kept] = found.confidence
            classes[number, :kept] = found.class_id
        return {COUNT: counts, BOXES: boxes, SCORES: scores, CLASSES: classes}

    def _boxes(self, outputs: Sequence[npt.NDArray[Any]]) -> list[Boxes]:
        """Boxes of each picture in network-input pixels."""
        values = [np.asarray(output, np.float32) for output in outputs]
        if self._decoder is not None:
            return self._decoder.boxes(values, self.options)
        return [boxes_of_rows(rows, self.options) for rows in values[0]]


def boxes_of_rows(rows: npt.NDArray[np.float32], options: NmsOptions) -> Boxes:
    """NMS of what a plan with YoloLayer inside gives.

    Args:
        rows: float32 (n, 6): left, top, right, bottom in network-input pixels, score, class index.
        options: Thresholds.
    """
    from yolotrt.postprocess import MAX_CANDIDATES

    kept = rows[rows[:, 4] > options.confidence]
    if options.classes is not None:
        kept = kept[np.isin(kept[:, 5], options.classes)]
    kept = kept[np.argsort(-kept[:, 4], kind="stable")[:MAX_CANDIDATES]]
    boxes = Boxes(kept[:, :4], kept[:, 4], kept[:, 5].astype(np.int64))
    return boxes.take(greedy_nms(boxes, options.iou, options.max_detections, agnostic=options.agnostic))
