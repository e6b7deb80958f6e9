"""Device libraries behind one small interface: memory, streams, events, kernels and CUDA graphs of one GPU.

CuPy is the default, PyCUDA the alternative for systems without it. Both work in the GPU's primary context, which all
libraries of a process share: nothing here creates a context, and arrays of CuPy, PyTorch and others can be used as they
are. A device is only touched inside `with device.current()`, or while `device.is_current()`.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.compile import Defines, compile_for_device
from yolotrt.errors import BackendUnavailableError, InputError, YolotrtError

Bytes = npt.NDArray[np.uint8]

LIBRARY_VARIABLE = "YOLOTRT_DEVICE_LIBRARY"
"""Environment variable that chooses ``cupy`` or ``pycuda``."""

_QUEUES_VARIABLE, _MOST_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", "32"
"""Hardware queues of a process's streams (CUDA Programming Guide, environment variables). There are 8 unless it is set
before CUDA starts, and streams that fall into the same queue wait for each other, as do a network's own streams."""


@dataclass(frozen=True)
class Memory:
    """Device memory, freed when this is dropped.

    Attributes:
        address: Its first byte, aligned to at least 256.
        size: Bytes.
        owner: The library's object that holds it.
    """

    address: int
    size: int
    owner: Any


@dataclass(frozen=True)
class Lines:
    """Equally long pieces of memory at equal distances.

    Attributes:
        size: Bytes of a line.
        pitch: Bytes from the beginning of one line to that of the next.
        count: Number of lines.
    """

    size: int
    pitch: int
    count: int


class Graph(abc.ABC):
    """A captured CUDA graph."""

    @abc.abstractmethod
    def launch(self, stream: Any) -> None:
        """Enqueue all that was captured."""


class GpuDevice(abc.ABC):
    """One GPU through a device library; also a `yolotrt.cuda.kernels.Device`.

    Streams, events and kernels are the library's own objects. Enqueuing calls return at once.

    Attributes:
        library: Name of the library.
        index: The GPU's number.
        name: The GPU's name.
        capability: Compute capability, such as ``(9, 0)``.
        errors: What the library raises when the GPU or the driver fails.
        exclusive: To be held while a stream is captured, and by whatever may wait for the whole GPU, which no capture
            survives, in whichever thread it is (CUDA Programming Guide, "Prohibited and Unhandled Operations").
    """

    library: str
    index: int
    name: str
    capability: tuple[int, int]
    errors: tuple[type[BaseException], ...]

    def __init__(self) -> None:
        self.exclusive = threading.RLock()
        self._modules: dict[bytes, Any] = {}

    @abc.abstractmethod
    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the GPU's primary context the calling thread's current one, and what was current again at the end."""

    def is_current(self) -> bool:
        """Whether the calling thread needs no `current` now; False where that is not known at once."""
        return False

    @abc.abstractmethod
    def memory_info(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""

    @abc.abstractmethod
    def allocate(self, size: int) -> Memory:
        """Device memory of `size` bytes, zeroed."""

    @abc.abstractmethod
    def page_locked(self, size: int) -> Bytes:
        """Page-locked host memory, uint8 (size,), that the GPU can also read by its host address.

        It goes back to a pool once no array refers to it any more.
        """

    @abc.abstractmethod
    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""

    @abc.abstractmethod
    def handle(self, stream: Any) -> int:
        """The stream's `cudaStream_t`."""

    @abc.abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until the stream is empty."""

    @abc.abstractmethod
    def event(self, *, blocking: bool = False, timing: bool = False) -> Any:
        """A new event.

        Args:
            blocking: Whether a thread that waits for it sleeps, rather than spins.
            timing: Whether it takes the time, for `elapsed_ms`.
        """

    @abc.abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Enqueue the event."""

    @abc.abstractmethod
    def wait(self, event: Any) -> None:
        """Wait on the host until the event has happened."""

    @abc.abstractmethod
    def has_happened(self, event: Any) -> bool:
        """Whether the event has happened."""

    @abc.abstractmethod
    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two events that have happened."""

    @abc.abstractmethod
    def wait_for_stream(self, stream: Any, other: int) -> None:
        """Let `stream` wait for what is enqueued by now on another library's stream, given as its `cudaStream_t`."""

    @abc.abstractmethod
    def upload(self, target: int, source: npt.NDArray[Any], stream: Any) -> None:
        """Enqueue a copy of a C-contiguous array to device memory."""

    @abc.abstractmethod
    def upload_lines(self, target: int, source: int, lines: Lines, stream: Any) -> None:
        """Enqueue a copy command for lines of page-locked memory, which then lie side by side in device memory.

        Args:
            target: Device address.
            source: Host address of the first line, in memory of `page_locked`.
            lines: Which bytes.
            stream: Where to enqueue.
        """

    @abc.abstractmethod
    def download(self, target: npt.NDArray[Any], source: int, stream: Any) -> None:
        """Enqueue a copy of device memory into a C-contiguous array."""

    @abc.abstractmethod
    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Graph:
        """Capture what `enqueue` enqueues on the stream, without executing it.

        Raises:
            one of `errors`: if something in it cannot be captured.
        """

    @abc.abstractmethod
    def load(self, code: bytes) -> Any:
        """Load a CUBIN or PTX."""

    @abc.abstractmethod
    def entry(self, module: Any, name: str) -> Any:
        """A kernel of a loaded module."""

    @abc.abstractmethod
    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: Any = None,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue a kernel; None is the library's default stream."""

    def milliseconds(self, enqueue: Callable[[], None], stream: Any) -> float:
        """How long the GPU takes for what `enqueue` enqueues on a stream, after what is there already."""
        first, second = self.event(timing=True), self.event(timing=True)
        self.record(first, stream)
        enqueue()
        self.record(second, stream)
        self.synchronize(stream)
        return self.elapsed_ms(first, second)

    def function(self, source: str, entry: str, defines: Defines) -> Any:
        """Compile (or take from the cache) kernels/`source`.cu and return its kernel `entry`."""
        code = compile_for_device(source, defines, self.capability)
        module = self._modules.get(code)
        if module is None:
            module = self._modules[code] = self.load(code)
        return self.entry(module, entry)


