"""The recorder refuses what TensorRT-RTX refuses and accepts what it accepts.

One function a layer kind defines a network that is right with its default arguments; a row of the tables changes what
it names. So a row that is refused is refused for the one thing that it changes.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from yolotrt.engines.trt_log import shared_logger
from yolotrt.errors import NetworkError
from yolotrt.network import recorder

Shape = tuple[int, ...]
Define = Callable[..., Any]

IMAGE = (1, 4, 8, 8)
BATCHES = (-1, 4, 8, 8)


class RefusedError(Exception):
    """TensorRT-RTX refused a network, in whatever way it shows it."""


class Net:
    """A network definition in one of the two libraries, built by the same calls.

    A layer is checked as soon as it is complete: it is not None, and its output has a shape.
    """

    def __init__(self, api: ModuleType, logger: Any = None) -> None:
        self.api = api
        self.builder = api.Builder(logger)
        self.network = self.builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.config = self.builder.create_builder_config()
        self.keep_alive: list[np.ndarray] = []
        self.dynamic_inputs: dict[str, Shape] = {}

    def dtype(self, name: str) -> Any:
        return getattr(self.api, name)

    def weights(self, count: int, dtype: str = "float32", value: float = 1.0) -> Any:
        self.keep_alive.append(np.full(count, value, dtype))
        return self.api.Weights(self.keep_alive[-1])

    def input(self, shape: Shape = IMAGE, dtype: str = "float32", name: str = "x") -> Any:
        """A network input; of int8, which takes no inputs here, a quantized float32 one."""
        if dtype == "int8":
            return self.quantized(self.input(shape, "float32", name))
        tensor = self.network.add_input(name, self.dtype(dtype), shape)
        if tensor is None:
            raise RefusedError(f"input {name}")
        if -1 in shape:
            self.dynamic_inputs[name] = shape
        return tensor

    def constant(self, shape: Shape = (), count: int | None = None, dtype: str = "float32", value: float = 1.0) -> Any:
        count = math.prod(shape) if count is None else count
        return self.checked(self.network.add_constant(shape, self.weights(count, dtype, value)))

    def quantized(self, x: Any) -> Any:
        return self.checked(self.network.add_quantize(x, self.constant(), self.api.int8))

    def layer(self, layer: Any, **attributes: Any) -> Any:
        """The output of a layer with these attributes."""
        if layer is None:
            raise RefusedError("the layer is None")
        for name, value in attributes.items():
            setattr(layer, name, self.own(value) if isinstance(value, enum.Enum) else value)
        return self.checked(layer)

    def own(self, member: enum.Enum) -> Any:
        """The library's own member of an enumeration that the recorder has under the same name."""
        return getattr(getattr(self.api, type(member).__name__), member.name)

    def checked(self, layer: Any) -> Any:
        if layer is None:
            raise RefusedError("the layer is None")
        tensor = layer.get_output(0)
        tuple(tensor.shape)  # raises if the layer is wrong
        return tensor

    def output(self, tensor: Any, name: str = "y") -> None:
        """Mark an output; INT8 leaves the network dequantized, as in real ones."""
        if tensor.dtype == self.api.int8:
            tensor = self.checked(self.network.add_dequantize(tensor, self.constant(), self.api.float32))
        tensor.name = name
        self.network.mark_output(tensor)

    def profile(self, ranges: dict[str, tuple[Shape, Shape, Shape]]) -> None:
        profile = self.builder.create_optimization_profile()
        for name, shapes in ranges.items():
            profile.set_shape(name, *shapes)
        if not profile or self.config.add_optimization_profile(profile) < 0:
            raise RefusedError("the profile was refused")

    def build(self) -> Any:
        """The plan; dynamic sizes that no profile was given for are 1 to 3."""
        if self.dynamic_inputs:
            self.profile({name: _sizes_1_to_3(shape) for name, shape in self.dynamic_inputs.items()})
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise RefusedError("the plan is None")
        return plan


def _sizes_1_to_3(shape: Shape) -> tuple[Shape, Shape, Shape]:
    smallest, usual, largest = (tuple(number if size == -1 else size for size in shape) for number in (1, 2, 3))
    return smallest, usual, largest


@pytest.fixture(scope="session")
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def rtx_refusal(rtx: ModuleType, define: Define, **arguments: Any) -> str:
    """Why TensorRT-RTX refuses a network; empty if it builds it without an error in its log."""
    logger = shared_logger(rtx)  # it keeps to its first logger as long as any builder is alive
    logger.errors.clear()
    try:
        net = Net(rtx, logger)
        define(net, **arguments)
        net.build()
    except (RefusedError, RuntimeError, ValueError, TypeError, AttributeError) as problem:
        return f"{problem} {logger.errors}"
    return str(logger.errors or "")


def record(define: Define, **arguments: Any) -> Net:
    net = Net(recorder)
    define(net, **arguments)
    net.build()
    return net


# --- one network a layer kind: right with its default arguments ---


def convolution(
    net: Net,
    x_shape: Shape = IMAGE,
    x_type: str = "float32",
    maps: int = 6,
    kernel_size: Shape = (3, 3),
    kernel_count: int | None = None,
    kernel_type: str | None = None,
    bias_count: int | None = None,
    bias_type: str | None = None,
    transposed: bool = False,
    **attributes: Any,
) -> None:
    x = net.input(x_shape, x_type)
    x_type = "float32" if x_type == "int8" else x_type
    if kernel_count is None:
        kernel_count = maps * x_shape[1] * math.prod(kernel_size) // max(attributes.get("num_groups", 1), 1)
    kernel = net.weights(kernel_count, kernel_type or x_type)
    bias = net.weights(maps if bias_count is None else bias_count, bias_type or x_type)
    add = net.network.add_deconvolution_nd if transposed else net.network.add_convolution_nd
    net.output(net.layer(add(x, maps, kernel_size, kernel, bias), **attributes))


def convolution_with_kernel_input(net: Net, kernel_shape: Shape = (6, 4, 3, 3), kernel_type: str = "float32") -> None:
    """The form that quantized weights take: the kernel is the output of a layer."""
    empty = net.api.Weights(net.api.float32)
    layer = net.network.add_convolution_nd(net.input(), 6, (3, 3), empty, net.weights(6))
    layer.set_input(1, net.constant(kernel_shape, dtype=kernel_type))
    net.output(net.checked(layer))


