"""The kernels against their CPU reference, on whatever device a `Machine` has; pytest is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import cv2
import numpy as np

from yolotrt.cuda.kernels import (
    BEST_VALUES,
    KEEP_ALL_ROWS,
    CopyKernel,
    Device,
    LetterboxKernel,
    MaskKernel,
    MaskLayout,
    NmsKernel,
    NmsLayout,
    UploadKernel,
    Variant,
    YoloLayerKernel,
    upload_bytes,
)
from yolotrt.postprocess import (
    MAX_CANDIDATES,
    Boxes,
    MaskCrop,
    NmsOptions,
    YoloLayer,
    greedy_nms,
    non_max_suppression,
    with_masks,
)
from yolotrt.preprocess import Letterbox

COCO_ANCHORS = (
    ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)
COCO_STRIDES = (8, 16, 32)


class Machine(Protocol):
    """A device and its memory."""

    device: Device

    def upload(self, array: np.ndarray) -> Any: ...

    def page_lock(self, array: np.ndarray) -> Any:
        """A copy in host memory that kernels read and write."""
        ...

    def address(self, buffer: Any) -> int: ...

    def download(self, buffer: Any) -> np.ndarray: ...


# --- letterbox -------------------------------------------------------------------------------------------------------


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise, or black and white noise, whose extremes show every rounding."""
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return (pixels > 127).astype(np.uint8) * 255 if rng.random() < 0.3 else pixels


