"""Where INT8 begins and ends in a network: explicit quantize and dequantize layers (Q/DQ), placed by one table.

A value x is stored as q = clip(round(x / scale), -128, 127), ties to even, and read as q x scale. Activations have one
scale a tensor, kernels one an output channel. TensorRT knows no zero points; where a library does, `ranges` adds them
afterwards. A library fuses a layer into an 8-bit kernel when it finds Q/DQ where that kernel begins and ends, which is
what a `Placement` says.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import InputError
from yolotrt.network import recorder

CONVOLUTION, SIGMOID, ACTIVATION = "convolution", "sigmoid", "activation"
ADD, CONCAT, MAX_POOL, RESIZE = "add", "concat", "max_pool", "resize"

INT8_MAX = 127
"""Scales map the largest value here, for which -128 stays unused: the range is symmetric."""

SIGMOID_SCALE = 1.0 / INT8_MAX
"""A sigmoid's values lie in 0..1, whatever the pictures show."""

SMALLEST_CHANNEL = 2.0**-10
"""A kernel's channel with smaller values than this part of the kernel's largest is quantized as if it had that part.

Channels that training has switched off hold values like 1e-20; a scale for these would make the channel's bias, counted
in input scale x kernel scale, exceed the 32 bits of an accumulator."""

CAST_SUFFIX = ".cast"
"""Ends the name of a converted network input, which has the values, and so the scale, of the input."""


@dataclass(frozen=True)
class Placement:
    """Which tensors are quantized, for one kind of library.

    Attributes:
        reads: Kinds of layers that read INT8: their inputs are quantized.
        writes: Kinds of layers that also write INT8: their outputs are quantized where their inputs are, and those of
            activations always, so that all readers share the 8-bit value.
        high_precision: The type of all else: ``fp16`` or ``fp32``.
        has_zero_points: Whether the library takes them; see `yolotrt.network.ranges`.
        splits_silu: Whether SiLU after the picture's convolution is written in a form that is not fused into it.
    """

    reads: frozenset[str]
    writes: frozenset[str] = frozenset()
    high_precision: str = "fp16"
    has_zero_points: bool = False
    splits_silu: bool = False


_EIGHT_BIT_LAYERS = frozenset({CONVOLUTION, ADD, CONCAT, MAX_POOL, RESIZE})

# layer                 input   output  because
# convolution           INT8    -       TensorRT fuses conv + bias + SiLU + the next reader's Q into one kernel that
#                                       accumulates in 32 bits: nothing may be rounded between the convolution and SiLU
# sigmoid, product      -       -       part of that kernel
# residual add          INT8    -       both inputs: the shortcut is the INT8 tensor that the convolution reads, too
# concatenation         INT8    -       one scale for all inputs and the output: bytes are copied
# max-pooling, resize   INT8    -       the scale of the input is that of the output: bytes are compared, copied
# head (Detect)         -       -       its raw values are box coordinates and logits: 8 bits are too few
# first convolution     -       -       a picture's three channels would be padded to 32 (docs/int8.md)
TENSORRT = Placement(reads=_EIGHT_BIT_LAYERS)
"""TensorRT 10, 11 and TensorRT-RTX."""

# TensorRT 8.6 takes Q/DQ in float32 networks alone. It fuses SiLU into every convolution of such a network, and for a
# picture's channels has kernels with SiLU in TF32 only, slower than halves and SiLU one by one (docs/int8.md).
TENSORRT_8 = replace(TENSORRT, high_precision="fp32", splits_silu=True)
"""TensorRT 8.6."""

# ONNX Runtime's 8-bit kernels (QLinearConv, QLinearSigmoid, QLinearMul, ...) fuse nothing but the Q/DQ around one
# layer: each writes INT8 as well. The convolution that reads the picture has three channels, for which its 8-bit kernel
# takes twice as long as the 32-bit one (docs/int8.md).
ONNX_RUNTIME = Placement(
    reads=_EIGHT_BIT_LAYERS,
    writes=_EIGHT_BIT_LAYERS | {SIGMOID, ACTIVATION},
    high_precision="fp32",
    has_zero_points=True,
)
"""ONNX Runtime on a CPU."""


@dataclass(frozen=True)
class Quantization:
    """What makes a network an INT8 network.

    Attributes:
        scales: Step of every quantized tensor, by the tensor's name. Tensors that share a scale have equal values.
        keep: Layers that stay in high precision: names of a layer, a block or a row of the yaml, such as ``model.9`` or
            ``model.2.m.0.cv1``. The head always does.
    """

    scales: Mapping[str, float] = field(repr=False)
    keep: tuple[str, ...] = ()


