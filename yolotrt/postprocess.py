"""From raw heads to boxes on the CPU: YoloLayer and non-maximum suppression, the reference for the GPU kernels.

YoloLayer (YOLOv5 models/yolo.py, Detect.forward): with s = sigmoid(raw), a cell at (column, row) of a level with stride
and an anchor give

    centre x = (2 s[0] - 0.5 + column) stride      width  = (2 s[2])^2 anchor width
    centre y = (2 s[1] - 0.5 + row) stride         height = (2 s[3])^2 anchor height

objectness s[4] and class probabilities s[5:], all in float32. Rows are ordered level by level, then anchor, then row,
then column, as YOLOv5 does it. Segmentation models have mask coefficients after the classes, which YoloLayer leaves as
they are. YOLOv5's NMS multiplies all that follows the objectness by it, the coefficients too (utils/general.py,
non_max_suppression: ``x[:, 5:] *= x[:, 4:5]``); an object's mask is the sigmoid of the prototypes weighed by the
products (utils/segment/general.py, process_mask).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from yolotrt.weights.model import Anchors

Float = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]

MAX_CANDIDATES = 30_000
"""Boxes that enter NMS at most, best first (YOLOv5 utils/general.py, max_nms)."""

MASK_THRESHOLD = 0.5
"""Pixels above it belong to the object (YOLOv5 utils/segment/general.py, process_mask)."""

BOX_VALUES = 5
"""x, y, width, height and objectness stand before the class probabilities."""


@dataclass(frozen=True)
class NmsOptions:
    """How rows become detections.

    Attributes:
        confidence: Rows with objectness or objectness x class probability not above this are dropped.
        iou: A box that overlaps a better one of its class by more than this is dropped.
        max_detections: Boxes kept at most.
        classes: Class indices to keep; None keeps all.
        agnostic: Whether boxes of different classes suppress each other.
        multi_label: Whether a row gives a box for every class above `confidence` (evaluation) or only for its best.
    """

    confidence: float = 0.25
    iou: float = 0.45
    max_detections: int = 300
    classes: tuple[int, ...] | None = None
    agnostic: bool = False
    multi_label: bool = False


@dataclass(frozen=True)
class MaskCrop:
    """One object's mask before the threshold, at the prototypes' size and inside its box.

    Attributes:
        values: float32 (rows, columns) in 0..1. Cells that the box does not cover are 0, among them one row or column
            on each side of the box, where the grid has it, so that the values can be interpolated to the border.
        top: Row of the first value in the prototypes' grid.
        left: Column of the first value.
        grid_size: Height and width of the prototypes' grid.
    """

    values: Float
    top: int
    left: int
    grid_size: tuple[int, int]


@dataclass(frozen=True)
class Boxes:
    """Boxes in network-input pixels, and of segmentation models what their masks are made of.

    A session gives `masks` where the model has them; `coefficients` only have to travel from YoloLayer to there, and a
    session on a GPU can keep them on the device.

    Attributes:
        xyxy: float32 (N, 4): left, top, right, bottom.
        confidence: float32 (N,).
        class_id: int64 (N,).
        coefficients: float32 (N, prototypes): weights of the prototypes, times objectness; or None.
        masks: One for each box, or None.
    """

    xyxy: Float
    confidence: Float
    class_id: Index
    coefficients: Float | None = None
    masks: tuple[MaskCrop, ...] | None = None

    def __len__(self) -> int:
        return len(self.confidence)

    def take(self, index: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Boxes:
        """The boxes at `index` (indices or a mask)."""
        return Boxes(
            self.xyxy[index],
            self.confidence[index],
            self.class_id[index],
            None if self.coefficients is None else self.coefficients[index],
            None if self.masks is None else tuple(self.masks[i] for i in np.arange(len(self))[index]),
        )


class YoloLayer:
    """Turns raw heads into rows of boxes.

    Attributes:
        anchors: float32 (levels, anchors, 2): width and height in network-input pixels.
        strides: Network-input pixels per cell, by level.
        class_count: Number of classes.
        mask_count: Mask coefficients of each row.
    """

    def __init__(self, anchors: Anchors, strides: Sequence[int], class_count: int, mask_count: int = 0) -> None:
        self.anchors: Float = np.array(anchors, np.float32)
        self.strides = tuple(strides)
        self.class_count = class_count
        self.mask_count = mask_count

    @property
    def row_values(self) -> int:
        """Values of each anchor and cell in the heads."""
        return BOX_VALUES + self.class_count + self.mask_count

    def full(self, heads: Sequence[Float]) -> Float:
        """Decode everything.

        Args:
            heads: Per level float32 (batch, anchors x (5 + classes + mask coefficients), rows, columns), raw.

        Returns:
            float32 (batch, rows of all levels, 5 + classes + mask coefficients): centre x, centre y, width, height in
            network-input pixels, objectness, class probabilities, mask coefficients.
        """
        return np.concatenate([self._decode_level(level, head) for level, head in enumerate(heads)], axis=1)

    def best(self, heads: Sequence[Float]) -> Float:
        """Decode, keeping each row's best class.

        Args:
            heads: As for `full`.

        Returns:
            float32 (batch, rows of all levels, 6 + mask coefficients): left, top, right, bottom in network-input
            pixels, objectness x probability of the best class (the first of equals), class index, objectness x mask
            coefficients.
        """
        rows = self.full(heads)
        boxes, classes, coefficients = np.split(rows, [BOX_VALUES, BOX_VALUES + self.class_count], -1)
        class_id = classes.argmax(-1)[..., None]
        score = boxes[..., 4:] * np.take_along_axis(classes, class_id, -1)
        return np.concatenate(
            [_corners(boxes[..., :4]), score, class_id.astype(np.float32), coefficients * boxes[..., 4:]], -1
        )

    def candidates(self, heads: Sequence[Float], confidence: float) -> Iterator[Float]:
        """Decode only rows whose objectness is above `confidence`; the same values as `full`, much faster.

        Args:
            heads: As for `full`.
            confidence: Threshold in 0..1.

        Yields:
            For each picture of the batch float32 (candidates, 5 + classes + mask coefficients), in the order of `full`.
        """
        levels = [self._split(head) for head in heads]  # (batch, anchors, values, rows, columns)
        threshold = raw_threshold(confidence)
        for picture in range(heads[0].shape[0]):
            rows = [self._candidates(level, split[picture], threshold) for level, split in enumerate(levels)]
            decoded = np.concatenate(rows)
            yield decoded[decoded[:, 4] > confidence]

    def _split(self, head: Float) -> Float:
        """(batch, anchors x values, h, w) -> (batch, anchors, values, h, w), without a copy."""
        batch, _, height, width = head.shape
        return head.reshape(batch, self.anchors.shape[1], self.row_values, height, width)

    def _decode_level(self, level: int, head: Float) -> Float:
        """All rows of one level: (batch, anchors x h x w, values)."""
        raw = self._split(head).transpose(0, 1, 3, 4, 2)  # (batch, anchors, h, w, values)
        batch, anchors, height, width, values = raw.shape
        anchor, row, column = np.indices((anchors, height, width))
        decoded = self._decode(level, raw.reshape(batch, -1, values), anchor.ravel(), row.ravel(), column.ravel())
        return decoded  # noqa: RET504 - the name says what it is

    def _candidates(self, level: int, raw: Float, threshold: float) -> Float:
        """Decoded rows of one picture and level, (anchors, values, h, w), whose raw objectness may be enough."""
        objectness = raw[:, 4]  # (anchors, h, w)
        # ten times faster than np.nonzero in three dimensions
        anchor, row, column = np.unravel_index(np.flatnonzero(objectness > threshold), objectness.shape)
        return self._decode(level, raw[anchor, :, row, column], anchor, row, column)

    def _decode(self, level: int, raw: Float, anchor: Index, row: Index, column: Index) -> Float:
        """The formulas above for rows (..., n, values) at the given cells (n,)."""
        stride = np.float32(self.strides[level])
        decoded = sigmoid(raw)
        cell = np.stack([column, row], -1).astype(np.float32)  # (n, 2)
        decoded[..., :2] = (decoded[..., :2] * 2 - np.float32(0.5) + cell) * stride
        decoded[..., 2:4] = (decoded[..., 2:4] * 2) ** 2 * self.anchors[level][anchor]
        if self.mask_count:
            decoded[..., -self.mask_count :] = raw[..., -self.mask_count :]
        return decoded


def sigmoid(raw: Float) -> Float:
    """1 / (1 + exp(-raw)) in float32; exactly 0 and 1 in the limits."""
    with np.errstate(over="ignore"):  # exp overflows to infinity and the quotient to 0, as it should
        decoded: Float = np.negative(raw)
        np.exp(decoded, out=decoded)
        decoded += 1
        return np.reciprocal(decoded, out=decoded)


def softmax(raw: Float) -> Float:
    """Probabilities of raw class scores along the last axis, in float32."""
    powers: Float = np.exp(raw - raw.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    return powers


def non_max_suppression(rows: Float, options: NmsOptions, mask_count: int = 0) -> Boxes:
    """Select the detections of one picture (YOLOv5 utils/general.py, non_max_suppression).

    Args:
        rows: float32 (n, 5 + classes + mask coefficients) as `YoloLayer.full` and `candidates` give them.
        options: Thresholds.
        mask_count: Mask coefficients of each row.

    Returns:
        At most `options.max_detections` boxes, best first; equal confidences in the order of their rows.
    """
    boxes = _select_classes(rows[rows[:, 4] > options.confidence], options, mask_count)
    if options.classes is not None:
        boxes = boxes.take(np.isin(boxes.class_id, options.classes))
    order = np.argsort(-boxes.confidence, kind="stable")[:MAX_CANDIDATES]
    boxes = boxes.take(order)
    return boxes.take(greedy_nms(boxes, options.iou, options.max_detections, agnostic=options.agnostic))


def greedy_nms(boxes: Boxes, iou: float, max_detections: int, *, agnostic: bool = False) -> Index:
    """Greedy non-maximum suppression.

    Args:
        boxes: Sorted, best first.
        iou: A box that overlaps a kept one by more than this is dropped.
        max_detections: Boxes kept at most.
        agnostic: Whether boxes of different classes suppress each other.

    Returns:
        int64 (kept,): indices of the kept boxes, best first.
    """
    everything = np.arange(len(boxes))
    groups = [everything] if agnostic else [everything[boxes.class_id == c] for c in np.unique(boxes.class_id)]
    kept = [group[_greedy_nms_of_group(boxes.xyxy[group], iou, max_detections)] for group in groups]
    return np.sort(np.concatenate([everything[:0], *kept]))[:max_detections]


def _greedy_nms_of_group(xyxy: Float, iou: float, max_detections: int) -> Index:
    """Greedy NMS of boxes (n, 4), best first, that all suppress each other."""
    left = np.arange(len(xyxy))
    areas = (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
    kept: list[int] = []
    while left.size and len(kept) < max_detections:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        left = left[~(_overlaps(xyxy[best], areas[best], xyxy[left], areas[left]) > np.float32(iou))]
    return np.array(kept, np.int64)


def _overlaps(box: Float, area: np.float32, others: Float, areas: Float) -> Float:
    """Intersection over union of one box with n others; boxes without area overlap nothing."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    np.maximum(sides, 0, out=sides)
    intersection = sides[:, 0] * sides[:, 1]
    with np.errstate(invalid="ignore"):
        overlaps: Float = intersection / (area + areas - intersection)
    return overlaps