def letterbox_case(rng: np.random.Generator, largest: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Random sizes of a network and a frame: up and down, halving, equal sides, one-pixel sides, extreme aspects."""
    network = tuple(int(side) for side in rng.integers(8, largest, 2))
    kind = rng.integers(8)
    frame = [int(side) for side in rng.integers(1, 3 * largest, 2)]
    if kind == 0:
        frame = [2 * side for side in network]
    elif kind == 1:
        frame = list(network)
    elif kind == 2:
        frame[rng.integers(2)] = 1
    elif kind == 3:
        frame = [int(side) for side in rng.integers(1, 12, 2)]
    elif kind == 4:
        frame[0] = network[0]
    return (network[0], network[1]), (frame[0], frame[1])


def letterbox_differences(
    machine: Machine, network: tuple[int, int], frames: Sequence[np.ndarray], *, half: bool, padding: int = 0
) -> int:
    """Values of the kernel's output that are not those of the CPU, bit for bit."""
    kernel = LetterboxKernel(machine.device, network, half=half)
    kind = np.float16 if half else np.float32
    buffers, plans = [], []
    for frame in frames:
        rows = np.full((frame.shape[0], frame.shape[1] * 3 + padding), 77, np.uint8)
        rows[:, : frame.shape[1] * 3] = frame.reshape(frame.shape[0], -1)
        # the last row's padding is not there, so that reading it is an error that a memory checker sees
        buffers.append(machine.upload(rows.ravel()[: rows.size - padding]))
        plans.append(kernel.plan(frame.shape[:2], machine.address(buffers[-1]), rows.shape[1]))
    plan_buffer = machine.upload(np.concatenate(plans))
    output = machine.upload(np.full((len(frames), 3, *network), -1, kind))
    kernel.launch(machine.address(plan_buffer), machine.address(output), len(frames))
    return _differences(machine.download(output), network, frames)


def _differences(output: np.ndarray, network: tuple[int, int], frames: Sequence[np.ndarray]) -> int:
    """Values of a network's input that are not those of the CPU, bit for bit."""
    expected = np.empty((len(frames), 3, *network), np.float32)
    for frame, slot in zip(frames, expected, strict=True):
        Letterbox.fit(frame.shape[:2], network).to_input(np.ascontiguousarray(frame), slot)
    bits = np.uint16 if output.dtype == np.float16 else np.uint32
    return int((output.view(bits) != expected.astype(output.dtype).view(bits)).sum())


def uploaded_letterbox_differences(
    machine: Machine, network: tuple[int, int], frames: Sequence[np.ndarray], *, half: bool, gathered: bool
) -> int:
    """Values that differ from the CPU's, where upload.cu fetches the frames, plus bytes fetched beside their room.

    Args:
        machine: The device.
        network: Height and width of the network's input.
        frames: uint8 BGR pictures.
        half: Whether the input is float16.
        gathered: Whether only the needed rows are there, side by side.
    """
    kernel, upload = LetterboxKernel(machine.device, network, half=half), UploadKernel(machine.device)
    sources, rooms, plans = [], [], []
    for frame in frames:
        size, rows = frame.shape[:2], kernel.needed_rows(frame.shape[:2])
        there = frame if rows.numbers is None or not gathered else frame[rows.numbers]
        # what is behind a frame may be fetched as padding, but must not reach the picture
        sources.append(machine.page_lock(np.pad(there.ravel(), (0, upload_bytes(there.size) - there.size), "edge")))
        room = upload_bytes(rows.count * 3 * frame.shape[1])
        rooms.append(machine.upload(np.full(room + SENTINEL.size, SENTINEL[0], np.uint8)))
        addresses = machine.address(rooms[-1]), machine.address(sources[-1])
        plans.append(kernel.upload_plan(size, *addresses, gathered=gathered))
    plan_buffer = machine.upload(np.concatenate(plans))
    output = machine.upload(np.full((len(frames), 3, *network), -1, np.float16 if half else np.float32))
    upload.launch(machine.address(plan_buffer), kernel.plan_bytes, len(frames))
    kernel.launch(machine.address(plan_buffer), machine.address(output), len(frames))
    beside = sum(int((machine.download(room)[-SENTINEL.size :] != SENTINEL).sum()) for room in rooms)
    return beside + _differences(machine.download(output), network, frames)


def copied_differences(machine: Machine, content: np.ndarray) -> int:
    """Bytes that copy.cu brings to the device and back wrongly, or writes behind the end; a multiple of 16 of them."""
    copy = CopyKernel(machine.device)
    device = machine.upload(np.full(content.size + SENTINEL.size, SENTINEL[0], np.uint8))
    back = machine.page_lock(np.full(content.size + SENTINEL.size, SENTINEL[0], np.uint8))
    source = machine.page_lock(content)
    copy.launch(machine.address(device), machine.address(source), content.size)
    copy.launch(machine.address(back), machine.address(device), content.size)
    expected = np.concatenate((content, SENTINEL))
    return sum(int((machine.download(buffer) != expected).sum()) for buffer in (device, back))


SENTINEL = np.full(64, 0xA5, np.uint8)
"""Stands behind the room that a frame is fetched into."""


def resize_differences(
    rng: np.random.Generator, machine: Machine, frame: tuple[int, int], scaled: tuple[int, int]
) -> int:
    """Bytes that differ from cv2.resize itself, where the picture fills the network's input in both directions."""
    pixels = picture(rng, *frame)
    kernel = LetterboxKernel(machine.device, scaled, half=False)
    buffer, output = machine.upload(pixels), machine.upload(np.zeros((3, *scaled), np.float32))
    plan_buffer = machine.upload(kernel.plan(frame, machine.address(buffer), 3 * frame[1]))
    kernel.launch(machine.address(plan_buffer), machine.address(output), 1)
    result = np.rint(machine.download(output)[::-1].transpose(1, 2, 0) * 255).astype(np.uint8)
    return int((result != cv2.resize(pixels, scaled[::-1], interpolation=cv2.INTER_LINEAR)).sum())


# --- YoloLayer -------------------------------------------------------------------------------------------------------


def random_heads(
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]],
    anchors: int,
    class_count: int,
    batch: int,
    *,
    half: bool,
) -> list[np.ndarray]:
    """Raw heads as a network gives them: float32 or float16 (batch, anchors x (5 + classes), height, width)."""
    kind = np.float16 if half else np.float32
    shape = anchors * (5 + class_count)
    return [(rng.standard_normal((batch, shape, *size)) * 3 - 2).astype(kind) for size in sizes]


