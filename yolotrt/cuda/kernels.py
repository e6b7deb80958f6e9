"""How the kernels of kernels/ are launched: geometry, arguments, buffer sizes and tables.

Nothing here knows a device library: a `Device` turns a source into a function and launches it, and memory is given as
addresses. So the same code drives CuPy, PyCUDA and the tests' host build.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.compile import Defines
from yolotrt.errors import InputError
from yolotrt.postprocess import BOX_VALUES, Boxes, NmsOptions
from yolotrt.preprocess import Letterbox
from yolotrt.weights.model import Anchors

Variant = Literal["best", "full"]
Bytes = npt.NDArray[np.uint8]

BEST_VALUES = 6
"""left, top, right, bottom, score, class."""

MAX_LEVELS = 4

_Dim3 = tuple[int, int, int]


class Device(Protocol):
    """What launching needs of a device library."""

    def function(self, source: str, entry: str, defines: Defines) -> Any:
        """Compile kernels/`source`.cu with `defines` and return its kernel `entry`."""
        ...

    def launch(
        self,
        function: Any,
        grid: _Dim3,
        block: _Dim3,
        arguments: Sequence[np.generic],
        stream: Any = None,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue a kernel on `stream`. Arguments are NumPy scalars of the parameters' sizes, pointers as uint64."""
        ...


# --- letterbox -------------------------------------------------------------------------------------------------------

_LETTERBOX_BLOCK = (32, 8, 1)
_CHANNELS = 3
_WEIGHT_ONE = np.float32(2048)
"""OpenCV's fixed-point one of uint8 resizing (INTER_RESIZE_COEF_BITS = 11)."""

_TAP = np.dtype([("first", np.int32), ("weight", np.int16), ("next_weight", np.int16)])
_PLAN = np.dtype(
    [
        ("pixels", np.uint64),
        ("pitch", np.int64),
        *((name, np.int32) for name in ("last_column", "last_row", "scaled_height", "scaled_width", "top", "left")),
    ]
)


def resize_taps(source: int, scaled: int, *, clamp: bool) -> npt.NDArray[np.void]:
    """Where OpenCV's uint8 INTER_LINEAR reads along one axis, and with which weights.

    The rule (OpenCV modules/imgproc/src/resize.cpp; 4.8, 4.10 and 5.0 agree): the scale is 1 / (scaled / source) in
    float64 with both roundings; the coordinate (i + 0.5) scale - 0.5 is rounded to float32 before its floor is taken;
    a weight is rounded half to even from float32. Columns beyond the border get the border pixel with the full weight,
    whereas rows keep their weights and only their indices are clamped by whoever reads them. Equal sizes and exact
    halving, which OpenCV treats apart, give the same bytes by this rule.

    Args:
        source: Pixels along the axis, at least 1.
        scaled: Pixels after resizing, at least 1.
        clamp: True for columns, False for rows.

    Returns:
        (scaled,) of `first` (int32 index, at least -1), `weight` and `next_weight` (int16, in 1/2048) of the pixel at
        `first` and of the one after it.
    """
    step = 1.0 / (scaled / source)
    coordinate = ((np.arange(scaled) + 0.5) * step - 0.5).astype(np.float32)
    first = np.floor(coordinate)
    fraction = coordinate - first
    if clamp:
        fraction[(first < 0) | (first >= source - 1)] = 0
        first = np.clip(first, 0, source - 1)
    taps = np.empty(scaled, _TAP)
    taps["first"] = first
    taps["weight"] = np.rint((1 - fraction) * _WEIGHT_ONE)
    taps["next_weight"] = np.rint(fraction * _WEIGHT_ONE)
    return taps