def _select_classes(rows: Float, options: NmsOptions, mask_count: int) -> Boxes:
    """One box for each row's best class, or for all its classes, whose confidence is high enough."""
    classes = rows[:, BOX_VALUES : rows.shape[1] - mask_count]
    if options.multi_label:
        scores = classes * rows[:, 4:5]  # (n, classes)
        row, class_id = np.nonzero(scores > options.confidence)
        confidence = scores[row, class_id]
    else:
        class_id = classes.argmax(1)
        confidence = np.take_along_axis(classes, class_id[:, None], 1)[:, 0] * rows[:, 4]
        row = np.flatnonzero(confidence > options.confidence)
        class_id, confidence = class_id[row], confidence[row]
    coefficients = rows[row, rows.shape[1] - mask_count :] * rows[row, 4:5] if mask_count else None
    return Boxes(_corners(rows[row, :4]), confidence, class_id, coefficients)


def with_masks(boxes: Boxes, prototypes: Float, network_size: tuple[int, int]) -> Boxes:
    """Boxes with their masks in place of the coefficients.

    A mask is the sigmoid of the prototypes weighed by the coefficients, in the cells whose left upper corner is in the
    box (YOLOv5 utils/segment/general.py, process_mask and crop_mask). Only those are computed.

    Args:
        boxes: With coefficients, in network-input pixels.
        prototypes: float32 (prototypes, height, width) of the picture.
        network_size: Height and width of the network's input.
    """
    if boxes.coefficients is None:
        raise ValueError("boxes without mask coefficients have no masks")
    height, width = prototypes.shape[1:]
    scale = np.array((width / network_size[1], height / network_size[0]) * 2, np.float32)
    limits = np.array((width, height) * 2)
    corners = np.clip(np.ceil(boxes.xyxy * scale), 0, limits).astype(np.int64)  # first column and row, and their ends
    crops = (
        _mask_crop(weights, prototypes, corner)
        for weights, corner in zip(boxes.coefficients, corners.tolist(), strict=True)
    )
    return replace(boxes, coefficients=None, masks=tuple(crops))