def kernel_of_a_later_layer(net: Net, reads_itself: bool = False, index: int = 1) -> None:
    """`set_input` may name a layer that was added after the convolution, but not one that depends on it."""
    empty = net.api.Weights(net.api.float32)
    layer = net.network.add_convolution_nd(net.input((1, 4, 3, 3)), 4, (3, 3), empty, net.weights(4))
    kernel = net.constant((4, 4, 3, 3))
    layer.set_input(index, kernel)
    if reads_itself:
        kernel = net.network.add_elementwise(kernel, net.checked(layer), net.api.ElementWiseOperation.SUM)
        layer.set_input(1, kernel.get_output(0))
    net.output(layer.get_output(0))


def constant(net: Net, shape: Shape = (2, 3), count: int | None = None) -> None:
    net.output(net.constant(shape, count))


def weight_array(net: Net, array: Any = None) -> None:
    array = np.ones((2, 3), np.float32) if array is None else array
    net.keep_alive.append(array)
    net.output(net.checked(net.network.add_constant((2, 3), net.api.Weights(array))))


def activation(net: Net, x_type: str = "float32", x_shape: Shape = IMAGE, kind: str = "SIGMOID") -> None:
    x = net.input(x_shape, x_type)
    net.output(net.checked(net.network.add_activation(x, getattr(net.api.ActivationType, kind))))


def elementwise(
    net: Net,
    a_shape: Shape = IMAGE,
    b_shape: Shape = IMAGE,
    a_type: str = "float32",
    b_type: str = "float32",
    operation: str = "SUM",
) -> None:
    a, b = net.input(a_shape, a_type, "a"), net.input(b_shape, b_type, "b")
    net.output(net.checked(net.network.add_elementwise(a, b, getattr(net.api.ElementWiseOperation, operation))))


def pooling(
    net: Net,
    x_shape: Shape = IMAGE,
    x_type: str = "float32",
    window: Shape = (5, 5),
    kind: str = "MAX",
    **attributes: Any,
) -> None:
    layer = net.network.add_pooling_nd(net.input(x_shape, x_type), getattr(net.api.PoolingType, kind), window)
    net.output(net.layer(layer, **attributes))


def concatenation(
    net: Net,
    shapes: tuple[Shape, ...] = (IMAGE, IMAGE),
    types: tuple[str, ...] = ("float32", "float32"),
    **attributes: Any,
) -> None:
    inputs = [
        net.input(shape, dtype, f"x{index}") for index, (shape, dtype) in enumerate(zip(shapes, types, strict=True))
    ]
    net.output(net.layer(net.network.add_concatenation(inputs), **attributes))


def resize(
    net: Net,
    x_shape: Shape = IMAGE,
    x_type: str = "float32",
    scales: tuple[float, ...] = (1, 1, 2, 2),
    **attributes: Any,
) -> None:
    net.output(net.layer(net.network.add_resize(net.input(x_shape, x_type)), scales=scales, **attributes))


def slicing(
    net: Net,
    x_shape: Shape = IMAGE,
    start: Shape = (0, 1, 0, 7),
    shape: Shape = (1, 3, 4, 8),
    stride: Shape = (1, 1, 2, -1),
    x_type: str = "float32",
) -> None:
    net.output(net.checked(net.network.add_slice(net.input(x_shape, x_type), start, shape, stride)))


def shuffle(net: Net, x_shape: Shape = IMAGE, x_type: str = "float32", **attributes: Any) -> None:
    net.output(net.layer(net.network.add_shuffle(net.input(x_shape, x_type)), **attributes))


def reduction(
    net: Net,
    x_shape: Shape = IMAGE,
    x_type: str = "float32",
    axes: int = 0b1100,
    keep_dims: bool = True,
    operation: str = "AVG",
) -> None:
    operation = getattr(net.api.ReduceOperation, operation)
    net.output(net.checked(net.network.add_reduce(net.input(x_shape, x_type), operation, axes, keep_dims)))


def softmax(net: Net, x_shape: Shape = IMAGE, x_type: str = "float32", **attributes: Any) -> None:
    net.output(net.layer(net.network.add_softmax(net.input(x_shape, x_type)), **attributes))


def matrix_product(
    net: Net,
    a_shape: Shape = (2, 3, 5),
    b_shape: Shape = (2, 5, 7),
    a_type: str = "float32",
    b_type: str = "float32",
    a_operation: str = "NONE",
    b_operation: str = "NONE",
) -> None:
    kinds = net.api.MatrixOperation
    a, b = net.input(a_shape, a_type, "a"), net.input(b_shape, b_type, "b")
    layer = net.network.add_matrix_multiply(a, getattr(kinds, a_operation), b, getattr(kinds, b_operation))
    net.output(net.checked(layer))


def cast(net: Net, x_type: str = "float32", to_type: str = "float16") -> None:
    net.output(net.checked(net.network.add_cast(net.input(IMAGE, x_type), net.dtype(to_type))))


def quantization(
    net: Net,
    x_type: str = "float32",
    to_type: str = "int8",
    scale_shape: Shape = (),
    scale_type: str = "float32",
    scale_value: float = 1.0,
    scale_is_input: bool = False,
    **attributes: Any,
) -> None:
    if scale_is_input:
        scale = net.input(scale_shape, name="scale")
    else:
        scale = net.constant(scale_shape, dtype=scale_type, value=scale_value)
    q = net.layer(net.network.add_quantize(net.input(IMAGE, x_type), scale, net.dtype(to_type)), **attributes)
    real = x_type if x_type in ("float32", "float16") else "float32"
    net.output(net.layer(net.network.add_dequantize(q, scale, net.dtype(real)), **attributes))


def dequantization(net: Net, x_type: str = "int8", to_type: str = "float32") -> None:
    scale = net.constant()
    net.output(net.checked(net.network.add_dequantize(net.input(IMAGE, x_type), scale, net.dtype(to_type))))


def inputs(net: Net, names: tuple[str, ...] = ("a", "b"), shapes: tuple[Shape, ...] = (IMAGE, IMAGE)) -> None:
    for name, shape in zip(names, shapes, strict=True):
        x = net.input(shape, name=name)
        net.output(net.checked(net.network.add_activation(x, net.api.ActivationType.RELU)), f"{name}_relu")


def outputs(
    net: Net, names: tuple[str, ...] = ("y0", "y1"), marks_input: bool = False, marks_twice: bool = False
) -> None:
    x = net.input()
    if marks_input:
        net.network.mark_output(x)
    for name in names:
        y = net.checked(net.network.add_activation(x, net.api.ActivationType.RELU))
        net.output(y, name)
        if marks_twice:
            net.network.mark_output(y)


