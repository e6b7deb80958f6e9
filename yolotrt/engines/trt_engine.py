"""A TensorRT plan in the memory of one GPU, which the sessions of a process share."""

from __future__ import annotations

import logging
import re
import threading
import weakref
from typing import Any

from yolotrt.cuda.device import GpuDevice, Memory
from yolotrt.engines import inspector
from yolotrt.engines.file import REBUILD, EngineFile, TensorInfo
from yolotrt.engines.trt_adapter import scratch_bytes
from yolotrt.engines.trt_log import shared_logger
from yolotrt.errors import EngineFileError, InferenceError

_log = logging.getLogger(__name__)

CAPTURE_ATTEMPTS = 3

_AMPERE = (8, 0)
"""What plans with hardware compatibility need at least."""

_DTYPE_NAMES = {"FLOAT": "float32", "HALF": "float16"}


class TrtEngine:
    """A deserialized plan.

    Attributes:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        device: The GPU.
        header: The engine's description.
        scratch_bytes: Device memory that one execution context needs while it runs.
        captures_left: How many captures as a CUDA graph may still fail before no more are tried.
    """

    def __init__(self, trt: Any, engine: EngineFile, device: GpuDevice) -> None:
        """Deserialize a plan.

        Raises:
            EngineFileError: if it was built for another version or GPU, or TensorRT refuses it.
        """
        self.trt = trt
        self.device = device
        self.header = engine.header
        self.captures_left = CAPTURE_ATTEMPTS
        require_fitting_machine(engine, trt, device)
        self._logger = shared_logger(trt)
        with device.exclusive, device.current():
            self._runtime = trt.Runtime(self._logger)
            if engine.header.build_options.get("version_compatible"):
                self._runtime.engine_host_code_allowed = True  # the plan brings its runtime along, as program code
            self._logger.clear()  # what it said of earlier engines and builds
            self._engine: Any = self._runtime.deserialize_cuda_engine(engine.plan)
            if self._engine is None:
                reason = self._logger.last_error or "no reason given"
                raise EngineFileError(f"engine {engine.label} was refused by TensorRT ({reason}): {REBUILD}")
            self._require_tensors(engine.label)
            self.scratch_bytes = scratch_bytes(self.trt, self._engine)

    def context(self, batch: int, scratch: Memory) -> Any:
        """A new execution context for one batch size.

        A CUDA graph is bound to the state of the context that it was captured from (TensorRT Developer Guide, "CUDA
        Graphs"), so each batch size gets a context; those of one stream may share their scratch memory. An engine is
        not safe for several threads (TensorRT documentation, "Thread Safety"): they make their contexts in turn.

        Args:
            batch: Pictures in each call.
            scratch: At least `scratch_bytes`.

        Raises:
            InferenceError: if TensorRT refuses.
        """
        with self.device.exclusive:
            context = self._new_context(scratch)
        if context is None:
            raise InferenceError(f"TensorRT gave no execution context ({self.last_error}): free GPU memory, or rebuild")
        for info in self.header.inputs:
            if info.shape[0] == -1 and not context.set_input_shape(info.name, (batch, *info.shape[1:])):
                raise InferenceError(f"TensorRT refused a batch of {batch} ({self.last_error}): {REBUILD}")
        return context

    def layers(self, context: Any = None) -> list[dict[str, Any]]:
        """What TensorRT's engine inspector says of each layer; with dynamic shapes for those of `context`."""
        return inspector.layers(inspector.engine_information(self.trt, self._engine, context))

    @property
    def last_error(self) -> str:
        """TensorRT's last error message."""
        return str(self._logger.last_error or "no reason given")

    def _new_context(self, scratch: Memory) -> Any:
        """A context without memory of its own, given ours."""
        strategy = getattr(self.trt, "ExecutionContextAllocationStrategy", None)
        specialization = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategy is not None and specialization is not None:
            context = self._engine.create_execution_context(self._rtx_config(strategy, specialization))
        elif strategy is not None:
            context = self._engine.create_execution_context(strategy.USER_MANAGED)
        elif hasattr(self._engine, "create_execution_context_without_device_memory"):  # TensorRT 8
            context = self._engine.create_execution_context_without_device_memory()
        else:
            raise InferenceError(f"{self.trt.__name__} {self.trt.__version__} is not known: update yolotrt")
        if context is not None and hasattr(context, "set_device_memory"):
            context.set_device_memory(scratch.address, scratch.size)
        elif context is not None:
            context.device_memory = scratch.address
        return context

    def _rtx_config(self, strategy: Any, specialization: Any) -> Any:
        """How TensorRT-RTX makes a context: with the kernels for its shapes, before the first run.

        Otherwise it takes makeshift ones until the others are compiled, and a graph would keep those.
        """
        if not hasattr(self._engine, "create_runtime_config"):
            return strategy.USER_MANAGED
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy.USER_MANAGED)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            config.dynamic_shapes_kernel_specialization_strategy = specialization.EAGER
        return config

    def _require_tensors(self, label: str) -> None:
        """The plan's inputs and outputs must be those of the header: buffers are made from it."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        actual = {
            TensorInfo(name, _dtype_name(engine.get_tensor_dtype(name)), tuple(map(int, engine.get_tensor_shape(name))))
            for name in names
        }
        if actual != {*self.header.inputs, *self.header.outputs}:
            raise EngineFileError(f"engine {label} has other inputs and outputs than its header says: {REBUILD}")


_shared: weakref.WeakValueDictionary[tuple[str, str, int, str], TrtEngine] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def shared_engine(trt: Any, engine: EngineFile, device: GpuDevice) -> TrtEngine:
    """The engine, deserialized once as long as anybody holds it.

    Raises:
        EngineFileError: see `TrtEngine`.
    """
    key = trt.__name__, device.library, device.index, engine.header.plan_sha256
    with _sharing:
        found = _shared.get(key)
        if found is None or found.header != engine.header:  # such as other class names for the same plan
            found = _shared[key] = TrtEngine(trt, engine, device)
        return found


def require_fitting_machine(engine: EngineFile, trt: Any, device: GpuDevice) -> None:
    """Refuse a plan that this TensorRT or this GPU cannot run, before TensorRT does it less clearly.

    Raises:
        EngineFileError: saying what it was built for and what is here.
    """
    header = engine.header
    built, installed = _numbers(header.backend_version), _numbers(trt.__version__)
    if header.build_options.get("version_compatible"):
        if built > installed:
            raise EngineFileError(
                f"engine {engine.label} was built with {header.backend} {header.backend_version}, and "
                f"{trt.__version__} is installed: version-compatible engines run with the same or a later version, so "
                f"{REBUILD}, or install {header.backend} {header.backend_version} or later"
            )
    elif built != installed:
        raise EngineFileError(
            f"engine {engine.label} was built with {header.backend} {header.backend_version}, and {trt.__version__} is "
            f"installed, which cannot run it: {REBUILD}, or install {header.backend} {header.backend_version}"
        )
    here = f"{device.capability[0]}.{device.capability[1]}"
    if not header.compute_capability or header.compute_capability == here:
        if header.device_name not in {"", device.name}:
            _log.warning(
                "engine %s was built on a %s and runs on a %s: build it here to be as fast as can be",
                engine.label,
                header.device_name,
                device.name,
            )
        return
    if header.build_options.get("hardware_compatible") and device.capability >= _AMPERE:
        return
    raise EngineFileError(
        f"engine {engine.label} was built for a GPU of compute capability {header.compute_capability} "
        f"({header.device_name}), and this {device.name} has {here}: build it here with python -m yolotrt -s"
    )


def _numbers(version: str) -> list[int]:
    """Major, minor and patch: a plan needs exactly these (TensorRT Developer Guide, "Version Compatibility")."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _dtype_name(dtype: Any) -> str:
    """NumPy's name of TensorRT's type."""
    name = str(dtype.name)
    return _DTYPE_NAMES.get(name, name.lower())
