"""TensorRT 8.6, 10 and 11 as far as a build sees them, without a GPU: what exists in each version, and how it fails.

The network is the recorder's, which checks every call. What the versions have or lack is what the bindings have or
lack (tests/test_api_lint.py); an attribute that a version lacks raises AttributeError, as in the bindings.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from yolotrt.network import recorder

PLAN_MAGIC = b"ftrt"
MYELIN_REFUSAL = "Error Code 9: Internal Error (Myelin error from unknown graph)"


@dataclass
class Behaviour:
    """How the library acts, and what it saw.

    Attributes:
        failures: Per build its error messages; a build without any succeeds, as do those after the last.
        survived: Errors that are logged by builds that succeed.
        no_cuda: Whether there is no driver.
        refuses_cache: What it says to a timing cache that is not empty: ``create`` or ``set``.
        fast_fp16: Whether the platform has it, as the builder says; likewise `fast_int8` and `tf32`.
        interrupts: Whether Ctrl-C is pressed during the build.
        type_of: The type that a convolution gets, by name; None gives the one that was asked for.
        loads: Whether plans can be deserialized.
        configs: The configuration of every build.
        networks: Its network.
        cancelled: How many builds a progress monitor has stopped.
        host_code_allowed: What runtimes were told.
        inspected_shapes: Input shapes of contexts that were given to an inspector.
    """

    failures: list[list[str]] = field(default_factory=list)
    survived: list[str] = field(default_factory=list)
    no_cuda: bool = False
    refuses_cache: str = ""
    fast_fp16: bool = True
    fast_int8: bool = True
    tf32: bool = True
    interrupts: bool = False
    type_of: Callable[[str], str | None] = lambda _: None
    loads: bool = True
    configs: list[Any] = field(default_factory=list)
    networks: list[Any] = field(default_factory=list)
    cancelled: int = 0
    host_code_allowed: list[bool] = field(default_factory=list)
    inspected_shapes: list[tuple[int, ...]] = field(default_factory=list)


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str, **behaviour: Any) -> Any:
    """Make ``import tensorrt`` give a fake; returns it. Its attribute `behaviour` can be changed."""
    library = _Library(version, Behaviour(**behaviour)).module
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    return library


class _Strict:
    """Takes no attribute that its class does not have, as objects of the bindings do."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        object.__setattr__(self, name, value)


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity


class IProgressMonitor:
    pass


class HostMemory(bytes):
    """What `serialize` gives: bytes by the buffer protocol."""


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> HostMemory:
        return HostMemory(b"measured after " + self.data if self.data else b"measured")


class WeakTensor(recorder.Tensor):
    """A tensor whose type, inside a weakly typed network, is not known before the build."""

    forced: Any = None

    @property
    def dtype(self) -> Any:
        if self.is_network_output:  # float32 unless it is told
            return self.forced or recorder.float32
        return self.forced or recorder.Tensor.dtype.fget(self)

    @dtype.setter
    def dtype(self, value: Any) -> None:
        assert self._is_outer, "TensorRT ignores the type of an inner tensor"
        self.forced = value

    @property
    def _is_outer(self) -> bool:
        return self.is_network_output or self.source is None


class WeakNetwork(recorder.Network):
    """A network whose layers can be constrained."""

    def add_input(self, *arguments: Any, **named: Any) -> Any:
        tensor = super().add_input(*arguments, **named)
        tensor.__class__ = WeakTensor
        return tensor

    def add_quantize(self, x: Any, scale: Any) -> Any:
        assert x.dtype == recorder.float32, "TensorRT 8.6 quantizes float32 alone"
        return super().add_quantize(x, scale, recorder.int8)

    def add_dequantize(self, x: Any, scale: Any) -> Any:
        return super().add_dequantize(x, scale, recorder.float32)

    def _add(self, layer: Any) -> Any:
        layer = super()._add(layer)
        kind = type(layer)
        types: dict[int, Any] = {}
        layer.__class__ = type(
            kind.__name__,
            (kind,),
            {
                "precision": None,
                "num_outputs": 1,
                "types": types,
                "set_output_type": lambda _, i, t: types.update({i: t}),
            },
        )
        layer.output.__class__ = WeakTensor
        return layer


@contextlib.contextmanager
def as_defined(network: recorder.Network) -> Iterator[None]:
    """Inputs have the types again that the layers were added with: what a weakly typed network is told comes on top."""
    inputs = [tensor for tensor in network.inputs if isinstance(tensor, WeakTensor)]
    forced = [tensor.forced for tensor in inputs]
    for tensor in inputs:
        tensor.forced = None
    try:
        yield
    finally:
        for tensor, dtype in zip(inputs, forced, strict=True):
            tensor.forced = dtype