def names(net: Net, layers: tuple[str, str] = ("one", "two"), tensors: tuple[str, str] = ("y", "z")) -> None:
    x = net.input()
    for layer, tensor in zip(layers, tensors, strict=True):
        x = net.layer(net.network.add_activation(x, net.api.ActivationType.TANH), name=layer)
        x.name = tensor
    net.network.mark_output(x)


def no_tensor(net: Net, use_none: bool = False) -> None:
    x = net.input()
    net.output(net.checked(net.network.add_activation(None if use_none else x, net.api.ActivationType.RELU)))


def attribute_set_late(net: Net, padding: Shape = (1, 1)) -> None:
    """The convolution changes after the layer behind it was asked for its shape."""
    convolution = net.network.add_convolution_nd(
        net.input(), 2, (3, 3), net.weights(2 * 4 * 3 * 3), net.api.Weights(net.api.float32)
    )
    y = net.checked(net.network.add_activation(net.checked(convolution), net.api.ActivationType.RELU))
    convolution.padding_nd = padding
    convolution.stride_nd = (2, 2)
    net.output(y)


def creation_flags(net: Net, flags: int = 1) -> None:
    net.network = net.builder.create_network(flags)
    if net.network is None:
        raise RefusedError("no network")
    pooling(net)


def profiled(
    net: Net,
    x_shape: Shape = BATCHES,
    smallest: Shape = IMAGE,
    usual: Shape = (2, 4, 8, 8),
    largest: Shape = (3, 4, 8, 8),
    name: str = "x",
    count: int = 1,
) -> None:
    pooling(net, x_shape)
    net.dynamic_inputs = {}
    for _ in range(count):
        net.profile({name: (smallest, usual, largest)})


def two_profiled(net: Net, named: tuple[str, ...] = ("a", "b")) -> None:
    """Two dynamic inputs and a profile that names some of them."""
    elementwise(net, BATCHES, BATCHES)
    net.dynamic_inputs = {name: net.dynamic_inputs[name] for name in named}


def dynamic_meets_known(net: Net, kind: str = "sum", batch: int = 3, size: int = 3) -> None:
    """A dynamic dimension beside a known one, which it must equal."""
    a, b = net.input((-1, 3, 5), name="a"), net.input((batch, 3, 5), name="b")
    if kind == "sum":
        layer = net.network.add_elementwise(a, b, net.api.ElementWiseOperation.SUM)
    elif kind == "concatenation":
        layer = net.network.add_concatenation([a, b])
        layer.axis = 2
    else:
        layer = net.network.add_matrix_multiply(a, net.api.MatrixOperation.NONE, b, net.api.MatrixOperation.TRANSPOSE)
    net.output(net.checked(layer))
    net.dynamic_inputs = {}
    net.profile({"a": ((size, 3, 5),) * 3})


DEFAULTS: tuple[Define, ...] = (
    convolution,
    convolution_with_kernel_input,
    kernel_of_a_later_layer,
    constant,
    weight_array,
    activation,
    elementwise,
    pooling,
    concatenation,
    resize,
    slicing,
    shuffle,
    reduction,
    softmax,
    matrix_product,
    cast,
    quantization,
    dequantization,
    inputs,
    outputs,
    names,
    no_tensor,
    attribute_set_late,
    creation_flags,
    profiled,
    two_profiled,
    dynamic_meets_known,
)

Case = tuple[Define, dict[str, Any]]

