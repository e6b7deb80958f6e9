"""Drives a library's builder: network definition, optimization profile, serialized plan.

All libraries have TensorRT's builder API, so there is one way through it; `BuildHooks` are where they differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from yolotrt.engines.base import CompleteOptions, Plan
from yolotrt.engines.file import TensorInfo
from yolotrt.errors import BuildError, YolotrtError
from yolotrt.network.builder import INPUT_NAME, NetworkBuilder
from yolotrt.network.ops import Tensor
from yolotrt.network.quantize import ONNX_RUNTIME, Placement
from yolotrt.network.ranges import use_whole_range
from yolotrt.weights import Weights

_log = logging.getLogger(__name__)

MIB = 1 << 20


class BuildHooks:
    """What a library does in its own way. As it stands: strongly typed, float32 at both ends, without a logger.

    Attributes:
        logger: The library's logger object.
        placement: Where the library wants INT8 to begin and end.
    """

    logger: Any = None

    def __init__(self, placement: Placement = ONNX_RUNTIME) -> None:
        """Prepare one build.

        Args:
            placement: Where the library wants INT8 to begin and end.
        """
        self.placement = placement

    def explain(self) -> str:
        """The library's last error message."""
        return ""

    def failure(self) -> YolotrtError:
        """The error to raise after the library has failed."""
        return BuildError(f"the engine could not be built: {self.explain() or 'the library gave no reason'}")

    def create_network(self, trt: Any, builder: Any) -> Any:
        """An empty network."""
        return builder.create_network(1 << int(getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", 0)))

    def io_dtype(self, trt: Any, compute_dtype: Any) -> Any:  # noqa: ARG002
        """The type of the network's input and heads."""
        return trt.float32

    def finish_network(self, definition: NetworkBuilder, network: Any, heads: Mapping[str, Tensor]) -> list[Tensor]:  # noqa: ARG002
        """Make the network's outputs; `heads` are the raw heads by name, of the compute type."""
        return list(definition.mark_outputs(heads).values())

    def int8_convolutions(self, plan: bytes) -> int | None:  # noqa: ARG002
        """How many convolutions a plan computes in INT8, as far as the plan itself tells; None if it does not."""
        return None

    def count_int8(self, plan: bytes, definition: NetworkBuilder) -> dict[str, Any]:
        """What the library made of an INT8 network's convolutions, for `Plan.findings`."""
        found, wanted = self.int8_convolutions(plan), len(definition.int8_convolutions)
        if found is None:
            return {}
        if found < wanted:
            _log.warning(
                "%d of %d convolutions that were to be int8 are: the library computes the others in floating point",
                found,
                wanted,
            )
        counts = {"int8": found, self.placement.high_precision: len(definition.convolutions) - found}
        return {"convolutions": {kind: count for kind, count in counts.items() if count}}

    def configure(self, config: Any) -> None:
        """Set what has no option in `build_plan`."""

    def serialize(self, definition: NetworkBuilder, builder: Any, config: Any) -> bytes | None:
        """Let the library work; None if it failed."""
        return definition.serialize(builder, config)


def build_plan(trt: Any, weights: Weights, options: CompleteOptions, hooks: BuildHooks | None = None) -> Plan:
    """Build a network and serialize it.

    Args:
        trt: The library's module: `tensorrt`, `tensorrt_rtx`, `yolotrt.network.recorder`, ...
        weights: The model.
        options: How to build it.
        hooks: What the library does in its own way.

    Raises:
        BuildError: if the library refuses to build.
        NetworkError, GraphError, WeightsError: if the model is wrong; see `NetworkBuilder.build_heads`.
    """
    hooks = hooks or BuildHooks()
    try:
        builder = trt.Builder(hooks.logger)
    except (TypeError, RuntimeError) as problem:  # "factory function returned nullptr"
        raise hooks.failure() from problem
    network = hooks.create_network(trt, builder)
    network.name = "yolov5"
    real = hooks.placement.high_precision if options.precision == "int8" else options.precision
    compute_dtype = trt.float16 if real == "fp16" else trt.float32
    definition = NetworkBuilder(
        network,
        trt,
        weights,
        compute_dtype=compute_dtype,
        explain=hooks.explain,
        io_dtype=hooks.io_dtype(trt, compute_dtype),
        quantization=options.quantization,
        placement=hooks.placement,
    )
    heads = definition.build_heads(-1 if options.is_dynamic else options.batch_range[2], *options.imgsz)
    if options.precision == "int8" and hooks.placement.has_zero_points:
        use_whole_range(network)
    outputs = hooks.finish_network(definition, network, heads)
    config = builder.create_builder_config()
    _set_profile(builder, config, options)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    hooks.configure(config)
    data = hooks.serialize(definition, builder, config)
    if data is None:
        raise hooks.failure()
    findings = hooks.count_int8(data, definition) if options.precision == "int8" else {}
    return Plan(
        data,
        inputs=tuple(_info(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_info(tensor) for tensor in outputs),
        findings=findings,
    )


def _set_profile(builder: Any, config: Any, options: CompleteOptions) -> None:
    """Tell the library the range of a dynamic batch."""
    if not options.is_dynamic:
        return
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, *((batch, 3, *options.imgsz) for batch in options.batch_range))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"the library refused the range of batch sizes {options.batch_range}")


def _info(tensor: Any) -> TensorInfo:
    """Name, type and shape of a network's input or output."""
    dtype = tensor.dtype.name
    return TensorInfo(tensor.name, _DTYPE_NAMES.get(dtype, dtype.lower()), tuple(int(size) for size in tensor.shape))


_DTYPE_NAMES = {"FLOAT": "float32", "HALF": "float16"}
"""NumPy's names of the types that TensorRT calls otherwise."""
