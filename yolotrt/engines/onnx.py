"""The engine for machines without a GPU: the recorded network as ONNX, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.base import Backend, CompleteOptions, Plan, Session
from yolotrt.engines.definition import build_plan
from yolotrt.engines.file import REBUILD, EngineFile
from yolotrt.engines.host import HostSession
from yolotrt.errors import BackendUnavailableError, BuildError, EngineFileError, InferenceError, InputError
from yolotrt.network import recorder
from yolotrt.weights import Weights

_ERRORS_ONLY = 3
"""ONNX Runtime's log level; its warnings speak of internals that a user cannot change."""


class OnnxRuntimeBackend(Backend):
    """Builds ONNX models and runs them on the CPU."""

    name = "onnxruntime"
    default_precision = "fp32"

    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(_onnxruntime().__version__)

    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Write the network as an ONNX model and check that ONNX Runtime loads it."""
        plan = build_plan(recorder, weights, options)
        try:
            _inference_session(plan.data, threads=1)
        except _library_errors() as problem:
            raise BuildError(f"ONNX Runtime refuses the network ({_first_line(problem)}): report this") from problem
        return plan

    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:
        """Open a session; by default ONNX Runtime takes one thread a physical core."""
        return OnnxRuntimeSession(engine, threads=threads)


class OnnxRuntimeSession(HostSession):
    """One ONNX Runtime session and its output buffers."""

    def __init__(self, engine: EngineFile, *, threads: int | None = None) -> None:
        """Load the model. See `OnnxRuntimeBackend.open`.

        Raises:
            InputError: if the number of threads is below 1.
            EngineFileError: if ONNX Runtime cannot load it.
        """
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads {threads!r}: choose a whole number of at least 1")
        super().__init__(engine.header)
        try:
            self._session: Any = _inference_session(engine.plan, threads)
        except _library_errors() as problem:
            raise EngineFileError(
                f"engine {engine.label} cannot be loaded by ONNX Runtime ({_first_line(problem)}): {REBUILD}"
            ) from problem
        self._outputs = [np.empty((self.header.max_batch, *info.shape[1:]), np.float32) for info in self.header.outputs]

    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """See `Session.run`."""
        if self._session is None:
            raise InputError("the session is closed: open a new one")
        self.check_input(images)
        images = np.ascontiguousarray(images)
        binding = self._session.io_binding()
        _bind(binding.bind_input, self.header.inputs[0].name, images)
        # ONNX Runtime writes into our buffers: session.run would copy each output once more
        heads = [output[: images.shape[0]] for output in self._outputs]
        for info, head in zip(self.header.outputs, heads, strict=True):
            _bind(binding.bind_output, info.name, head)
        try:
            self._session.run_with_iobinding(binding)
        except _library_errors() as problem:
            raise InferenceError(f"ONNX Runtime failed ({_first_line(problem)}): try a smaller batch") from problem
        return heads

    def close(self) -> None:
        """Free the session."""
        self._session = None
        self._outputs = []


def _bind(bind: Any, name: str, array: npt.NDArray[np.float32]) -> None:
    """Bind an array in host memory."""
    bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _onnxruntime() -> Any:
    """The module onnxruntime."""
    try:
        import onnxruntime
    except ImportError as problem:
        raise BackendUnavailableError(
            f'ONNX Runtime is not installed ({problem}): run pip install "yolotrtx[cpu]"'
        ) from problem
    return onnxruntime


def _library_errors() -> tuple[type[Exception], ...]:
    """The classes that ONNX Runtime raises, one for each kind of failure, all derived from Exception alone."""
    state = _onnxruntime().capi.onnxruntime_pybind11_state
    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*own, RuntimeError, ValueError)


def _inference_session(model: bytes, threads: int | None) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _first_line(problem: Exception) -> str:
    """The first line of a library's message, shortened."""
    return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