RIGHT: list[Case] = [
    *((define, {}) for define in DEFAULTS),
    (convolution, {"x_type": "float16"}),
    (convolution, {"num_groups": 2}),
    (convolution, {"num_groups": 4, "maps": 8}),
    (convolution, {"x_shape": (1, 4, 2, 8), "padding_nd": (1, 1)}),
    (convolution, {"kernel_size": (3, 5), "padding_nd": (1, 2), "stride_nd": (2, 3)}),
    (convolution, {"dilation_nd": (2, 3)}),
    (convolution, {"x_shape": BATCHES}),
    (convolution, {"x_shape": (-1, 4, -1, -1), "padding_nd": (2, 2)}),
    (convolution, {"transposed": True, "stride_nd": (2, 2), "padding_nd": (1, 1)}),
    (convolution, {"transposed": True, "stride_nd": (2, 2), "pre_padding": (1, 1), "post_padding": (0, 1)}),
    (convolution, {"pre_padding": (2, 0), "post_padding": (0, 1)}),
    (convolution, {"transposed": True, "dilation_nd": (2, 2), "x_shape": BATCHES}),
    (convolution, {"transposed": True, "num_groups": 2, "x_type": "float16"}),
    (constant, {"shape": ()}),
    *(
        (activation, {"kind": kind.name, "x_type": dtype})
        for kind in recorder.ActivationType
        for dtype in ("float32", "float16")
    ),
    (activation, {"x_shape": ()}),
    (activation, {"x_shape": (1, 1, 1, 1, 1, 1, 2, 3)}),
    (activation, {"x_shape": BATCHES}),
    *(
        (elementwise, {"operation": operation.name, "a_type": dtype, "b_type": dtype})
        for operation in recorder.ElementWiseOperation
        for dtype in ("float32", "float16", "int32", "int64")
    ),
    (elementwise, {"b_shape": (1, 4, 1, 1)}),
    (elementwise, {"a_shape": (1, 1, 8, 1), "b_shape": (1, 4, 1, 8)}),
    (elementwise, {"a_shape": (), "b_shape": ()}),
    (elementwise, {"a_shape": BATCHES, "b_shape": BATCHES}),
    (elementwise, {"a_shape": BATCHES}),
    (elementwise, {"b_shape": BATCHES}),
    (pooling, {"padding_nd": (2, 2)}),
    (pooling, {"window": (9, 9), "padding_nd": (1, 1)}),
    (pooling, {"padding_nd": (4, 4), "stride_nd": (2, 3)}),
    (pooling, {"x_type": "float16"}),
    (pooling, {"x_type": "int8"}),
    (pooling, {"x_shape": BATCHES}),
    (pooling, {"kind": "AVERAGE", "padding_nd": (1, 2), "average_count_excludes_padding": False}),
    (concatenation, {"shapes": (IMAGE, (1, 5, 8, 8))}),
    (concatenation, {"axis": 3}),
    (concatenation, {"shapes": (IMAGE,), "types": ("float32",)}),
    (concatenation, {"shapes": ((4, 8), (3, 8))}),
    (concatenation, {"shapes": ((8,), (8,))}),
    (concatenation, {"shapes": ((1, 2, 3, 4), (1, 2, 3, 4)), "types": ("int32", "int32")}),
    (concatenation, {"types": ("float16", "float16")}),
    (concatenation, {"types": ("int8", "int8")}),
    (concatenation, {"shapes": (BATCHES, BATCHES)}),
    (concatenation, {"shapes": (BATCHES, IMAGE), "axis": 0}),
    (resize, {"scales": (1, 1, 1.3, 2.7)}),
    (resize, {"scales": (1, 1, 0.5, 0.3)}),
    (resize, {"scales": (2, 2, 1, 1)}),
    (resize, {"x_type": "float16"}),
    (resize, {"x_type": "int8"}),
    (resize, {"x_shape": BATCHES}),
    (resize, {"x_shape": (-1, 4, -1, 8)}),
    *(
        (resize, {"resize_mode": mode, "coordinate_transformation": transformation})
        for mode in recorder.InterpolationMode
        for transformation in recorder.ResizeCoordinateTransformation
    ),
    (slicing, {"x_type": "float16"}),
    (slicing, {"x_type": "int8"}),
    (slicing, {"x_shape": BATCHES}),
    (shuffle, {"reshape_dims": (1, 4, 64)}),
    (shuffle, {"reshape_dims": (1, 4, -1)}),
    (shuffle, {"reshape_dims": (0, 0, -1)}),
    (shuffle, {"reshape_dims": (0, 0, 0, 0, 1)}),
    (shuffle, {"reshape_dims": (0, 0, 0, 0, -1)}),
    (shuffle, {"reshape_dims": (-1,), "x_type": "int8"}),
    (shuffle, {"reshape_dims": (), "x_shape": (1, 1)}),
    (shuffle, {"first_transpose": (0, 2, 3, 1)}),
    (shuffle, {"reshape_dims": (1, 4, 64), "second_transpose": (0, 2, 1), "x_type": "int64"}),
    (shuffle, {"first_transpose": (0, 2, 3, 1), "reshape_dims": (0, -1, 4), "second_transpose": (2, 0, 1)}),
    (shuffle, {"x_shape": BATCHES, "reshape_dims": (0, 4, 64)}),
    (shuffle, {"x_shape": BATCHES, "reshape_dims": (0, -1)}),
    (shuffle, {"x_shape": BATCHES, "reshape_dims": (-1, 4, 64)}),
    (shuffle, {"x_shape": BATCHES, "reshape_dims": (4, -1, 64)}),
    (shuffle, {"x_shape": BATCHES, "first_transpose": (1, 2, 3, 0), "reshape_dims": (0, 64, -1)}),
    (shuffle, {"x_shape": (-1, 4, -1, 8), "reshape_dims": (0, 4, -1)}),
    (shuffle, {"x_shape": (-1, 4, -1, 8), "reshape_dims": (0, 8, 0, -1)}),
    (shuffle, {"x_shape": (-1, 4, -1, 8), "reshape_dims": (0, 0, 0, 4, 2)}),
    *((reduction, {"operation": operation.name}) for operation in recorder.ReduceOperation),
    (reduction, {"keep_dims": False, "axes": 0b1111}),
    (reduction, {"x_type": "int32", "operation": "SUM"}),
    (reduction, {"x_type": "int8", "operation": "MAX"}),
    (reduction, {"x_shape": BATCHES, "axes": 1, "keep_dims": False}),
    (softmax, {"axes": 8, "x_type": "float16"}),
    (softmax, {"x_shape": (3, 4)}),
    (softmax, {"x_shape": (1, 2, 3, 4, 5)}),
    (softmax, {"x_shape": BATCHES}),
    (matrix_product, {"a_shape": (2, 5, 3), "a_operation": "TRANSPOSE"}),
    (matrix_product, {"b_shape": (2, 7, 5), "b_operation": "TRANSPOSE"}),
    (matrix_product, {"b_shape": (1, 5, 7), "a_type": "float16", "b_type": "float16"}),
    (matrix_product, {"a_shape": (3, 5), "b_shape": (5, 7)}),
    (matrix_product, {"a_shape": (-1, 3, 5), "b_shape": (-1, 5, 7)}),
    (matrix_product, {"a_shape": (-1, 3, 5), "b_shape": (1, 5, 7)}),
    *(
        (cast, {"x_type": x_type, "to_type": to_type})
        for x_type in ("float32", "float16", "int32", "int64", "int8")
        for to_type in ("float32", "float16", "int32", "int64", "int8")
    ),
    (quantization, {"x_type": "float16"}),
    (quantization, {"x_type": "float16", "scale_type": "float16"}),
    (quantization, {"scale_shape": (4,), "axis": 1}),
    (dequantization, {"to_type": "float16"}),
    (inputs, {"shapes": (IMAGE, (1, 1, 1, 1, 1, 1, 2, 3))}),
    (dynamic_meets_known, {"kind": "concatenation"}),
    (dynamic_meets_known, {"kind": "product"}),
    (profiled, {"count": 2}),
    (profiled, {"usual": IMAGE, "largest": IMAGE}),
    (profiled, {"x_shape": IMAGE, "usual": IMAGE, "largest": IMAGE}),
    (profiled, {"x_shape": IMAGE, "count": 0}),
]
"""Networks that both accept, with outputs of the same shapes and types."""