def _mask_crop(weights: Float, prototypes: Float, corners: Sequence[int]) -> MaskCrop:
    """The mask of one object in the cells from the first two corners to before the last two."""
    left, top, right, bottom = corners
    grid = prototypes.shape[1], prototypes.shape[2]
    if left >= right or top >= bottom:
        return MaskCrop(np.zeros((0, 0), np.float32), 0, 0, grid)
    inside = prototypes[:, top:bottom, left:right]
    values = sigmoid(np.tensordot(weights, inside, 1))
    first_row, first_column = max(top - 1, 0), max(left - 1, 0)
    around = ((top - first_row, int(bottom < grid[0])), (left - first_column, int(right < grid[1])))
    return MaskCrop(np.pad(values, around), first_row, first_column, grid)


def _corners(xywh: Float) -> Float:
    """Centre, width and height (..., 4) as left, top, right, bottom."""
    half = xywh[..., 2:4] / 2
    return np.concatenate([xywh[..., :2] - half, xywh[..., :2] + half], -1)


def raw_threshold(confidence: float) -> float:
    """A raw value whose sigmoid is a little below `confidence`, to filter before the exact test.

    A little is four float32 steps at 1, since `sigmoid` rounds three times and the comparison once. A distance in raw
    values would not do: near 1 they are many to one sigmoid.
    """
    below = min(confidence, 1.0) - 4 * float(np.finfo(np.float32).eps)
    return float(np.log(below / (1 - below))) if below > 0 else -np.inf
