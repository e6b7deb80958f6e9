"""How the kernels of kernels/ are launched: geometry, arguments, buffer sizes and tables.

Nothing here knows a device library: a `Device` turns a source into a function and launches it, and memory is given as
addresses. So the same code drives CuPy, PyCUDA and the tests' host build.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.compile import Defines
from yolotrt.cuda.device import Lines
from yolotrt.errors import InputError
from yolotrt.postprocess import BOX_VALUES, Boxes, MaskCrop, NmsOptions
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
        ("source", np.uint64),
        ("source_pitch", np.int64),
        *((name, np.int32) for name in ("row_bytes", "row_count", "is_listed", "unused")),
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


@dataclass(frozen=True, eq=False)
class NeededRows:
    """The rows of a frame that the letterbox reads, which are all that has to reach the GPU.

    Attributes:
        count: Number of rows.
        numbers: int32 (count,): which ones, repeated where two scaled rows read the same; None for the first `count`.
        taps: The taps of `resize_taps`, as they are when only these rows are there, side by side.
    """

    count: int
    numbers: npt.NDArray[np.int32] | None
    taps: npt.NDArray[np.void]

    @classmethod
    def all(cls, source: int, scaled: int) -> NeededRows:
        """All rows of a frame `source` rows high that becomes `scaled` rows."""
        return cls(source, None, resize_taps(source, scaled, clamp=False))

    @classmethod
    def of(cls, source: int, scaled: int) -> NeededRows:
        """The rows that are read, where they are fewer.

        A reduction by an odd whole number reads one row for each scaled one, another by more than two reads two.
        """
        everything = cls.all(source, scaled)
        taps = everything.taps.copy()
        each = 1 if not taps["next_weight"].any() else 2
        if each * scaled >= source:
            return everything
        numbers = taps["first"][:, None] + np.arange(each, dtype=np.int32)  # (scaled, each)
        taps["first"] = np.arange(scaled) * each
        return cls(each * scaled, np.clip(numbers, 0, source - 1).ravel(), taps)

    @functools.cached_property
    def lines(self) -> tuple[int, Lines] | None:
        """The same as equally long lines at equal distances, counted in rows, which a copy command can fetch.

        Rows before the first line, and the lines; None if the rows are not that regular.
        """
        if self.numbers is None:
            return 0, Lines(self.count, self.count, 1)
        first = self.numbers[0]
        steps = np.diff(self.numbers)
        each = 1 + int(np.argmax(steps != 1)) if (steps != 1).any() else self.count  # neighbours in a line
        if self.count % each:
            return None
        starts = self.numbers[::each]
        apart = int(starts[1] - starts[0]) if len(starts) > 1 else each
        regular = first + apart * np.arange(len(starts))[:, None] + np.arange(each)
        if apart < each or not np.array_equal(self.numbers, regular.ravel()):
            return None
        return int(first), Lines(each, apart, len(starts))


def needed_lines(source_size: tuple[int, int], network_size: tuple[int, int]) -> tuple[int, Lines] | None:
    """What of a frame without gaps between its rows a copy command has to fetch.

    Returns:
        Bytes before the first line, and the lines; None if its needed rows are not regular.
    """
    in_rows = needed_rows(source_size, network_size).lines
    if in_rows is None:
        return None
    row_bytes, (before, lines) = _CHANNELS * source_size[1], in_rows
    return before * row_bytes, Lines(lines.size * row_bytes, lines.pitch * row_bytes, lines.count)


@functools.lru_cache(maxsize=64)
def needed_rows(source_size: tuple[int, int], network_size: tuple[int, int]) -> NeededRows:
    """What of a frame the letterbox reads; sizes are height and width."""
    return NeededRows.of(source_size[0], Letterbox.fit(source_size, network_size).scaled_size[0])


class LetterboxKernel:
    """Launches letterbox.cu: frames to the network's input, `[batch, 3, height, width]`, RGB in 0..1.

    Attributes:
        network_size: Height and width of the network's input.
        plan_bytes: Size of one slot's plan; the plans of a batch lie one after the other, 16-byte aligned. A plan of
            zeros makes a slot of padding.
    """

    def __init__(self, device: Device, network_size: tuple[int, int], *, half: bool) -> None:
        self.network_size = network_size
        # listed rows are at most two for each scaled one
        size = _PLAN.itemsize + _TAP.itemsize * sum(network_size) + 2 * 4 * network_size[0]
        self.plan_bytes = upload_bytes(size)
        self._device = device
        self._function = device.function("letterbox", "letterbox", {"HALF_OUTPUT": int(half)})

    def needed_rows(self, source_size: tuple[int, int]) -> NeededRows:
        """What of a frame (height, width) the letterbox reads."""
        return needed_rows(source_size, self.network_size)

    def needed_lines(self, source_size: tuple[int, int]) -> tuple[int, Lines] | None:
        """The same for a copy command; see `needed_lines`."""
        return needed_lines(source_size, self.network_size)

    def plan(self, source_size: tuple[int, int], pixels: int, pitch: int) -> Bytes:
        """Everything that the kernel needs to know of one frame in device memory.

        Args:
            source_size: Height and width of the frame.
            pixels: Device address of its first byte; uint8 BGR.
            pitch: Bytes from one row to the next, at least 3 x width.

        Returns:
            uint8 (plan_bytes,), to be copied to the slot's plan on the device.

        Raises:
            InputError: if the rows would overlap.
        """
        if pitch < _CHANNELS * source_size[1]:
            raise InputError(
                f"a frame {source_size[1]} pixels wide cannot have {pitch} bytes a row: give the pitch in bytes"
            )
        return self._plan(source_size, "whole", pixels=pixels, pitch=pitch)

    def upload_plan(self, source_size: tuple[int, int], pixels: int, source: int, *, gathered: bool) -> Bytes:
        """The same for a frame in page-locked host memory, whose needed rows `UploadKernel` fetches.

        Args:
            source_size: Height and width of the frame.
            pixels: Device address of room for the needed rows, `upload_bytes` of their size.
            source: Address of the frame, whose rows have no gaps; its memory has `upload_bytes` of their size too.
            gathered: Whether only the needed rows are there, side by side, instead of all.

        Returns:
            As `plan`.
        """
        return self._plan(source_size, "gathered" if gathered else "needed", pixels=pixels, source=source)

    def uploaded_plan(self, source_size: tuple[int, int], pixels: int) -> Bytes:
        """The same for a frame whose needed rows come to `pixels`, side by side, in another way."""
        return self._plan(source_size, "uploaded", pixels=pixels)

    @staticmethod
    def header(plan: Bytes) -> npt.NDArray[np.void]:
        """A view of a plan, whose ``pixels``, ``source`` and ``pitch`` may change for a frame of the same size."""
        return plan[: _PLAN.itemsize].view(_PLAN)

    def launch(self, plans: int, output: int, batch: int, stream: Any = None) -> None:
        """Fill the first `batch` slots of the input at `output`, following the plans at `plans`."""
        height, width = self.network_size
        columns, rows, _ = _LETTERBOX_BLOCK
        grid = (-(-width // columns), -(-height // rows), batch)
        arguments = (np.uint64(plans), np.int32(self.plan_bytes), np.int32(height), np.int32(width), np.uint64(output))
        self._device.launch(self._function, grid, _LETTERBOX_BLOCK, arguments, stream)

    def _plan(self, source_size: tuple[int, int], kind: _PlanKind, **addresses: int) -> Bytes:
        content = _plan_without_addresses(source_size, self.network_size, kind)
        plan = np.frombuffer(bytearray(content.ljust(self.plan_bytes, b"\0")), np.uint8)
        header = self.header(plan)
        for name, address in addresses.items():
            header[name] = address
        return plan


_PlanKind = Literal["whole", "needed", "gathered", "uploaded"]


@functools.lru_cache(maxsize=64)
def _plan_without_addresses(source_size: tuple[int, int], network_size: tuple[int, int], kind: _PlanKind) -> bytes:
    """A plan without addresses.

    The frame is on the device (``whole``), or its needed rows are to be fetched from among all (``needed``) or from
    where nothing else is (``gathered``), or they come to the device in another way (``uploaded``).
    """
    fit = Letterbox.fit(source_size, network_size)
    row_bytes = _CHANNELS * source_size[1]
    needed = (
        NeededRows.all(source_size[0], fit.scaled_size[0])
        if kind == "whole"
        else needed_rows(source_size, network_size)
    )
    numbers = needed.numbers if kind == "needed" else None
    header = np.zeros((), _PLAN)
    header["pitch"] = row_bytes
    header["last_column"], header["last_row"] = row_bytes - _CHANNELS, needed.count - 1
    header["scaled_height"], header["scaled_width"] = fit.scaled_size
    header["top"], header["left"] = fit.top, fit.left
    if numbers is not None:
        header["is_listed"] = 1
        header["source_pitch"], header["row_bytes"], header["row_count"] = row_bytes, row_bytes, needed.count
    elif kind in {"needed", "gathered"}:  # one long row, in the largest units whatever the width
        header["row_bytes"], header["row_count"] = upload_bytes(row_bytes * needed.count), 1
    columns = resize_taps(source_size[1], fit.scaled_size[1], clamp=True)
    columns["first"] *= _CHANNELS
    listed = b"" if numbers is None else numbers.astype(np.int32).tobytes()
    return header.tobytes() + columns.tobytes() + needed.taps.tobytes() + listed


# --- upload ----------------------------------------------------------------------------------------------------------

_UPLOAD_GRID, _UPLOAD_BLOCK = (16, 1, 1), (256, 1, 1)
"""Enough loads under way for PCIe 5.0 (measured: docs/benchmarks.md), few enough to leave the GPU to the network."""


def upload_bytes(size: int) -> int:
    """Size of a buffer for `size` bytes that `UploadKernel` may copy in its largest units."""
    return -(-size // 16) * 16


class UploadKernel:
    """Launches upload.cu: fetches the rows that the plans of `LetterboxKernel.upload_plan` name."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._function = device.function("upload", "upload", {})

    def launch(self, plans: int, plan_bytes: int, slots: int, stream: Any = None) -> None:
        """Fetch the frames of the first `slots` plans."""
        arguments = (np.uint64(plans), np.int32(plan_bytes), np.int32(slots))
        self._device.launch(self._function, _UPLOAD_GRID, _UPLOAD_BLOCK, arguments, stream)