WRONG: list[tuple[Define, dict[str, Any], str]] = [
    (convolution, {"kernel_count": 215}, "kernel has 215 values: 216 are needed"),
    (convolution, {"kernel_count": 0}, "kernel has 0 values: 216 are needed"),
    (convolution, {"bias_count": 5}, "bias has 5 values for 6 output channels"),
    (convolution, {"bias_count": 0}, "bias has 0 values for 6 output channels"),
    (convolution, {"num_groups": 3}, "4 input and 6 output channels cannot be split into 3 groups"),
    (convolution, {"num_groups": 4}, "4 input and 6 output channels cannot be split into 4 groups"),
    (convolution, {"num_groups": 0}, "cannot be split into 0 groups"),
    (convolution, {"kernel_type": "float16"}, "kernel is HALF, the input FLOAT"),
    (convolution, {"kernel_type": "float32", "x_type": "float16"}, "kernel is FLOAT, the input HALF"),
    (convolution, {"bias_type": "float16"}, "bias is HALF, the input FLOAT"),
    (convolution, {"x_type": "int8"}, "the input is INT8"),
    (convolution, {"x_type": "int32"}, "the input is INT32"),
    (convolution, {"x_shape": (4, 8, 8)}, "the input has 3 dimensions: expected 4"),
    (convolution, {"x_shape": (1, 4, 2, 8)}, "kernel (3, 3) is larger than the padded input"),
    (convolution, {"dilation_nd": (4, 4)}, "kernel (3, 3) is larger than the padded input"),
    (convolution, {"x_shape": (1, -1, 8, 8), "kernel_count": 216}, "the input's channels are dynamic"),
    (convolution, {"kernel_size": (0, 3)}, "kernel_size_nd is (0, 3)"),
    (convolution, {"kernel_size": (3,)}, "kernel_size_nd is (3,)"),
    (convolution, {"padding_nd": (-1, 0)}, "pre_padding is (-1, 0)"),
    (convolution, {"padding_nd": (1, 1, 1)}, "pre_padding is (1, 1, 1)"),
    (convolution, {"stride_nd": (0, 1)}, "stride_nd is (0, 1)"),
    (convolution, {"stride_nd": (2,)}, "stride_nd is (2,)"),
    (convolution, {"dilation_nd": (0, 1)}, "dilation_nd is (0, 1)"),
    (convolution, {"maps": 0}, "0 output channels"),
    (convolution, {"strides": (2, 2)}, "has no attribute strides"),
    (convolution, {"transposed": True, "kernel_count": 215}, "kernel has 215 values: 216 are needed"),
    (convolution, {"transposed": True, "bias_count": 4}, "bias has 4 values for 6 output channels"),
    (convolution, {"transposed": True, "padding_nd": (9, 9)}, "kernel (3, 3) is larger than the padded input"),
    (convolution_with_kernel_input, {"kernel_shape": (4, 6, 3, 3)}, "kernel of shape (4, 6, 3, 3)"),
    (convolution_with_kernel_input, {"kernel_shape": (216,)}, "kernel of shape (216,)"),
    (convolution_with_kernel_input, {"kernel_type": "float16"}, "kernel is HALF, the input FLOAT"),
    (kernel_of_a_later_layer, {"reads_itself": True}, "it would read its own output"),
    (kernel_of_a_later_layer, {"index": 3}, "has no input 3"),
    (constant, {"count": 5}, "5 values for a constant of shape (2, 3)"),
    (constant, {"count": 7}, "7 values for a constant of shape (2, 3)"),
    (constant, {"shape": (2, -3), "count": 6}, "shape (2, -3)"),
    (constant, {"shape": (1,) * 9}, "shape (1, 1, 1, 1, 1, 1, 1, 1, 1)"),
    (weight_array, {"array": [1.0] * 6}, "weights must be a NumPy array, not list"),
    (weight_array, {"array": np.ones((2, 3))}, "weights of type float64 are not supported"),
    (weight_array, {"array": np.ones((3, 2), np.float32).T}, "weights must be contiguous"),
    (activation, {"x_type": "int8"}, "the input is INT8"),
    (activation, {"x_type": "int32"}, "the input is INT32"),
    (activation, {"x_shape": (1,) * 9}, "shape (1, 1, 1, 1, 1, 1, 1, 1, 1)"),
    (elementwise, {"b_shape": (1, 4, 8, 7)}, "the inputs have shapes (1, 4, 8, 8) and (1, 4, 8, 7)"),
    (elementwise, {"b_shape": (4, 8, 8)}, "the inputs have shapes (1, 4, 8, 8) and (4, 8, 8)"),
    (elementwise, {"b_type": "float16"}, "the inputs are FLOAT and HALF"),
    (elementwise, {"a_type": "int8"}, "the inputs are INT8 and FLOAT"),
    (elementwise, {"a_type": "int8", "b_type": "int8", "operation": "POW"}, "the inputs are INT8"),
    (elementwise, {"a_shape": BATCHES, "b_shape": (3, 4, 8, 8)}, "shapes (2, 4, 8, 8) and (3, 4, 8, 8)"),
    (pooling, {"x_shape": (8, 8)}, "the input has 2 dimensions"),
    (pooling, {"x_type": "int32"}, "the input is INT32"),
    (pooling, {"window": (0, 1)}, "window_size_nd is (0, 1)"),
    (pooling, {"window": (3,)}, "window_size_nd is (3,)"),
    (pooling, {"stride_nd": (0, 1)}, "stride_nd is (0, 1)"),
    (pooling, {"padding_nd": (-1, 0)}, "padding_nd is (-1, 0)"),
    (concatenation, {"shapes": (IMAGE, (1, 4, 8, 7))}, "shapes (1, 4, 8, 8) and (1, 4, 8, 7) differ besides axis 1"),
    (concatenation, {"shapes": (IMAGE, (1, 4, 8))}, "shapes (1, 4, 8, 8) and (1, 4, 8) differ"),
    (concatenation, {"shapes": (IMAGE, (1, 5, 8, 8)), "axis": 2}, "differ besides axis 2"),
    (concatenation, {"axis": 4}, "axis 4 is outside 0..3"),
    (concatenation, {"axis": -1}, "axis -1 is outside 0..3"),
    (concatenation, {"types": ("float32", "float16")}, "the inputs are FLOAT and HALF"),
    (concatenation, {"types": ("int8", "float32")}, "the inputs are INT8 and FLOAT"),
    (concatenation, {"shapes": (), "types": ()}, "no inputs"),
    (concatenation, {"shapes": (BATCHES, (9, 4, 8, 8))}, "shapes (1, 4, 8, 8) and (9, 4, 8, 8) differ"),
    (resize, {"scales": (2, 2)}, "2 scales for 4 dimensions"),
    (resize, {"scales": (1, 1, 2, 2, 1)}, "5 scales for 4 dimensions"),
    (resize, {"scales": (1, 1, -1, 2)}, "expected positive numbers"),
    (resize, {"x_shape": (), "scales": ()}, "0 scales for 0 dimensions"),
    (resize, {"x_type": "int32"}, "the input is INT32"),
    (resize, {"scales": (2, 2, 2, 2), "resize_mode": recorder.InterpolationMode.LINEAR}, "linear takes the last two"),
    (slicing, {"start": (0, 2, 0, 7)}, "3 elements from 2 in steps of 1 leave a dimension of 4"),
    (slicing, {"start": (0, -1, 0, 7)}, "3 elements from -1"),
    (slicing, {"stride": (1, 1, 3, -1)}, "4 elements from 0 in steps of 3 leave a dimension of 8"),
    (slicing, {"stride": (1, 1, 2, -2)}, "8 elements from 7 in steps of -2"),
    (slicing, {"shape": (1, -1, 4, 8)}, "-1 elements from 1"),
    (slicing, {"start": (0, 1, 0)}, "start, shape and stride must have 4 values"),
    (slicing, {"start": (0, 1, 0), "shape": (1, 3, 4), "stride": (1, 1, 2)}, "must have 4 values"),
    (shuffle, {"reshape_dims": (1, 4, 63)}, "shape (1, 4, 8, 8) cannot be reshaped to (1, 4, 63)"),
    (shuffle, {"reshape_dims": (1, -1, -1)}, "cannot be reshaped to (1, -1, -1)"),
    (shuffle, {"reshape_dims": (1, 3, -1)}, "cannot be reshaped to (1, 3, -1)"),
    (shuffle, {"reshape_dims": (0, 0, 0, 0, 0)}, "cannot be reshaped to (0, 0, 0, 0, 0)"),
    (shuffle, {"reshape_dims": (1, 4, -2)}, "cannot be reshaped to (1, 4, -2)"),
    (shuffle, {"reshape_dims": (1,) * 8 + (256,)}, "cannot be reshaped to (1, 1, 1, 1, 1, 1, 1, 1, 256)"),
    (shuffle, {"reshape_dims": (1, 4, 64), "x_shape": BATCHES}, "cannot be reshaped to (1, 4, 64)"),
    (shuffle, {"reshape_dims": (0, 3, -1), "x_shape": BATCHES}, "cannot be reshaped to (0, 3, -1)"),
    (shuffle, {"reshape_dims": (0, 5, 64), "x_shape": BATCHES}, "cannot be reshaped to (0, 5, 64)"),
    (shuffle, {"reshape_dims": (-1, 5, 64), "x_shape": BATCHES}, "cannot be reshaped to (-1, 5, 64)"),
    (shuffle, {"reshape_dims": (0, 31, 0), "x_shape": (-1, 4, -1, 8)}, "cannot be reshaped to (0, 31, 0)"),
    (shuffle, {"first_transpose": (0, 1, 1, 2)}, "first_transpose (0, 1, 1, 2) is no permutation of 4 axes"),
    (shuffle, {"first_transpose": (0, 2, 3)}, "first_transpose (0, 2, 3) is no permutation"),
    (reduction, {"axes": 0}, "axes mask 0 does not fit a tensor of 4 dimensions"),
    (reduction, {"axes": 16}, "axes mask 16 does not fit"),
    (reduction, {"axes": -1}, "axes mask -1 does not fit"),
    (reduction, {"x_type": "int8"}, "the input is INT8"),
    (softmax, {"axes": 0}, "axes mask 0 does not name one of 4 axes"),
    (softmax, {"axes": 3}, "axes mask 3 does not name one of 4 axes"),
    (softmax, {"axes": 16}, "axes mask 16 does not name one of 4 axes"),
    (softmax, {"x_shape": (3,)}, "the input has 1 dimensions"),
    (softmax, {"x_type": "int32"}, "the input is INT32"),
    (matrix_product, {"b_shape": (2, 4, 7)}, "shapes (2, 3, 5) and (2, 4, 7) cannot be multiplied"),
    (matrix_product, {"b_shape": (3, 5, 7)}, "shapes (2, 3, 5) and (3, 5, 7) cannot be multiplied"),
    (matrix_product, {"b_shape": (5, 7)}, "shapes (2, 3, 5) and (5, 7) cannot be multiplied"),
    (matrix_product, {"a_shape": (5,), "b_shape": (5,)}, "shapes (5,) and (5,) cannot be multiplied"),
    (matrix_product, {"a_operation": "TRANSPOSE"}, "shapes (2, 3, 5) and (2, 5, 7) cannot be multiplied"),
    (matrix_product, {"b_type": "float16"}, "the inputs are FLOAT and HALF"),
    (matrix_product, {"a_type": "int32", "b_type": "int32"}, "the inputs are INT32 and INT32"),
    (matrix_product, {"a_shape": (2, 3, -1)}, "cannot be multiplied"),
    (quantization, {"x_type": "int8"}, "the input is INT8: expected FLOAT or HALF"),
    (quantization, {"x_type": "int32"}, "the input is INT32: expected FLOAT or HALF"),
    (quantization, {"to_type": "float32"}, "the output cannot be FLOAT"),
    (quantization, {"to_type": "int32"}, "the output cannot be INT32"),
    (quantization, {"scale_shape": (4,)}, "axis -1 is outside 0..3"),
    (quantization, {"scale_shape": (4,), "axis": 4}, "axis 4 is outside 0..3"),
    (quantization, {"scale_shape": (3,), "axis": 1}, "3 scales for 4 channels"),
    (quantization, {"scale_shape": (4, 1), "axis": 1}, "the scale has shape (4, 1)"),
    (quantization, {"scale_type": "int32"}, "the scale is INT32"),
    (dequantization, {"x_type": "float32"}, "the input is FLOAT: expected INT8"),
    (dequantization, {"to_type": "int32"}, "the output cannot be INT32"),
    (inputs, {"names": ("a", "a")}, "input a: the name is taken"),
    (inputs, {"names": ("a", "a_relu")}, "tensor a_relu: the name is taken"),
    (inputs, {"names": ("", "b")}, "a tensor has an empty name"),
    (inputs, {"shapes": (IMAGE, (1, -2, 8, 8))}, "shape (1, -2, 8, 8)"),
    (outputs, {"names": ()}, "the network has no output"),
    (outputs, {"marks_input": True}, "output x: it is an input"),
    (outputs, {"marks_twice": True}, "output y0: it is an output already"),
    (outputs, {"names": ("y", "y")}, "tensor y: the name is taken"),
    (outputs, {"names": ("",)}, "a tensor has an empty name"),
    (names, {"layers": ("one", "one")}, "layer one: the name is taken"),
    (names, {"tensors": ("x", "z")}, "tensor x: the name is taken"),
    (names, {"tensors": ("", "z")}, "a tensor has an empty name"),
    (no_tensor, {"use_none": True}, "an input is NoneType, not a tensor"),
    (attribute_set_late, {"padding": (-1, 0)}, "pre_padding is (-1, 0)"),
    (creation_flags, {"flags": 2}, "network creation flags 2 are not known"),
    (two_profiled, {"named": ("a",)}, "input b is dynamic: the optimization profile does not name it"),
    (two_profiled, {"named": ()}, "input a is dynamic: the build needs an optimization profile"),
    (dynamic_meets_known, {"size": 2}, "the inputs have shapes (2, 3, 5) and (3, 3, 5)"),
    (profiled, {"count": 0}, "input x is dynamic: the build needs an optimization profile"),
    (profiled, {"name": "z"}, "profile of input z: the network has no such input"),
    (profiled, {"smallest": (4, 4, 8, 8)}, "(4, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8) are not in order"),
    (profiled, {"usual": (5, 4, 8, 8)}, "are not in order"),
    (profiled, {"largest": (3, 4, 9, 8)}, "shape (3, 4, 9, 8) does not fit (-1, 4, 8, 8)"),
    (profiled, {"smallest": (-1, 4, 8, 8)}, "are not in order"),
    (profiled, {"smallest": (1, 4, 8)}, "are not in order"),
    (profiled, {"smallest": (1, 4, 8), "usual": (2, 4, 8), "largest": (3, 4, 8)}, "shape (1, 4, 8) does not fit"),
    (profiled, {"x_shape": IMAGE}, "shape (2, 4, 8, 8) does not fit (1, 4, 8, 8)"),
]
"""Networks that both refuse, and what the recorder says."""

