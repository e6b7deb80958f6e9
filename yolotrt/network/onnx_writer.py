"""Serializes a recorded network as an ONNX model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import BackendUnavailableError, NetworkError
from yolotrt.network import recorder as rec

OPSET = 17
"""Runs on ONNX Runtime 1.13 and later, and has every operator needed here."""

IR_VERSION = 8
"""The file format that belongs to opset 17."""

_ACTIVATIONS = {
    rec.ActivationType.RELU: "Relu",
    rec.ActivationType.SIGMOID: "Sigmoid",
    rec.ActivationType.TANH: "Tanh",
    rec.ActivationType.LEAKY_RELU: "LeakyRelu",
    rec.ActivationType.ELU: "Elu",
    rec.ActivationType.SOFTPLUS: "Softplus",
    rec.ActivationType.HARD_SIGMOID: "HardSigmoid",
    rec.ActivationType.CLIP: "Clip",
}
_ELEMENTWISE = {
    rec.ElementWiseOperation.SUM: "Add",
    rec.ElementWiseOperation.PROD: "Mul",
    rec.ElementWiseOperation.MAX: "Max",
    rec.ElementWiseOperation.MIN: "Min",
    rec.ElementWiseOperation.SUB: "Sub",
    rec.ElementWiseOperation.DIV: "Div",
    rec.ElementWiseOperation.POW: "Pow",
}
_REDUCE = {
    rec.ReduceOperation.SUM: "ReduceSum",
    rec.ReduceOperation.PROD: "ReduceProd",
    rec.ReduceOperation.MAX: "ReduceMax",
    rec.ReduceOperation.MIN: "ReduceMin",
    rec.ReduceOperation.AVG: "ReduceMean",
}
_COORDINATES = {
    rec.ResizeCoordinateTransformation.ALIGN_CORNERS: "align_corners",
    rec.ResizeCoordinateTransformation.ASYMMETRIC: "asymmetric",
    rec.ResizeCoordinateTransformation.HALF_PIXEL: "half_pixel",
}
_ROUNDING = {
    rec.ResizeRoundMode.HALF_UP: "round_prefer_ceil",
    rec.ResizeRoundMode.HALF_DOWN: "round_prefer_floor",
    rec.ResizeRoundMode.FLOOR: "floor",
    rec.ResizeRoundMode.CEIL: "ceil",
}


def write_onnx(network: rec.Network) -> bytes:
    """Return `network` as a serialized ONNX model; the batch, if dynamic, is named ``batch``.

    Raises:
        BackendUnavailableError: if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as problem:
        raise BackendUnavailableError('the package onnx is not installed: run pip install "yolotrtx[cpu]"') from problem
    writer = _Writer(onnx, {tensor.name for tensor in (*network.inputs, *(layer.output for layer in network.layers))})
    for layer in network.sorted_layers():
        writer.add(layer)
    graph = onnx.helper.make_graph(
        writer.nodes,
        network.name or "yolov5",
        [writer.value_info(tensor) for tensor in network.inputs],
        [writer.value_info(tensor) for tensor in network.outputs],
        writer.initializers,
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="yolotrt",
    )
    return bytes(model.SerializeToString())