_COPY_BLOCK = (256, 1, 1)
_COPY_UNIT = 16


class CopyKernel:
    """Launches copy.cu: between page-locked and device memory, past the queues of the copy engines."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._function = device.function("copy", "copy", {})

    def launch(self, target: int, source: int, size: int, stream: Any = None) -> None:
        """Copy `size` bytes; size and addresses are multiples of 16."""
        units = size // _COPY_UNIT
        grid = (-(-units // _COPY_BLOCK[0]), 1, 1)
        arguments = (np.uint64(source), np.int32(units), np.uint64(target))
        self._device.launch(self._function, grid, _COPY_BLOCK, arguments, stream)


# --- YoloLayer -------------------------------------------------------------------------------------------------------

YOLOLAYER_ROWS = 32
"""Rows of one picture that a block of yololayer.cu makes."""

YOLOLAYER_BLOCK = (256, 1, 1)


KEEP_ALL_ROWS = -np.inf
"""A least objectness that no row is below."""


def yololayer_defines(
    anchors: Anchors, strides: Sequence[int], class_count: int, variant: Variant, *, half: bool, mask_count: int = 0
) -> dict[str, int | str]:
    """The macros of yololayer.cu.

    Args:
        anchors: Per level, per anchor: width and height in network-input pixels.
        strides: Network-input pixels per cell, by level.
        class_count: Number of classes.
        variant: Form of the rows.
        half: Whether the heads are float16 rather than float32.
        mask_count: Mask coefficients after the classes.

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
        **({"MASKS": mask_count} if mask_count else {}),
    }


