"""The whole of eight bits for values that are hardly ever negative: zero points, for libraries that have them.

Symmetric steps spend as many of the 256 numbers below zero as above it, but nothing that SiLU gives is below -0.28.
Where the lowest value of a tensor is known from what computes it, 255 steps from there to the largest value stand for
the same values about twice as exactly. TensorRT knows no zero points; ONNX does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from yolotrt.network import recorder
from yolotrt.network.quantize import INT8_MAX, copies

_STEPS = 255
_LOWEST_INTEGER = -128

FLOORS = {
    recorder.ActivationType.SIGMOID: -6.0,
    recorder.ActivationType.SOFTPLUS: -6.0,
    recorder.ActivationType.HARD_SIGMOID: -3.0,
    recorder.ActivationType.RELU: 0.0,
}
"""What activations (SiLU, Mish, Hardswish, ReLU) read may be cut off below: their result hardly changes there.

SiLU(-6) is -0.015. Without the cut, rare values of -100 would cost precision where SiLU needs it (docs/int8.md)."""

_LOWEST_RESULTS = {
    recorder.ActivationType.SIGMOID: 0.0,
    recorder.ActivationType.HARD_SIGMOID: 0.0,
    recorder.ActivationType.SOFTPLUS: 0.0,
    recorder.ActivationType.RELU: 0.0,
}

_LOWEST_PRODUCTS = {
    recorder.ActivationType.SIGMOID: -0.2785,  # SiLU, at x = -1.278
    recorder.ActivationType.HARD_SIGMOID: -0.375,  # Hardswish, at x = -1.5
    recorder.ActivationType.TANH: -0.3089,  # Mish, at x = -1.192
}
"""Lowest value of x times this activation of it, which is how SiLU and its like are computed."""


def whole_range_step(largest: float, lowest: float) -> float:
    """The step of 256 integers from `lowest` (at most 0), or minus `largest` if that is higher, to `largest`."""
    return (largest + min(-lowest, largest)) / _STEPS


def lowest_values(network: recorder.Network) -> dict[str, float]:
    """The lowest value that the tensors of a recorded network can have, by name, as far as it is known."""
    lowest = _LowestValues(network)
    found = {layer.output.name: lowest.of(layer.output) for layer in network.layers}
    return {name: low for name, low in found.items() if low is not None}


def use_whole_range(network: recorder.Network) -> None:
    """Give the activations of a recorded INT8 network zero points where their lowest value is known.

    The largest value that is represented stays. Tensors that copy each other's values keep one scale and zero point.
    """
    lowest = _LowestValues(network)
    for layer in network.layers:
        if not isinstance(layer, recorder.QuantizeLayer) or layer.dequantize:
            continue
        constant = layer.inputs[1].source
        if not isinstance(constant, recorder.ConstantLayer) or constant.shape:
            continue  # a kernel, with a scale for each channel
        low = lowest.of(layer.inputs[0])
        if low is None:
            continue
        largest = INT8_MAX * float(constant.weights.array)
        step = whole_range_step(largest, low)
        constant.weights = recorder.Weights(np.array(step, np.float32))
        for user in (layer, *layer.output.consumers):
            assert isinstance(user, recorder.QuantizeLayer)
            user.zero_point = _LOWEST_INTEGER + round(min(-low, largest) / step)


class _LowestValues:
    """Bounds of a network's tensors from below, by the layers that compute them."""

    def __init__(self, network: recorder.Network) -> None:
        self._network = network
        self._leader: dict[str, str] = {}
        self._members: dict[str, list[recorder.Tensor]] = {}
        self._known: dict[str, float | None] = {}
        self._group()

    def of(self, tensor: recorder.Tensor) -> float | None:
        """The lowest value of the tensors that share the tensor's scale; None if it is not known."""
        leader = self._find(_real(tensor).name)
        if leader not in self._known:
            self._known[leader] = None  # what is asked for on the way is not known
            lows = [self._computed(member) for member in self._members[leader]]
            known = [low for low in lows if low is not None]
            self._known[leader] = min(known) if known and len(known) == len(lows) else None
        return self._known[leader]

    def _group(self) -> None:
        """Join the tensors that copy each other's values."""
        tensors = [*self._network.inputs, *(layer.output for layer in self._network.layers)]
        self._leader = {tensor.name: tensor.name for tensor in tensors}
        for layer in self._network.layers:
            for tensor in layer.inputs if copies(layer) else ():
                self._leader[self._find(_real(tensor).name)] = self._find(layer.output.name)
        for tensor in tensors:
            if tensor.source is None or not copies(tensor.source):
                self._members.setdefault(self._find(tensor.name), []).append(tensor)

    def _find(self, name: str) -> str:
        while self._leader[name] != name:
            name = self._leader[name]
        return name

    def _computed(self, tensor: recorder.Tensor) -> float | None:
        """The lowest value that the tensor's own layer gives."""
        layer = tensor.source
        if isinstance(layer, recorder.ActivationLayer):
            return _LOWEST_RESULTS.get(layer.type)
        if isinstance(layer, recorder.ConvolutionLayer):
            return floor(tensor)
        if not isinstance(layer, recorder.ElementWiseLayer):
            return None
        if layer.op == recorder.ElementWiseOperation.PROD:
            a, b = (_real(operand) for operand in layer.inputs)
            low = _lowest_product(a, b)
            return _lowest_product(b, a) if low is None else low
        if layer.op == recorder.ElementWiseOperation.SUM:
            lows = [self.of(operand) for operand in layer.inputs]
            return None if None in lows else sum(low for low in lows if low is not None)
        return None


def _lowest_product(x: recorder.Tensor, factor: recorder.Tensor) -> float | None:
    """The lowest value of x times an activation of the same x."""
    activation = factor.source
    if not isinstance(activation, recorder.ActivationLayer):
        return None
    read = _real(activation.inputs[0])
    if activation.type == recorder.ActivationType.TANH:  # of SOFTPLUS
        if (
            not isinstance(read.source, recorder.ActivationLayer)
            or read.source.type != recorder.ActivationType.SOFTPLUS
        ):
            return None
        read = _real(read.source.inputs[0])
    return _LOWEST_PRODUCTS.get(activation.type) if read is x else None


def floor(tensor: recorder.Tensor) -> float | None:
    """Where values that only an activation reads may be cut off, see `FLOORS`; None if others read them as well."""
    readers = list(_readers(tensor))
    activations = [reader for reader in readers if isinstance(reader, recorder.ActivationLayer)]
    if len(activations) != 1:
        return None
    (activation,) = activations
    products = {reader.name for reader in readers} - {activation.name}
    if not all(activation.name.startswith(f"{name}.") for name in products):  # as model.0.act.sigmoid in model.0.act
        return None
    return FLOORS.get(activation.type)


def _readers(tensor: recorder.Tensor) -> Iterator[recorder.Layer]:
    """The layers that read a tensor's values, in 8 bits or as they are."""
    for reader in tensor.consumers:
        if isinstance(reader, recorder.QuantizeLayer):
            yield from _readers(reader.output)
        else:
            yield reader


def _real(tensor: recorder.Tensor) -> recorder.Tensor:
    """What was quantized, of a dequantized tensor; other tensors as they are."""
    while isinstance(tensor.source, recorder.QuantizeLayer | recorder.CastLayer):
        tensor = tensor.source.inputs[0]
    return tensor
