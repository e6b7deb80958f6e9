"""What the sessions on a GPU have in common: an engine on a stream, captured as CUDA graphs, and one-line errors."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.device import GpuDevice, Graph, find_device
from yolotrt.cuda.kernels import upload_bytes
from yolotrt.engines.base import Frame, Session, Timing
from yolotrt.engines.file import REBUILD, EngineFile, TensorInfo
from yolotrt.engines.trt_engine import TrtEngine, shared_engine
from yolotrt.errors import InferenceError, InputError
from yolotrt.postprocess import NmsOptions

_log = logging.getLogger(__name__)

NAPS, NAP = 3, 150e-6
"""How often, and for how many seconds, a thread sleeps before it lets the driver wake it."""


class Closable(Protocol):
    """What holds memory of the GPU."""

    def close(self) -> None:
        """Free it."""
        ...


_Lane = TypeVar("_Lane", bound=Closable)
_Self = TypeVar("_Self", bound="EngineSession[Any]")


class EngineSession(Session, Generic[_Lane]):
    """One engine on one GPU, and lanes that run it. Sessions of the same engine share the weights."""

    def __init__(self, engine: TrtEngine) -> None:
        self.header = engine.header
        self.timing = Timing()
        self._engine: TrtEngine | None = engine
        self._device = engine.device
        self._using = Using(engine.device)
        self._lanes: list[_Lane] = []

    @classmethod
    def open(cls: type[_Self], trt: Any, engine: EngineFile, device: GpuDevice | None = None) -> _Self:
        """Open a session.

        Args:
            trt: The module `tensorrt` or `tensorrt_rtx`.
            engine: An engine that it built.
            device: The GPU; None takes the first one.

        Raises:
            BackendUnavailableError: if there is no usable GPU or no device library.
            EngineFileError: if the engine does not fit this machine.
            InferenceError: if the GPU's memory does not suffice.
        """
        device = device or find_device()
        with Switching(device):
            shared = shared_engine(trt, engine, device)
        return cls(shared)

    def close(self) -> None:
        """See `Session.close`."""
        if self._engine is None:
            return
        with contextlib.suppress(*self._device.errors), self._device.current():
            while self._lanes:  # freed here, while the GPU is current: PyCUDA frees nothing in another thread otherwise
                with contextlib.suppress(*self._device.errors):
                    self._lanes.pop().close()
        self._lanes = []
        self._engine = None

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            with contextlib.suppress(Exception):  # the interpreter may be ending
                self.close()

    def _compute_at_first(self, picture: Frame, options: NmsOptions, batches: int) -> None:
        """The smallest and the largest batch, as contexts and graphs are for one size; each under way takes a lane."""
        low, _, high = self.header.batch_range
        for frames in ([picture] * count for count in sorted({low, high})):
            if self.header.model.task == "classify":
                self.classify(frames)
            else:
                for pending in [self.submit(frames, options) for _ in range(batches)]:
                    pending.result()

    def _require_open(self) -> None:
        if self._engine is None:
            raise InputError("the session is closed: open a new one")

    def _on_device(self) -> Using:
        return self._using if self._device.is_current() else Switching(self._device)


class EngineStream:
    """An engine on a stream of its own, with memory for its tensors, and graphs of what is done around it.

    Attributes:
        stream: The stream.
        tensors: The network's inputs and outputs, for the largest batch; sizes are multiples of 16 bytes.
    """

    def __init__(self, engine: TrtEngine) -> None:
        header = engine.header
        device = self._device = engine.device
        self._engine = engine
        self.stream = device.stream()
        self._done, self._waking = device.event(), device.event(blocking=True)
        self.tensors = {
            info.name: device.allocate(upload_bytes(tensor_bytes(info, header.max_batch)))
            for info in (*header.inputs, *header.outputs)
        }
        self._scratch = device.allocate(engine.scratch_bytes)
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, Graph] = {}

    def enqueue(self, batch: int) -> None:
        """Enqueue the engine alone.

        Raises:
            InferenceError: if TensorRT fails.
        """
        context = self._contexts.get(batch)
        if context is None:
            context = self._contexts[batch] = self.new_context(batch)
        if not context.execute_async_v3(self._device.handle(self.stream)):
            raise InferenceError(f"TensorRT failed ({self._engine.last_error}): build the engine again")

    def new_context(self, batch: int) -> Any:
        """A context for one batch size that knows where its tensors are."""
        context = self._engine.context(batch, self._scratch)
        for name, memory in self.tensors.items():
            if not context.set_tensor_address(name, memory.address):
                raise InferenceError(f"TensorRT refused the memory of {name} ({self._engine.last_error}): {REBUILD}")
        return context

    def start(self, batch: int, enqueue: Callable[[int], None]) -> None:
        """Start all that is done for a batch; nothing of it is under way if this fails.

        Args:
            batch: Its size.
            enqueue: Enqueues it all for a batch size, the engine too. It is captured at the first call for this one,
                and the graph launched at others until `forget_graphs`.
        """
        try:
            graph = self._graphs.get(batch)
            if graph is not None:
                graph.launch(self.stream)
            else:
                enqueue(batch)  # TensorRT wants to run once before it is captured
                self._capture(batch, lambda: enqueue(batch))
            self._device.record(self._done, self.stream)
        except BaseException:
            self._device.synchronize(self.stream)  # what it reads may change at once
            raise

    def wait(self, *, spin: bool) -> None:
        """Wait for what was started last, without sleeping or with as little computation as possible.

        To be woken by the driver costs 20 to 30 us of computation, a nap 7 to 9: so the first of the time is spent in
        naps. They also end late, when further batches are finished for which there is nothing to wait.
        """
        device, done = self._device, self._done
        if spin:
            device.wait(done)
            return
        for _ in range(NAPS):
            if device.has_happened(done):
                return
            time.sleep(NAP)
        device.record(self._waking, self.stream)  # nothing else was started since
        device.wait(self._waking)

    def captured(self, enqueue: Callable[[], None]) -> Graph:
        """A graph of what is enqueued on the stream; whatever it needs was made by enqueuing it once before."""
        with self._device.exclusive:
            return self._device.capture(self.stream, enqueue)

    def forget_graphs(self) -> None:
        """Have them captured anew, since addresses or arguments are others."""
        self._graphs.clear()

    def outputs(self, batch: int) -> list[npt.NDArray[np.float32]]:
        """The network's outputs of the last batch, once it is computed, as float32 arrays of the host."""
        outputs = []
        for info in self._engine.header.outputs:
            output = np.empty((batch, *info.shape[1:]), np.dtype(info.dtype))
            self._device.download(output, self.tensors[info.name].address, self.stream)
            outputs.append(output)
        self._device.synchronize(self.stream)
        return [output.astype(np.float32, copy=False) for output in outputs]

    def close(self) -> None:
        """Wait for what is under way, and free everything in an order that TensorRT stands."""
        try:
            self._device.synchronize(self.stream)
        finally:
            self._graphs.clear()
            self._contexts.clear()

    def _capture(self, batch: int, enqueue: Callable[[], None]) -> None:
        """Make the graph of a batch. Where that fails the batch is enqueued, which costs launch time and nothing else.

        One failure tells little: another library of the process may have waited for the whole GPU meanwhile.
        """
        if not self._engine.captures_left:
            return
        failures: tuple[type[BaseException], ...] = (*self._device.errors, InferenceError)
        try:
            self._graphs[batch] = self.captured(enqueue)
        except failures as problem:
            self._engine.captures_left -= 1
            if not self._engine.captures_left:
                _log.warning("the engine cannot be captured as a CUDA graph and is enqueued each time (%s)", problem)


