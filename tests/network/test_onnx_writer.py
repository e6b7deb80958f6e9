"""Recorded networks, run by ONNX Runtime, compute what the layers' definitions say.

The references are written here in NumPy, in float64, from the definitions of the layers in TensorRT's documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from yolotrt.errors import BackendUnavailableError, NetworkError
from yolotrt.network import recorder as rec
from yolotrt.network.onnx_writer import write_onnx

Array = np.ndarray
Shape = tuple[int, ...]
Define = Callable[..., rec.Tensor]

EXACT = 0.0
ROUNDING = 1e-5
"""For sums of at most some 100 products of values around 1: 100 x 2^-24 is 6e-6."""


class Model:
    """A network whose inputs have a dynamic batch, as an ONNX Runtime session."""

    def __init__(self, define: Define, *shapes: Shape, dtype: str = "float32") -> None:
        builder = rec.Builder()
        network = builder.create_network()
        self.shapes, self.dtype = shapes, dtype
        inputs = [
            network.add_input(f"x{index}", rec.DataType(dtype), (rec.DYNAMIC, *shape))
            for index, shape in enumerate(shapes)
        ]
        result = define(network, *inputs)
        result.name = "y"
        network.mark_output(result)
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for tensor, shape in zip(inputs, shapes, strict=True):
            profile.set_shape(tensor.name, (1, *shape), (2, *shape), (3, *shape))
        config.add_optimization_profile(profile)
        data = builder.build_serialized_network(network, config)
        self.proto = onnx.load_from_string(data)
        onnx.checker.check_model(self.proto, full_check=True)
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def __call__(self, *arrays: Array) -> Array:
        (result,) = self.session.run(None, {f"x{index}": array for index, array in enumerate(arrays)})
        return result


def random_inputs(seed: int, model: Model, *, positive: bool = False) -> list[Array]:
    """Values of a normal distribution, or from 0.25 to 2; of integers, -9 to 9."""
    generator = np.random.default_rng(seed)
    shapes = [(seed, *shape) for shape in model.shapes]
    if np.issubdtype(model.dtype, np.integer):
        return [generator.integers(-9, 10, shape, model.dtype) for shape in shapes]
    draw = (lambda shape: generator.uniform(0.25, 2, shape)) if positive else generator.standard_normal
    return [draw(shape).astype(model.dtype) for shape in shapes]


def parameters(*shape: int, dtype: str = "float32") -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


def assert_computes(
    define: Define,
    reference: Callable[..., Array],
    *shapes: Shape,
    tolerance: float = EXACT,
    dtype: str = "float32",
    positive: bool = False,
) -> None:
    """Compare network and reference for batches of 1 to 3 pictures."""
    model = Model(define, *shapes, dtype=dtype)
    for batch in (1, 2, 3):
        inputs = random_inputs(batch, model, positive=positive)
        result = model(*inputs)
        exact = [array if np.issubdtype(dtype, np.integer) else array.astype(np.float64) for array in inputs]
        expected = np.asarray(reference(*exact))
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


def attributes(layer: Any, **values: Any) -> rec.Tensor:
    """The output of a layer with these attributes."""
    for name, value in values.items():
        setattr(layer, name, value)
    return layer.get_output(0)


def constant(network: rec.Network, array: Any, dtype: str = "float32") -> rec.Tensor:
    array = np.asarray(array, dtype)
    return network.add_constant(array.shape, rec.Weights(array)).get_output(0)


# --- convolution ---


def convolution_reference(x, kernel, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Cross-correlation with zeros around."""
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    extent = [dilation[i] * (kernel.shape[2 + i] - 1) + 1 for i in (0, 1)]
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    parts = [
        np.einsum("bchwij,ocij->bohw", part, weights)
        for part, weights in zip(np.split(windows, groups, 1), np.split(kernel, groups, 0), strict=True)
    ]
    return np.concatenate(parts, 1) + (0 if bias is None else bias[:, None, None])