def bits_of(value: float) -> int:
    """The bits of a float32 as an int32: plugins pass only integers to their kernels."""
    return int(np.float32(value).view(np.int32))


def yololayer_grid(rows: int, batch: int) -> _Dim3:
    """Blocks of yololayer.cu for `rows` rows a picture."""
    return -(-rows // YOLOLAYER_ROWS), batch, 1


class YoloLayerKernel:
    """Launches yololayer.cu: raw heads to dense rows.

    Attributes:
        row_values: Values a row has: 6 (`best`, whose mask coefficients `MaskKernel` takes from the heads) or
            5 + classes + mask coefficients (`full`).
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
        mask_count: int = 0,
    ) -> None:
        defines = yololayer_defines(anchors, strides, class_count, variant, half=half, mask_count=mask_count)
        self.row_values = BEST_VALUES if variant == "best" else BOX_VALUES + class_count + mask_count
        self._anchors = len(anchors[0])
        self._device = device
        self._function = device.function("yololayer", "yololayer", defines)

    def row_count(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Rows a picture has with heads of these heights and widths."""
        return self._anchors * sum(height * width for height, width in sizes)

    def launch(
        self,
        heads: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        batch: int,
        output: int,
        stream: Any = None,
        least_objectness: float = KEEP_ALL_ROWS,
    ) -> None:
        """Decode `batch` pictures.

        Args:
            heads: Addresses of the levels' heads, [batch, anchors x (5 + classes), height, width].
            sizes: Height and width of every level.
            batch: Pictures.
            output: Address of float32 [batch, rows, row_values].
            stream: Where to enqueue.
            least_objectness: `best` rows of a lower raw objectness become zeros, which is much faster; `raw_threshold`
                gives it for a confidence.
        """
        integers = (batch, *(side for size in sizes for side in size), bits_of(least_objectness))
        arguments = (*map(np.uint64, heads), *map(np.int32, integers), np.uint64(output))
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
        """The result: counts, then boxes, in one piece."""
        return self.detections_offset + 4 * BEST_VALUES * self.batch * self.max_detections

    @property
    def detections_offset(self) -> int:
        """Where in the result the boxes begin."""
        return _aligned(4 * self.batch)

    @property
    def _keys_bytes(self) -> int:
        return _aligned(8 * self.batch * self.segments * self.segment_rows)

    def split(self, output: Bytes) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The parts of a result in host memory, uint8 (at least output_bytes,).

        Returns:
            Views: int32 (batch,), the number of boxes; float32 (batch, max_detections, 6), the boxes.
        """
        counts = output[: 4 * self.batch].view(np.int32)
        rows = output[self.detections_offset : self.output_bytes].view(np.float32)
        return counts, rows.reshape(self.batch, self.max_detections, BEST_VALUES)

    def detections(self, output: Bytes) -> list[Boxes]:
        """The boxes of every picture.

        Args:
            output: uint8 (output_bytes,), in host memory.

        Returns:
            Per picture the boxes in network-input pixels, best first; copies, independent of `output`.
        """
        counts, rows = self.split(output)
        return [boxes_of(picture, count) for picture, count in zip(rows, counts.tolist(), strict=True)]


class NmsKernel:
    """Launches nms.cu: rows of `YoloLayerKernel` (`best`) to detections.

    Attributes:
        layout: Sizes of the buffers.
    """

    def __init__(self, device: Device, layout: NmsLayout, options: NmsOptions, *, keeps_rows: bool = False) -> None:
        """Prepare the launches.

        Args:
            device: What launches.
            layout: Sizes of the buffers.
            options: Thresholds.
            keeps_rows: Whether the row of each box is written as well, for `MaskKernel`.

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
        self._keeps_rows = keeps_rows
        defines = {"THREADS": layout.threads, **({"KEPT_ROWS": 1} if keeps_rows else {})}
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

    def launch(
        self, rows: int, workspace: int, output: int, class_mask: int = 0, stream: Any = None, kept_rows: int = 0
    ) -> None:
        """Select the detections of a batch.

        Args:
            rows: Address of float32 [batch, rows, 6].
            workspace: Address of `layout.workspace_bytes` bytes.
            output: Address of `layout.output_bytes` bytes of device memory: with more than 512 candidates, kept boxes
                are read back.
            class_mask: Address of a `class_mask`, or 0.
            stream: Where to enqueue.
            kept_rows: Address of int32 [batch, max_detections] where the kernel keeps rows.
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
            *([np.uint64(kept_rows)] if self._keeps_rows else []),
        )
        self._device.launch(self._select, (layout.batch, 1, 1), (layout.threads, 1, 1), arguments, stream)


# --- masks -----------------------------------------------------------------------------------------------------------

_MASK_CROPS_BLOCK = (256, 1, 1)
_MASK_CELLS_BLOCK = (256, 1, 1)

_LEVEL = np.dtype([("head", np.uint64), ("height", np.int32), ("width", np.int32)])
_CROP = np.dtype([(name, np.int32) for name in ("offset", "top", "left", "height", "width")])


@dataclass(frozen=True)
class MaskLayout:
    """Sizes of what masks.cu reads and writes.

    Attributes:
        nms: Pictures, rows and detections.
        mask_count: Mask coefficients, which is the number of prototypes.
        grid_size: Height and width of the prototypes.
        network_size: Height and width of the network's input.
        whole_grids: How many detections a picture have room if each covers all of it. Of most pictures hundreds have.
    """

    nms: NmsLayout
    mask_count: int
    grid_size: tuple[int, int]
    network_size: tuple[int, int]
    whole_grids: int = 32

    @property
    def capacity(self) -> int:
        """Cells that a picture has room for."""
        return min(self.whole_grids, self.nms.max_detections) * self.grid_size[0] * self.grid_size[1]

    @property
    def cells_bytes(self) -> int:
        """float32 [batch, capacity]."""
        return 4 * self.nms.batch * self.capacity

    @property
    def crops_bytes(self) -> int:
        """[batch, max_detections] of what a detection covers of the grid, and where its cells lie."""
        return _CROP.itemsize * self.nms.batch * self.nms.max_detections

    def crops(self, table: Bytes, cells: Bytes, picture: int, count: int) -> tuple[MaskCrop, ...] | None:
        """The masks of a picture's first `count` detections; None if there was no room for all of them.

        Args:
            table: uint8 (at least crops_bytes,), in host memory: the crops.
            cells: uint8 (at least cells_bytes,), in host memory.
            picture: Its place in the batch.
            count: Detections that it has.

        Returns:
            Copies, independent of `cells`.
        """
        first = picture * self.nms.max_detections
        crops = table[: self.crops_bytes].view(_CROP)[first : first + count]
        if count and crops["offset"].min() < 0:
            return None
        size = int((crops["height"] * crops["width"]).sum())
        start = picture * self.capacity
        values = cells[: self.cells_bytes].view(np.float32)[start : start + size].copy()
        return tuple(
            MaskCrop(values[offset : offset + height * width].reshape(height, width), top, left, self.grid_size)
            for offset, top, left, height, width in crops.tolist()
        )


class MaskKernel:
    """Launches masks.cu after `NmsKernel`: the crops of a whole batch, then their cells."""

    def __init__(
        self, device: Device, layout: MaskLayout, anchors_per_level: int, class_count: int, *, half: bool
    ) -> None:
        defines = {
            "ANCHORS": anchors_per_level,
            "NC": class_count,
            "MASKS": layout.mask_count,
            "HALF_HEADS": int(half),
        }
        self.layout = layout
        self._device = device
        self._crops = device.function("masks", "mask_crops", defines)
        self._cells = device.function("masks", "mask_cells", defines)

    @staticmethod
    def levels(heads: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Bytes:
        """The table of levels, to be copied to the device: addresses of the heads, heights and widths."""
        table = np.zeros(len(heads), _LEVEL)
        table["head"] = heads
        table["height"], table["width"] = zip(*sizes, strict=True)
        return table.view(np.uint8)

    def launch_crops(self, rows: int, kept_rows: int, crops: int, host_crops: int, stream: Any = None) -> None:
        """Say what the detections of a batch cover of the prototypes' grid.

        Args:
            rows: Address of the rows that `NmsKernel` read.
            kept_rows: Address of the rows that it kept.
            crops: Address of `layout.crops_bytes` bytes.
            host_crops: The same again, in device memory or in page-locked host memory.
            stream: Where to enqueue.
        """
        nms = self.layout.nms
        arguments = (
            *(np.uint64(rows), np.int32(nms.rows), np.uint64(kept_rows), np.int32(nms.max_detections)),
            *self._grid_arguments(),
            *(np.int32(self.layout.capacity), np.uint64(crops), np.uint64(host_crops)),
        )
        self._device.launch(self._crops, (nms.batch, 1, 1), _MASK_CROPS_BLOCK, arguments, stream)

    def launch_cells(
        self,
        levels: int,
        prototypes: int,
        rows: int,
        kept_rows: int,
        crops: int,
        cells: int,
        stream: Any = None,
    ) -> None:
        """Weigh the prototypes of a batch.

        Args:
            levels: Address of the table of `levels`.
            prototypes: Address of [batch, mask_count, grid height, grid width].
            rows: Address of the rows that `NmsKernel` read.
            kept_rows: Address of the rows that it kept.
            crops: Address of what `launch_crops` wrote.
            cells: Address of `layout.cells_bytes` bytes, in device memory or in page-locked host memory: they are only
                written, and each at most once.
            stream: Where to enqueue.
        """
        layout, nms = self.layout, self.layout.nms
        arguments = (
            *(np.uint64(levels), np.uint64(prototypes), *self._grid_arguments(), np.uint64(rows), np.int32(nms.rows)),
            *(np.uint64(kept_rows), np.uint64(crops), np.int32(layout.capacity), np.uint64(cells)),
        )
        blocks = -(-layout.grid_size[0] * layout.grid_size[1] // _MASK_CELLS_BLOCK[0])
        if nms.max_detections:
            grid = (blocks, nms.max_detections, nms.batch)
            self._device.launch(self._cells, grid, _MASK_CELLS_BLOCK, arguments, stream)

    def _grid_arguments(self) -> tuple[np.generic, ...]:
        """The grid's height and width, and cells a network pixel in x and y."""
        (height, width), (network_height, network_width) = self.layout.grid_size, self.layout.network_size
        scales = np.float32(width / network_width), np.float32(height / network_height)
        return np.int32(height), np.int32(width), *scales


def boxes_of(rows: npt.NDArray[np.float32], count: int) -> Boxes:
    """A copy of the first `count` boxes of rows (max_detections, 6)."""
    rows = rows[:count].copy()
    return Boxes(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _literal(value: float) -> str:
    """A C float literal that is exactly the float32 nearest to `value`."""
    return f"{float(np.float32(value))!r}f"