class _Library:
    """Makes the module."""

    def __init__(self, version: str, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.major = int(version.split(".", maxsplit=1)[0])
        module: Any = ModuleType("tensorrt")
        for name, value in vars(recorder).items():
            if not name.startswith("_"):
                setattr(module, name, value)
        module.__spec__ = ModuleSpec("tensorrt", None)
        module.__version__ = version
        module.behaviour = behaviour
        module.ILogger = ILogger
        if self.major >= 10:
            module.IProgressMonitor = IProgressMonitor
        self._add_enums(module)
        module.Builder = lambda logger: Builder(self, logger)
        module.Runtime = lambda logger: Runtime(self, logger)
        module.INetworkDefinition = SimpleNamespace()  # without add_plugin
        self.module = module

    def _add_enums(self, module: Any) -> None:
        weak, has_libraries = self.major < 11, self.major < 11
        creation = {8: "EXPLICIT_BATCH", 10: "EXPLICIT_BATCH STRONGLY_TYPED", 11: "STRONGLY_TYPED"}[self.major]
        module.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", creation)
        flags = "TF32 VERSION_COMPATIBLE" + (
            " FP16 INT8 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS" if weak else ""
        )
        module.BuilderFlag = _enum("BuilderFlag", flags)
        sources = ("CUBLAS CUBLAS_LT CUDNN " if has_libraries else "") + "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS"
        module.TacticSource = _enum("TacticSource", sources)
        preview = "ALIASED" + (" PROFILE_SHARING_0806" if self.major < 11 else "")
        module.PreviewFeature = _enum("PreviewFeature", preview)
        module.HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")
        module.ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
        module.LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members.split())})


class Config(recorder.BuilderConfig, _Strict):
    """What the builder is told. `flags` is what was set in the end."""

    flags: Any = None
    sources = None
    preview = None
    cache: Any = None
    limits = None
    profiles = None
    builder_optimization_level = None
    profiling_verbosity = None
    hardware_compatibility_level = None

    def __init__(self, library: _Library) -> None:
        self._library = library
        self._trt = library.module
        super().__init__()
        self.flags = {self._trt.BuilderFlag.TF32}
        self.sources = sum(1 << source for source in self._trt.TacticSource)
        self.preview = {}
        self.limits = {}

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(flag)

    def flag_names(self) -> set[str]:
        return {flag.name for flag in self.flags}

    def get_tactic_sources(self) -> int:
        return self.sources

    def set_tactic_sources(self, sources: int) -> bool:
        self.sources = sources
        return True

    def source_names(self) -> set[str]:
        return {source.name for source in self._trt.TacticSource if self.sources >> source & 1}

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self.preview[feature.name] = enable

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.limits[pool.name] = size

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        return None if data and self._library.behaviour.refuses_cache == "create" else TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.data and self._library.behaviour.refuses_cache == "set":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class ConfigWithMonitor(Config):
    progress_monitor: Any = None


