"""Frames in, boxes out on a GPU: one CUDA graph does everything.

A frame's way, all on one stream: upload of the rows that the letterbox reads (from page-locked memory), letterbox,
engine, YoloLayer (unless it is a plugin inside the engine), NMS, which writes at most `max_detections` boxes into
page-locked memory, and for segmentation the masks, which go there as well. All this is kernels in the graph, none a
copy command of the driver: those of all streams wait for each other in the queues of the copy engines. Only the frames
of batches come by copy commands, before the graph begins: a kernel that reads across the bus slows other engines.

Where a frame lies and how large it is stands in a small record that travels along, so that one captured graph serves
all frames of all sizes: it is captured once for each batch size.

Lanes, each with its stream, buffers and graphs, work on several batches at once, so that one batch's upload, launch
gaps and host work hide behind the others' computation. A lane is made when so many batches are submitted.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.device import Bytes, GpuDevice, Graph, Lines, Memory
from yolotrt.cuda.interop import DevicePixels, device_pixels
from yolotrt.cuda.kernels import (
    BEST_VALUES,
    CopyKernel,
    LetterboxKernel,
    MaskKernel,
    MaskLayout,
    NmsKernel,
    NmsLayout,
    UploadKernel,
    YoloLayerKernel,
    boxes_of,
    upload_bytes,
)
from yolotrt.engines.base import PLUGIN, Finished, Frame, Pending, Session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_classifier import GpuClassifier
from yolotrt.engines.gpu_engine import EngineSession, EngineStream, explain
from yolotrt.engines.host import HostDecoder
from yolotrt.engines.lent_memory import LentMemory
from yolotrt.engines.trt_engine import TrtEngine
from yolotrt.errors import InferenceError, InputError
from yolotrt.postprocess import Boxes, NmsOptions, raw_threshold

LANES = 4
"""Two batches that are computed, one whose frames are fetched, and one whose result the host takes."""
COMMANDS_FROM = 2
"""From so many frames on, copy commands fetch a batch before its graph begins; of a single frame a kernel in the graph
does it sooner (docs/benchmarks.md)."""
_CHANNELS = 3
_NOTHING = ()
"""What a plan of zeros is for."""

_log = logging.getLogger(__name__)


def open_gpu_session(trt: Any, engine: EngineFile) -> Session:
    """Open a session on the first GPU, as the engine's task needs it; see `EngineSession.open`."""
    return (GpuClassifier if engine.header.model.task == "classify" else GpuSession).open(trt, engine)