class CupyDevice(GpuDevice):
    """A GPU through CuPy."""

    library = "cupy"

    def __init__(self, index: int = 0) -> None:
        """Open a GPU.

        Raises:
            BackendUnavailableError: if CuPy or the GPU is missing.
        """
        super().__init__()
        try:
            import cupy
        except ImportError as problem:
            raise _NotInstalledError(f"CuPy is not installed ({_reason(problem)}): install yolotrtx[gpu]") from None
        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self.errors = (
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            cupy.cuda.memory.OutOfMemoryError,
        )
        try:
            digits: str = cupy.cuda.Device(index).compute_capability
            self.name = self._runtime.getDeviceProperties(index)["name"].decode()
        except cupy.cuda.runtime.CUDARuntimeError as problem:
            raise BackendUnavailableError(
                f"GPU {index} cannot be used ({_reason(problem)}): check the driver with nvidia-smi"
            ) from None
        self.index = index
        self.capability = int(digits[:-1]), int(digits[-1])
        self._thread = _Thread()

    def is_current(self) -> bool:
        """See `GpuDevice.is_current`."""
        try:
            return self._thread.has_used_it and self._runtime.getDevice() == self.index
        except self.errors:  # a kernel has failed, which whatever is called next says as well
            return False

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """See `GpuDevice.current`."""
        self._thread.has_used_it = True
        return self._cupy.cuda.Device(self.index)  # type: ignore[no-any-return]  # a new one: they are not for threads

    def memory_info(self) -> tuple[int, int]:
        """See `GpuDevice.memory_info`."""
        with self.current():
            free, total = self._runtime.memGetInfo()
        return int(free), int(total)

    def allocate(self, size: int) -> Memory:
        """See `GpuDevice.allocate`."""
        with self._zeroing as stream:  # CuPy's pool gives memory again that another stream may still be using
            owner = self._cupy.cuda.alloc(max(size, 1))
            self._runtime.memsetAsync(owner.ptr, 0, max(size, 1), stream.ptr)
        stream.synchronize()
        return Memory(int(owner.ptr), size, owner)

    def page_locked(self, size: int) -> Bytes:
        """See `GpuDevice.page_locked`."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(max(size, 1)), np.uint8, size)

    def stream(self) -> Any:
        """See `GpuDevice.stream`."""
        return self._cupy.cuda.Stream(non_blocking=True)

    def handle(self, stream: Any) -> int:
        """See `GpuDevice.handle`."""
        return int(stream.ptr)

    def synchronize(self, stream: Any) -> None:
        """See `GpuDevice.synchronize`."""
        stream.synchronize()

    def event(self, *, blocking: bool = False, timing: bool = False) -> Any:
        """See `GpuDevice.event`."""
        return self._cupy.cuda.Event(block=blocking, disable_timing=not timing)

    def record(self, event: Any, stream: Any) -> None:
        """See `GpuDevice.record`."""
        event.record(stream)

    def wait(self, event: Any) -> None:
        """See `GpuDevice.wait`."""
        event.synchronize()

    def has_happened(self, event: Any) -> bool:
        """See `GpuDevice.has_happened`."""
        return bool(event.done)

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """See `GpuDevice.elapsed_ms`."""
        return float(self._cupy.cuda.get_elapsed_time(first, second))

    def wait_for_stream(self, stream: Any, other: int) -> None:
        """See `GpuDevice.wait_for_stream`."""
        event = self.event()
        event.record(self._cupy.cuda.ExternalStream(other))
        stream.wait_event(event)

    def upload(self, target: int, source: npt.NDArray[Any], stream: Any) -> None:
        """See `GpuDevice.upload`."""
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(target, source.ctypes.data, source.nbytes, kind, stream.ptr)

    def upload_lines(self, target: int, source: int, lines: Lines, stream: Any) -> None:
        """See `GpuDevice.upload_lines`."""
        kind, size = self._runtime.memcpyHostToDevice, lines.size
        self._runtime.memcpy2DAsync(target, size, source, lines.pitch, size, lines.count, kind, stream.ptr)

    def download(self, target: npt.NDArray[Any], source: int, stream: Any) -> None:
        """See `GpuDevice.download`."""
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(target.ctypes.data, source, target.nbytes, kind, stream.ptr)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Graph:
        """See `GpuDevice.capture`."""
        with stream:
            stream.begin_capture(self._runtime.streamCaptureModeThreadLocal)
            try:
                enqueue()
            except BaseException:
                with contextlib.suppress(*self.errors):
                    stream.end_capture()
                raise
            return _CupyGraph(stream.end_capture())

    def load(self, code: bytes) -> Any:
        """See `GpuDevice.load`."""
        module = self._cupy.cuda.function.Module()
        module.load(code)
        return module

    def entry(self, module: Any, name: str) -> Any:
        """See `GpuDevice.entry`."""
        return module.get_function(name)

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: Any = None,
        shared_bytes: int = 0,
    ) -> None:
        """See `GpuDevice.launch`; None is CuPy's current stream."""
        function(grid, block, tuple(arguments), shared_bytes, stream=stream)

    @functools.cached_property
    def _zeroing(self) -> Any:
        """The stream on which memory is allocated and zeroed."""
        return self.stream()