class Builder:
    def __init__(self, library: _Library, logger: Any) -> None:
        if library.behaviour.no_cuda:
            logger.log(
                Severity.WARNING, "CUDA initialization failure with error: 35. Please check your CUDA installation"
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._library = library
        self._logger = logger
        if library.major < 11:
            self.platform_has_fast_int8 = library.behaviour.fast_int8
            self.platform_has_fast_fp16 = library.behaviour.fast_fp16
            self.platform_has_tf32 = library.behaviour.tf32

    def create_network(self, flags: int) -> recorder.Network:
        creation = self._library.module.NetworkDefinitionCreationFlag
        wanted = creation.EXPLICIT_BATCH if self._library.major < 10 else creation.STRONGLY_TYPED
        assert flags == 1 << wanted
        return WeakNetwork() if self._library.major < 10 else recorder.Network()

    def create_builder_config(self) -> Config:
        return (Config if self._library.major < 10 else ConfigWithMonitor)(self._library)

    def create_optimization_profile(self) -> recorder.OptimizationProfile:
        return recorder.OptimizationProfile()

    def build_serialized_network(self, network: recorder.Network, config: Config) -> HostMemory | None:
        behaviour = self._library.behaviour
        with as_defined(network):
            recorder.check_network(network, config)
        behaviour.configs.append(config)
        behaviour.networks.append(network)
        if self._is_cancelled(getattr(config, "progress_monitor", None)):
            self._logger.log(Severity.ERROR, "Build canceled by user")
            behaviour.cancelled += 1
            return None
        failure = behaviour.failures.pop(0) if behaviour.failures else []
        for message in failure or behaviour.survived:
            self._logger.log(Severity.ERROR, message)
        return None if failure else HostMemory(PLAN_MAGIC + self._information(network, config).encode())

    def _is_cancelled(self, monitor: Any) -> bool:
        """Tells the monitor of two phases and presses Ctrl-C between them."""
        if monitor is None:
            if self._library.behaviour.interrupts:
                os.kill(os.getpid(), signal.SIGINT)
            return False
        monitor.phase_start("Building engine", None, 2)
        goes_on = monitor.step_complete("Building engine", 0)
        monitor.phase_start("Tactics", "Building engine", 2)
        if self._library.behaviour.interrupts:
            os.kill(os.getpid(), signal.SIGINT)
        goes_on &= monitor.step_complete("Tactics", 0)
        monitor.phase_finish("Tactics")
        goes_on &= monitor.step_complete("Building engine", 1)
        monitor.phase_finish("Building engine")
        return not goes_on

    def _information(self, network: recorder.Network, config: Config) -> str:
        """What the inspector will say of this engine."""
        convolutions = [layer for layer in network.layers if isinstance(layer, recorder.ConvolutionLayer)]
        describe = _compiled if self._library.major >= 11 else _own_kernel
        layers = [describe(layer.name, self._type_name(layer, config)) for layer in convolutions]
        return json.dumps({"Layers": layers, "dynamic": bool(config.profiles)})

    def _type_name(self, layer: Any, config: Config) -> str:
        forced = self._library.behaviour.type_of(layer.name)
        if forced is not None:
            return forced
        if all(isinstance(tensor.source, recorder.QuantizeLayer) for tensor in layer.inputs):
            return "Int8" if self._library.major >= 10 or "INT8" in config.flag_names() else "Float"
        if self._library.major >= 10:
            is_half = layer.kernel.dtype == recorder.float16
        else:
            half, flags = recorder.float16, config.flag_names()
            obeyed = "FP16" in flags and {"OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"} & flags
            is_half = layer.precision == half and layer.types == {0: half} and obeyed
        return "Half" if is_half else "TF32" if "TF32" in config.flag_names() else "Float"


def _own_kernel(name: str, kind: str) -> dict[str, Any]:
    written = "Float" if kind == "TF32" else kind
    return {
        "Name": f"{name} + PWN(PWN({name.removesuffix('.conv')}.sigmoid), {name.removesuffix('.conv')})",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}],
        "ParameterType": "Convolution",
        "Weights": {"Type": written, "Count": 1} if kind else {},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32" if kind == "TF32" else "",
    }


def _compiled(name: str, kind: str) -> dict[str, Any]:
    written = "Float" if kind == "TF32" else kind
    return {
        "Name": f"__myl_ConvSigmMul_myl0_{abs(hash(name)) % 1000}",
        "LayerType": "kgen",
        "Inputs": [{"Name": "x", "Format": "N/A due to dynamic shapes", "Datatype": written, "shaped": True}],
        "TacticName": "sm80_xmma_fprop_tf32f32_tf32f32_f32" if kind == "TF32" else "__myl_ConvSigmMul",
        "Metadata": f"{name}\x1e{name}.sigmoid",
    }


class Runtime(_Strict):
    engine_host_code_allowed = False

    def __init__(self, library: _Library, logger: Any) -> None:
        self._library = library
        self._logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        behaviour = self._library.behaviour
        behaviour.host_code_allowed.append(self.engine_host_code_allowed)
        if not behaviour.loads:
            self._logger.log(Severity.ERROR, "Error Code 1: Serialization (magic tag does not match)")
            return None
        return Engine(self._library, plan.removeprefix(PLAN_MAGIC).decode())


class Engine:
    SCRATCH = 3 << 20

    def __init__(self, library: _Library, information: str) -> None:
        self._library = library
        self._information = information
        name = "device_memory_size_v2" if library.major >= 10 else "device_memory_size"
        setattr(self, name, self.SCRATCH)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self._library, self._information)

    def create_execution_context(self) -> Context:
        return Context()


class Context:
    shape: tuple[int, ...] = ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        self.shape = shape
        return True


class Inspector(_Strict):
    execution_context: Any = None

    def __init__(self, library: _Library, information: str) -> None:
        self._library = library
        self._information = information

    def get_engine_information(self, form: Any) -> str:
        assert form == self._library.module.LayerInformationFormat.JSON
        information = json.loads(self._information)
        if self.execution_context is not None:
            self._library.behaviour.inspected_shapes.append(self.execution_context.shape)
        elif information["dynamic"]:
            for layer in information["Layers"]:
                layer["Inputs"] = [{"Format/Datatype": "N/A due to dynamic shapes"}]
        return json.dumps(information)