HARMFUL = "TensorRT-RTX does not look at it, and the engine computes nonsense"
SILENTLY_FLOAT = "TensorRT-RTX takes it, but the convolution behind it is then silently not INT8"
EMPTY = "an empty tensor has no use here, and is what a wrong size looks like"
FAILS_LATER = "TensorRT-RTX tries the profile's usual size only: the engine fails when it meets the others"
NO_ARITHMETIC = "integers only move through these networks: INT8 without its scale is no number to compute with"
NOT_IN_ONNX = "ONNX or ONNX Runtime has no such operator"

STRICTER: list[tuple[Define, dict[str, Any], str]] = [
    (quantization, {"scale_value": 0.0}, HARMFUL),
    (quantization, {"scale_value": -1.0}, HARMFUL),
    (quantization, {"scale_value": np.inf}, HARMFUL),
    (quantization, {"scale_value": np.nan}, HARMFUL),
    (quantization, {"scale_shape": (4,), "axis": -3}, HARMFUL),
    (quantization, {"scale_shape": (1,)}, SILENTLY_FLOAT),
    (quantization, {"scale_type": "float16"}, SILENTLY_FLOAT),
    (quantization, {"scale_is_input": True}, SILENTLY_FLOAT),
    (pooling, {"window": (9, 9)}, EMPTY),
    (resize, {"scales": (1, 1, 0, 2)}, EMPTY),
    (resize, {"scales": (1, 1, 0.01, 1)}, EMPTY),
    (slicing, {"shape": (1, 0, 4, 8)}, EMPTY),
    (inputs, {"shapes": (IMAGE, (1, 0, 8, 8))}, EMPTY),
    (profiled, {"smallest": (0, 4, 8, 8)}, EMPTY),
    (convolution, {"x_shape": (1, 4, -1, 8)}, FAILS_LATER),
    (elementwise, {"a_shape": BATCHES, "b_shape": (7, 4, 8, 8)}, FAILS_LATER),
    (concatenation, {"shapes": (BATCHES, IMAGE)}, FAILS_LATER),
    (slicing, {"x_shape": BATCHES, "shape": (2, 3, 4, 8)}, FAILS_LATER),
    (matrix_product, {"a_shape": (-1, 3, 5)}, FAILS_LATER),
    (activation, {"x_type": "int8", "kind": "RELU"}, NO_ARITHMETIC),
    (activation, {"x_type": "int32", "kind": "RELU"}, NO_ARITHMETIC),
    (elementwise, {"a_type": "int8", "b_type": "int8"}, NO_ARITHMETIC),
    (reduction, {"x_type": "int8", "operation": "SUM"}, NO_ARITHMETIC),
    (resize, {"x_type": "int8", "resize_mode": recorder.InterpolationMode.LINEAR}, NO_ARITHMETIC),
    (pooling, {"x_type": "int8", "kind": "AVERAGE"}, NO_ARITHMETIC),
    (resize, {"scales": (1, 2, 2, 2), "resize_mode": recorder.InterpolationMode.LINEAR}, NOT_IN_ONNX),
    (slicing, {"stride": (1, 1, 2, 0)}, NOT_IN_ONNX),
    (pooling, {"padding_nd": (5, 5)}, NOT_IN_ONNX),
    (pooling, {"x_shape": (1, 4, 8, 8, 8)}, "three-dimensional layers have no use here"),
    (shuffle, {"first_transpose": (0, 2, 3, 1, 4)}, "TensorRT-RTX ignores what is too much in a permutation"),
]
"""Networks that TensorRT-RTX builds and the recorder refuses, and why. There are none the other way round."""


