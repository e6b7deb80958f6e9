"""The engine for machines without a GPU: the recorded network as ONNX, run by ONNX Runtime."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolotrt.engines.base import Backend, CompleteOptions, Frame, Plan, Session
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.file import REBUILD, EngineFile
from yolotrt.engines.host import HostSession
from yolotrt.errors import BackendUnavailableError, BuildError, EngineFileError, InferenceError, InputError
from yolotrt.network import recorder
from yolotrt.postprocess import Float, NmsOptions
from yolotrt.weights import Weights

_ERRORS_ONLY = 3
"""ONNX Runtime's log level; its warnings speak of internals that a user cannot change."""

_EXACT_INT8 = "session.x64quantprecision"
"""Session option: with 1, ONNX Runtime's 8-bit kernels are exact on any x86 CPU, but much slower than those of VNNI."""

_SIDE_BY_SIDE = 4
"""Pictures in the batches that are computed at the same time at most: each has its own activations in memory."""

_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""Environment variable: official builds of ONNX Runtime, such as 1.31 and 1.32, report their use to its maker over the
network and keep an identifier in the user's cache folder, unless this is 1 when they are loaded (their Privacy.md)."""

_CORES = Path("/sys/devices/system/cpu")
_CPU_INFO = Path("/proc/cpuinfo")

_log = logging.getLogger(__name__)


class OnnxRuntimeBackend(Backend):
    """Builds ONNX models and runs them on the CPU."""

    name = "onnxruntime"
    default_precision = "fp32"

    def version(self) -> str:
        """Version of ONNX Runtime."""
        return str(_onnxruntime().__version__)

    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Write the network as an ONNX model and check that ONNX Runtime loads it."""
        plan = build_plan(recorder, weights, options, _OnnxHooks())
        try:
            inference_session(plan.data, threads=1)
        except _library_errors() as problem:
            raise BuildError(f"ONNX Runtime refuses the network ({_first_line(problem)}): report this") from problem
        return plan

    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:
        """Open a session; by default ONNX Runtime takes one thread a physical core."""
        return OnnxRuntimeSession(engine, threads=threads)


class _OnnxHooks(BuildHooks):
    """Looks at what ONNX Runtime's optimizer makes of an INT8 network."""

    def int8_convolutions(self, plan: bytes) -> int | None:
        return _count_int8_convolutions(plan)


class OnnxRuntimeSession(HostSession):
    """ONNX Runtime with all threads for one batch, and with few for each of several batches side by side."""

    def __init__(self, engine: EngineFile, *, threads: int | None = None) -> None:
        """Load the model. See `OnnxRuntimeBackend.open`.

        Raises:
            InputError: if the number of threads is below 1.
            EngineFileError: if ONNX Runtime cannot load it.
        """
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads {threads!r}: choose a whole number of at least 1")
        if threads is not None and threads > (os.cpu_count() or threads):
            _log.warning(
                "%d threads on %d CPUs wait for each other, which takes many times as long", threads, os.cpu_count()
            )
        available = _core_count()
        cores = threads or available
        workers = max(1, min(cores, _SIDE_BY_SIDE // engine.header.max_batch))
        super().__init__(engine.header, workers=workers)
        self.leaves_cores_free = cores < available
        self._engine = engine
        self._shared_threads = cores - workers + 1  # the workers compute, too, beside one pool for all of them
        try:
            self._session: Any = inference_session(engine.plan, threads)
        except _library_errors() as problem:
            raise EngineFileError(
                f"engine {engine.label} cannot be loaded by ONNX Runtime ({_first_line(problem)}): {REBUILD}"
            ) from problem
        self._shared: Any = self._session if workers == 1 else None  # until several batches are under way
        self._loading = threading.Lock()

    def compute(self, images: Float, outputs: Sequence[Float], *, is_alone: bool) -> None:
        """See `HostSession.compute`."""
        try:
            session = self._session if is_alone else self._shared_session()
            binding = session.io_binding()
            _bind(binding.bind_input, self.header.inputs[0].name, images)
            # ONNX Runtime writes into our buffers: session.run would copy each output once more
            for info, output in zip(self.header.outputs, outputs, strict=True):
                _bind(binding.bind_output, info.name, output)
            session.run_with_iobinding(binding)
        except _library_errors() as problem:
            raise InferenceError(f"ONNX Runtime failed ({_first_line(problem)}): try a smaller batch") from problem

    def _compute_at_first(self, picture: Frame, options: NmsOptions, batches: int) -> None:
        if batches > 1 and self.header.model.task != "classify":  # classifiers compute one batch at a time
            self._shared_session()
        super()._compute_at_first(picture, options, batches)

    def close(self) -> None:
        """Free the sessions."""
        super().close()
        self._session = self._shared = None

    def _shared_session(self) -> Any:
        """Computes batches side by side. Its results are those of the other one, to the bit."""
        with self._loading:
            if self._shared is None:
                self._shared = inference_session(self._engine.plan, self._shared_threads)
            return self._shared


def _core_count() -> int:
    """Physical cores that this process may use, as far as they can be told."""
    try:
        usable = os.sched_getaffinity(0)
        siblings = [_CORES.joinpath(f"cpu{cpu}/topology/core_cpus_list").read_text() for cpu in usable]
    except (AttributeError, OSError):  # another system than Linux: two hardware threads a core are usual
        return max(1, (os.cpu_count() or 1) // 2)
    return len(set(siblings))


def _bind(bind: Any, name: str, array: Float) -> None:
    """Bind an array in host memory."""
    bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)


def _onnxruntime() -> Any:
    """The module onnxruntime, without its telemetry unless the user has asked for it."""
    os.environ.setdefault(_NO_TELEMETRY, "1")
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


def inference_session(model: bytes, threads: int | None) -> Any:
    """An onnxruntime.InferenceSession on the CPU."""
    return _onnxruntime().InferenceSession(model, _session_options(threads), providers=["CPUExecutionProvider"])


def _session_options(threads: int | None) -> Any:
    """An onnxruntime.SessionOptions."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if _saturates_in_int8():
        options.add_session_config_entry(_EXACT_INT8, "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@functools.cache
def _saturates_in_int8() -> bool:
    """Whether this is an x86 CPU without VNNI, whose fast 8-bit kernels add two products in 16 bits, which saturate.

    Known on Linux; elsewhere the fast kernels are taken.
    """
    try:
        flags = set(_CPU_INFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return "avx2" in flags and flags.isdisjoint({"avx512_vnni", "avx_vnni"})


def _count_int8_convolutions(model: bytes) -> int:
    """Convolutions that ONNX Runtime's optimizer leaves as 8-bit kernels, by the types of the optimized nodes."""
    import onnx

    options = _session_options(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _onnxruntime().InferenceSession(model, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    return sum(node.op_type == "QLinearConv" for node in optimized.graph.node)


def _first_line(problem: Exception) -> str:
    """The first line of a library's message, shortened."""
    return (str(problem).splitlines() or [type(problem).__name__])[0][:200]
