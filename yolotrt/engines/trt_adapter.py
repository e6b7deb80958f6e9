"""How versions of TensorRT differ where a network is built: 8.6, 10, 11 and TensorRT-RTX.

| | 8.6 | 10 | 11, TensorRT-RTX |
| --- | --- | --- | --- |
| network | explicit batch, weakly typed | strongly typed on request | always strongly typed |
| fp16 | flags, and every layer constrained | types of tensors | types of tensors |
| int8 | Q/DQ of two arguments, float32 and halves by preference | Q/DQ of three arguments | Q/DQ of three arguments |
| sharing of a profile | a preview feature | always | always |
| tactic sources cuBLAS, cuDNN | on or off by version | off | gone |
| progress monitor | none | yes | yes |
| what a platform can | the builder knows | the builder knows | from the compute capability |

Everything else of the builder that this project uses is the same in all of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from yolotrt.engines.base import CompleteOptions
from yolotrt.engines.definition import BuildHooks
from yolotrt.engines.gpu import (
    FIRST_FOR_TENSORRT_10,
    FIRST_HARDWARE_COMPATIBLE,
    FIRST_WITH_TF32,
    Gpu,
    dotted,
    label,
)
from yolotrt.engines.progress import announce, interruptible, make_monitor
from yolotrt.engines.trt_log import NO_GPU_REMEDY, build_failure, shared_logger, warn_of_survived_errors
from yolotrt.errors import BackendUnavailableError, InferenceError, YolotrtError
from yolotrt.network.builder import NetworkBuilder
from yolotrt.network.ops import Tensor
from yolotrt.network.quantize import TENSORRT, TENSORRT_8


class TrtHooks(BuildHooks):
    """Builds with TensorRT or TensorRT-RTX; what goes in and comes out is of the type of what is not INT8.

    Half-precision networks read and write halves: the kernels around the engine do, too, which saves casts.

    Attributes:
        convolutions: Names of the network's convolutions, once it is defined.
        int8_convolutions_wanted: Names of those that are to be INT8.
    """

    def __init__(self, trt: Any, options: CompleteOptions) -> None:
        """Prepare one build.

        Args:
            trt: The module `tensorrt` or `tensorrt_rtx`.
            options: How to build.
        """
        super().__init__(TENSORRT if is_strongly_typed(trt) else TENSORRT_8)
        self.logger = shared_logger(trt)
        self.logger.clear()
        self.convolutions: tuple[str, ...] = ()
        self.int8_convolutions_wanted: tuple[str, ...] = ()
        self._trt = trt
        self._options = options
        self._has_fast_halves = True
        self._library = library_label(trt)

    def explain(self) -> str:
        """See `BuildHooks.explain`."""
        return str(self.logger.last_error)

    def failure(self) -> YolotrtError:
        """See `BuildHooks.failure`; failures that users meet are explained."""
        messages = self.logger.errors or self.logger.warnings
        return build_failure(self._library, messages, self._options.workspace_mib)

    def create_network(self, trt: Any, builder: Any) -> Any:
        """See `BuildHooks.create_network`."""
        flags: Any = trt.NetworkDefinitionCreationFlag
        flag = flags.STRONGLY_TYPED if hasattr(flags, "STRONGLY_TYPED") else getattr(flags, "EXPLICIT_BATCH", 0)
        network = builder.create_network(1 << int(flag))
        if network is None:
            raise self.failure()
        self._has_fast_halves = getattr(builder, "platform_has_fast_fp16", True)
        return network

    def io_dtype(self, trt: Any, compute_dtype: Any) -> Any:  # noqa: ARG002
        """See `BuildHooks.io_dtype`."""
        return compute_dtype

    def finish_network(self, definition: NetworkBuilder, network: Any, heads: Mapping[str, Tensor]) -> list[Tensor]:
        """See `BuildHooks.finish_network`."""
        self.note_convolutions(definition)
        outputs = super().finish_network(definition, network, heads)
        if not is_strongly_typed(self._trt):
            if self._options.precision == "fp16":
                constrain_types(network, outputs, self._trt.float16)
            elif self._options.precision == "int8" and self._has_fast_halves:
                # left to itself, TensorRT computes them in TF32, since such a network is defined in float32
                in_floats = {*self.convolutions} - {*self.int8_convolutions_wanted}
                inputs = [network.get_input(index) for index in range(network.num_inputs)]
                constrain_types(network, [*inputs, *outputs], self._trt.float16, in_floats)
        return outputs

    def note_convolutions(self, definition: NetworkBuilder) -> None:
        """Remember what to look for in the engine."""
        self.convolutions = definition.convolutions
        self.int8_convolutions_wanted = definition.int8_convolutions

    def configure(self, config: Any) -> None:
        """See `BuildHooks.configure`."""
        configure(self._trt, config, self._options)

    def serialize(self, definition: NetworkBuilder, builder: Any, config: Any) -> bytes | None:
        """See `BuildHooks.serialize`; shows progress, and Ctrl-C ends it."""
        can_report = hasattr(config, "progress_monitor")
        with interruptible(can_cancel=can_report) as interruption, contextlib.ExitStack() as stack:
            monitor = make_monitor(self._trt, interruption) if can_report else None
            if monitor is None:
                announce(f"{self._library} builds, which takes minutes; it cannot show how far it is")
            else:
                config.progress_monitor = monitor
                stack.callback(monitor.close)
            return definition.serialize(builder, config)

    def warn_of_survived_errors(self) -> None:
        """To be called after a build that gave a plan."""
        warn_of_survived_errors(self._library, self.logger.errors)


def library_label(trt: Any) -> str:
    """Such as ``TensorRT 8.6.0``."""
    name = "TensorRT-RTX" if trt.__name__ == "tensorrt_rtx" else "TensorRT"
    return f"{name} {trt.__version__}"


def is_strongly_typed(trt: Any) -> bool:
    """Whether the types of tensors decide the precision; otherwise flags and constraints do."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def constrain_types(network: Any, ends: Iterable[Tensor], dtype: Any, names: Collection[str] | None = None) -> None:
    """Make layers of a weakly typed network compute in `dtype` and give it.

    Args:
        network: The network.
        ends: Those of its inputs and outputs that are to have the type, too.
        dtype: The type.
        names: The layers; None means all.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        is_meant = names is None or layer.name in names
        if is_meant and hasattr(layer, "precision") and hasattr(layer, "set_output_type"):
            layer.precision = dtype
            for output in range(layer.num_outputs):
                layer.set_output_type(output, dtype)
    for tensor in ends:
        tensor.dtype = dtype


def configure(trt: Any, config: Any, options: CompleteOptions) -> None:
    """Set precision, portability and search effort.

    Raises:
        BackendUnavailableError: if this version lacks an option that was asked for.
    """
    _set_precision(trt, config, options.precision)
    _turn_off_external_libraries(trt, config)
    _share_profile(trt, config)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatible:
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        config.hardware_compatibility_level = _required(trt, levels, "AMPERE_PLUS", "--hardware-compatible")
    if options.version_compatible:
        config.set_flag(_required(trt, trt.BuilderFlag, "VERSION_COMPATIBLE", "--version-compatible"))


def check_platform(trt: Any, builder: Any, gpu: Gpu, options: CompleteOptions) -> None:
    """Refuse what the GPU cannot do, before minutes are spent on it.

    Raises:
        BackendUnavailableError: if TensorRT, or what was asked of it, does not run on this GPU.
    """
    where = label(gpu)
    if major_version(trt) >= 10 and gpu.capability < FIRST_FOR_TENSORRT_10:
        raise BackendUnavailableError(
            f"{library_label(trt)} needs compute capability {dotted(FIRST_FOR_TENSORRT_10)} ({where}): {NO_GPU_REMEDY}"
        )
    # from 11 on the builder does not tell, and every GPU that is left has fast halves
    if options.precision == "fp16" and not getattr(builder, "platform_has_fast_fp16", True):
        raise BackendUnavailableError(f"this GPU has no fast fp16 ({where}): build with --precision fp32")
    if options.precision == "int8" and not getattr(builder, "platform_has_fast_int8", True):
        raise BackendUnavailableError(f"this GPU has no fast int8 ({where}): build with --precision fp16")
    has_tf32 = getattr(builder, "platform_has_tf32", gpu.capability >= FIRST_WITH_TF32)
    if options.precision == "tf32" and not has_tf32:
        raise BackendUnavailableError(f"this GPU has no TF32 ({where}): build with --precision fp32")
    if options.hardware_compatible and gpu.capability < FIRST_HARDWARE_COMPATIBLE:
        raise BackendUnavailableError(
            f"--hardware-compatible needs compute capability {dotted(FIRST_HARDWARE_COMPATIBLE)} ({where}): "
            "leave it out"
        )


def scratch_bytes(trt: Any, engine: Any) -> int:
    """Bytes of device memory that an execution context of `engine` needs.

    Raises:
        InferenceError: if this version of TensorRT does not tell.
    """
    if hasattr(engine, "device_memory_size_v2"):  # TensorRT 10.1 and later
        return int(engine.device_memory_size_v2)
    if hasattr(engine, "device_memory_size"):
        return int(engine.device_memory_size)
    raise InferenceError(f"{library_label(trt)} is not known: update yolotrt")


def major_version(trt: Any) -> int:
    """Such as 8."""
    found = re.match(r"\d+", trt.__version__)
    return int(found[0]) if found else 0


def _set_precision(trt: Any, config: Any, precision: str) -> None:
    """TensorRT allows TF32 unless it is told otherwise."""
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)
    elif precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    if precision == "fp16" and not is_strongly_typed(trt):
        config.set_flag(_required(trt, trt.BuilderFlag, "FP16", "--precision fp16"))
        config.set_flag(_required(trt, trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS", "--precision fp16"))
    if precision == "int8" and not is_strongly_typed(trt):
        # Q/DQ say what is INT8; of the rest, float32 in the network, TensorRT may compute any layer in halves, and is
        # to prefer what `constrain_types` asked for
        for flag in ("INT8", "FP16", "PREFER_PRECISION_CONSTRAINTS"):
            config.set_flag(_required(trt, trt.BuilderFlag, flag, "--precision int8"))


def _turn_off_external_libraries(trt: Any, config: Any) -> None:
    """TensorRT's own kernels serve a convolutional network; cuBLAS and cuDNN may not even be installed."""
    names = ("CUBLAS", "CUBLAS_LT", "CUDNN")
    external = sum(1 << int(getattr(trt.TacticSource, name)) for name in names if hasattr(trt.TacticSource, name))
    chosen = config.get_tactic_sources()
    if chosen & external:
        config.set_tactic_sources(chosen & ~external)


def _share_profile(trt: Any, config: Any) -> None:
    """Let several execution contexts use the one profile at once: a preview of 8.6, and a matter of course since."""
    feature = getattr(getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806", None)
    if feature is not None and major_version(trt) < 10:
        config.set_preview_feature(feature, True)


def _required(trt: Any, owner: Any, name: str, option: str) -> Any:
    """An enumerator that an option stands for."""
    value = getattr(owner, name, None)
    if value is None:
        raise BackendUnavailableError(f"{library_label(trt)} has no {option}: leave it out, or update TensorRT")
    return value