def case_id(value: Any) -> str | None:
    if callable(value):
        return str(value.__name__)
    if isinstance(value, dict):
        return "-".join(f"{key}={getattr(item, 'name', item)}" for key, item in value.items()) or "default"
    return ""


@pytest.mark.parametrize(("define", "arguments"), RIGHT, ids=case_id)
def test_the_recorder_accepts(define, arguments):
    record(define, **arguments)


@pytest.mark.parametrize(("define", "arguments"), RIGHT, ids=case_id)
def test_tensorrt_rtx_accepts_and_infers_the_same(rtx, define, arguments):
    assert rtx_refusal(rtx, define, **arguments) == ""
    theirs = Net(rtx, shared_logger(rtx))
    define(theirs, **arguments)
    assert described_outputs(record(define, **arguments)) == described_outputs(theirs)


def described_outputs(net: Net) -> list[tuple[str, Shape, str]]:
    """Name, shape and type of each output."""
    tensors = [net.network.get_output(index) for index in range(net.network.num_outputs)]
    return [(tensor.name, tuple(tensor.shape), tensor.dtype.name) for tensor in tensors]


@pytest.mark.parametrize(("define", "arguments", "message"), WRONG, ids=case_id)
def test_the_recorder_refuses(define, arguments, message):
    with pytest.raises(NetworkError) as refusal:
        record(define, **arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("define", "arguments", "message"), WRONG, ids=case_id)
