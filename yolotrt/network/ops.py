"""One typed method per TensorRT layer: adds it, checks it once, names it.

`Ops` calls nothing but the public methods of TensorRT's `INetworkDefinition`, on whatever object it is given:
TensorRT's own, TensorRT-RTX's, or the recorder that writes ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import NetworkError, WeightsError
from yolotrt.network import quantize
from yolotrt.network.quantize import Quantizer
from yolotrt.weights import Weights
from yolotrt.weights.folding import batch_norm, convolution_parts, folded_convolution, folded_part
from yolotrt.weights.model import FloatArray

Tensor = Any
"""An `ITensor` of the library in use."""

Pair = tuple[int, int]

FLOAT16_MAX = 65504.0

MAX_TENSOR_VOLUME = 2**31 - 1
"""TensorRT's limit on the number of values in a tensor."""


class Ops:
    """Adds layers to a network definition.

    Attributes:
        weights: The model's arrays and metadata.
        convolutions: Names of the convolutions that were added.
        operations: Multiplications and additions of all convolutions and matrix products so far, for one picture.
    """

    def __init__(
        self,
        network: Any,
        trt: Any,
        weights: Weights,
        compute_dtype: Any,
        explain: Callable[[], str] = str,
        *,
        io_dtype: Any = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        """Wrap a network definition.

        Args:
            network: An `INetworkDefinition`.
            trt: The module that it comes from (`tensorrt`, `tensorrt_rtx` or `yolotrt.network.recorder`).
            weights: The arrays to take.
            compute_dtype: `trt.float32` or `trt.float16`: the type of all activations and weights.
            explain: Returns the library's last error message, for errors raised here.
            io_dtype: The type of the network's inputs and outputs; None is `trt.float32`.
            quantizer: Says what becomes INT8; None leaves all in the compute type.
        """
        self.weights = weights
        self._network = network
        self._trt = trt
        self._compute_dtype = compute_dtype
        self._io_dtype = trt.float32 if io_dtype is None else io_dtype
        self._numpy_dtype = np.float16 if compute_dtype == trt.float16 else np.float32
        self._explain = explain
        self.operations = 0
        self._quantizer = quantizer
        self._quantized_tensors: dict[str, Tensor] = {}
        self._sources: dict[str, str] = {}  # name of a dequantized tensor -> name of what was quantized
        self._originals: dict[str, Tensor] = {}  # the same -> what was quantized
        # TensorRT reads some arrays as late as in the build, by pointer: each must outlive it.
        self.keep_alive: list[npt.NDArray[Any]] = []
        self._split_after: set[str] = set()  # names of convolutions that SiLU is not to be fused into
        self.convolutions: list[str] = []
        self.int8_convolutions: list[str] = []

    def input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Add a network input; a dimension of -1 is dynamic. Computation goes on in the compute type."""
        tensor = self._network.add_input(name, self._io_dtype, shape)
        if tensor is None:
            raise NetworkError(f"input {name} of shape {shape} was refused{self._reason()}")
        return self._with_dtype(tensor, self._compute_dtype, f"{name}{quantize.CAST_SUFFIX}")

    def output(self, tensor: Tensor, name: str) -> Tensor:
        """Mark `tensor`, which is of the compute type, as the network output `name`."""
        tensor = self._with_dtype(tensor, self._io_dtype, f"{name}{quantize.CAST_SUFFIX}")
        tensor.name = name
        self._network.mark_output(tensor)
        return tensor

    def convolution(
        self,
        x: Tensor,
        name: str,
        kernel: FloatArray,
        bias: FloatArray,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        """2-D convolution; `kernel` is (out, in / groups, height, width), `bias` (out,)."""
        is_quantized = self._scale_to_read(x, quantize.CONVOLUTION, name) is not None
        x = self._as_read(x, quantize.CONVOLUTION, name)
        own_kernel = self._trt.Weights(self._compute_dtype) if is_quantized else self._constant(kernel, name)
        layer = self._network.add_convolution_nd(
            x, kernel.shape[0], kernel.shape[2:], own_kernel, self._constant(bias, name)
        )
        self._require(layer, name)
        if is_quantized:
            layer.set_input(1, self._quantized_kernel(kernel, name))
            self.int8_convolutions.append(name)
        layer.stride_nd = stride
        layer.padding_nd = padding
        layer.dilation_nd = dilation
        layer.num_groups = groups
        self.convolutions.append(name)
        if self._quantizer is not None and self._quantizer.splits_silu(str(x.name)):
            self._split_after.add(name)
        y = self._checked(layer, name)
        self._count(kernel.size * y.shape[2] * y.shape[3] + math.prod(y.shape[1:]))
        return self._as_written(y, quantize.CONVOLUTION, reads_int8=is_quantized)

    def conv_batch_norm(
        self,
        x: Tensor,
        name: str,
        out_channels: int,
        kernel_size: Pair,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        """Convolution ``NAME.conv`` with BatchNorm ``NAME.bn`` folded into it."""
        shape = (out_channels, _per_group(channels(x), groups, name), *kernel_size)
        kernel, bias = self._folded(name, shape)
        return self.convolution(
            x, f"{name}.conv", kernel, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )

    def space_to_depth_conv(
        self, x: Tensor, name: str, out_channels: int, kernel_size: Pair, *, stride: Pair, padding: Pair, groups: int
    ) -> Tensor:
        """Focus: the four neighbours of every second pixel become channels, then ``NAME.conv`` with ``NAME.bn``.

        A kernel over such channels is a kernel of twice the size over the pixels themselves, at twice the stride and
        padding. So it is one convolution here, which reads the picture once.
        """
        in_channels = 4 * channels(x)
        shape = (out_channels, _per_group(in_channels, groups, name), *kernel_size)
        kernel, bias = self._folded(name, shape)
        return self.convolution(
            x,
            f"{name}.conv",
            _over_pixels(_ungrouped(kernel, groups)),
            bias,
            stride=(2 * stride[0], 2 * stride[1]),
            padding=(2 * padding[0], 2 * padding[1]),
        )

    def conv_before_shared_norm(
        self, x: Tensor, name: str, out_channels: int, *, norm: str, norm_channels: int, first: int
    ) -> Tensor:
        """1x1 convolution ``NAME`` whose output is channels `first` and on of what BatchNorm `norm` takes."""
        shape = (out_channels, channels(x), 1, 1)
        kernel, bias = self._folded_part(name, shape, norm, norm_channels, first)
        return self.convolution(x, name, kernel, bias)

    def conv_with_bias(
        self,
        x: Tensor,
        name: str,
        out_channels: int,
        kernel_size: Pair = (1, 1),
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        has_bias: bool = True,
    ) -> Tensor:
        """A convolution without BatchNorm: ``NAME.weight`` and, where it has one, ``NAME.bias``."""
        shape = (out_channels, _per_group(channels(x), groups, name), *kernel_size)
        kernel = self.weights.take(f"{name}.weight", shape)
        bias = self._bias(name, out_channels, has_bias=has_bias)
        return self.convolution(x, name, kernel, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)

    def transposed_conv(
        self,
        x: Tensor,
        name: str,
        out_channels: int,
        kernel_size: Pair,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        output_padding: Pair = (0, 0),
        groups: int = 1,
        has_bias: bool = True,
    ) -> Tensor:
        """Transposed convolution ``NAME.weight``, ``NAME.bias``, with torch.nn.ConvTranspose2d's parameters.

        What `output_padding` adds at the end is what less padding there leaves.
        """
        after = (padding[0] - output_padding[0], padding[1] - output_padding[1])
        if min(after) < 0:
            raise NetworkError(f"{name}: an output padding of {output_padding} is larger than the padding {padding}")
        kernel = self.weights.take(
            f"{name}.weight", (channels(x), _per_group(out_channels, groups, name), *kernel_size)
        )
        bias = self._bias(name, out_channels, has_bias=has_bias)
        layer = self._network.add_deconvolution_nd(
            x, out_channels, kernel_size, self._constant(kernel, name), self._constant(bias, name)
        )
        self._require(layer, name)
        layer.stride_nd = stride
        layer.pre_padding = padding
        layer.post_padding = after
        layer.num_groups = groups
        y = self._checked(layer, name)
        self._count(kernel.size * x.shape[2] * x.shape[3] + math.prod(y.shape[1:]))
        return y

    def linear(self, x: Tensor, name: str, kernel: FloatArray, bias: FloatArray | None = None) -> Tensor:
        """A linear layer at every pixel, which is a 1x1 convolution; `kernel` is (out, in), `bias` (out,) or none."""
        bias = np.zeros(kernel.shape[0], np.float32) if bias is None else bias
        return self.convolution(x, name, kernel[:, :, None, None], bias)

    def reshape(
        self, x: Tensor, name: str, shape: tuple[int, ...], *, then_transpose: tuple[int, ...] | None = None
    ) -> Tensor:
        """Give `x` another shape, without the batch, which stays; `then_transpose` orders its axes, batch included."""
        layer = self._network.add_shuffle(x)
        self._require(layer, name)
        layer.reshape_dims = (0, *shape)  # 0: as it is, which may be dynamic
        if then_transpose is not None:
            layer.second_transpose = then_transpose
        return self._checked(layer, name)

    def softmax(self, x: Tensor, name: str, axis: int) -> Tensor:
        """Softmax along `axis`."""
        layer = self._network.add_softmax(x)
        self._require(layer, name)
        layer.axes = 1 << axis
        return self._checked(layer, name)

    def matrix_multiply(
        self, a: Tensor, b: Tensor, name: str, *, transpose_a: bool = False, transpose_b: bool = False
    ) -> Tensor:
        """Product of the matrices in the last two axes."""
        plain, transposed = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        operations = (transposed if transpose_a else plain, transposed if transpose_b else plain)
        product = self._checked(self._network.add_matrix_multiply(a, operations[0], b, operations[1]), name)
        self._count(math.prod(product.shape[1:]) * a.shape[-2 if transpose_a else -1])
        return product

    def mean_of_pixels(self, x: Tensor, name: str) -> Tensor:
        """Average of all pixels of each channel: (batch, channels, 1, 1)."""
        vertical, horizontal = 1 << 2, 1 << 3
        return self._checked(
            self._network.add_reduce(x, self._trt.ReduceOperation.AVG, vertical | horizontal, True), name
        )

    def activation(self, x: Tensor, name: str, kind: str) -> Tensor:
        """Apply the activation that the checkpoint names: ``SiLU``, ``LeakyReLU(0.1)``, ``Identity`` ...

        Raises:
            NetworkError: if the activation is unknown.
        """
        function, _, argument = kind.partition("(")
        add = _ACTIVATIONS.get(function)
        if add is None:
            raise NetworkError(f"{name}: activation {kind!r} is not known: known are {', '.join(sorted(_ACTIVATIONS))}")
        if function == "SiLU" and x.name in self._split_after:
            add = _split_silu
        y = add(self, x, name, _slope(argument, name))
        return self._as_written(y, quantize.ACTIVATION, reads_int8=self._is_quantized(x))

    def unary(self, x: Tensor, name: str, kind: str, alpha: float | None = None, beta: float | None = None) -> Tensor:
        """Apply an activation layer of TensorRT, such as ``SIGMOID``; `alpha` and `beta` as its documentation says."""
        layer = self._network.add_activation(x, getattr(self._trt.ActivationType, kind))
        self._require(layer, name)
        if alpha is not None:
            layer.alpha = alpha
        if beta is not None:
            layer.beta = beta
        y = self._checked(layer, name)
        return y if kind != "SIGMOID" else self._as_written(y, quantize.SIGMOID, reads_int8=self._is_quantized(x))

    def multiply(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Elementwise product of two tensors of one shape, or of one and a single value."""
        return self._elementwise(a, b, name, self._trt.ElementWiseOperation.PROD)

    def sum(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Elementwise sum of two tensors of one shape, in floating point."""
        return self._elementwise(a, b, name, self._trt.ElementWiseOperation.SUM)

    def number(self, value: float, name: str) -> Tensor:
        """A constant (1, 1, 1, 1) of the compute type."""
        array = np.full((1, 1, 1, 1), value, np.float32)
        return self._checked(self._network.add_constant(array.shape, self._constant(array, name)), name)

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Elementwise sum of two tensors of one shape."""
        a, b = (self._as_read(tensor, quantize.ADD, name) for tensor in (a, b))
        y = self.sum(a, b, name)
        return self._as_written(y, quantize.ADD, reads_int8=self._is_quantized(a))

    def concat(self, tensors: Sequence[Tensor], name: str, axis: int = 1) -> Tensor:
        """Join tensors along `axis` (1: channels)."""
        tensors = [self._as_read(tensor, quantize.CONCAT, name) for tensor in tensors]
        layer = self._network.add_concatenation(tensors)
        self._require(layer, name)
        layer.axis = axis
        reads_int8 = all(map(self._is_quantized, tensors))
        return self._as_written(self._checked(layer, name), quantize.CONCAT, reads_int8=reads_int8)

    def max_pool(self, x: Tensor, name: str, size: int, *, stride: int = 1, padding: int = 0) -> Tensor:
        """2-D max-pooling with a square window."""
        x = self._as_read(x, quantize.MAX_POOL, name)
        layer = self._network.add_pooling_nd(x, self._trt.PoolingType.MAX, (size, size))
        self._require(layer, name)
        layer.stride_nd = (stride, stride)
        layer.padding_nd = (padding, padding)
        return self._as_written(self._checked(layer, name), quantize.MAX_POOL, reads_int8=self._is_quantized(x))

    def upsample_nearest(self, x: Tensor, name: str, factor: int) -> Tensor:
        """Repeat every pixel `factor` times in both directions, as torch.nn.Upsample(mode="nearest")."""
        x = self._as_read(x, quantize.RESIZE, name)
        layer = self._network.add_resize(x)
        self._require(layer, name)
        layer.resize_mode = self._trt.InterpolationMode.NEAREST
        layer.coordinate_transformation = self._trt.ResizeCoordinateTransformation.ASYMMETRIC
        layer.nearest_rounding = self._trt.ResizeRoundMode.FLOOR
        layer.scales = (1.0, 1.0, float(factor), float(factor))
        return self._as_written(self._checked(layer, name), quantize.RESIZE, reads_int8=self._is_quantized(x))

    def _elementwise(self, a: Tensor, b: Tensor, name: str, operation: Any) -> Tensor:
        return self._checked(self._network.add_elementwise(a, b, operation), name)

    def _as_read(self, x: Tensor, kind: str, layer: str) -> Tensor:
        """`x` as a layer of that kind reads it: dequantized from INT8, or as it is."""
        if self._quantizer is not None and self._quantizer.reads_original(layer):
            return self._originals.get(x.name, x)
        scale = self._scale_to_read(x, kind, layer)
        return x if scale is None else self._through_int8(x, scale)

    def _scale_to_read(self, x: Tensor, kind: str, layer: str) -> float | None:
        """The scale at which a layer of that kind reads `x` as INT8, or None."""
        if self._quantizer is None:
            return None
        return self._quantizer.read_scale(kind, layer, self._sources.get(x.name, x.name))

    def _as_written(self, y: Tensor, kind: str, *, reads_int8: bool) -> Tensor:
        """The output of a layer of that kind as all layers after it get it."""
        if self._quantizer is None or self._is_quantized(y):
            return y
        scale = self._quantizer.write_scale(kind, y.name, reads_int8=reads_int8)
        return y if scale is None else self._through_int8(y, scale)

    def _is_quantized(self, x: Tensor) -> bool:
        """Whether it was dequantized from INT8."""
        return x.name in self._sources

    def _through_int8(self, x: Tensor, scale: float) -> Tensor:
        """Quantize and dequantize an activation; the same tensor once for all its readers."""
        if self._is_quantized(x):
            return x
        name = str(x.name)
        if name not in self._quantized_tensors:
            y = self._quantize_dequantize(x, name, np.array(scale, np.float32))
            self._quantized_tensors[name] = y
            self._sources[str(y.name)], self._originals[str(y.name)] = name, x
        return self._quantized_tensors[name]

    def _quantized_kernel(self, kernel: npt.NDArray[np.float32], name: str) -> Tensor:
        """A convolution's kernel, quantized with one scale an output channel and dequantized."""
        self._check_weights(kernel, name)
        constant = self._constant_tensor(kernel, f"{name}.kernel")
        return self._quantize_dequantize(constant, f"{name}.kernel", quantize.kernel_scales(kernel), axis=0)

    def _quantize_dequantize(
        self, x: Tensor, name: str, scale: npt.NDArray[np.float32], axis: int | None = None
    ) -> Tensor:
        """Layers ``NAME.q`` and ``NAME.dq``; a scale of shape () for the tensor, of (channels,) along `axis`."""
        step = self._constant_tensor(scale, f"{name}.scale")  # float32 and of rank 0: else TensorRT computes in float
        quantized = quantize.add_quantize(self._network, self._trt, x, step)
        self._require(quantized, f"{name}.q")
        if axis is not None:
            quantized.axis = axis
        integers = self._checked(quantized, f"{name}.q")
        dequantized = quantize.add_dequantize(self._network, self._trt, integers, step, self._compute_dtype)
        self._require(dequantized, f"{name}.dq")
        if axis is not None:
            dequantized.axis = axis
        return self._checked(dequantized, f"{name}.dq")

    def _constant_tensor(self, array: npt.NDArray[np.float32], name: str) -> Tensor:
        """A float32 constant of the network, kept alive."""
        kept = np.require(array, np.float32, "C")
        self.keep_alive.append(kept)
        return self._checked(self._network.add_constant(kept.shape, self._trt.Weights(kept)), name)

    def _with_dtype(self, x: Tensor, dtype: Any, name: str) -> Tensor:
        """Convert from or to the compute type; no layer where both ends of the network have it.

        The tensor is not asked: TensorRT 8 decides the types inside a network when it builds.
        """
        same = self._io_dtype == self._compute_dtype
        return x if same else self._checked(self._network.add_cast(x, dtype), name)

    def _folded(self, name: str, kernel_shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
        """See `folded_convolution`."""
        return folded_convolution(self.weights, name, kernel_shape)

    def _folded_part(
        self, name: str, kernel_shape: tuple[int, ...], norm: str, norm_channels: int, first: int
    ) -> tuple[FloatArray, FloatArray]:
        """See `folded_part`."""
        return folded_part(self.weights, name, kernel_shape, norm, norm_channels, first)

    def _count(self, products: int) -> None:
        """Add to the operations: each product, and each bias, is one multiplication and one addition.

        So thop counts, whose figures YOLOv5 publishes.
        """
        self.operations += 2 * int(products)

    def _constant(self, array: FloatArray, name: str) -> Any:
        """`array` as the library's `Weights` in the compute type, kept alive."""
        self._check_weights(array, name)
        if self._numpy_dtype == np.float16 and array.size and float(np.abs(array).max()) > FLOAT16_MAX:
            raise WeightsError(f"{name} has weights beyond the range of fp16: build with --precision fp32")
        kept = np.ascontiguousarray(array, self._numpy_dtype)
        self.keep_alive.append(kept)
        return self._trt.Weights(kept)

    def _bias(self, name: str, out_channels: int, *, has_bias: bool) -> FloatArray:
        """``NAME.bias``, or zeros."""
        return self.weights.take(f"{name}.bias", (out_channels,)) if has_bias else np.zeros(out_channels, np.float32)

    def _check_weights(self, array: npt.NDArray[np.float32], name: str) -> None:
        """Raise WeightsError unless all values are finite."""
        if not np.isfinite(array).all():
            raise WeightsError(
                f"{name} has weights that are NaN or infinite: training diverged: use another checkpoint"
            )

    def _require(self, layer: Any, name: str) -> None:
        """Raise if the library refused to add the layer."""
        if layer is None:
            raise NetworkError(f"{name}: the layer was refused{self._reason()}")

    def _checked(self, layer: Any, name: str) -> Tensor:
        """Name the layer and return its output, whose shape the library must be able to tell."""
        self._require(layer, name)
        layer.name = name
        layer.metadata = name  # what the engine inspector shows of a layer that was fused into another
        output = layer.get_output(0)
        try:
            shape = tuple(output.shape)
        except (RuntimeError, ValueError) as problem:  # how the bindings show an invalid shape
            raise NetworkError(f"{name}: the layer's output has no valid shape{self._reason()}") from problem
        if abs(int(np.prod(shape, dtype=np.float64))) > MAX_TENSOR_VOLUME:
            raise NetworkError(f"{name}: an output of shape {shape} is too large: choose a smaller --imgsz or --batch")
        output.name = name
        return output

    def _reason(self) -> str:
        """The library's last error, to append to a message."""
        reason = self._explain().strip()
        return f" ({reason})" if reason else ""


class OutlineOps(Ops):
    """Adds layers whose weights have the right shapes and no values: untouched memory costs nothing."""

    def _folded(self, name: str, kernel_shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
        convolution_parts(self.weights, name, kernel_shape)
        return np.empty(kernel_shape, np.float32), np.empty(kernel_shape[0], np.float32)

    def _folded_part(
        self,
        name: str,
        kernel_shape: tuple[int, ...],
        norm: str,
        norm_channels: int,
        first: int,  # noqa: ARG002 - all parts have one shape
    ) -> tuple[FloatArray, FloatArray]:
        self.weights.take(f"{name}.weight", kernel_shape)
        batch_norm(self.weights, norm, norm_channels)
        return np.empty(kernel_shape, np.float32), np.empty(kernel_shape[0], np.float32)

    def _constant(self, array: FloatArray, name: str) -> Any:  # noqa: ARG002 - nothing can be wrong with no values
        return self._trt.Weights(np.empty(array.shape, self._numpy_dtype))


def channels(x: Tensor) -> int:
    """Number of channels of a (batch, channels, height, width) tensor."""
    return int(x.shape[1])


def _per_group(count: int, groups: int, name: str) -> int:
    """Channels of each group of a convolution."""
    if groups < 1 or count % groups:
        raise NetworkError(f"{name}: {count} channels cannot be split into {groups} groups")
    return count // groups


def _ungrouped(kernel: FloatArray, groups: int) -> FloatArray:
    """A grouped convolution's kernel as that of one group, with zeros where it does not look."""
    if groups == 1:
        return kernel
    out_channels, per_group, *size = kernel.shape
    dense = np.zeros((groups, out_channels // groups, groups, per_group, *size), np.float32)
    for group, part in enumerate(np.split(kernel, groups)):
        dense[group, :, group] = part
    return dense.reshape(out_channels, groups * per_group, *size)


def _over_pixels(kernel: FloatArray) -> FloatArray:
    """The kernel (out, 4 x channels, h, w) over Focus's channels as one over pixels, (out, channels, 2h, 2w).

    Focus joins the pixels at even rows and columns, odd rows, odd columns, odd both, in this order (YOLOv5
    models/common.py).
    """
    out_channels, in_channels, height, width = kernel.shape
    parts = kernel.reshape(out_channels, 2, 2, in_channels // 4, height, width)  # (out, dx, dy, channels, h, w)
    pixels: FloatArray = parts.transpose(0, 3, 4, 2, 5, 1)  # (out, channels, h, dy, w, dx)
    return pixels.reshape(out_channels, in_channels // 4, 2 * height, 2 * width)


def _slope(argument: str, name: str) -> float | None:
    """The number in ``LeakyReLU(0.1)``; None without one."""
    text = argument.rstrip(")").strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise NetworkError(f"{name}: activation argument {text!r} is no number") from None


def _silu(net: Ops, x: Tensor, name: str, _: float | None) -> Tensor:
    return net.multiply(x, net.unary(x, f"{name}.sigmoid", "SIGMOID"), name)


def _split_silu(net: Ops, x: Tensor, name: str, _: float | None) -> Tensor:
    """SiLU as x/2 + x/2 tanh(x/2), which a library that would fuse SiLU does not take for it.

    In float32 it is the same. In halves the sum of a negative x cancels: it is off by up to 0.003, less than the step
    of the integers that it is rounded to.
    """
    half = net.multiply(x, net.number(0.5, f"{name}.half"), f"{name}.halved")
    return net.sum(net.multiply(half, net.unary(half, f"{name}.tanh", "TANH"), f"{name}.product"), half, name)


def _hardswish(net: Ops, x: Tensor, name: str, _: float | None) -> Tensor:
    return net.multiply(x, net.unary(x, f"{name}.sigmoid", "HARD_SIGMOID", alpha=1 / 6, beta=0.5), name)


def _mish(net: Ops, x: Tensor, name: str, _: float | None) -> Tensor:
    softplus = net.unary(x, f"{name}.softplus", "SOFTPLUS", alpha=1.0, beta=1.0)
    return net.multiply(x, net.unary(softplus, f"{name}.tanh", "TANH"), name)


def _leaky_relu(net: Ops, x: Tensor, name: str, slope: float | None) -> Tensor:
    # torch.nn.LeakyReLU's own default is 0.01
    return net.unary(x, name, "LEAKY_RELU", alpha=0.01 if slope is None else slope)


_ACTIVATIONS: dict[str, Callable[[Ops, Tensor, str, float | None], Tensor]] = {
    "SiLU": _silu,
    "Hardswish": _hardswish,
    "Mish": _mish,
    "LeakyReLU": _leaky_relu,
    "ReLU": lambda net, x, name, _: net.unary(x, name, "RELU"),
    "Sigmoid": lambda net, x, name, _: net.unary(x, name, "SIGMOID"),
    "Tanh": lambda net, x, name, _: net.unary(x, name, "TANH"),
    "Identity": lambda _net, x, _name, _: x,
}
