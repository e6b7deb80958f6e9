"""A GPU that is none: a `GpuDevice` and a TensorRT that compute on the CPU, as late and as strictly as CUDA may.

Streams execute nothing before somebody waits for them, which is the order in which a buffer that is used again too
early shows. Freed memory is overwritten and never handed out again, a copy or upload outside of live memory fails, and
so does a call outside `device.current()` or one that a capture does not allow.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import enum
import functools
import itertools
import json
import struct
import threading
import time
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

import numpy as np
import onnxruntime

from tests.kernels.host_device import HostDevice
from yolotrt.cuda.device import GpuDevice, Graph, Lines, Memory
from yolotrt.cuda.kernels import _PLAN, BEST_VALUES, YoloLayerKernel
from yolotrt.engines.base import KERNEL, PLUGIN
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.weights.model import Anchors

FREED = 0xDB
"""What freed memory is filled with."""

_indices = itertools.count()
_kernels_run = threading.RLock()  # the host build of the kernels has one set of coroutines


class HostGpuError(Exception):
    """What the device library raises."""


def bytes_at(address: int, size: int) -> np.ndarray:
    """The memory at an address, as uint8 (size,)."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class _Block:
    """Memory, aligned to 256, that is overwritten when it is dropped."""

    def __init__(self, size: int, live: dict[int, int], dropped: Callable[[np.ndarray], None]) -> None:
        self._room = np.empty(max(size, 1) + 256, np.uint8)
        self.address = -(-self._room.ctypes.data // 256) * 256
        self.size = size
        self._live, self._dropped = live, dropped
        live[self.address] = max(size, 1)
        self.__array_interface__ = {
            "data": (self.address, False),
            "shape": (max(size, 1),),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        del self._live[self.address]
        self._room[:] = FREED
        self._dropped(self._room)


class HostStream:
    """Work that waits to be executed."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.queue: deque[Callable[[], None]] = deque()
        self.captured: list[Callable[[], None]] | None = None

    def enqueue(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def run(self) -> None:
        while self.queue:
            self.queue.popleft()()


class HostEvent:
    """A point in a stream: where it was recorded last."""

    def __init__(self) -> None:
        self.stream: HostStream | None = None
        self.time = 0.0
        self._records = self._happened = 0

    @property
    def has_happened(self) -> bool:
        return self._happened == self._records

    def record(self, stream: HostStream) -> None:
        self.stream = stream
        self._records += 1
        stream.enqueue(functools.partial(self._happen, self._records))

    def _happen(self, record: int) -> None:
        self._happened, self.time = record, time.perf_counter()


class HostGraph(Graph):
    """What was captured, with the addresses of then."""

    def __init__(self, work: Sequence[Callable[[], None]], launched: Counter[str]) -> None:
        self._work = tuple(work)
        self._launched = launched

    def launch(self, stream: HostStream) -> None:
        self._launched["graph"] += 1
        for work in self._work:
            stream.enqueue(work)


class HostGpuDevice(GpuDevice):
    """A GPU on the CPU; see the module.

    Attributes:
        failing: Method -> what it raises from now on.
        calls: How often kernels (by name) were executed, graphs launched and captures made.
        foreign_streams: Handles of other libraries' streams that were waited for.
        memory_limit: Bytes that can be allocated.
        capturing_thread: Where a stream is being captured, if anywhere.
        freed_elsewhere: How often device memory was freed outside of `current()`, where PyCUDA may not manage to.
        stays_current: Whether it remains current in a thread in which it was once, as with CuPy.
        as_views: Whether page-locked memory comes as a view of an array, as PyCUDA gives it, or as one, as CuPy does.
    """

    library = "host"
    name = "Host GPU"
    capability = (9, 0)
    errors = (HostGpuError,)

    def __init__(self, kernels: HostDevice) -> None:
        super().__init__()
        self.index = next(_indices)  # sessions of one test must not find the engine of another
        self.failing: dict[str, BaseException] = {}
        self.calls: Counter[str] = Counter()
        self.foreign_streams: list[int] = []
        self.memory_limit = 1 << 40
        self.as_views = False
        self.stays_current = False
        self.device_memory: dict[int, int] = {}
        self.page_locked_memory: dict[int, int] = {}
        self.streams: dict[int, HostStream] = {}
        self._kernels = kernels
        self.capturing_thread: int | None = None
        self.freed_elsewhere = 0
        self._handles = itertools.count(1000)
        self._graveyard: list[np.ndarray] = []
        self._thread = threading.local()
        self._checks = {
            "upload": self._check_upload,
            "copy": self._check_copy,
            "nms_select": self._check_select,
            "mask_crops": self._check_crops,
            "mask_cells": self._check_cells,
        }

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self._fail("current")
        self.calls["current"] += 1
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            yield
        finally:
            self._thread.depth -= not self.stays_current

    def is_current(self) -> bool:
        return self.stays_current and getattr(self._thread, "depth", 0) > 0

    def memory_info(self) -> tuple[int, int]:
        return self.memory_limit - sum(self.device_memory.values()), self.memory_limit

    def allocate(self, size: int) -> Memory:
        self._check("allocate", in_capture=False)
        if self.memory_info()[0] < size:
            raise HostGpuError(f"Out of memory allocating {size} bytes")
        block = _Block(size, self.device_memory, self._free)
        bytes_at(block.address, max(size, 1))[:] = 0
        return Memory(block.address, size, block)

    def page_locked(self, size: int) -> np.ndarray:
        self._check("page_locked", in_capture=False)
        array = np.asarray(_Block(size, self.page_locked_memory, self._graveyard.append))
        return array[:size] if self.as_views or not size else array

    def stream(self) -> HostStream:
        self._check("stream")
        stream = HostStream(next(self._handles))
        self.streams[stream.handle] = stream
        return stream

    def handle(self, stream: HostStream) -> int:
        return stream.handle

    def synchronize(self, stream: HostStream) -> None:
        self._check("synchronize", in_capture=False)
        stream.run()

    def event(self, *, blocking: bool = False, timing: bool = False) -> HostEvent:
        self._check("event")
        return HostEvent()

    def record(self, event: HostEvent, stream: HostStream) -> None:
        self._check("record")
        event.record(stream)

    def wait(self, event: HostEvent) -> None:
        self._check("wait", in_capture=False)
        while not event.has_happened:
            event.stream.queue.popleft()()

    def has_happened(self, event: HostEvent) -> bool:
        self._check("has_happened", in_capture=False)
        if event.stream.queue and not event.has_happened:
            event.stream.queue.popleft()()  # the GPU computes while the thread sleeps
        return event.has_happened

    def elapsed_ms(self, first: HostEvent, second: HostEvent) -> float:
        return (second.time - first.time) * 1e3

    def wait_for_stream(self, stream: HostStream, other: int) -> None:
        self._check("wait_for_stream")
        self.foreign_streams.append(other)

    def upload(self, target: int, source: np.ndarray, stream: HostStream) -> None:
        self._check("upload")
        assert source.flags.c_contiguous
        self._require(self.device_memory, target, source.nbytes)
        size, address = source.nbytes, source.ctypes.data
        if self._holds(self.page_locked_memory, address, size):
            stream.enqueue(lambda: self._copy(target, address, size, self.page_locked_memory, address))
        else:  # the driver has read ordinary memory when it returns
            content = source.tobytes()
            stream.enqueue(lambda: ctypes.memmove(target, content, size))

    def upload_lines(self, target: int, source: int, lines: Lines, stream: HostStream) -> None:
        self._check("upload_lines")
        extent = (lines.count - 1) * lines.pitch + lines.size

        def work() -> None:
            self._require(self.page_locked_memory, source, extent)
            self._require(self.device_memory, target, lines.count * lines.size)
            self.calls["upload_lines"] += 1
            for line in range(lines.count):
                ctypes.memmove(target + line * lines.size, source + line * lines.pitch, lines.size)

        stream.enqueue(work)

    def download(self, target: np.ndarray, source: int, stream: HostStream) -> None:
        self._check("download")
        assert target.flags.c_contiguous
        self._require(self.device_memory, source, target.nbytes)
        size, address = target.nbytes, target.ctypes.data
        if self._holds(self.page_locked_memory, address, size):
            stream.enqueue(lambda: self._copy(address, source, size, self.page_locked_memory, address))
        else:  # the driver has written ordinary memory when it returns
            self._check("download", in_capture=False)
            stream.enqueue(lambda: ctypes.memmove(address, source, size))
            stream.run()

    def capture(self, stream: HostStream, enqueue: Callable[[], None]) -> Graph:
        self._check("capture", in_capture=False)
        stream.captured, self._thread.is_capturing = [], True
        self.capturing_thread = threading.get_ident()
        try:
            enqueue()
            graph = HostGraph(stream.captured, self.calls)
        finally:
            stream.captured, self._thread.is_capturing = None, False
            self.capturing_thread = None
        self.calls["capture"] += 1
        return graph

    def function(self, source: str, entry: str, defines: Any) -> Any:
        with _kernels_run:
            return self._kernels.function(source, entry, defines)

    def load(self, code: bytes) -> Any:
        raise NotImplementedError

    def entry(self, module: Any, name: str) -> Any:
        raise NotImplementedError

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: HostStream | None = None,
        shared_bytes: int = 0,
    ) -> None:
        self._check("launch")
        assert stream is not None, "a launch without a stream"
        name = function.__name__.removeprefix("run_")
        arguments = tuple(arguments)

        def work() -> None:
            if name in self._checks:
                self._checks[name](*map(int, arguments))
            self.calls[name] += 1
            if name == "upload":  # which any grid and block may do, and few threads faster here
                launch_grid, launch_block = (2, 1, 1), (8, 1, 1)
            else:
                launch_grid, launch_block = grid, block
            with _kernels_run:
                self._kernels.launch(function, launch_grid, launch_block, arguments)

        stream.enqueue(work)

    def run_kernel(self, kernel: Callable[..., None], *arguments: Any) -> None:
        """Launch through a class of yolotrt.cuda.kernels and wait; what a plugin inside an engine does."""
        stream = HostStream(-1)
        with self.current():
            kernel(*arguments, stream)
            stream.run()

    def _check(self, method: str, *, in_capture: bool = True) -> None:
        assert getattr(self._thread, "depth", 0) > 0, f"{method} outside of device.current()"
        self._fail(method)
        if not in_capture and getattr(self._thread, "is_capturing", False):
            raise HostGpuError(f"{method}: operation not permitted when stream is capturing")

    def _fail(self, method: str) -> None:
        if method in self.failing:
            raise copy.copy(self.failing[method])

    def require_no_capture_elsewhere(self) -> None:
        """What may wait for the whole GPU breaks the capture of any thread."""
        assert self.capturing_thread in (None, threading.get_ident()), "another thread captures"

    def _free(self, room: np.ndarray) -> None:
        self.freed_elsewhere += getattr(self._thread, "depth", 0) == 0
        self._graveyard.append(room)

    def _copy(self, target: int, source: int, size: int, memory: dict[int, int], address: int) -> None:
        self._require(memory, address, size)  # still alive
        ctypes.memmove(target, source, size)

    def _check_upload(self, plans: int, plan_bytes: int, slots: int) -> None:
        """The rows that upload.cu will read and write must be in live memory."""
        for slot in range(slots):
            record = bytes_at(plans + slot * plan_bytes, plan_bytes)
            plan = record[: _PLAN.itemsize].view(_PLAN)[0]
            count, row_bytes = int(plan["row_count"]), int(plan["row_bytes"])
            if count == 0:
                continue
            last = count - 1
            if plan["is_listed"]:
                start = _PLAN.itemsize + 8 * int(plan["scaled_height"] + plan["scaled_width"])
                last = int(record[start : start + 4 * count].view(np.int32).max())
            self._require(self.page_locked_memory, int(plan["source"]), last * int(plan["source_pitch"]) + row_bytes)
            self._require(self.device_memory, int(plan["pixels"]), count * row_bytes)

    def _check_copy(self, source: int, units: int, target: int) -> None:
        """One end is the host's, the other the device's."""
        to_device = self._holds(self.device_memory, target, 16 * units)
        self._require(self.page_locked_memory if to_device else self.device_memory, source, 16 * units)
        self._require(self.device_memory if to_device else self.page_locked_memory, target, 16 * units)
        assert source % 16 == target % 16 == 0

    def _check_select(self, *arguments: int) -> None:
        """The kernel reads boxes that it has kept: its result must not be across the bus."""
        (most, counts, boxes), kept_rows = arguments[9:12], arguments[12:]
        self._require(self.device_memory, counts, 4)
        self._require(self.device_memory, boxes, 4 * BEST_VALUES * most)
        for address in kept_rows:
            self._require(self.device_memory, address, 4 * most)

    def _check_crops(self, *arguments: int) -> None:
        """Whatever the kernel reads is in device memory; what it writes for the host is the host's."""
        (rows, _, kept_rows, most), (crops, host_crops) = arguments[:4], arguments[-2:]
        for memory, address, size in (
            (self.device_memory, rows, 4 * BEST_VALUES),
            (self.device_memory, kept_rows, 4 * most),
            (self.device_memory, crops, 20 * most),
            (self.page_locked_memory, host_crops, 20 * most),
        ):
            self._require(memory, address, size)

    def _check_cells(self, *arguments: int) -> None:
        """As `_check_crops`."""
        (levels, prototypes), (rows, _, kept_rows, crops, capacity, cells) = arguments[:2], arguments[-6:]
        for address in (levels, prototypes, rows, kept_rows, crops):
            self._require(self.device_memory, address, 4)
        self._require(self.page_locked_memory, cells, 4 * capacity)

    @classmethod
    def _require(cls, memory: dict[int, int], address: int, size: int) -> None:
        assert cls._holds(memory, address, size), f"{size} bytes at {address:#x} are not in live memory"

    @staticmethod
    def _holds(memory: dict[int, int], address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + room for start, room in list(memory.items()))


# --- TensorRT --------------------------------------------------------------------------------------------------------


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(enum.Enum):
    FLOAT, HALF = "float32", "float16"


class FakeTensorRt(types.ModuleType):
    """The module `tensorrt`, as far as the runtime uses it, of a version 8 or of a later one, or `tensorrt_rtx`.

    Attributes:
        has_scratch_size: Whether engines say how much memory they need.
        deserialized: How many engines were.
        refused: What TensorRT logs when it refuses the next plan (nothing if blank); empty if it does not.
        failed: What it logs when it refuses to execute; empty if it does not.
        executed_batches: Batch of each execution.
        violations: Objects that outlived what they need.
        engines: Those alive.
    """

    def __init__(self, device: HostGpuDevice, version: str = "10.13.0.35", *, is_rtx: bool = False) -> None:
        super().__init__("tensorrt_rtx" if is_rtx else "tensorrt")
        self.__version__ = version
        self.device = device
        self.is_rtx = is_rtx
        self.is_modern = is_rtx or int(version.partition(".")[0]) >= 10
        self.has_scratch_size = True
        self.deserialized = 0
        self.refused = self.failed = ""
        self.executed_batches: list[int] = []
        self.violations: list[str] = []
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ILogger = type("ILogger", (), {"Severity": Severity})
        self.Runtime = lambda logger: FakeRuntime(self, logger)
        if self.is_modern:
            self.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
        if is_rtx:
            self.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])