def deconvolution_reference(x, kernel, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Every input value adds its multiple of the kernel to the output."""
    batch, channels, *size = x.shape
    full = [(size[i] - 1) * stride[i] + dilation[i] * (kernel.shape[2 + i] - 1) + 1 for i in (0, 1)]
    per_group, maps = channels // groups, kernel.shape[1]
    y = np.zeros((batch, maps * groups, *full))
    for channel, row, column in np.ndindex(channels, *size):
        first = channel // per_group * maps
        rows = slice(row * stride[0], row * stride[0] + dilation[0] * (kernel.shape[2] - 1) + 1, dilation[0])
        columns = slice(column * stride[1], column * stride[1] + dilation[1] * (kernel.shape[3] - 1) + 1, dilation[1])
        y[:, first : first + maps, rows, columns] += x[:, channel, row, column, None, None, None] * kernel[channel]
    y = y[:, :, padding[0] : full[0] - padding[0], padding[1] : full[1] - padding[1]]
    return y + bias[:, None, None]


@pytest.mark.parametrize("add", ["convolution", "deconvolution"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1, 1), {}),
        ((3, 3), {"padding": (1, 1)}),
        ((3, 5), {"stride": (2, 3), "padding": (1, 2)}),
        ((2, 3), {"dilation": (2, 3), "padding": (0, 2)}),
        ((3, 3), {"groups": 2, "stride": (2, 1)}),
        ((3, 3), {"groups": 6, "padding": (1, 1)}),
    ],
)
def test_convolution(add, size, options):
    maps, groups = 12, options.get("groups", 1)
    shape = (maps, 6 // groups, *size) if add == "convolution" else (6, maps // groups, *size)
    kernel, bias = parameters(*shape), parameters(maps)

    def define(network, x):
        layer = getattr(network, f"add_{add}_nd")(x, maps, size, rec.Weights(kernel), rec.Weights(bias))
        names = {"stride": "stride_nd", "padding": "padding_nd", "dilation": "dilation_nd", "groups": "num_groups"}
        return attributes(layer, **{names[option]: value for option, value in options.items()})

    reference = convolution_reference if add == "convolution" else deconvolution_reference
    assert_computes(define, lambda x: reference(x, kernel, bias, **options), (6, 9, 11), tolerance=ROUNDING)


@pytest.mark.parametrize("bias", [None, rec.Weights(rec.float32)], ids=["none", "empty"])
def test_convolution_without_bias(bias):
    kernel = parameters(5, 3, 3, 3)
    assert_computes(
        lambda network, x: network.add_convolution_nd(x, 5, (3, 3), rec.Weights(kernel), bias).get_output(0),
        lambda x: convolution_reference(x, kernel),
        (3, 7, 5),
        tolerance=ROUNDING,
    )


def test_convolution_with_a_quantized_kernel():
    kernel = np.random.default_rng(0).integers(-127, 128, (5, 3, 3, 3), np.int8)
    scales = np.float32([0.5, 0.25, 0.125, 1, 2]) / 127
    bias = parameters(5)

    def define(network, x):
        layer = network.add_convolution_nd(x, 5, (3, 3), rec.Weights(rec.float32), rec.Weights(bias))
        dequantize = network.add_dequantize(constant(network, kernel, "int8"), constant(network, scales), rec.float32)
        layer.set_input(1, attributes(dequantize, axis=0))
        return layer.get_output(0)

    assert_computes(
        define,
        lambda x: convolution_reference(x, kernel * scales.astype(np.float64)[:, None, None, None], bias),
        (3, 7, 5),
        tolerance=ROUNDING,
    )


# --- elementwise ---


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("kind", "options", "reference"),
    [
        ("RELU", {}, lambda x: np.maximum(x, 0)),
        ("SIGMOID", {}, sigmoid),
        ("TANH", {}, np.tanh),
        ("LEAKY_RELU", {}, lambda x: np.where(x < 0, 0.01 * x, x)),
        ("LEAKY_RELU", {"alpha": 0.1}, lambda x: np.where(x < 0, 0.1 * x, x)),
        ("ELU", {}, lambda x: np.where(x < 0, np.expm1(x), x)),
        ("ELU", {"alpha": 0.5}, lambda x: np.where(x < 0, 0.5 * np.expm1(x), x)),
        ("SOFTPLUS", {}, lambda x: np.log1p(np.exp(x))),
        ("CLIP", {}, lambda x: x),
        ("CLIP", {"alpha": -0.5, "beta": 0.75}, lambda x: np.clip(x, -0.5, 0.75)),
        ("HARD_SIGMOID", {}, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
        ("HARD_SIGMOID", {"alpha": 1 / 6, "beta": 0.25}, lambda x: np.clip(x / 6 + 0.25, 0, 1)),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # half precision: inputs up to 4, each step of the computation rounded to 2^-11
    [("float32", ROUNDING), ("float16", 4 * 2**-10)],
)
def test_activation(kind, options, reference, dtype, tolerance):
    assert_computes(
        lambda network, x: attributes(network.add_activation(x, rec.ActivationType[kind]), **options),
        reference,
        (3, 7, 5),
        tolerance=tolerance,
        dtype=dtype,
    )


def test_every_activation_is_tested():
    assert {kind.name for kind in rec.ActivationType} == {
        mark.args[1][row][0]
        for mark in test_activation.pytestmark
        if mark.args[0] == ("kind", "options", "reference")
        for row in range(len(mark.args[1]))
    }


OPERATIONS = {
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": np.divide,
    "POW": np.power,
}


@pytest.mark.parametrize("operation", list(rec.ElementWiseOperation), ids=lambda operation: operation.name)
@pytest.mark.parametrize("shapes", [((3, 7, 5), (3, 7, 5)), ((3, 1, 5), (1, 7, 1))], ids=["same", "broadcast"])
def test_elementwise(operation, shapes):
    assert_computes(
        lambda network, a, b: network.add_elementwise(a, b, operation).get_output(0),
        OPERATIONS[operation.name],
        *shapes,
        tolerance=ROUNDING,
        positive=True,  # powers of negative numbers are none
    )


@pytest.mark.parametrize("operation", ["SUM", "PROD", "MAX", "MIN", "SUB"])
def test_elementwise_of_integers(operation):
    assert_computes(
        lambda network, a, b: network.add_elementwise(a, b, rec.ElementWiseOperation[operation]).get_output(0),
        OPERATIONS[operation],
        (3, 7),
        (3, 7),
        dtype="int32",
    )


def test_constant():
    offset = parameters(1, 3, 1, 5)
    assert_computes(
        lambda network, x: network.add_elementwise(
            x, constant(network, offset), rec.ElementWiseOperation.SUM
        ).get_output(0),
        lambda x: x + offset,
        (3, 7, 5),
        tolerance=ROUNDING,
    )


# --- layers that move values ---


def windows_of(x, size, stride, padding, fill):
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=(2, 3))[:, :, :: stride[0], :: stride[1]]


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [((5, 5), (1, 1), (2, 2)), ((2, 3), (2, 1), (0, 0)), ((3, 2), (2, 3), (1, 1))],
)
@pytest.mark.parametrize("kind", ["max", "average", "average with padding"])
def test_pooling(kind, size, stride, padding):
    def define(network, x):
        layer = network.add_pooling_nd(x, rec.PoolingType.MAX if kind == "max" else rec.PoolingType.AVERAGE, size)
        return attributes(
            layer,
            stride_nd=stride,
            padding_nd=padding,
            average_count_excludes_padding=kind == "average",
        )

    def reference(x):
        if kind == "max":
            return windows_of(x, size, stride, padding, -np.inf).max((4, 5))
        windows = windows_of(x, size, stride, padding, np.nan if kind == "average" else 0)
        return np.nanmean(windows, (4, 5))

    assert_computes(define, reference, (3, 9, 11), tolerance=EXACT if kind == "max" else ROUNDING)


@pytest.mark.parametrize(
    ("axis", "shapes"), [(1, ((3, 7), (2, 7), (1, 7))), (2, ((3, 7), (3, 1))), (0, ((3, 7), (3, 7)))]
)
def test_concatenation(axis, shapes):
    assert_computes(
        lambda network, *inputs: attributes(network.add_concatenation(inputs), axis=axis),
        lambda *inputs: np.concatenate(inputs, axis),
        *shapes,
    )


def source_coordinates(size, scale, transformation):
    """Where along an axis of `size` each value of the enlarged axis comes from."""
    enlarged = np.floor(size * scale)
    index = np.arange(enlarged)
    if transformation == "ALIGN_CORNERS":
        return index * (size - 1) / (enlarged - 1)
    return (index + 0.5) / scale - 0.5 if transformation == "HALF_PIXEL" else index / scale


ROUND = {
    "HALF_UP": lambda v: np.floor(v + 0.5),
    "HALF_DOWN": lambda v: np.ceil(v - 0.5),
    "FLOOR": np.floor,
    "CEIL": np.ceil,
}


@pytest.mark.parametrize("scales", [(2, 2), (3, 1), (1, 2.5), (0.5, 0.75)])
@pytest.mark.parametrize("transformation", rec.ResizeCoordinateTransformation, ids=lambda member: member.name)
@pytest.mark.parametrize("rounding", rec.ResizeRoundMode, ids=lambda member: member.name)
def test_nearest_resize(scales, transformation, rounding):
    def define(network, x):
        return attributes(
            network.add_resize(x),
            scales=(1, 1, *scales),
            coordinate_transformation=transformation,
            nearest_rounding=rounding,
        )

    def reference(x):
        for axis, scale in zip((2, 3), scales, strict=True):
            coordinates = source_coordinates(x.shape[axis], scale, transformation.name)
            # a tie that float32 cannot tell from its neighbours would be decided by rounding errors
            index = ROUND[rounding.name](np.round(coordinates, 6)).astype(int)
            x = np.take(x, np.clip(index, 0, x.shape[axis] - 1), axis)
        return x

    assert_computes(define, reference, (3, 8, 12))


@pytest.mark.parametrize("transformation", rec.ResizeCoordinateTransformation, ids=lambda member: member.name)
@pytest.mark.parametrize("scales", [(2, 3), (1.5, 0.5)])
def test_linear_resize(transformation, scales):
    def define(network, x):
        return attributes(
            network.add_resize(x),
            scales=(1, 1, *scales),
            resize_mode=rec.InterpolationMode.LINEAR,
            coordinate_transformation=transformation,
        )

    def reference(x):
        for axis, scale in zip((2, 3), scales, strict=True):
            last = x.shape[axis] - 1
            place = np.clip(source_coordinates(x.shape[axis], scale, transformation.name), 0, last)
            low = np.floor(place).astype(int)
            share = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
            x = np.take(x, low, axis) * (1 - share) + np.take(x, np.minimum(low + 1, last), axis) * share
        return x

    assert_computes(define, reference, (3, 8, 10), tolerance=ROUNDING)


@pytest.mark.parametrize(
    ("start", "shape", "stride", "expected"),
    [
        ((0, 1, 2), (1, 2, 3), (1, 1, 1), np.s_[:1, 1:3, 2:5]),
        ((0, 0, 1), (1, 3, 3), (1, 1, 2), np.s_[:1, :, 1:6:2]),
        ((0, 2, 6), (1, 3, 3), (1, -1, -3), np.s_[:1, ::-1, 6::-3]),
        ((0, 2, 5), (1, 2, 3), (1, -2, -1), np.s_[:1, 2::-2, 5:2:-1]),
    ],
)
def test_slice(start, shape, stride, expected):
    assert_computes(
        lambda network, x: network.add_slice(x, start, shape, stride).get_output(0), lambda x: x[expected], (3, 7)
    )


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, lambda x: x),
        ({"first_transpose": (0, 2, 3, 1)}, lambda x: x.transpose(0, 2, 3, 1)),
        ({"second_transpose": (3, 0, 2, 1)}, lambda x: x.transpose(3, 0, 2, 1)),
        ({"reshape_dims": (0, 2, 3, 35)}, lambda x: x.reshape(len(x), 2, 3, 35)),
        ({"reshape_dims": (-1, 35)}, lambda x: x.reshape(-1, 35)),
        ({"reshape_dims": (0, 0, -1)}, lambda x: x.reshape(len(x), 6, 35)),
        (
            {"first_transpose": (0, 2, 3, 1), "reshape_dims": (0, -1, 3), "second_transpose": (2, 0, 1)},
            lambda x: x.transpose(0, 2, 3, 1).reshape(len(x), -1, 3).transpose(2, 0, 1),
        ),
        (
            {"first_transpose": (1, 0, 2, 3), "reshape_dims": (6, 0, -1)},
            lambda x: x.transpose(1, 0, 2, 3).reshape(6, len(x), -1),
        ),
        (
            {"reshape_dims": (0, 2, -1, 5), "second_transpose": (0, 2, 1, 3)},
            lambda x: x.reshape(len(x), 2, -1, 5).transpose(0, 2, 1, 3),
        ),
    ],
)
def test_shuffle(options, reference):
    assert_computes(lambda network, x: attributes(network.add_shuffle(x), **options), reference, (6, 7, 5))


# --- reductions and products ---


@pytest.mark.parametrize("axes", [(2, 3), (1,), (0, 2)])
@pytest.mark.parametrize("keep_dims", [True, False])
@pytest.mark.parametrize(
    ("operation", "reference"),
    [("SUM", np.sum), ("PROD", np.prod), ("MAX", np.max), ("MIN", np.min), ("AVG", np.mean)],
)
def test_reduce(operation, reference, axes, keep_dims):
    mask = sum(1 << axis for axis in axes)
    assert_computes(
        lambda network, x: network.add_reduce(x, rec.ReduceOperation[operation], mask, keep_dims).get_output(0),
        lambda x: reference(x, axis=axes, keepdims=keep_dims),
        (3, 5, 3),
        tolerance=ROUNDING,
    )


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_softmax(axis):
    def reference(x):
        powers = np.exp(x - x.max(axis, keepdims=True))
        return powers / powers.sum(axis, keepdims=True)

    assert_computes(
        lambda network, x: attributes(network.add_softmax(x), axes=1 << axis), reference, (3, 7, 5), tolerance=ROUNDING
    )


@pytest.mark.parametrize("a_is_transposed", [False, True])
@pytest.mark.parametrize("b_is_transposed", [False, True])
def test_matrix_multiply(a_is_transposed, b_is_transposed):
    kinds = [
        rec.MatrixOperation.TRANSPOSE if t else rec.MatrixOperation.NONE for t in (a_is_transposed, b_is_transposed)
    ]
    assert_computes(
        lambda network, a, b: network.add_matrix_multiply(a, kinds[0], b, kinds[1]).get_output(0),
        lambda a, b: (a.swapaxes(-1, -2) if a_is_transposed else a) @ (b.swapaxes(-1, -2) if b_is_transposed else b),
        (2, 5, 3) if a_is_transposed else (2, 3, 5),
        (1, 7, 5) if b_is_transposed else (1, 5, 7),
        tolerance=ROUNDING,
    )


# --- types ---


@pytest.mark.parametrize("to_type", ["float32", "float16", "int32", "int64"])
@pytest.mark.parametrize("from_type", ["float32", "float16", "int32"])
def test_cast(from_type, to_type):
    model = Model(lambda network, x: network.add_cast(x, rec.DataType(to_type)).get_output(0), (3, 7), dtype=from_type)
    (x,) = random_inputs(2, model)
    result = model(x)
    assert result.dtype == to_type
    np.testing.assert_array_equal(result, x.astype(to_type))


# Quantization: the nearest integer, ties to even, saturated.
QUANTIZED = {
    0.0: 0,
    0.5: 0,
    1.5: 2,
    -0.5: 0,
    -1.5: -2,
    2.4: 2,
    2.6: 3,
    127.4: 127,
    1000.0: 127,
    -128.4: -128,
    -999.0: -128,
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_quantize_one_scale(dtype, scale_dtype):
    scale_dtype = "float32" if dtype == "float32" else scale_dtype

    def define(network, x):
        quantized = network.add_quantize(x, constant(network, 0.25, scale_dtype), rec.int8).get_output(0)
        return network.add_cast(quantized, rec.int32).get_output(0)

    x = np.array([list(QUANTIZED)], dtype) * np.array(0.25, dtype)
    result = Model(define, (len(QUANTIZED),), dtype=dtype)(x)
    np.testing.assert_array_equal(result, [list(QUANTIZED.values())])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_quantize_and_dequantize_per_channel(dtype):
    scales = np.float32([0.5, 0.25, 2])

    def define(network, x):
        step = constant(network, scales)
        quantized = attributes(network.add_quantize(x, step, rec.int8), axis=1)
        return attributes(network.add_dequantize(quantized, step, rec.DataType(dtype)), axis=1)

    steps = scales.astype(np.float64)[:, None]
    # powers of two: dividing by them and multiplying again is exact
    assert_computes(define, lambda x: np.clip(np.rint(x / steps), -128, 127) * steps, (3, 50), dtype=dtype)


def test_int8_moves_through_the_layers_that_take_it():
    step = 0.125

    def define(network, x):
        y = network.add_quantize(x, constant(network, step), rec.int8).get_output(0)
        y = network.add_pooling_nd(y, rec.PoolingType.MAX, (3, 3)).get_output(0)
        y = attributes(network.add_resize(y), scales=(1, 1, 2, 2))
        y = network.add_concatenation([y, y]).get_output(0)
        y = network.add_slice(y, (0, 1, 0, 0), (1, 4, 6, 4), (1, 1, 1, 2)).get_output(0)
        y = attributes(network.add_shuffle(y), first_transpose=(0, 2, 1, 3))
        y = network.add_reduce(y, rec.ReduceOperation.MAX, 8, False).get_output(0)
        return network.add_dequantize(y, constant(network, step), rec.float32).get_output(0)

    def reference(x):
        y = windows_of(np.rint(x / step) * step, (3, 3), (1, 1), (0, 0), 0).max((4, 5)).repeat(2, 2).repeat(2, 3)
        return np.concatenate([y, y], 1)[:1, 1:5, :6, :8:2].transpose(0, 2, 1, 3).max(3)

    assert_computes(define, reference, (3, 7, 6))


@pytest.mark.parametrize(
    ("scales", "rounding", "dtype", "is_repeated"),
    [
        ((2, 2), "FLOOR", "float32", True),
        ((3, 1), "FLOOR", "float32", True),
        ((1, 4), "FLOOR", "float32", True),
        ((2, 1.5), "FLOOR", "float32", False),
        ((2, 2), "CEIL", "float32", False),
        ((2, 2), "FLOOR", "float16", False),
    ],
)
@pytest.mark.parametrize("readers", [1, 2])
def test_integers_are_repeated_by_concatenation(scales, rounding, dtype, is_repeated, readers):
    step = 0.125

    def define(network, x):
        scale = constant(network, step)
        y = network.add_quantize(x, scale, rec.int8).get_output(0)
        y = network.add_dequantize(y, scale, rec.DataType(dtype)).get_output(0)
        resized = attributes(
            network.add_resize(y), scales=(1, 1, *scales), nearest_rounding=rec.ResizeRoundMode[rounding]
        )
        if readers == 1:
            return resized
        # also read as it is, with other rows in between
        row = network.add_slice(y, (0, 0, 0, 0), (1, 3, 1, 1), (1, 1, 1, 1)).get_output(0)
        return network.add_elementwise(resized, row, rec.ElementWiseOperation.SUM).get_output(0)

    def reference(x):
        y = np.clip(np.rint(x / step), -128, 127) * step
        resized = y
        for axis, scale in zip((2, 3), scales, strict=True):
            place = np.arange(int(resized.shape[axis] * scale)) / scale
            index = np.clip(ROUND[rounding](place), 0, resized.shape[axis] - 1).astype(int)
            resized = np.take(resized, index, axis)
        return resized if readers == 1 else resized + y[:1, :, :1, :1]

    assert_computes(define, reference, (3, 4, 6), dtype=dtype)
    operators = [node.op_type for node in Model(define, (3, 4, 6), dtype=dtype).proto.graph.node]
    assert operators.count("Resize") == (not is_repeated)
    assert operators.count("DequantizeLinear") == (readers if is_repeated else 1)


def test_what_is_repeated_can_be_an_output_as_well():
    def define(network, x):
        scale = constant(network, 0.125)
        y = network.add_quantize(x, scale, rec.int8).get_output(0)
        y = network.add_dequantize(y, scale, rec.float32).get_output(0)
        network.mark_output(y)
        return attributes(network.add_resize(y), scales=(1, 1, 2, 2))

    operators = [node.op_type for node in Model(define, (3, 4, 6)).proto.graph.node]
    assert operators.count("DequantizeLinear") == 2


# --- the model as a whole ---


def test_tensors_have_the_given_names_shapes_and_types():
    model = Model(lambda network, x: network.add_cast(x, rec.float16).get_output(0), (3, 7))
    (x,), (y,) = model.session.get_inputs(), model.session.get_outputs()
    assert (x.name, x.shape, x.type) == ("x0", ["batch", 3, 7], "tensor(float)")
    assert (y.name, y.shape, y.type) == ("y", ["batch", 3, 7], "tensor(float16)")


def test_a_constant_can_be_an_output():
    assert_computes(lambda network, _: constant(network, [1, 2, 3]), lambda _: np.array([1, 2, 3]), (3,))


def test_names_of_tensors_that_look_like_our_own_do_no_harm():
    kernel = parameters(2, 3, 1, 1)

    def define(network, x):
        x = attributes(network.add_shuffle(x), first_transpose=(0, 1, 3, 2), second_transpose=(0, 1, 3, 2))
        layer = network.add_convolution_nd(x, 2, (1, 1), rec.Weights(kernel), rec.Weights(np.zeros(2, np.float32)))
        layer.name = "conv"
        y = layer.get_output(0)
        for name in ("conv.weight", "conv.bias", "constant", "constant_1", f"{x.name}.0"):
            y = network.add_activation(y, rec.ActivationType.RELU).get_output(0)
            y.name = name
        return attributes(network.add_resize(y), scales=(1, 1, 2, 2))

    def reference(x):
        return np.maximum(convolution_reference(x, kernel), 0).repeat(2, 2).repeat(2, 3)

    assert_computes(define, reference, (3, 7, 5), tolerance=ROUNDING)


def test_softplus_that_onnx_lacks_is_refused():
    network = rec.Network()
    layer = network.add_activation(network.add_input("x", rec.float32, (1, 3)), rec.ActivationType.SOFTPLUS)
    layer.alpha = 2.0
    network.mark_output(layer.get_output(0))
    with pytest.raises(NetworkError, match="Softplus with alpha = beta = 1 only"):
        write_onnx(network)


def test_a_missing_onnx_package_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailableError) as problem:
        write_onnx(rec.Network())
    assert str(problem.value) == 'the package onnx is not installed: run pip install "yolotrtx[cpu]"'