class GpuSession(EngineSession["_Lane"]):
    """One engine for detection or segmentation on one GPU with its own buffers."""

    def __init__(self, engine: TrtEngine, *, lanes: int = LANES) -> None:
        """Prepare to run.

        Args:
            engine: The engine.
            lanes: Batches that can be under way at once; each has its own buffers.

        Raises:
            InferenceError: if the GPU's memory does not suffice.
        """
        super().__init__(engine)
        self.batches_in_flight = lanes
        self._lent = LentMemory()
        with self._on_device():
            self._lanes.append(_Lane(engine, self._lent))

    def submit(self, frames: Sequence[Frame], options: NmsOptions) -> Pending:
        """See `Session.submit`. Where all lanes are busy, this waits for the oldest batch and keeps its result."""
        self.check_frame_count(len(frames))
        self._require_open()
        if options.multi_label:
            return Finished(self._detect_on_host(frames, options))
        with self._on_device():
            for lane in self._lanes:
                if lane.pending is None:
                    return self._start(lane, frames, options)
            if len(self._lanes) < self.batches_in_flight:
                pending = self._start_in_new_lane(frames, options)
                if pending is not None:
                    return pending
            return self._start(self._oldest_lane(), frames, options)

    def detect(self, frames: Sequence[Frame], options: NmsOptions) -> list[Boxes]:
        """See `Session.detect`; waits without sleeping, which is the fastest for a single frame."""
        pending = self.submit(frames, options)
        if isinstance(pending, _GpuPending):
            pending.finish(spin=True)
        return pending.result()

    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """See `Session.run`.

        Raises:
            InputError: also if YoloLayer is inside the engine, which then has no raw heads.
        """
        self.check_input(images)
        self._require_open()
        self._require_heads()
        with self._on_device():
            lane = self._idle_lane()
            with lane.settling():
                return lane.raw_heads(len(images), lambda: lane.upload_images(images))

    def frame_buffer(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """See `Session.frame_buffer`: page-locked memory from a pool."""
        self._require_open()
        with self._on_device():
            return self._lent.lend(self._device, height, width)

    def profile(self, frames: Sequence[Frame], options: NmsOptions, repeats: int = 50) -> dict[str, list[float]]:
        """GPU time of each stage for a batch, each repeated alone, and of the whole.

        Args:
            frames: A batch, as for `submit`.
            options: Thresholds.
            repeats: Measurements of each stage.

        Returns:
            Milliseconds by stage: ``upload``, ``letterbox``, ``engine``, ``yololayer`` (unless it is in the engine),
            ``nms``, ``masks`` (of segmentation models) and ``whole``.
        """
        self.check_frame_count(len(frames))
        self._require_open()
        with self._on_device():
            lane = self._idle_lane()
            lane.use(options)
            with lane.settling():
                owners = lane.place(frames)
                times = lane.profile(len(frames), repeats)
        del owners  # the GPU has read the frames
        return times

    def finish(self, lane: _Lane, *, spin: bool) -> list[Boxes]:
        """Wait for a lane's batch and take its boxes."""
        with self._on_device():
            began = time.perf_counter()
            lane.run.wait(spin=spin)
            waited = time.perf_counter()
            boxes = lane.boxes()
            timing = self.timing
            timing.inference_ms += (waited - began) * 1e3
            timing.postprocess_ms += (time.perf_counter() - waited) * 1e3
        return boxes

    def _detect_on_host(self, frames: Sequence[Frame], options: NmsOptions) -> list[Boxes]:
        """Several labels a box: the GPU computes the raw heads, NumPy does the rest."""
        self._require_heads()
        timing = self.timing
        began = time.perf_counter()
        with self._on_device():
            lane = self._idle_lane()
            with lane.settling():
                owners = lane.place(frames)
                placed = time.perf_counter()
                heads = lane.raw_heads(lane.batch_for(len(frames)), lambda: lane.enqueue_input(len(frames)))
        del owners  # the GPU has read the frames
        inferred = time.perf_counter()
        boxes = HostDecoder(self.header).boxes([head[: len(frames)] for head in heads], options)
        timing.preprocess_ms += (placed - began) * 1e3
        timing.inference_ms += (inferred - placed) * 1e3
        timing.postprocess_ms += (time.perf_counter() - inferred) * 1e3
        timing.pictures += len(frames)
        return boxes

    def _start(self, lane: _Lane, frames: Sequence[Frame], options: NmsOptions) -> _GpuPending:
        """Start a batch in a lane that has none."""
        began = time.perf_counter()
        lane.use(options)  # which may be refused, before any frame is read
        timing = self.timing
        lane.started_at = timing.pictures
        try:
            pending = _GpuPending(self, lane, lane.place(frames))
            lane.start(len(frames))
            lane.pending = pending
        except BaseException:  # wherever Ctrl-C comes, no batch is under way whose frames nobody keeps
            lane.settle()
            lane.pending = None
            raise
        timing.pictures += len(frames)
        timing.preprocess_ms += (time.perf_counter() - began) * 1e3
        return pending

    def _start_in_new_lane(self, frames: Sequence[Frame], options: NmsOptions) -> _GpuPending | None:
        """Start a batch in one more lane; None if the GPU has no room for it, which may turn out with the batch."""
        assert self._engine is not None
        # TensorRT takes memory for its contexts itself
        failures: tuple[type[BaseException], ...] = (*self._device.errors, InferenceError)
        try:
            lane = _Lane(self._engine, self._lent)
            self._lanes.append(lane)
            try:
                return self._start(lane, frames, options)
            except BaseException:
                self._lanes.remove(lane)
                lane.close()
                raise
        except failures as problem:
            self.batches_in_flight = len(self._lanes)
            reason = problem if isinstance(problem, InferenceError) else explain(problem)
            _log.warning("%d batches can be under way at once (%s)", self.batches_in_flight, reason)
            return None

    def _oldest_lane(self) -> _Lane:
        """The lane whose batch began first, after that is finished."""
        return self._finished(min(self._lanes, key=lambda lane: lane.started_at))

    def _idle_lane(self) -> _Lane:
        """The first lane, after its batch is finished."""
        return self._finished(self._lanes[0])

    @staticmethod
    def _finished(lane: _Lane) -> _Lane:
        if lane.pending is not None:
            lane.pending.finish(spin=False)
        return lane

    def _require_heads(self) -> None:
        if self.header.yololayer == PLUGIN:
            raise InputError(
                "this engine holds YoloLayer and gives no raw heads: build it with --yololayer kernel to evaluate it"
            )


class _GpuPending(Pending):
    """A batch in a lane."""

    __slots__ = ("_lane", "_outcome", "_owners", "_session")

    def __init__(self, session: GpuSession, lane: _Lane, owners: list[Any]) -> None:
        self._session = session
        self._lane = lane
        self._owners: list[Any] | None = owners  # alive until the GPU has read the frames
        self._outcome: list[Boxes] | Exception

    def finish(self, *, spin: bool) -> None:
        """Wait and keep the boxes, or the failure for `result`; the lane is free afterwards."""
        if self._owners is None:
            return
        try:
            self._outcome = self._session.finish(self._lane, spin=spin)
        except Exception as problem:  # noqa: BLE001  # whatever it is, it belongs to this batch
            self._outcome = problem
        # after Ctrl-C the batch is still under way, and the GPU reads its frames
        self._owners = self._lane.pending = None

    def result(self) -> list[Boxes]:
        """See `Pending.result`; the thread sleeps while it waits."""
        self.finish(spin=False)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class _Lane:
    """A stream with all buffers to work on one batch at a time.

    Attributes:
        run: The engine on the stream.
        pending: The batch under way.
        started_at: Pictures that the session had taken when it began.
    """

    def __init__(self, engine: TrtEngine, lent: LentMemory) -> None:
        header = engine.header
        device = self._device = engine.device
        self.pending: _GpuPending | None = None
        self.started_at = 0
        self._engine = engine
        self._lent = lent
        self._low, _, high = header.batch_range
        self.run = EngineStream(engine)
        self._stream = self.run.stream
        self._letterbox = LetterboxKernel(device, header.imgsz, half=header.inputs[0].dtype == "float16")
        self._copy, self._upload = CopyKernel(device), UploadKernel(device)
        tensors = self.run.tensors
        self._images = tensors[header.inputs[0].name]
        self._yololayer = None if header.yololayer == PLUGIN else _YoloLayer(engine, tensors)
        row_count = header.outputs[0].shape[1] if self._yololayer is None else self._yololayer.row_count
        self._rows = tensors[header.outputs[0].name] if self._yololayer is None else self._yololayer.rows
        self._plans = _Plans(device, self._letterbox.plan_bytes, high)
        self._slots = [_Slot(device, self._letterbox, plan) for plan in self._plans.host]
        self._has_masks = header.model.task == "segment"
        self._nms = _Nms(device, row_count, high, len(header.model.names), keeps_rows=self._has_masks)
        self._masks: _Masks | None = None  # until their number is known
        self._started = 0, 0  # frames and batch size of the batch under way

    def batch_for(self, count: int) -> int:
        """The batch size that the engine runs for `count` frames."""
        return max(count, self._low)

    def use(self, options: NmsOptions) -> None:
        """Use other options. All or nothing: what graphs refer to stays if memory runs out."""
        if options is self._nms.options or options == self._nms.options:
            return
        masks = None
        if self._has_masks and self._yololayer is not None:
            masks = _Masks(self._engine, self.run.tensors, self._yololayer, options.max_detections)
        self._nms.set_options(options)
        self._masks = masks
        self.run.forget_graphs()

    def place(self, frames: Sequence[Frame]) -> list[Any]:
        """Say in the plans where the frames are, copying those that are in ordinary memory.

        Copy commands are under way then, also if this fails: see `settle`.

        Returns:
            What must stay alive until the GPU has read the frames.
        """
        by_command = len(frames) >= COMMANDS_FROM
        owners: list[Any] = []
        makers: set[int | None] = set()
        for slot, frame in zip(self._slots, frames, strict=False):
            if isinstance(frame, np.ndarray):
                found = self._lent.find(frame)
                if found is None:
                    slot.copy(frame, by_command=by_command)
                else:
                    address, owner = found
                    slot.fetch(frame.shape, address, by_command=by_command)
                    owners.append(owner)
                if by_command:
                    slot.enqueue_command(self._stream)
            else:
                pixels = device_pixels(frame, self._device.handle(self._stream))
                slot.point(pixels)
                owners.append(pixels.owner)
                makers.add(pixels.stream)
        for stream in makers:  # once for all frames that it makes
            if stream is not None:
                self._device.wait_for_stream(self._stream, stream)
        for slot in self._slots[len(frames) : self._low]:  # what a static batch is filled up with
            slot.clear()
        return owners

    def start(self, count: int) -> None:
        """Enqueue a batch whose frames are placed; nothing of it is under way if this fails."""
        batch = self.batch_for(count)
        self.run.start(batch, self._enqueue)
        self._started = count, batch

    def settle(self) -> None:
        """Wait for whatever is under way after a failure: what it reads may change at once."""
        self._device.synchronize(self._stream)

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Settle if something in it fails."""
        try:
            yield
        except BaseException:
            self.settle()
            raise

    def boxes(self) -> list[Boxes]:
        """What each frame of the finished batch shows."""
        count, batch = self._started
        found = self._nms.boxes(count, batch)
        if self._masks is None:
            return found
        masked = self._masks.added_to(found)
        if masked is not None:
            return masked
        heads = [output[:count] for output in self.run.outputs(batch)]
        return HostDecoder(self._engine.header).boxes(heads, self._nms.options)

    def raw_heads(self, batch: int, enqueue_input: Callable[[], None]) -> list[npt.NDArray[np.float32]]:
        """Run the engine alone on an input; the raw heads as float32 arrays of the host."""
        enqueue_input()
        self.run.enqueue(batch)
        return self.run.outputs(batch)

    def upload_images(self, images: npt.NDArray[np.float32]) -> None:
        """Fill the network's input with pictures that are letterboxed already."""
        dtype = np.dtype(self._engine.header.inputs[0].dtype)
        self._device.upload(self._images.address, np.ascontiguousarray(images, dtype), self._stream)
        self._device.synchronize(self._stream)  # the array is ours alone and may go

    def enqueue_input(self, count: int) -> None:
        """Upload and letterbox `count` placed frames."""
        self._enqueue_upload(self.batch_for(count))
        self._enqueue_letterbox(self.batch_for(count))

    def profile(self, count: int, repeats: int) -> dict[str, list[float]]:
        """See `GpuSession.profile`."""
        batch = self.batch_for(count)
        self._enqueue(batch)
        stages = self._stages(batch)
        upload = stages["upload"]

        def upload_with_commands() -> None:
            self._enqueue_commands(batch)
            upload()

        def whole() -> None:
            self._enqueue_commands(batch)
            self._enqueue(batch)

        times = {}
        for name, enqueue in {**stages, "upload": upload_with_commands, "whole": whole}.items():
            graph = self.run.captured(enqueue)
            times[name] = [self._time(graph) for _ in range(repeats)]
        return times

    def close(self) -> None:
        """Wait for what is under way, and free everything."""
        try:
            self.run.close()
        finally:
            self.pending = None  # its frames were read until now

    def _time(self, graph: Graph) -> float:
        """Milliseconds that a graph takes; it is launched twice, so that no launch is waited for."""
        graph.launch(self._stream)
        return self._device.milliseconds(lambda: graph.launch(self._stream), self._stream)

    def _enqueue(self, batch: int) -> None:
        for enqueue in self._stages(batch).values():
            enqueue()

    def _stages(self, batch: int) -> dict[str, Callable[[], None]]:
        """A frame's way, in order."""
        layer, masks, rows = self._yololayer, self._masks, self._rows.address
        kept_rows = 0 if masks is None else masks.kept_rows.address
        stages: dict[str, Callable[[], None]] = {
            "upload": lambda: self._enqueue_upload(batch),
            "letterbox": lambda: self._enqueue_letterbox(batch),
            "engine": lambda: self.run.enqueue(batch),
        }
        if layer is not None:
            stages["yololayer"] = lambda: layer.enqueue(batch, self._stream, self._nms.options.confidence)
        stages["nms"] = lambda: self._nms.enqueue(rows, kept_rows, batch, self._stream)
        if masks is not None:
            stages["masks"] = lambda: masks.enqueue(batch, self._stream)
        return stages

    def _enqueue_commands(self, batch: int) -> None:
        """Copy again what copy commands brought."""
        for slot in self._slots[:batch]:
            slot.enqueue_command(self._stream)

    def _enqueue_upload(self, batch: int) -> None:
        plans, plan_bytes = self._plans, self._letterbox.plan_bytes
        self._copy.launch(plans.device.address, plans.memory.ctypes.data, batch * plan_bytes, self._stream)
        self._upload.launch(plans.device.address, plan_bytes, batch, self._stream)

    def _enqueue_letterbox(self, batch: int) -> None:
        self._letterbox.launch(self._plans.device.address, self._images.address, batch, self._stream)


class _Plans:
    """The letterbox's plans of a batch.

    Attributes:
        memory: Page-locked, where the host writes them.
        host: The same by slot.
        device: Where the kernels read them.
    """

    def __init__(self, device: GpuDevice, plan_bytes: int, batch: int) -> None:
        self.memory = device.page_locked(batch * plan_bytes)
        self.memory[:] = 0
        self.host = [self.memory[slot * plan_bytes : (slot + 1) * plan_bytes] for slot in range(batch)]
        self.device = device.allocate(batch * plan_bytes)


class _Slot:
    """One picture of a batch: its plan, and room for its pixels."""

    def __init__(self, device: GpuDevice, letterbox: LetterboxKernel, plan: Bytes) -> None:
        self._device = device
        self._letterbox = letterbox
        self._plan = plan
        self._header = letterbox.header(plan)
        # what the plan is for, but for addresses; None where that is not known
        self._written: tuple[Any, ...] | None = _NOTHING
        self._source = 0  # in the plan; 0 where that is not known
        self._pixels = Memory(0, 0, None)
        self._staging = np.empty(0, np.uint8)
        self._lines: tuple[int, Lines] | None = None  # what of the source a copy command is to fetch, if one is
        self._command: tuple[int, Lines] | None = None  # its source and lines

    def fetch(self, shape: tuple[int, ...], address: int, *, by_command: bool) -> None:
        """The GPU fetches the frame from page-locked memory: by a copy command if its rows allow, or by the kernel."""
        kind = "fetched", shape, by_command
        if self._written != kind:
            height, width, _ = shape
            lines = self._letterbox.needed_lines((height, width)) if by_command else None
            self._write_upload(kind, (height, width), lines, gathered=False)
        self._read_from(address)

    def copy(self, frame: npt.NDArray[np.uint8], *, by_command: bool) -> None:
        """Copy the rows that are needed to page-locked memory, from which the GPU fetches them; see `fetch`."""
        height, width, _ = shape = frame.shape
        rows = self._letterbox.needed_rows((height, width))
        size = rows.count * width * _CHANNELS
        if self._staging.size < upload_bytes(size):
            self._staging = self._device.page_locked(upload_bytes(size))
        target = self._staging[:size].reshape(rows.count, -1)
        all_rows = frame.reshape(height, -1)
        if rows.numbers is None:
            np.copyto(target, all_rows)
        else:
            np.take(all_rows, rows.numbers, axis=0, out=target, mode="clip")  # the mode that writes without a buffer
        kind = "copied", shape, by_command
        if self._written != kind:
            lines = (0, Lines(size, size, 1)) if by_command else None
            self._write_upload(kind, (height, width), lines, gathered=True)
        self._read_from(self._staging.ctypes.data)

    def enqueue_command(self, stream: Any) -> None:
        """Enqueue the copy command, if one is to fetch the frame."""
        if self._command is not None:
            self._device.upload_lines(self._pixels.address, *self._command, stream)

    def point(self, frame: DevicePixels) -> None:
        """Read the frame where it is in device memory."""
        self._command = None
        kind = "device", frame.size
        if self._written == kind:
            self._header["pixels"], self._header["pitch"] = frame.address, frame.pitch
        else:
            self._written = None  # if this is interrupted, the plan is of no use
            self._plan[:] = self._letterbox.plan(frame.size, frame.address, frame.pitch)
            self._written = kind

    def clear(self) -> None:
        """No frame."""
        self._command = None
        if self._written != _NOTHING:
            self._written = None  # if this is interrupted, the plan is of no use
            self._plan[:] = 0
            self._written = _NOTHING

    def _write_upload(
        self, kind: tuple[Any, ...], size: tuple[int, int], lines: tuple[int, Lines] | None, *, gathered: bool
    ) -> None:
        """Write the plan of a frame that is in page-locked memory, but for its address."""
        self._written = self._command = None  # if this is interrupted, the plan is of no use
        room = upload_bytes(self._letterbox.needed_rows(size).count * size[1] * _CHANNELS)
        if self._pixels.size < room:
            self._pixels = self._device.allocate(room)
        pixels = self._pixels.address
        self._plan[:] = (
            self._letterbox.upload_plan(size, pixels, 0, gathered=gathered)
            if lines is None
            else self._letterbox.uploaded_plan(size, pixels)
        )
        self._source, self._lines = 0, lines
        self._written = kind

    def _read_from(self, source: int) -> None:
        """Have that frame fetched from an address of page-locked memory."""
        if self._lines is not None:
            offset, lines = self._lines
            self._command = source + offset, lines
        elif source != self._source:
            self._source = 0
            self._header["source"] = source
            self._source = source


class _YoloLayer:
    """YoloLayer after an engine that gives raw heads.

    Attributes:
        rows: Where the rows go.
        row_count: Rows a picture has.
        heads: The heads' addresses.
        sizes: Their heights and widths.
    """

    def __init__(self, engine: TrtEngine, tensors: dict[str, Memory]) -> None:
        header = engine.header
        model = header.model
        heads = header.outputs[: len(model.strides)]
        self._kernel = YoloLayerKernel(
            engine.device,
            model.anchors,
            model.strides,
            len(model.names),
            "best",
            half=heads[0].dtype == "float16",
            mask_count=header.outputs[-1].shape[1] if model.task == "segment" else 0,
        )
        self.sizes = [(info.shape[2], info.shape[3]) for info in heads]
        self.heads = [tensors[info.name].address for info in heads]
        self.row_count = self._kernel.row_count(self.sizes)
        self.rows = engine.device.allocate(4 * header.max_batch * self.row_count * BEST_VALUES)

    def enqueue(self, batch: int, stream: Any, confidence: float) -> None:
        """Decode the rows that can have more than a confidence."""
        least = raw_threshold(confidence)
        self._kernel.launch(self.heads, self.sizes, batch, self.rows.address, stream, least)


class _Nms:
    """NMS with the options of the moment, and its buffers.

    Attributes:
        options: The options.
    """

    def __init__(
        self, device: GpuDevice, row_count: int, largest_batch: int, class_count: int, *, keeps_rows: bool
    ) -> None:
        self._device = device
        self._row_count = row_count
        self._largest_batch = largest_batch
        self._class_count = class_count
        self._keeps_rows = keeps_rows
        self.options = NmsOptions(max_detections=-1)  # which no caller may have
        self._kernels: dict[int, NmsKernel] = {}
        self._results: dict[int, tuple[npt.NDArray[np.int32], list[npt.NDArray[np.float32]]]] = {}
        self._workspace = device.allocate(NmsLayout(largest_batch, row_count, 1).workspace_bytes)
        self._copy = CopyKernel(device)

    def set_options(self, options: NmsOptions) -> None:
        """Use other options; graphs are out of date then."""
        layout = NmsLayout(self._largest_batch, self._row_count, options.max_detections)
        kernel = NmsKernel(
            self._device, layout, options, keeps_rows=self._keeps_rows
        )  # refuses wrong options before anything is enqueued
        mask = self._class_mask(options)
        room = upload_bytes(layout.output_bytes)
        output, host_output = self._device.allocate(room), self._device.page_locked(room)
        # all or nothing: graphs that hold the old addresses stay valid if memory runs out above
        self._kernels, self._results = {layout.batch: kernel}, {}
        self._mask, self._output, self._host_output, self.options = mask, output, host_output, options

    def enqueue(self, rows: int, kept_rows: int, batch: int, stream: Any) -> None:
        """Write the boxes of `rows` into page-locked memory, and which rows they are where those are to be kept.

        With many candidates the kernel reads boxes that it has kept, so they leave the device when they are complete.
        """
        kernel, output = self._kernel(batch), self._output.address
        kernel.launch(rows, self._workspace.address, output, self._mask.address, stream, kept_rows)
        self._copy.launch(self._host_output.ctypes.data, output, upload_bytes(kernel.layout.output_bytes), stream)

    def boxes(self, count: int, batch: int) -> list[Boxes]:
        """Boxes of the first `count` pictures of a finished batch."""
        results = self._results.get(batch)
        if results is None:
            counts, rows = self._kernel(batch).layout.split(self._host_output)
            results = self._results[batch] = counts, list(rows)
        counts, pictures = results
        return [boxes_of(rows, found) for rows, found in zip(pictures, counts[:count].tolist(), strict=False)]

    def _class_mask(self, options: NmsOptions) -> Memory:
        """The classes to keep, on the device; address 0 keeps all."""
        mask = NmsKernel.class_mask(options, self._class_count)
        return Memory(0, 0, None) if mask is None else _on_device(self._device, mask)

    def _kernel(self, batch: int) -> NmsKernel:
        kernel = self._kernels.get(batch)
        if kernel is None:
            layout = NmsLayout(batch, self._row_count, self.options.max_detections)
            kernel = NmsKernel(self._device, layout, self.options, keeps_rows=self._keeps_rows)
            self._kernels[batch] = kernel
        return kernel


class _Masks:
    """The masks of a batch, which go to the host without their empty surroundings.

    Attributes:
        kept_rows: Where NMS says which rows its boxes are.
    """

    def __init__(self, engine: TrtEngine, tensors: dict[str, Memory], layer: _YoloLayer, max_detections: int) -> None:
        header, device = engine.header, engine.device
        prototypes = header.outputs[-1]
        self._device = device
        self._header = header
        self._layer = layer
        self._levels = _on_device(device, MaskKernel.levels(layer.heads, layer.sizes))
        self._prototypes = tensors[prototypes.name].address
        self._layout = MaskLayout(
            NmsLayout(header.max_batch, layer.row_count, max_detections),
            prototypes.shape[1],
            (prototypes.shape[2], prototypes.shape[3]),
            header.imgsz,
        )
        self.kept_rows = device.allocate(4 * header.max_batch * max_detections)
        self._crops = device.allocate(self._layout.crops_bytes)
        self._host_crops = device.page_locked(self._layout.crops_bytes)
        self._cells = device.page_locked(self._layout.cells_bytes)
        self._kernels: dict[int, MaskKernel] = {}

    def enqueue(self, batch: int, stream: Any) -> None:
        """Write the masks of what NMS kept into page-locked memory."""
        kernel = self._kernel(batch)
        rows, kept_rows, crops = self._layer.rows.address, self.kept_rows.address, self._crops.address
        kernel.launch_crops(rows, kept_rows, crops, self._host_crops.ctypes.data, stream)
        cells = self._cells.ctypes.data
        kernel.launch_cells(self._levels.address, self._prototypes, rows, kept_rows, crops, cells, stream)

    def added_to(self, found: Sequence[Boxes]) -> list[Boxes] | None:
        """The boxes of a finished batch with their masks; None if there was no room for all of these."""
        masked = []
        for picture, boxes in enumerate(found):
            crops = self._layout.crops(self._host_crops, self._cells, picture, len(boxes))
            if crops is None:
                return None
            masked.append(replace(boxes, masks=crops))
        return masked

    def _kernel(self, batch: int) -> MaskKernel:
        kernel = self._kernels.get(batch)
        if kernel is None:
            model, half = self._header.model, self._header.outputs[0].dtype == "float16"
            layout = replace(self._layout, nms=replace(self._layout.nms, batch=batch))
            kernel = MaskKernel(self._device, layout, len(model.anchors[0]), len(model.names), half=half)
            self._kernels[batch] = kernel
        return kernel


def _on_device(device: GpuDevice, content: Bytes) -> Memory:
    """A copy in device memory."""
    memory, stream = device.allocate(content.size), device.stream()
    device.upload(memory.address, content, stream)
    device.synchronize(stream)
    return memory
