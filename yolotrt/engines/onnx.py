"""The engine for machines without a GPU: the recorded network as ONNX, run by ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.engines.base import Backend, BuildOptions, Plan, Session
from yolotrt.engines.definition import build_plan
from yolotrt.engines.file import REBUILD, EngineFile
from yolotrt.errors import BackendUnavailableError, EngineFileError
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

    def build(self, weights: Weights, options: BuildOptions) -> Plan:
        """Write the network as an ONNX model and check that ONNX Runtime loads it."""
        plan = build_plan(recorder, weights, options)
        _inference_session(plan.data, threads=1)
        return plan

    def open(self, engine: EngineFile, *, threads: int | None = None, **_: Any) -> Session:
        """Open a session.

        Args:
            engine: An engine of this backend.
            threads: Number of CPU threads; None leaves it to ONNX Runtime (one a physical core).
        """
        return OnnxRuntimeSession(engine, threads=threads)


class OnnxRuntimeSession(Session):
    """One ONNX Runtime session and its output buffers."""

    def __init__(self, engine: EngineFile, *, threads: int | None = None) -> None:
        """Load the model. See `OnnxRuntimeBackend.open`.

        Raises:
            EngineFileError: if ONNX Runtime cannot load it.
        """
        self.header = engine.header
        try:
            self._session: Any = _inference_session(engine.plan, threads)
        except BackendUnavailableError:
            raise
        except Exception as problem:  # ONNX Runtime has a class of its own for each kind of failure
            raise EngineFileError(
                f"engine {engine.label} cannot be loaded by ONNX Runtime ({_first_line(problem)}): {REBUILD}"
            ) from problem
        self._outputs = [np.empty((self.header.max_batch, *info.shape[1:]), np.float32) for info in self.header.outputs]

    def run(self, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """See `Session.run`."""
        self.check_input(images)
        images = np.ascontiguousarray(images)
        binding = self._session.io_binding()
        _bind(binding.bind_input, self.header.inputs[0].name, images)
        # ONNX Runtime writes into our buffers: session.run would copy each output once more
        heads = [output[: images.shape[0]] for output in self._outputs]
        for info, head in zip(self.header.outputs, heads, strict=True):
            _bind(binding.bind_output, info.name, head)
        self._session.run_with_iobinding(binding)
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