def decode(
    machine: Machine,
    heads: Sequence[np.ndarray],
    layer: YoloLayer,
    variant: Variant,
    least_objectness: float = KEEP_ALL_ROWS,
) -> np.ndarray:
    """What yololayer.cu makes of the heads."""
    anchors = tuple(tuple((float(w), float(h)) for w, h in level) for level in layer.anchors)
    half = heads[0].dtype == np.float16
    kernel = YoloLayerKernel(machine.device, anchors, layer.strides, layer.class_count, variant, half=half)
    sizes = [head.shape[2:] for head in heads]
    batch = heads[0].shape[0]
    buffers = [machine.upload(head) for head in heads]
    output = machine.upload(np.full((batch, kernel.row_count(sizes), kernel.row_values), np.nan, np.float32))
    addresses = [machine.address(buffer) for buffer in buffers]
    kernel.launch(addresses, sizes, batch, machine.address(output), least_objectness=least_objectness)
    return machine.download(output)


def decode_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest deviation of full or best rows, in units of float32's last place at the row's largest side.

    A coordinate is computed from values as large as the row's centre and size, so their last place is its own.
    """
    scale = np.abs(expected[..., :4]).max(-1, keepdims=True)
    boxes = np.abs(actual[..., :4] - expected[..., :4]) / np.spacing(np.maximum(scale, 1).astype(np.float32))
    rest = np.abs(actual[..., 4:] - expected[..., 4:]) / np.spacing(np.maximum(np.abs(expected[..., 4:]), 1e-30))
    return float(max(boxes.max(), rest.max()))


# --- masks -----------------------------------------------------------------------------------------------------------


def detect_masks(
    machine: Machine,
    layer: YoloLayer,
    heads: Sequence[np.ndarray],
    prototypes: np.ndarray,
    options: NmsOptions,
    network: tuple[int, int],
    **layout_options: int,
) -> tuple[list[Boxes], list[tuple[MaskCrop, ...] | None]]:
    """YoloLayer, NMS and masks on the device: each picture's boxes and crops."""
    anchors = tuple(tuple((float(w), float(h)) for w, h in level) for level in layer.anchors)
    batch, half, sizes = len(prototypes), heads[0].dtype == np.float16, [head.shape[2:] for head in heads]
    decoder = YoloLayerKernel(
        machine.device, anchors, layer.strides, layer.class_count, "best", half=half, mask_count=layer.mask_count
    )
    nms = NmsLayout(batch, decoder.row_count(sizes), options.max_detections)
    layout = MaskLayout(nms, layer.mask_count, prototypes.shape[2:], network, **layout_options)
    suppression = NmsKernel(machine.device, nms, options, keeps_rows=True)
    kernel = MaskKernel(machine.device, layout, len(anchors[0]), layer.class_count, half=half)
    buffers = [machine.upload(head) for head in heads]
    planes = machine.upload(prototypes)
    rows = machine.upload(np.zeros((batch, nms.rows, BEST_VALUES), np.float32))
    workspace, output, crops = (
        machine.upload(np.full(size, 0xA5, np.uint8))
        for size in (nms.workspace_bytes, nms.output_bytes, layout.crops_bytes)
    )
    host_crops, cells = (
        machine.page_lock(np.full(size, 0xA5, np.uint8))
        for size in (layout.crops_bytes, layout.cells_bytes + SENTINEL.size)
    )
    kept_rows = machine.upload(np.full((batch, options.max_detections), 7, np.int32))
    addresses = [machine.address(buffer) for buffer in buffers]
    levels = machine.upload(MaskKernel.levels(addresses, sizes))
    decoder.launch(addresses, sizes, batch, machine.address(rows))
    suppression.launch(*map(machine.address, (rows, workspace, output)), kept_rows=machine.address(kept_rows))
    kernel.launch_crops(*map(machine.address, (rows, kept_rows, crops, host_crops)))
    kernel.launch_cells(*map(machine.address, (levels, planes, rows, kept_rows, crops, cells)))
    found = nms.detections(machine.download(output))
    table, values = machine.download(host_crops), machine.download(cells)
    assert (values[layout.cells_bytes :] == SENTINEL).all(), "cells were written beside their room"
    return found, [layout.crops(table, values, picture, len(boxes)) for picture, boxes in enumerate(found)]