class _Thread(threading.local):
    """What is known of the calling thread.

    Attributes:
        has_used_it: Whether it was in the GPU's context before; a thread that never was has the number 0 as well.
    """

    has_used_it = False


class _CupyGraph(Graph):
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def launch(self, stream: Any) -> None:
        self._graph.launch(stream)


class PycudaDevice(GpuDevice):
    """A GPU through PyCUDA, in the primary context; `pycuda.autoinit` is not used, and must not be."""

    library = "pycuda"

    def __init__(self, index: int = 0) -> None:
        """Open a GPU.

        Raises:
            BackendUnavailableError: if PyCUDA or the GPU is missing.
        """
        super().__init__()
        try:
            import pycuda.tools
            from pycuda import driver
        except (ImportError, OSError) as problem:
            raise _NotInstalledError(
                f"PyCUDA is not installed ({_reason(problem)}): install yolotrtx[pycuda]"
            ) from None
        self._driver: Any = driver
        self.errors = (driver.Error, _DriverError)
        try:
            driver.init()
            device = driver.Device(index)
            self.name = device.name()
            self.capability = device.compute_capability()
            self._context: Any = device.retain_primary_context()
        except driver.Error as problem:
            raise BackendUnavailableError(
                f"GPU {index} cannot be used ({_reason(problem)}): check the driver with nvidia-smi"
            ) from None
        self.index = index
        self._calls = _DriverCalls()
        with self.current():
            self._page_locked: Any = pycuda.tools.PageLockedMemoryPool()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See `GpuDevice.current`."""
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def memory_info(self) -> tuple[int, int]:
        """See `GpuDevice.memory_info`."""
        with self.current():
            free, total = self._driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, size: int) -> Memory:
        """See `GpuDevice.allocate`."""
        owner = self._driver.mem_alloc(max(size, 1))
        self._driver.memset_d8_async(int(owner), 0, max(size, 1), self._zeroing)
        self._zeroing.synchronize()  # not the context, which another thread's capture would not survive
        return Memory(int(owner), size, owner)

    def page_locked(self, size: int) -> Bytes:
        """See `GpuDevice.page_locked`."""
        return self._page_locked.allocate((max(size, 1),), np.uint8)[:size]  # type: ignore[no-any-return]

    def stream(self) -> Any:
        """See `GpuDevice.stream`."""
        non_blocking = 1  # CU_STREAM_NON_BLOCKING
        return self._driver.Stream(non_blocking)

    def handle(self, stream: Any) -> int:
        """See `GpuDevice.handle`."""
        return int(stream.handle)

    def synchronize(self, stream: Any) -> None:
        """See `GpuDevice.synchronize`."""
        stream.synchronize()

    def event(self, *, blocking: bool = False, timing: bool = False) -> Any:
        """See `GpuDevice.event`."""
        flags = self._driver.event_flags
        chosen = flags.BLOCKING_SYNC if blocking else flags.DEFAULT
        return self._driver.Event(chosen if timing else chosen | flags.DISABLE_TIMING)

    def record(self, event: Any, stream: Any) -> None:
        """See `GpuDevice.record`."""
        event.record(stream)

    def wait(self, event: Any) -> None:
        """See `GpuDevice.wait`."""
        event.synchronize()

    def has_happened(self, event: Any) -> bool:
        """See `GpuDevice.has_happened`."""
        return bool(event.query())

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """See `GpuDevice.elapsed_ms`."""
        return float(second.time_since(first))

    def wait_for_stream(self, stream: Any, other: int) -> None:
        """See `GpuDevice.wait_for_stream`."""
        self._calls.wait_for_stream(self.handle(stream), other)

    def upload(self, target: int, source: npt.NDArray[Any], stream: Any) -> None:
        """See `GpuDevice.upload`."""
        self._driver.memcpy_htod_async(target, source, stream)

    def upload_lines(self, target: int, source: int, lines: Lines, stream: Any) -> None:
        """See `GpuDevice.upload_lines`."""
        self._calls.upload_lines(target, source, lines, self.handle(stream))

    def download(self, target: npt.NDArray[Any], source: int, stream: Any) -> None:
        """See `GpuDevice.download`."""
        self._driver.memcpy_dtoh_async(target, source, stream)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Graph:
        """See `GpuDevice.capture`."""
        return self._calls.capture(self.handle(stream), enqueue)

    def load(self, code: bytes) -> Any:
        """See `GpuDevice.load`."""
        return self._driver.module_from_buffer(code)

    def entry(self, module: Any, name: str) -> Any:
        """See `GpuDevice.entry`."""
        return module, module.get_function(name)  # a function does not keep its module alive

    def launch(
        self,
        function: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        stream: Any = None,
        shared_bytes: int = 0,
    ) -> None:
        """See `GpuDevice.launch`."""
        function[1](*arguments, grid=grid, block=block, stream=stream, shared=shared_bytes)

    @functools.cached_property
    def _zeroing(self) -> Any:
        """The stream on which memory is zeroed."""
        return self.stream()


class _DriverError(Exception):
    """The driver's name of an error."""