class _Writer:
    """Collects the nodes and initializers of an ONNX graph."""

    def __init__(self, onnx: Any, names: set[str]) -> None:
        self._onnx = onnx
        self._names = names
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def add(self, layer: rec.Layer) -> None:
        """Append the node or nodes of `layer`."""
        _EMITTERS[type(layer)](self, layer)

    def value_info(self, tensor: rec.Tensor) -> Any:
        """Describe an input or output of the graph."""
        shape = ["batch" if size == rec.DYNAMIC and axis == 0 else size for axis, size in enumerate(tensor.shape)]
        shape = [f"{tensor.name}_{axis}" if size == rec.DYNAMIC else size for axis, size in enumerate(shape)]
        return self._onnx.helper.make_tensor_value_info(tensor.name, self.element_type(tensor.dtype), shape)

    def element_type(self, dtype: rec.DataType) -> int:
        """ONNX's number for an element type."""
        return int(self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype.value)))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        layer: rec.Layer,
        attributes: Mapping[str, Any] | None = None,
        *,
        output: str = "",
    ) -> str:
        """Append a node whose output is the layer's, or a new one if it is named; returns the output's name."""
        output = self._new_name(output) if output else layer.output.name
        self.nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name=output, **(attributes or {})))
        return output

    def constant(self, array: npt.NDArray[Any], name: str = "constant") -> str:
        """Append an initializer with a new name like `name`; returns it."""
        return self.initializer(array, self._new_name(name))

    def initializer(self, array: npt.NDArray[Any], name: str) -> str:
        """Append an initializer called `name`."""
        self.initializers.append(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Append an initializer of int64 values."""
        return self.constant(np.array(values, np.int64))

    def _new_name(self, wish: str) -> str:
        """`wish`, with a number if another tensor has that name."""
        numbered = (f"{wish}_{number}" for number in itertools.count(1))
        name = next(name for name in itertools.chain([wish], numbered) if name not in self._names)
        self._names.add(name)
        return name


def _inputs(layer: rec.Layer) -> list[str]:
    return [tensor.name for tensor in layer.inputs]


def _constant(writer: _Writer, layer: rec.ConstantLayer) -> None:
    if not layer.output.consumers or not all(_stores_quantized(reader, layer) for reader in layer.output.consumers):
        writer.initializer(layer.weights.array.reshape(layer.shape), layer.output.name)


def _stores_quantized(reader: rec.Layer, constant: rec.ConstantLayer) -> bool:
    """Whether `reader` quantizes the constant, which is then stored in 8 bits alone."""
    return isinstance(reader, rec.QuantizeLayer) and not reader.dequantize and reader.inputs[0].source is constant


def _convolution(writer: _Writer, layer: rec.ConvolutionLayer) -> None:
    names = _inputs(layer)
    if len(names) == 1:
        names.append(writer.constant(layer.kernel.array.reshape(layer.kernel_shape()), f"{layer.name}.weight"))
    if layer.bias is not None and layer.bias.size:
        bias = layer.bias.array.reshape(-1)
        names.append(_quantized_bias(writer, layer, bias) or writer.constant(bias, f"{layer.name}.bias"))
    writer.node(
        "ConvTranspose" if layer.transposed else "Conv",
        names,
        layer,
        {
            "kernel_shape": layer.kernel_size_nd,
            "strides": tuple(layer.stride_nd),
            "pads": (*layer.pre_padding, *layer.post_padding),
            "dilations": tuple(layer.dilation_nd),
            "group": layer.num_groups,
        },
    )


def _quantized_bias(writer: _Writer, layer: rec.ConvolutionLayer, bias: npt.NDArray[Any]) -> str:
    """The bias of an INT8 convolution in the steps of its accumulator, input scale x kernel scale, as int32.

    Returns:
        The dequantized bias's name; empty if the convolution is none of INT8 or the bias needs more than 32 bits.
    """
    scales = [_dequantizing_scale(tensor) for tensor in layer.inputs]
    if len(scales) != 2 or scales[0] is None or scales[1] is None or layer.output.dtype != rec.float32:
        return ""
    step = np.broadcast_to(np.float32(scales[0]) * scales[1], bias.shape).astype(np.float32)
    integers = np.rint(bias.astype(np.float64) / step)
    if np.abs(integers).max() > np.iinfo(np.int32).max:
        return ""
    name = f"{layer.name}.bias"
    operands = [writer.constant(integers.astype(np.int32), f"{name}.q"), writer.constant(step, f"{name}.scale")]
    return writer.node("DequantizeLinear", operands, layer, {"axis": 0}, output=f"{name}.dq")


def _dequantizing_scale(tensor: rec.Tensor) -> npt.NDArray[np.float32] | None:
    """The scale of the dequantize layer that gives `tensor`; None if another layer does."""
    source = tensor.source
    if not isinstance(source, rec.QuantizeLayer) or not source.dequantize:
        return None
    constant = source.inputs[1].source
    return constant.weights.array.astype(np.float32) if isinstance(constant, rec.ConstantLayer) else None


def _activation(writer: _Writer, layer: rec.ActivationLayer) -> None:
    operator = _ACTIVATIONS[layer.type]
    if operator == "Clip":
        dtype = np.dtype(layer.output.dtype.value)
        largest = float(np.finfo(dtype).max)
        limits = [writer.constant(np.array(max(-largest, min(v, largest)), dtype)) for v in (layer.alpha, layer.beta)]
        writer.node(operator, [*_inputs(layer), *limits], layer)
        return
    if operator == "Softplus" and (layer.alpha, layer.beta) != (1.0, 1.0):
        raise NetworkError(f"layer {layer.name}: ONNX has Softplus with alpha = beta = 1 only")
    attributes = {"LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta")}.get(operator, ())
    writer.node(operator, _inputs(layer), layer, {name: float(getattr(layer, name)) for name in attributes})


def _elementwise(writer: _Writer, layer: rec.ElementWiseLayer) -> None:
    writer.node(_ELEMENTWISE[layer.op], _inputs(layer), layer)


def _pooling(writer: _Writer, layer: rec.PoolingLayer) -> None:
    attributes = {
        "kernel_shape": layer.window_size_nd,
        "strides": tuple(layer.stride_nd),
        "pads": tuple(layer.padding_nd) * 2,
    }
    if layer.type == rec.PoolingType.MAX:
        writer.node("MaxPool", _inputs(layer), layer, attributes)
    else:
        include = int(not layer.average_count_excludes_padding)
        writer.node("AveragePool", _inputs(layer), layer, {"count_include_pad": include, **attributes})


def _concatenation(writer: _Writer, layer: rec.ConcatenationLayer) -> None:
    writer.node("Concat", _inputs(layer), layer, {"axis": layer.axis})


def _resize(writer: _Writer, layer: rec.ResizeLayer) -> None:
    if _repeats_integers(layer):
        _repeat(writer, layer)
        return
    scales = writer.constant(np.array(layer.scales, np.float32))
    writer.node(
        "Resize",
        [*_inputs(layer), "", scales],
        layer,
        {
            "mode": "nearest" if layer.resize_mode == rec.InterpolationMode.NEAREST else "linear",
            "coordinate_transformation_mode": _COORDINATES[layer.coordinate_transformation],
            "nearest_mode": _ROUNDING[layer.nearest_rounding],
        },
    )


def _repeats_integers(reader: rec.Layer) -> bool:
    """Whether it repeats the pixels of an 8-bit picture with channels, as nn.Upsample in an INT8 network does."""
    if not isinstance(reader, rec.ResizeLayer) or len(reader.scales) != 4:
        return False
    x, (batch, channels, *factors) = reader.inputs[0], reader.scales
    return (
        isinstance(x.source, rec.QuantizeLayer)
        and (x.source.dequantize, x.dtype, x.source.inputs[1].shape) == (True, rec.float32, ())
        and reader.resize_mode == rec.InterpolationMode.NEAREST
        and reader.coordinate_transformation == rec.ResizeCoordinateTransformation.ASYMMETRIC
        and reader.nearest_rounding == rec.ResizeRoundMode.FLOOR
        and (batch, channels) == (1, 1)
        and all(float(factor).is_integer() for factor in factors)
        and rec.DYNAMIC not in x.shape[1:]
    )


def _repeat(writer: _Writer, layer: rec.ResizeLayer) -> None:
    """Repeat columns, then rows, by concatenation with channels last, before the integers are dequantized.

    That is how ONNX Runtime lays out 8-bit networks, and where its Resize goes value by value, on one thread.
    """
    dequantize = layer.inputs[0].source
    assert isinstance(dequantize, rec.QuantizeLayer)
    _, channels, height, width = layer.inputs[0].shape
    down, across = (int(factor) for factor in layer.scales[2:])
    name = layer.output.name
    x = writer.node("Transpose", [dequantize.inputs[0].name], layer, {"perm": (0, 2, 3, 1)}, output=f"{name}.nhwc")
    for axis, copies, shape in (
        (3, across, (0, height, width, 1, channels)),
        (2, down, (0, height, 1, width * across * channels)),
    ):
        x = writer.node("Reshape", [x, writer.integers(shape)], layer, output=f"{name}.rows")
        x = writer.node("Concat", [x] * copies, layer, {"axis": axis}, output=f"{name}.repeated")
    shape = (0, height * down, width * across, channels)
    x = writer.node("Reshape", [x, writer.integers(shape)], layer, output=f"{name}.rows")
    x = writer.node("Transpose", [x], layer, {"perm": (0, 3, 1, 2)}, output=f"{name}.integers")
    writer.node("DequantizeLinear", [x, *_quantizing(writer, dequantize)], layer)


def _slice(writer: _Writer, layer: rec.SliceLayer) -> None:
    # ONNX wants the end after the last element; INT64_MIN stands for "past the start" when stepping backwards
    ends = [
        start + count * stride if start + count * stride >= 0 else np.iinfo(np.int64).min
        for start, count, stride in zip(layer.start, layer.shape, layer.stride, strict=True)
    ]
    axes = range(len(layer.start))
    arguments = [writer.integers(values) for values in (layer.start, ends, axes, layer.stride)]
    writer.node("Slice", [*_inputs(layer), *arguments], layer)


def _shuffle(writer: _Writer, layer: rec.ShuffleLayer) -> None:
    steps: list[tuple[str, dict[str, Any]]] = []
    if layer.first_transpose is not None:
        steps.append(("Transpose", {"perm": tuple(layer.first_transpose)}))
    if layer.reshape_dims is not None:
        steps.append(("Reshape", {}))
    if layer.second_transpose is not None:
        steps.append(("Transpose", {"perm": tuple(layer.second_transpose)}))
    value = layer.inputs[0].name
    for index, (operator, attributes) in enumerate(steps or [("Identity", {})]):
        last = index == max(len(steps) - 1, 0)
        inputs = [value, writer.integers(tuple(layer.reshape_dims or ()))] if operator == "Reshape" else [value]
        output = "" if last else f"{layer.output.name}.{index}"
        value = writer.node(operator, inputs, layer, attributes, output=output)


def _reduce(writer: _Writer, layer: rec.ReduceLayer) -> None:
    operator, axes = _REDUCE[layer.op], layer.axis_list()
    if operator == "ReduceSum":  # takes its axes as an input since opset 13, the others since 18
        writer.node(operator, [*_inputs(layer), writer.integers(axes)], layer, {"keepdims": int(layer.keep_dims)})
    else:
        writer.node(operator, _inputs(layer), layer, {"axes": axes, "keepdims": int(layer.keep_dims)})


def _softmax(writer: _Writer, layer: rec.SoftMaxLayer) -> None:
    writer.node("Softmax", _inputs(layer), layer, {"axis": layer.axes.bit_length() - 1})


def _matrix_multiply(writer: _Writer, layer: rec.MatrixMultiplyLayer) -> None:
    operands = []
    for index, (tensor, operation) in enumerate(zip(layer.inputs, (layer.op0, layer.op1), strict=True)):
        name = tensor.name
        if operation == rec.MatrixOperation.TRANSPOSE:
            rank = len(tensor.shape)
            order = (*range(rank - 2), rank - 1, rank - 2)
            name = writer.node("Transpose", [name], layer, {"perm": order}, output=f"{layer.output.name}.{index}")
        operands.append(name)
    writer.node("MatMul", operands, layer)


def _cast(writer: _Writer, layer: rec.CastLayer) -> None:
    writer.node("Cast", _inputs(layer), layer, {"to": writer.element_type(layer.to_type)})


def _quantize(writer: _Writer, layer: rec.QuantizeLayer) -> None:
    x, scale = layer.inputs
    if isinstance(x.source, rec.ConstantLayer) and _stores_quantized(layer, x.source):
        writer.initializer(_quantized_constant(layer, x.source), layer.output.name)
        return
    readers = layer.output.consumers
    if readers and all(map(_repeats_integers, readers)) and not layer.output.is_network_output:
        return  # they read the integers
    axis = {"axis": layer.axis} if scale.shape else {}
    step, zero_point = _quantizing(writer, layer)
    if not layer.dequantize:
        writer.node("QuantizeLinear", [_cast_to_float32(writer, layer, x), step, zero_point], layer, axis)
    elif layer.to_type == rec.float32:
        writer.node("DequantizeLinear", [x.name, step, zero_point], layer, axis)
    else:
        real = writer.node("DequantizeLinear", [x.name, step, zero_point], layer, axis, output=f"{x.name}.float32")
        writer.node("Cast", [real], layer, {"to": writer.element_type(layer.to_type)})


def _quantizing(writer: _Writer, layer: rec.QuantizeLayer) -> tuple[str, str]:
    """Names of the scale and zero point of a quantize or dequantize layer."""
    scale = layer.inputs[1]
    return _cast_to_float32(writer, layer, scale), writer.constant(_zero_point(layer, scale.shape))


def _quantized_constant(layer: rec.QuantizeLayer, constant: rec.ConstantLayer) -> npt.NDArray[np.int8]:
    """What a quantize layer makes of a constant: a kernel is stored in 8 bits, not in 32."""
    values = constant.weights.array.reshape(constant.shape).astype(np.float32)
    scale = layer.inputs[1].source.weights.array.astype(np.float32)  # type: ignore[union-attr]
    if scale.ndim:
        scale = scale.reshape([-1 if axis == layer.axis else 1 for axis in range(values.ndim)])
    return np.asarray(np.clip(np.rint(values / scale), -128, 127), np.int8)


def _zero_point(layer: rec.QuantizeLayer, shape: rec.Shape) -> npt.NDArray[Any]:
    """The layer's zero point in int8, or 128 more in uint8 for values that only dequantize layers read.

    q + 128 in uint8 with zero point 128 stands for the same number as q in int8 with zero point 0, and the 8-bit
    kernels of ONNX Runtime on x86 are several times faster with it.
    """
    integers = layer.inputs[0] if layer.dequantize else layer.output
    source = integers.source
    is_activation = isinstance(source, rec.QuantizeLayer) and not isinstance(source.inputs[0].source, rec.ConstantLayer)
    is_internal = not integers.is_network_output and all(
        isinstance(reader, rec.QuantizeLayer) and reader.dequantize for reader in integers.consumers
    )
    if is_activation and is_internal:
        return np.full(shape, 128 + layer.zero_point, np.uint8)
    return np.full(shape, layer.zero_point, np.int8)


def _cast_to_float32(writer: _Writer, layer: rec.Layer, tensor: rec.Tensor) -> str:
    """The name of `tensor` in float32, the only type that opset 17 quantizes."""
    if tensor.dtype == rec.float32:
        return tensor.name
    attributes = {"to": writer.element_type(rec.float32)}
    return writer.node("Cast", [tensor.name], layer, attributes, output=f"{tensor.name}.float32")


_EMITTERS: dict[type[rec.Layer], Callable[[_Writer, Any], None]] = {
    rec.ConstantLayer: _constant,
    rec.ConvolutionLayer: _convolution,
    rec.ActivationLayer: _activation,
    rec.ElementWiseLayer: _elementwise,
    rec.PoolingLayer: _pooling,
    rec.ConcatenationLayer: _concatenation,
    rec.ResizeLayer: _resize,
    rec.SliceLayer: _slice,
    rec.ShuffleLayer: _shuffle,
    rec.ReduceLayer: _reduce,
    rec.SoftMaxLayer: _softmax,
    rec.MatrixMultiplyLayer: _matrix_multiply,
    rec.CastLayer: _cast,
    rec.QuantizeLayer: _quantize,
}