def test_tensorrt_rtx_refuses(rtx, define, arguments, message):
    assert rtx_refusal(rtx, define, **arguments), f"only the recorder refuses: {message}"


@pytest.mark.parametrize(("define", "arguments", "reason"), STRICTER, ids=case_id)
def test_the_recorder_is_stricter_on_purpose(define, arguments, reason):
    with pytest.raises(NetworkError):
        record(define, **arguments)


@pytest.mark.parametrize(("define", "arguments", "reason"), STRICTER, ids=case_id)
def test_tensorrt_rtx_is_laxer(rtx, define, arguments, reason):
    assert rtx_refusal(rtx, define, **arguments) == "", f"both refuse now, no longer: {reason}"


@pytest.mark.parametrize("attribute", ["first_transpose", "second_transpose"])
@pytest.mark.parametrize("order", [(0, 1, 2, 4), (0, 1, 2, -1)])
def test_permutations_with_axes_outside_are_refused(attribute, order):
    """Not given to TensorRT-RTX, which does not check them and may crash."""
    with pytest.raises(NetworkError, match=re.escape(f"{attribute} {order} is no permutation of 4 axes")):
        record(shuffle, **{attribute: order})


def test_every_layer_kind_is_in_the_tables():
    kinds = set()
    for define in DEFAULTS:
        kinds |= {type(layer) for layer in record(define).network.layers}
    assert kinds == set(recorder.Layer.__subclasses__())


def test_a_layer_is_refused_at_the_faulty_call_and_by_its_name():
    net = Net(recorder)
    layer = net.network.add_pooling_nd(net.input(), recorder.PoolingType.MAX, (3, 3))
    layer.name = "model.9.m.0"
    layer.stride_nd = (0, 0)
    with pytest.raises(NetworkError, match=r"^Pooling layer model\.9\.m\.0: stride_nd is \(0, 0\)"):
        net.network.add_activation(layer.get_output(0), recorder.ActivationType.RELU)


def test_a_reshape_that_fixes_a_dynamic_batch_is_refused_before_the_build():
    net = Net(recorder)
    layer = net.network.add_shuffle(net.input(BATCHES))
    layer.reshape_dims = (1, 4, 64)
    with pytest.raises(NetworkError, match=re.escape("shape (-1, 4, 8, 8) cannot be reshaped to (1, 4, 64)")):
        net.checked(layer)


@pytest.mark.parametrize(("kind", "shape"), [("sum", (3, 3, 5)), ("concatenation", (3, 3, 10)), ("product", (3, 3, 3))])
def test_a_dynamic_dimension_becomes_the_known_one_beside_it(kind, shape):
    assert described_outputs(record(dynamic_meets_known, kind=kind)) == [("y", shape, "FLOAT")]


def test_layers_behind_one_that_changes_are_inferred_anew():
    net = Net(recorder)
    pool = net.network.add_pooling_nd(net.input(), recorder.PoolingType.MAX, (2, 2))
    relu = net.network.add_activation(pool.get_output(0), recorder.ActivationType.RELU)
    other = net.network.add_activation(net.input(name="other"), recorder.ActivationType.RELU)
    last = net.checked(net.network.add_activation(relu.get_output(0), recorder.ActivationType.RELU))
    assert last.shape == (1, 4, 7, 7)
    pool.stride_nd = (2, 2)
    assert last.shape == (1, 4, 4, 4)
    other.set_input(0, last)
    assert other.get_output(0).shape == (1, 4, 4, 4)
    pool.padding_nd = (1, 1)
    assert other.get_output(0).shape == (1, 4, 5, 5)


def test_sizes_of_a_profile_leave_no_trace_in_the_network():
    net = record(pooling, x_shape=BATCHES)
    assert described_outputs(net) == [("y", (-1, 4, 4, 4), "FLOAT")]


def test_a_network_deeper_than_the_recursion_limit_is_checked():
    net = Net(recorder)
    tensor = net.input(BATCHES)
    for _ in range(2000):
        tensor = net.checked(net.network.add_activation(tensor, recorder.ActivationType.RELU))
    net.output(tensor)
    assert net.build()


def test_attributes_that_nobody_set_are_those_of_tensorrt(rtx):
    nets = (Net(recorder), Net(rtx, shared_logger(rtx)))
    for kind in recorder.ActivationType:
        layers = [net.network.add_activation(net.input(name=kind.name), net.own(kind)) for net in nets]
        # TensorRT keeps them in float32
        assert [(np.float32(layer.alpha), np.float32(layer.beta)) for layer in layers[:1]] == [
            (layer.alpha, layer.beta) for layer in layers[1:]
        ]
    for rank in (2, 3, 4, 5):
        inputs = [net.input((1, 2, 3, 4, 5)[:rank], name=f"rank {rank}") for net in nets]
        own, theirs = (net.network.add_softmax(x).axes for net, x in zip(nets, inputs, strict=True))
        assert own == theirs
        own, theirs = (net.network.add_concatenation([x]).axis for net, x in zip(nets, inputs, strict=True))
        assert own == theirs
    for add in (
        lambda net: net.network.add_pooling_nd(net.network.get_input(0), net.api.PoolingType.MAX, (3, 2)),
        lambda net: net.network.add_convolution_nd(net.network.get_input(0), 1, (3, 2), net.weights(24)),
        lambda net: net.network.add_deconvolution_nd(net.network.get_input(0), 1, (3, 2), net.weights(24)),
        lambda net: net.network.add_resize(net.network.get_input(0)),
        lambda net: net.network.add_quantize(net.network.get_input(0), net.constant(), net.api.int8),
        lambda net: net.network.add_reduce(net.network.get_input(0), net.api.ReduceOperation.SUM, 2, True),
    ):
        own, theirs = (add(net) for net in nets)
        shared = [name for name in vars(own) if hasattr(theirs, name) and name not in NOT_COMPARABLE]
        assert {name: plain(getattr(own, name)) for name in shared} == {
            name: plain(getattr(theirs, name)) for name in shared
        }


NOT_COMPARABLE = ("name", "metadata", "kernel", "bias", "type", "op", "to_type")


def plain(value: Any) -> Any:
    """An attribute's value without the types of either library."""
    if hasattr(value, "name"):
        return value.name
    return value if isinstance(value, bool | int | float) else tuple(value)