class FakeRuntime:
    def __init__(self, trt: FakeTensorRt, logger: Any) -> None:
        self.engine_host_code_allowed = False
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        assert isinstance(plan, bytes)
        self._trt.device.require_no_capture_elsewhere()
        if self._trt.refused:
            if self._trt.refused.strip():
                self._logger.log(Severity.ERROR, self._trt.refused)
            return None
        self._trt.deserialized += 1
        kind = _RtxEngine if self._trt.is_rtx else _ModernEngine if self._trt.is_modern else _OldEngine
        engine = kind(self._trt, self, self._logger, plan)
        self._trt.engines.add(engine)
        return engine


class _Engine:
    scratch = 4096 + 64

    def __init__(self, trt: FakeTensorRt, runtime: FakeRuntime, logger: Any, plan: bytes) -> None:
        (length,) = struct.unpack_from("<I", plan)
        content = json.loads(plan[4 : 4 + length])
        self.trt, self.logger, self.runtime = trt, logger, runtime
        self.inputs, self.outputs = (
            [TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in content[key]]
            for key in ("inputs", "outputs")
        )
        self.batches = content["batches"]
        self.layer = content["layer"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # these networks are tiny
        self._network = onnxruntime.InferenceSession(plan[4 + length :], options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index].name

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._info(name).dtype)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def compute(self, batch: int, addresses: dict[str, int]) -> None:
        """The network, from the addresses of the inputs to those of the outputs."""
        info = self.inputs[0]
        images = _tensor(addresses[info.name], info, batch).astype(np.float32)
        heads = self._network.run(None, {info.name: images})
        if self.layer is None:
            for info, head in zip(self.outputs, heads, strict=True):
                _tensor(addresses[info.name], info, batch)[:] = head
            return
        heads = [np.ascontiguousarray(head) for head in heads]
        device = self.trt.device
        layer = YoloLayerKernel(device, *self.layer, "best", half=False)
        sizes = [head.shape[2:] for head in heads]
        rows = addresses[self.outputs[0].name]
        device.run_kernel(layer.launch, [head.ctypes.data for head in heads], sizes, batch, rows)

    def _info(self, name: str) -> TensorInfo:
        return next(info for info in (*self.inputs, *self.outputs) if info.name == name)