class Quantizer:
    """Answers, layer by layer, what is to be quantized."""

    def __init__(
        self, quantization: Quantization, placement: Placement, inputs: Collection[str], heads: Collection[str]
    ) -> None:
        """Begin a network.

        Args:
            quantization: Scales and layers to keep.
            placement: The library's table.
            inputs: Names of the network's inputs.
            heads: Names of the rows that give the raw heads, such as ``model.24``.
        """
        self._scales = quantization.scales
        self._placement = placement
        self._inputs = inputs
        self._keep = {**dict.fromkeys(quantization.keep, False), **dict.fromkeys(heads, True)}

    def splits_silu(self, tensor: str) -> bool:
        """Whether SiLU after a convolution that reads `tensor` is not to be fused into it: see `Placement`."""
        return self._placement.splits_silu and self._is_picture(tensor)

    def read_scale(self, kind: str, layer: str, tensor: str) -> float | None:
        """The scale at which `layer` reads `tensor`; None where it reads it as it is."""
        is_kept = self._is_kept(layer)
        if kind not in self._placement.reads or is_kept or self._is_picture(tensor):
            return None
        return self._scales.get(tensor)

    def reads_original(self, layer: str) -> bool:
        """Whether `layer` reads the values from before they were quantized for others: it is to be exact."""
        return self._is_kept(layer)

    def write_scale(self, kind: str, layer: str, *, reads_int8: bool) -> float | None:
        """The scale at which the output of `layer` is quantized at once; None where that is up to its readers."""
        if kind not in self._placement.writes or self._is_kept(layer):
            return None
        if kind != ACTIVATION and not reads_int8:
            return None
        return SIGMOID_SCALE if kind == SIGMOID else self._scales.get(layer)

    def check_kept_layers_exist(self) -> None:
        """Raise InputError if a layer to keep was never met."""
        unknown = [name for name, was_met in self._keep.items() if not was_met]
        if unknown:
            raise InputError(
                f"--int8-keep {unknown[0]}: the model has no layer of that name: name a row such as model.9, or a part "
                "of it such as model.2.m.0.cv1 (--int8-report lists them)"
            )

    def _is_picture(self, tensor: str) -> bool:
        """Whether it is an input of the network, converted or not."""
        return tensor.removesuffix(CAST_SUFFIX) in self._inputs

    def _is_kept(self, layer: str) -> bool:
        """Whether `layer` or a block that it is part of stays in high precision."""
        found = [name for name in self._keep if _is_part(layer, name)]
        self._keep.update(dict.fromkeys(found, True))
        return bool(found)


def _is_part(layer: str, name: str) -> bool:
    """Whether `layer` is the layer, or in the block or row, called `name`."""
    return layer == name or layer.startswith(f"{name}.")


def kernel_scales(kernel: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales of a kernel, one an output channel.

    Args:
        kernel: float32 (out, in / groups, height, width).

    Returns:
        float32 (out,), positive: the largest magnitude of each channel is 127 steps.
    """
    largest = np.abs(kernel).reshape(len(kernel), -1).max(axis=1)
    floor = max(float(largest.max()) * SMALLEST_CHANNEL, np.finfo(np.float32).tiny * INT8_MAX)
    return np.asarray(np.maximum(largest, floor) / np.float32(INT8_MAX), np.float32)


def add_quantize(network: Any, trt: Any, x: Any, scale: Any) -> Any:
    """Add a layer from real values to INT8, in the form that the library's version takes."""
    return network.add_quantize(x, scale, trt.int8) if _is_strongly_typed(trt) else network.add_quantize(x, scale)


def add_dequantize(network: Any, trt: Any, x: Any, scale: Any, dtype: Any) -> Any:
    """Add a layer from INT8 to real values of `dtype`, in the form that the library's version takes.

    TensorRT 8.6 takes two arguments and gives float32: the network is then float32 throughout, and build flags and
    preferences say what may be computed otherwise.
    """
    return network.add_dequantize(x, scale, dtype) if _is_strongly_typed(trt) else network.add_dequantize(x, scale)


def _is_strongly_typed(trt: Any) -> bool:
    """Whether layers are told their output type: since TensorRT 10."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def scale_groups(network: recorder.Network) -> tuple[tuple[str, ...], ...]:
    """The tensors of a recorded float network that may be quantized, in groups that share a scale.

    Concatenation, max-pooling and resizing copy values, so their inputs and outputs form one group. Sigmoids inside an
    activation have a known range and heads stay in high precision: neither is in a group.

    Returns:
        Groups of tensor names, each sorted as the network computes them, ordered by their first tensor.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    names = [tensor.name for tensor in network.inputs]
    leader.update({name: name for name in names})
    for layer in network.sorted_layers():
        output = layer.output
        if output.is_network_output or _is_inner_activation(layer):
            continue
        names.append(output.name)
        leader[output.name] = output.name
        if copies(layer):
            for tensor in layer.inputs:
                leader[find(tensor.name)] = find(output.name)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(find(name), []).append(name)
    return tuple(tuple(group) for group in groups.values())


def computed_tensors(network: recorder.Network) -> frozenset[str]:
    """Names of tensors with values of their own: inputs, and outputs of layers that do more than copy."""
    layers = (layer.output.name for layer in network.layers if not copies(layer))
    return frozenset((*(tensor.name for tensor in network.inputs), *layers))


def copies(layer: recorder.Layer) -> bool:
    """Whether every value of its output is one of its inputs'."""
    if isinstance(layer, recorder.PoolingLayer):
        return bool(layer.type == recorder.PoolingType.MAX)
    return isinstance(layer, recorder.ConcatenationLayer | recorder.ResizeLayer)


def _is_inner_activation(layer: recorder.Layer) -> bool:
    """Whether it is a part of an activation, such as the sigmoid ``model.0.act.sigmoid`` in SiLU ``model.0.act``."""
    whole = layer.name.rpartition(".")[0]
    readers = [consumer.name for consumer in layer.output.consumers]
    return isinstance(layer, recorder.ActivationLayer) and any(
        name == whole or name.rpartition(".")[0] == whole for name in readers
    )