class LetterboxKernel:
    """Launches letterbox.cu: frames to the network's input, `[batch, 3, height, width]`, RGB in 0..1.

    Attributes:
        network_size: Height and width of the network's input.
        plan_bytes: Size of one slot's plan; the plans of a batch lie one after the other, 16-byte aligned.
    """

    def __init__(self, device: Device, network_size: tuple[int, int], *, half: bool) -> None:
        self.network_size = network_size
        size = _PLAN.itemsize + _TAP.itemsize * sum(network_size)
        self.plan_bytes = -(-size // 16) * 16
        self._device = device
        self._function = device.function("letterbox", "letterbox", {"HALF_OUTPUT": int(half)})

    def plan(self, source_size: tuple[int, int], pixels: int, pitch: int) -> Bytes:
        """Everything that the kernel needs to know of one frame.

        Args:
            source_size: Height and width of the frame.
            pixels: Device address of its first byte; uint8 BGR.
            pitch: Bytes from one row to the next, at least 3 x width.

        Returns:
            uint8 (plan_bytes,), to be copied to the slot's plan on the device.

        Raises:
            InputError: if the rows would overlap.
        """
        height, width = source_size
        if pitch < _CHANNELS * width:
            raise InputError(f"a frame {width} pixels wide cannot have {pitch} bytes a row: give the pitch in bytes")
        fit = Letterbox.fit(source_size, self.network_size)
        header = np.zeros((), _PLAN)
        header["pixels"], header["pitch"] = pixels, pitch
        header["last_column"], header["last_row"] = _CHANNELS * (width - 1), height - 1
        header["scaled_height"], header["scaled_width"] = fit.scaled_size
        header["top"], header["left"] = fit.top, fit.left
        columns = resize_taps(width, fit.scaled_size[1], clamp=True)
        columns["first"] *= _CHANNELS
        rows = resize_taps(height, fit.scaled_size[0], clamp=False)
        content = header.tobytes() + columns.tobytes() + rows.tobytes()
        return np.frombuffer(content.ljust(self.plan_bytes, b"\0"), np.uint8)

    def launch(self, plans: int, output: int, batch: int, stream: Any = None) -> None:
        """Fill the first `batch` slots of the input at `output`, following the plans at `plans`."""
        height, width = self.network_size
        columns, rows, _ = _LETTERBOX_BLOCK
        grid = (-(-width // columns), -(-height // rows), batch)
        arguments = (np.uint64(plans), np.int32(self.plan_bytes), np.int32(height), np.int32(width), np.uint64(output))
        self._device.launch(self._function, grid, _LETTERBOX_BLOCK, arguments, stream)


# --- YoloLayer -------------------------------------------------------------------------------------------------------

YOLOLAYER_ROWS = 32
"""Rows of one picture that a block of yololayer.cu makes."""

YOLOLAYER_BLOCK = (256, 1, 1)


def yololayer_defines(
    anchors: Anchors, strides: Sequence[int], class_count: int, variant: Variant, *, half: bool
) -> dict[str, int | str]:
    """The macros of yololayer.cu.

    Args:
        anchors: Per level, per anchor: width and height in network-input pixels.
        strides: Network-input pixels per cell, by level.
        class_count: Number of classes.
        variant: Form of the rows.
        half: Whether the heads are float16 rather than float32.

    Raises:
        InputError: if there are more levels than the kernel has parameters for.
    """
    if not 1 <= len(anchors) <= MAX_LEVELS or len(anchors) != len(strides):
        raise InputError(
            f"{len(anchors)} detection levels and {len(strides)} strides: YoloLayer takes 1 to {MAX_LEVELS} levels"
        )
    return {
        "LEVELS": len(anchors),
        "ANCHORS": len(anchors[0]),
        "ANCHOR_SIZES": ", ".join(_literal(side) for level in anchors for anchor in level for side in anchor),
        "STRIDES": ", ".join(_literal(stride) for stride in strides),
        "NC": class_count,
        "HALF_HEADS": int(half),
        "FULL_ROWS": int(variant == "full"),
    }


def yololayer_grid(rows: int, batch: int) -> _Dim3:
    """Blocks of yololayer.cu for `rows` rows a picture."""
    return -(-rows // YOLOLAYER_ROWS), batch, 1


class YoloLayerKernel:
    """Launches yololayer.cu: raw heads to dense rows.

    Attributes:
        row_values: Values a row has: 6 (`best`) or 5 + classes (`full`).
    """

    def __init__(
        self,
        device: Device,
        anchors: Anchors,
        strides: Sequence[int],
        class_count: int,
        variant: Variant,
        *,
        half: bool,
    ) -> None:
        defines = yololayer_defines(anchors, strides, class_count, variant, half=half)
        self.row_values = BEST_VALUES if variant == "best" else BOX_VALUES + class_count
        self._anchors = len(anchors[0])
        self._device = device
        self._function = device.function("yololayer", "yololayer", defines)

    def row_count(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Rows a picture has with heads of these heights and widths."""
        return self._anchors * sum(height * width for height, width in sizes)

    def launch(
        self, heads: Sequence[int], sizes: Sequence[tuple[int, int]], batch: int, output: int, stream: Any = None
    ) -> None:
        """Decode `batch` pictures.

        Args:
            heads: Addresses of the levels' heads, [batch, anchors x (5 + classes), height, width].
            sizes: Height and width of every level.
            batch: Pictures.
            output: Address of float32 [batch, rows, row_values].
            stream: Where to enqueue.
        """
        cells = (np.int32(side) for size in sizes for side in size)
        arguments = (*map(np.uint64, heads), np.int32(batch), *cells, np.uint64(output))
        grid = yololayer_grid(self.row_count(sizes), batch)
        self._device.launch(self._function, grid, YOLOLAYER_BLOCK, arguments, stream)


# --- non-maximum suppression -----------------------------------------------------------------------------------------

_FILTER_THREADS = 256
_ALIGNMENT = 256
"""Of parts of a buffer, in bytes; what device allocators give."""


@dataclass(frozen=True)
class NmsLayout:
    """How the buffers of nms.cu are divided, in bytes.

    Attributes:
        batch: Pictures.
        rows: Rows a picture has.
        max_detections: Boxes kept at most.
        threads: Threads of the selecting block.
    """

    batch: int
    rows: int
    max_detections: int
    threads: int = 1024

    @property
    def segment_rows(self) -> int:
        """Rows that one block filters: as few as leave a picture no more segments than the selecting block threads."""
        return _FILTER_THREADS * -(-self.rows // (_FILTER_THREADS * self.threads))

    @property
    def segments(self) -> int:
        """Segments a picture has."""
        return -(-self.rows // self.segment_rows)

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory: two arrays of keys and the segments' counts. It needs no initialisation."""
        return 2 * self._keys_bytes + _aligned(4 * self.batch * self.segments)

    @property
    def sorted_offset(self) -> int:
        """Where in the scratch memory the second array of keys begins."""
        return self._keys_bytes

    @property
    def counts_offset(self) -> int:
        """Where in the scratch memory the segments' counts begin."""
        return 2 * self._keys_bytes

    @property
    def output_bytes(self) -> int:
        """The result: counts, then boxes, in one piece so that one copy fetches both."""
        return self.detections_offset + 4 * BEST_VALUES * self.batch * self.max_detections

    @property
    def detections_offset(self) -> int:
        """Where in the result the boxes begin."""
        return _aligned(4 * self.batch)

    @property
    def _keys_bytes(self) -> int:
        return _aligned(8 * self.batch * self.segments * self.segment_rows)

    def detections(self, output: Bytes) -> list[Boxes]:
        """The boxes of every picture.

        Args:
            output: uint8 (output_bytes,), copied from the device.

        Returns:
            Per picture the boxes in network-input pixels, best first; copies, independent of `output`.
        """
        counts = output[: 4 * self.batch].view(np.int32)
        end = self.detections_offset + 4 * BEST_VALUES * self.batch * self.max_detections
        rows = output[self.detections_offset : end].view(np.float32).reshape(self.batch, -1, BEST_VALUES)
        return [_boxes(picture[:count].copy()) for picture, count in zip(rows, counts, strict=True)]


class NmsKernel:
    """Launches nms.cu: rows of `YoloLayerKernel` (`best`) to detections.

    Attributes:
        layout: Sizes of the buffers.
    """

    def __init__(self, device: Device, layout: NmsLayout, options: NmsOptions) -> None:
        """Prepare the launches.

        Raises:
            InputError: if a threshold is outside 0..1 or `options` ask for several labels a box.
        """
        if not (0 <= options.confidence <= 1 and 0 <= options.iou <= 1):
            raise InputError(
                f"confidence {options.confidence} and iou {options.iou} must be in 0..1: give them as fractions"
            )
        if options.multi_label:
            raise InputError("the GPU keeps one label a box: suppress multi-label boxes on the CPU")
        self.layout = layout
        self._options = options
        self._device = device
        defines = {"THREADS": layout.threads}
        self._filter = device.function("nms", "nms_filter", defines)
        self._select = device.function("nms", "nms_select", defines)

    @staticmethod
    def class_mask(options: NmsOptions, class_count: int) -> Bytes | None:
        """uint8 (classes,), 1 for every class to keep, to be copied to the device; None if all are kept."""
        if options.classes is None:
            return None
        mask = np.zeros(class_count, np.uint8)
        mask[[index for index in options.classes if 0 <= index < class_count]] = 1
        return mask

    def launch(self, rows: int, workspace: int, output: int, class_mask: int = 0, stream: Any = None) -> None:
        """Select the detections of a batch.

        Args:
            rows: Address of float32 [batch, rows, 6].
            workspace: Address of `layout.workspace_bytes` bytes.
            output: Address of `layout.output_bytes` bytes.
            class_mask: Address of a `class_mask`, or 0.
            stream: Where to enqueue.
        """
        layout, options = self.layout, self._options
        keys = np.uint64(workspace)
        counts = np.uint64(workspace + layout.counts_offset)
        shape = np.int32(layout.rows), np.int32(layout.segments), np.int32(layout.segment_rows)
        self._device.launch(
            self._filter,
            (layout.segments, layout.batch, 1),
            (_FILTER_THREADS, 1, 1),
            (np.uint64(rows), np.uint64(class_mask), shape[0], shape[2], np.float32(options.confidence), keys, counts),
            stream,
        )
        arguments = (
            *(np.uint64(rows), *shape, keys, np.uint64(workspace + layout.sorted_offset), counts),
            *(np.float32(options.iou), np.int32(options.agnostic), np.int32(layout.max_detections)),
            *(np.uint64(output), np.uint64(output + layout.detections_offset)),
        )
        self._device.launch(self._select, (layout.batch, 1, 1), (layout.threads, 1, 1), arguments, stream)


def _boxes(rows: npt.NDArray[np.float32]) -> Boxes:
    return Boxes(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _literal(value: float) -> str:
    """A C float literal that is exactly the float32 nearest to `value`."""
    return f"{float(np.float32(value))!r}f"