class _OldEngine(_Engine):
    """As of TensorRT 8."""

    device_memory_size = _Engine.scratch

    def create_execution_context_without_device_memory(self) -> Any:
        return _OldContext(self)


class _ModernEngine(_Engine):
    """As of TensorRT 10.1 and later."""

    def __getattr__(self, name: str) -> int:
        if name == "device_memory_size_v2" and self.trt.has_scratch_size:
            return self.scratch
        raise AttributeError(name)

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy is self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return _ModernContext(self)


class _RtxEngine(_ModernEngine):
    """As of TensorRT-RTX."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> Any:
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        return super().create_execution_context(config.strategy)


class RuntimeConfig:
    """How an execution context of TensorRT-RTX is made."""

    dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class _Context:
    def __init__(self, engine: _Engine) -> None:
        engine.trt.device.require_no_capture_elsewhere()
        self._trt, self._engine, self._logger = engine.trt, weakref.ref(engine), engine.logger
        self._addresses: dict[str, int] = {}
        self._batch = max(engine.inputs[0].shape[0], 0)
        self._batches = engine.batches
        self._is_dynamic = engine.inputs[0].shape[0] == -1
        self._scratch = 0, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        info = self._engine().inputs[0]
        low, _, high = self._batches
        fits = name == info.name and tuple(shape[1:]) == info.shape[1:] and low <= shape[0] <= high
        if fits and self._is_dynamic:
            self._batch = shape[0]
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, handle: int) -> bool:
        if self._trt.failed:
            self._logger.log(Severity.ERROR, self._trt.failed)
            return False
        engine, batch, addresses = self._engine(), self._batch, dict(self._addresses)
        scratch, size = self._scratch
        assert engine is not None, "the engine is gone"
        assert set(addresses) == {info.name for info in (*engine.inputs, *engine.outputs)}
        assert batch > 0, "no input shape"
        assert size >= engine.scratch, "no scratch memory"
        device = self._trt.device

        def work() -> None:
            for info in (*engine.inputs, *engine.outputs):
                device._require(device.device_memory, addresses[info.name], _size(info, batch))
            device._require(device.device_memory, scratch, size)
            bytes_at(scratch, size)[:] = 0xEE
            engine.compute(batch, addresses)
            self._trt.executed_batches.append(batch)

        device.streams[handle].enqueue(work)
        return True

    def __del__(self) -> None:
        if self._engine() is None:
            self._trt.violations.append("a context outlived its engine")


class _OldContext(_Context):
    @property
    def device_memory(self) -> int:
        return self._scratch[0]

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self._scratch = address, _Engine.scratch


class _ModernContext(_Context):
    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch = address, size


def _size(info: TensorInfo, batch: int) -> int:
    return batch * int(np.prod(info.shape[1:])) * np.dtype(info.dtype).itemsize


def _tensor(address: int, info: TensorInfo, batch: int) -> np.ndarray:
    return bytes_at(address, _size(info, batch)).view(info.dtype).reshape(batch, *info.shape[1:])


def gpu_engine(
    engine: EngineFile,
    *,
    half_input: bool = False,
    half_heads: bool = False,
    plugin: bool = False,
    version: str = "10.13.0.35",
    **header: Any,
) -> EngineFile:
    """An engine of ONNX Runtime as one of the TensorRT above.

    Args:
        engine: The engine.
        half_input: Whether the input is float16.
        half_heads: Whether the heads are float16.
        plugin: Whether YoloLayer is inside.
        version: TensorRT that it was built with.
        header: Other fields of the header.
    """
    old = engine.header
    inputs = tuple(replace(info, dtype="float16" if half_input else "float32") for info in old.inputs)
    outputs = tuple(replace(info, dtype="float16" if half_heads else "float32") for info in old.outputs)
    layer: tuple[Anchors, Sequence[int], int] | None = None
    if plugin:
        layer = old.model.anchors, old.model.strides, len(old.model.names)
        rows = sum(len(layer[0][0]) * info.shape[2] * info.shape[3] for info in outputs)
        outputs = (TensorInfo("rows", "float32", (outputs[0].shape[0], rows, BEST_VALUES)),)
    content = {
        "inputs": [asdict(info) for info in inputs],
        "outputs": [asdict(info) for info in outputs],
        "batches": old.batch_range,
        "layer": layer,
    }
    text = json.dumps(content).encode()
    plan = struct.pack("<I", len(text)) + text + engine.plan
    values = {
        "backend": "tensorrt",
        "backend_version": version,
        "inputs": inputs,
        "outputs": outputs,
        "yololayer": PLUGIN if plugin else KERNEL,
        "device_name": HostGpuDevice.name,
        "compute_capability": ".".join(map(str, HostGpuDevice.capability)),
        "plan_sha256": sha256(plan).hexdigest(),
        "plan_size": len(plan),
    }
    return EngineFile(replace(old, **{**values, **header}), plan)
