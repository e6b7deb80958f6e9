"""Drives a library's builder: network definition, optimization profile, serialized plan.

All libraries here have TensorRT's strongly typed builder API, so there is one way through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from yolotrt.engines.base import CompleteOptions, Plan
from yolotrt.engines.file import TensorInfo
from yolotrt.errors import BuildError
from yolotrt.network.builder import INPUT_NAME, NetworkBuilder
from yolotrt.weights import Weights

MIB = 1 << 20


def build_plan(
    trt: Any,
    weights: Weights,
    options: CompleteOptions,
    *,
    logger: Any = None,
    explain: Callable[[], str] = str,
    configure: Callable[[Any], None] | None = None,
) -> Plan:
    """Build a strongly typed network and serialize it.

    Args:
        trt: The library's module: `tensorrt_rtx`, `yolotrt.network.recorder`, ...
        weights: The model.
        options: How to build it.
        logger: The library's logger object.
        explain: Returns the library's last error message.
        configure: Called with the builder configuration before the build.

    Raises:
        BuildError: if the library refuses to build.
        NetworkError, GraphError, WeightsError: if the model is wrong; see `NetworkBuilder.build`.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    network.name = "yolov5"
    compute_dtype = trt.float16 if options.precision == "fp16" else trt.float32
    definition = NetworkBuilder(network, trt, weights, compute_dtype=compute_dtype, explain=explain)
    outputs = definition.build(-1 if options.is_dynamic else options.batch_range[2], *options.imgsz)
    config = builder.create_builder_config()
    _set_profile(builder, config, options)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if configure is not None:
        configure(config)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"the engine could not be built: {explain() or 'the library gave no reason'}")
    return Plan(
        bytes(data),
        inputs=tuple(_info(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_info(tensor) for tensor in outputs.values()),
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