def tensor_bytes(info: TensorInfo, batch: int) -> int:
    """Bytes of a network input or output."""
    return batch * int(np.prod(info.shape[1:])) * np.dtype(info.dtype).itemsize


class Using:
    """Use the GPU, which is current; its failures become InferenceError. A class, as each frame enters it twice."""

    __slots__ = ("_device",)

    def __init__(self, device: GpuDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if problem is not None and isinstance(problem, self._device.errors):
            raise InferenceError(explain(problem)) from problem


class Switching(Using):
    """The same, where another GPU or none may be current."""

    __slots__ = ("_current",)

    def __enter__(self) -> None:
        self._current = self._device.current()
        try:
            self._current.__enter__()
        except self._device.errors as problem:
            raise InferenceError(explain(problem)) from problem

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._current.__exit__(kind, problem, trace)
        except self._device.errors as failure:
            problem = problem or failure
        super().__exit__(kind, problem, trace)


def explain(problem: BaseException) -> str:
    """A device library's error in one line with a remedy."""
    text = (str(problem).splitlines() or [type(problem).__name__])[0]
    if "memory" in text.lower() and "illegal" not in text.lower():
        return f"the GPU's memory does not suffice ({text}): use a smaller batch, or free memory on the GPU"
    return f"the GPU failed ({text}): start the program again; report it if it happens once more"