def mask_case(
    rng: np.random.Generator,
    *,
    classes: int,
    masks: int,
    half: bool,
    batch: int = 3,
    network: tuple[int, int] = (96, 160),
) -> tuple[YoloLayer, list[np.ndarray], np.ndarray]:
    """A layer, and heads and prototypes as a network for segmentation gives them."""
    layer = YoloLayer(COCO_ANCHORS, COCO_STRIDES, classes, masks)
    kind = np.float16 if half else np.float32
    sizes = [(network[0] // stride, network[1] // stride) for stride in COCO_STRIDES]
    heads = [(rng.standard_normal((batch, 3 * layer.row_values, *size)) * 1.5).astype(kind) for size in sizes]
    return layer, heads, rng.standard_normal((batch, masks, network[0] // 4, network[1] // 4)).astype(kind)


def expected_masks(
    layer: YoloLayer,
    heads: Sequence[np.ndarray],
    prototypes: np.ndarray,
    options: NmsOptions,
    network: tuple[int, int],
) -> list[Boxes]:
    """The CPU's boxes with their masks."""
    rows = layer.candidates([head.astype(np.float32) for head in heads], options.confidence)
    return [
        with_masks(non_max_suppression(candidates, options, layer.mask_count), planes.astype(np.float32), network)
        for candidates, planes in zip(rows, prototypes, strict=True)
    ]


def masks_of_found(
    layer: YoloLayer,
    heads: Sequence[np.ndarray],
    prototypes: np.ndarray,
    found: Sequence[Boxes],
    network: tuple[int, int],
) -> list[Boxes]:
    """Boxes of a device with the CPU's masks: which of two nearly equal boxes NMS takes does not matter."""
    decoded = layer.best([head.astype(np.float32) for head in heads])  # (batch, rows, 6 + coefficients)
    masked = []
    for rows, boxes, planes in zip(decoded, found, prototypes, strict=True):
        own = np.column_stack([boxes.xyxy, boxes.confidence, boxes.class_id])  # (detections, 6)
        nearest = np.array([np.abs(rows[:, :BEST_VALUES] - one).sum(1).argmin() for one in own], np.int64)
        weighed = replace(boxes, coefficients=rows[nearest, BEST_VALUES:])
        masked.append(with_masks(weighed, planes.astype(np.float32), network))
    return masked


def crops_error(actual: Sequence[MaskCrop], expected: Sequence[MaskCrop]) -> float:
    """The largest deviation of the values; infinite if the crops do not lie where they should."""
    if len(actual) != len(expected):
        return np.inf
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        same_place = (one.top, one.left, one.grid_size) == (other.top, other.left, other.grid_size)
        if not same_place or one.values.shape != other.values.shape:
            return np.inf
        worst = max(worst, float(np.abs(one.values - other.values).max(initial=0)))
    return worst


# --- non-maximum suppression -----------------------------------------------------------------------------------------


def nms_rows(rng: np.random.Generator, batch: int, count: int, *, classes: int, crowded: bool) -> np.ndarray:
    """Random `best` rows; crowded ones have few distinct corners and scores, so that everything ties."""
    rows = np.empty((batch, count, BEST_VALUES), np.float32)
    if crowded:
        rows[..., :2] = rng.integers(0, 12, (batch, count, 2)) * 4
        rows[..., 2:4] = rows[..., :2] + rng.integers(0, 6, (batch, count, 2)) * 4  # some without area
        rows[..., 4] = rng.integers(0, 9, (batch, count)) / np.float32(8)
    else:
        centre, side = rng.random((batch, count, 2)) * 640, rng.random((batch, count, 2)) ** 2 * 200
        rows[..., :2], rows[..., 2:4] = centre - side / 2, centre + side / 2
        rows[..., 4] = rng.random((batch, count)) ** 3
    rows[..., 5] = rng.integers(0, classes, (batch, count))
    return rows


def suppress(
    machine: Machine, rows: np.ndarray, options: NmsOptions, *, classes: int, threads: int = 1024
) -> list[Boxes]:
    """What nms.cu makes of `best` rows; its memory is dirty before."""
    layout = NmsLayout(rows.shape[0], rows.shape[1], options.max_detections, threads)
    kernel = NmsKernel(machine.device, layout, options)
    mask = NmsKernel.class_mask(options, classes)
    row_buffer, mask_buffer = machine.upload(rows), None if mask is None else machine.upload(mask)
    workspace = machine.upload(np.full(layout.workspace_bytes, 0xA5, np.uint8))
    output = machine.upload(np.full(layout.output_bytes, 0xA5, np.uint8))
    mask_address = 0 if mask_buffer is None else machine.address(mask_buffer)
    kernel.launch(machine.address(row_buffer), machine.address(workspace), machine.address(output), mask_address)
    return layout.detections(machine.download(output))


def expected_suppression(rows: np.ndarray, options: NmsOptions) -> Boxes:
    """The CPU's answer for the `best` rows of one picture."""
    rows = rows[rows[:, 4] > np.float32(options.confidence)]
    if options.classes is not None:
        rows = rows[np.isin(rows[:, 5], options.classes)]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")[:MAX_CANDIDATES]]
    boxes = Boxes(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))
    return boxes.take(greedy_nms(boxes, options.iou, options.max_detections, agnostic=options.agnostic))


def nms_case(rng: np.random.Generator, most_rows: int) -> tuple[np.ndarray, NmsOptions, int]:
    """Random rows, options and class count."""
    classes = int(rng.choice([1, 2, 5, 80]))
    crowded = bool(rng.random() < 0.6)
    count = int(rng.choice([1, 2, 31, 255, 256, 257, 512, 513, 1024, int(rng.integers(1, most_rows))]))
    rows = nms_rows(rng, int(rng.integers(1, 4)), count, classes=classes, crowded=crowded)
    options = NmsOptions(
        confidence=float(rng.choice([0.0, 0.25, 0.5, 0.99, 1.0])),
        iou=float(rng.choice([0.0, 0.25, 0.45, 0.5, 1.0])),
        max_detections=int(rng.choice([0, 1, 10, 300, 1000])),
        classes=None if rng.random() < 0.7 else tuple(int(c) for c in rng.integers(0, classes, 2)),
        agnostic=bool(rng.random() < 0.3),
    )
    return rows, options, classes


def exact_overlap_case(rng: np.random.Generator) -> tuple[np.ndarray, NmsOptions]:
    """Two boxes whose overlap is exactly the threshold, as float32 operations in the reference's order give it."""
    first = rng.uniform(0, 300, 4).astype(np.float32)
    first[2:] += first[:2] + 50
    second = first + rng.uniform(-20, 20, 4).astype(np.float32)
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    intersection = sides[0] * sides[1]
    overlap = intersection / (areas[0] + areas[1] - intersection)
    rows = np.array([[[*first, 0.9, 0], [*second, 0.8, 0]]], np.float32)
    return rows, NmsOptions(iou=float(overlap), max_detections=10)


def same_boxes(actual: Boxes, expected: Boxes) -> bool:
    """Whether boxes, scores, classes and their order are equal, bit for bit."""
    return (
        np.array_equal(actual.xyxy, expected.xyxy)
        and np.array_equal(actual.confidence, expected.confidence)
        and np.array_equal(actual.class_id, expected.class_id)
    )
