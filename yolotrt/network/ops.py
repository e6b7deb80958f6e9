"""One typed method per TensorRT layer: adds it, checks it once, names it.

`Ops` calls nothing but the public methods of TensorRT's `INetworkDefinition`, on whatever object it is given:
TensorRT's own, TensorRT-RTX's, or the recorder that writes ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import NetworkError, WeightsError
from yolotrt.weights import Weights
from yolotrt.weights.folding import folded_convolution

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
    ) -> None:
        """Wrap a network definition.

        Args:
            network: An `INetworkDefinition`.
            trt: The module that it comes from (`tensorrt`, `tensorrt_rtx` or `yolotrt.network.recorder`).
            weights: The arrays to take.
            compute_dtype: `trt.float32` or `trt.float16`: the type of all activations and weights.
            explain: Returns the library's last error message, for errors raised here.
            io_dtype: The type of the network's inputs and outputs; None is `trt.float32`.
        """
        self.weights = weights
        self._network = network
        self._trt = trt
        self._compute_dtype = compute_dtype
        self._io_dtype = trt.float32 if io_dtype is None else io_dtype
        self._numpy_dtype = np.float16 if compute_dtype == trt.float16 else np.float32
        self._explain = explain
        # TensorRT reads some arrays as late as in the build, by pointer: each must outlive it.
        self.keep_alive: list[npt.NDArray[Any]] = []
        self.convolutions: list[str] = []

    def input(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Add a network input; a dimension of -1 is dynamic. Computation goes on in the compute type."""
        tensor = self._network.add_input(name, self._io_dtype, shape)
        if tensor is None:
            raise NetworkError(f"input {name} of shape {shape} was refused{self._reason()}")
        return self._with_dtype(tensor, self._compute_dtype, f"{name}.cast")

    def output(self, tensor: Tensor, name: str) -> Tensor:
        """Mark `tensor`, which is of the compute type, as the network output `name`."""
        tensor = self._with_dtype(tensor, self._io_dtype, f"{name}.cast")
        tensor.name = name
        self._network.mark_output(tensor)
        return tensor

    def convolution(
        self,
        x: Tensor,
        name: str,
        kernel: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
    ) -> Tensor:
        """2-D convolution; `kernel` is (out, in / groups, height, width), `bias` (out,)."""
        layer = self._network.add_convolution_nd(
            x, kernel.shape[0], kernel.shape[2:], self._constant(kernel, name), self._constant(bias, name)
        )
        self._require(layer, name)
        layer.stride_nd = stride
        layer.padding_nd = padding
        layer.dilation_nd = dilation
        layer.num_groups = groups
        self.convolutions.append(name)
        return self._checked(layer, name)

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
        shape = (out_channels, self._channels_per_group(x, groups, name), *kernel_size)
        kernel, bias = folded_convolution(self.weights, name, shape)
        return self.convolution(
            x, f"{name}.conv", kernel, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )

    def conv_with_bias(self, x: Tensor, name: str, out_channels: int, kernel_size: Pair = (1, 1)) -> Tensor:
        """A plain convolution of stride 1 with its own bias: ``NAME.weight``, ``NAME.bias``."""
        kernel = self.weights.take(f"{name}.weight", (out_channels, channels(x), *kernel_size))
        return self.convolution(x, name, kernel, self.weights.take(f"{name}.bias", (out_channels,)))

    def activation(self, x: Tensor, name: str, kind: str) -> Tensor:
        """Apply the activation that the checkpoint names: ``SiLU``, ``LeakyReLU(0.1)``, ``Identity`` ...

        Raises:
            NetworkError: if the activation is unknown.
        """
        function, _, argument = kind.partition("(")
        add = _ACTIVATIONS.get(function)
        if add is None:
            raise NetworkError(f"{name}: activation {kind!r} is not known: known are {', '.join(sorted(_ACTIVATIONS))}")
        return add(self, x, name, _slope(argument, name))

    def unary(self, x: Tensor, name: str, kind: str, alpha: float | None = None, beta: float | None = None) -> Tensor:
        """Apply an activation layer of TensorRT, such as ``SIGMOID``; `alpha` and `beta` as its documentation says."""
        layer = self._network.add_activation(x, getattr(self._trt.ActivationType, kind))
        self._require(layer, name)
        if alpha is not None:
            layer.alpha = alpha
        if beta is not None:
            layer.beta = beta
        return self._checked(layer, name)

    def multiply(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Elementwise product of two tensors of one shape."""
        return self._elementwise(a, b, name, self._trt.ElementWiseOperation.PROD)

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """Elementwise sum of two tensors of one shape."""
        return self._elementwise(a, b, name, self._trt.ElementWiseOperation.SUM)

    def concat(self, tensors: Sequence[Tensor], name: str, axis: int = 1) -> Tensor:
        """Join tensors along `axis` (1: channels)."""
        layer = self._network.add_concatenation(list(tensors))
        self._require(layer, name)
        layer.axis = axis
        return self._checked(layer, name)

    def max_pool(self, x: Tensor, name: str, size: int, *, stride: int = 1, padding: int = 0) -> Tensor:
        """2-D max-pooling with a square window."""
        layer = self._network.add_pooling_nd(x, self._trt.PoolingType.MAX, (size, size))
        self._require(layer, name)
        layer.stride_nd = (stride, stride)
        layer.padding_nd = (padding, padding)
        return self._checked(layer, name)

    def upsample_nearest(self, x: Tensor, name: str, factor: int) -> Tensor:
        """Repeat every pixel `factor` times in both directions, as torch.nn.Upsample(mode="nearest")."""
        layer = self._network.add_resize(x)
        self._require(layer, name)
        layer.resize_mode = self._trt.InterpolationMode.NEAREST
        layer.coordinate_transformation = self._trt.ResizeCoordinateTransformation.ASYMMETRIC
        layer.nearest_rounding = self._trt.ResizeRoundMode.FLOOR
        layer.scales = (1.0, 1.0, float(factor), float(factor))
        return self._checked(layer, name)

    def _elementwise(self, a: Tensor, b: Tensor, name: str, operation: Any) -> Tensor:
        return self._checked(self._network.add_elementwise(a, b, operation), name)

    def _with_dtype(self, x: Tensor, dtype: Any, name: str) -> Tensor:
        """Convert from or to the compute type; no layer where both ends of the network have it.

        The tensor is not asked: TensorRT 8 decides the types inside a network when it builds.
        """
        same = self._io_dtype == self._compute_dtype
        return x if same else self._checked(self._network.add_cast(x, dtype), name)

    def _constant(self, array: npt.NDArray[np.float32], name: str) -> Any:
        """`array` as the library's `Weights` in the compute type, kept alive."""
        if not np.isfinite(array).all():
            raise WeightsError(
                f"{name} has weights that are NaN or infinite: training diverged: use another checkpoint"
            )
        if self._numpy_dtype == np.float16 and array.size and float(np.abs(array).max()) > FLOAT16_MAX:
            raise WeightsError(f"{name} has weights beyond the range of fp16: build with --precision fp32")
        kept = np.ascontiguousarray(array, self._numpy_dtype)
        self.keep_alive.append(kept)
        return self._trt.Weights(kept)

    def _channels_per_group(self, x: Tensor, groups: int, name: str) -> int:
        """Input channels of each group of a convolution."""
        if groups < 1 or channels(x) % groups:
            raise NetworkError(f"{name}: {channels(x)} input channels cannot be split into {groups} groups")
        return channels(x) // groups

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
            raise NetworkError(f"{name}: an output of shape {shape} is too large")
        output.name = name
        return output

    def _reason(self) -> str:
        """The library's last error, to append to a message."""
        reason = self._explain().strip()
        return f" ({reason})" if reason else ""


def channels(x: Tensor) -> int:
    """Number of channels of a (batch, channels, height, width) tensor."""
    return int(x.shape[1])


def _slope(argument: str, name: str) -> float | None:
    """The number in ``LeakyReLU(0.1)``; None without one."""
    text = argument.rstrip(")").strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise NetworkError(f"{name}: activation argument {text!r} is no number") from None


def _silu(net: Ops, x: Tensor, name: str, _: float | None) -> Tensor:
    return net.multiply(x, net.unary(x, f"{name}.sigmoid", "SIGMOID"), name)


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
