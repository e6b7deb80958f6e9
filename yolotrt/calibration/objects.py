"""Where the objects are: most of a picture is background, which fills a histogram and decides nothing.

The largest values of a tensor often lie on objects. A range chosen for all values cuts them off, which costs a
background little and a box its exact edges (docs/int8.md, "Which method").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.base import CompleteOptions
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.network import recorder
from yolotrt.network.builder import INPUT_NAME
from yolotrt.network.quantize import Placement
from yolotrt.postprocess import BOX_VALUES, YoloLayer, sigmoid
from yolotrt.weights import Weights

Float = npt.NDArray[np.float32]

MIN_OBJECTNESS = 0.05
"""A cell with more of it in the float network shows an object: low enough for those that INT8 may lose."""

OBJECTNESS = 4
"""Where it lies among the values of an anchor and cell."""

FLOAT = Placement(reads=frozenset(), high_precision="fp32")


class ObjectFinder:
    """Finds objects with the float network itself; no labels are needed."""

    def __init__(self, weights: Weights, imgsz: tuple[int, int], threads: int | None = None) -> None:
        """Open a session on the float network.

        Args:
            weights: A model for detection or segmentation.
            imgsz: Network input height and width in pixels.
            threads: CPU threads; None leaves it to ONNX Runtime.
        """
        from yolotrt.engines.onnx import inference_session

        model = weights.metadata
        options = CompleteOptions("fp32", imgsz, (1, 1, 1))
        self._session: Any = inference_session(build_plan(recorder, weights, options, BuildHooks(FLOAT)).data, threads)
        self._model = model
        self._width_height = np.array(imgsz[::-1], np.float32)

    def find(self, images: Float) -> Float:
        """Find the objects of one picture.

        Args:
            images: float32 (1, 3, height, width), RGB in 0..1, letterboxed.

        Returns:
            float32 (n, 4): left, top, right, bottom in parts of the picture, before NMS. n is at least 1: without any
            object it is what looks most like one.
        """
        model = self._model
        heads = self._session.run(None, {INPUT_NAME: images})[: len(model.strides)]
        values = heads[0].shape[1] // len(model.anchors[0])
        layer = YoloLayer(model.anchors, model.strides, len(model.names), values - BOX_VALUES - len(model.names))
        rows = next(layer.candidates(heads, MIN_OBJECTNESS))
        if not len(rows):
            rows = layer.full(heads)[0]
            rows = rows[[rows[:, 4].argmax()]]
        centre, half = rows[:, :2] / self._width_height, rows[:, 2:4] / self._width_height / 2
        return np.concatenate([centre - half, centre + half], -1)


def inside(boxes: Float, rows: int, columns: int) -> npt.NDArray[np.bool_]:
    """Which cells of a tensor objects touch.

    Args:
        boxes: float32 (n, 4): left, top, right, bottom in parts of the picture.
        rows: The tensor's height in cells.
        columns: The tensor's width in cells.

    Returns:
        bool (rows, columns).
    """
    mask = np.zeros((rows, columns), np.bool_)
    size = np.array([columns, rows])
    first = np.clip(np.floor(boxes[:, :2] * size), 0, size - 1).astype(int)
    end = np.clip(np.ceil(boxes[:, 2:] * size), first + 1, size).astype(int)
    for (left, top), (right, bottom) in zip(first, end, strict=True):
        mask[top:bottom, left:right] = True
    return mask


def objectness(head: Float, anchors: int) -> Float:
    """The probability of an object in each cell.

    Args:
        head: float32 (1, anchors x values, rows, columns), raw.
        anchors: Anchors of a cell.

    Returns:
        float32 (1, anchors x values, rows, columns) in 0..1: the same for all values of an anchor and cell.
    """
    _, channels, rows, columns = head.shape
    values = channels // anchors
    split = head.reshape(anchors, values, rows, columns)
    return np.repeat(sigmoid(split[:, OBJECTNESS]), values, axis=0)[None]