class _Copy2D(ctypes.Structure):
    """`CUDA_MEMCPY2D` (CUDA Driver API)."""

    _fields_: ClassVar = [
        (f"{end}{name}", kind)
        for end in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_uint),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_ulonglong),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


class _DriverCalls:
    """Functions of the CUDA driver that PyCUDA does not wrap as we need them (CUDA Driver API).

    All work in the current context.
    """

    _THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
    _HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")

    def capture(self, stream: int, enqueue: Callable[[], None]) -> Graph:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), self._THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            self._driver.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            if graph:
                self._driver.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        finally:
            self._driver.cuGraphDestroy(graph)
        return _DriverGraph(self, executable)

    def launch(self, executable: ctypes.c_void_p, stream: int) -> None:
        self._call("cuGraphLaunch", executable, ctypes.c_void_p(stream))

    def destroy(self, executable: ctypes.c_void_p) -> None:
        self._driver.cuGraphExecDestroy(executable)

    def wait_for_stream(self, stream: int, other: int) -> None:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), self._DISABLE_TIMING)
        try:
            self._call("cuEventRecord", event, ctypes.c_void_p(other))
            self._call("cuStreamWaitEvent", ctypes.c_void_p(stream), event, 0)
        finally:
            self._driver.cuEventDestroy_v2(event)  # the driver keeps it until it has happened

    def upload_lines(self, target: int, source: int, lines: Lines, stream: int) -> None:
        copy = _Copy2D(
            srcMemoryType=self._HOST,
            srcHost=source,
            srcPitch=lines.pitch,
            dstMemoryType=self._DEVICE,
            dstDevice=target,
            dstPitch=lines.size,
            WidthInBytes=lines.size,
            Height=lines.count,
        )
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), ctypes.c_void_p(stream))

    def _call(self, function: str, *arguments: Any) -> None:
        """Call the driver; raises _DriverError if it fails."""
        status = getattr(self._driver, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            raise _DriverError(f"{function}: {(name.value or b'unknown error').decode()}")


class _DriverGraph(Graph):
    def __init__(self, calls: _DriverCalls, executable: ctypes.c_void_p) -> None:
        self._calls = calls
        self._executable = executable

    def launch(self, stream: Any) -> None:
        self._calls.launch(self._executable, int(stream.handle))

    def __del__(self) -> None:
        self._calls.destroy(self._executable)


class _NotInstalledError(BackendUnavailableError):
    """A device library is missing."""


def _reason(problem: BaseException) -> str:
    """The first line of an error; CuPy wraps those of its import in a page of advice."""
    cause = problem.__cause__ or problem
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


DEVICES: dict[str, Callable[[int], GpuDevice]] = {"cupy": CupyDevice, "pycuda": PycudaDevice}
"""Device libraries in the order in which they are tried."""

_open: dict[tuple[str, int], GpuDevice] = {}
_opening = threading.Lock()


def find_device(index: int | None = None, library: str | None = None) -> GpuDevice:
    """A GPU through the first device library that works; the same object each time.

    Args:
        index: The GPU's number; None takes 0, which ``CUDA_VISIBLE_DEVICES`` may define.
        library: ``cupy`` or ``pycuda``; None takes what the environment variable ``YOLOTRT_DEVICE_LIBRARY`` names, or
            the first that works.

    Raises:
        InputError: if the library's name is unknown.
        BackendUnavailableError: if no library or no GPU is there.
    """
    chosen = library or os.environ.get(LIBRARY_VARIABLE)
    if chosen and chosen not in DEVICES:
        raise InputError(f"device library {chosen!r} is not known: choose one of {', '.join(DEVICES)}")
    os.environ.setdefault(_QUEUES_VARIABLE, _MOST_QUEUES)
    problems: list[YolotrtError] = []
    for name in [chosen] if chosen else DEVICES:
        key = name, index or 0
        try:
            with _opening:
                if key not in _open:
                    _open[key] = DEVICES[name](index or 0)
        except YolotrtError as problem:
            problems.append(problem)
        else:
            return _open[key]
    # what a library says of the GPU tells more than that another is not installed
    raise next((problem for problem in problems if not isinstance(problem, _NotInstalledError)), problems[0])
