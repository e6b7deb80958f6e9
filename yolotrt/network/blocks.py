"""The blocks of YOLOv5, each as the TensorRT layers that it consists of.

A function here is one module of a YOLOv5 yaml. It is registered under the yaml's name, takes the yaml's arguments in
the yaml's order (without the input channels, which the input tensor tells) and names its parts as YOLOv5 names its
arrays, so that ``model.2.m.0.cv1`` means the same here, in the checkpoint and in the engine. Tensors are
(batch, channels, height, width); the comment at each function says how its output's shape follows from its input's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from yolotrt.errors import GraphError
from yolotrt.network.graph import ModelGraph
from yolotrt.network.ops import Ops, Pair, Tensor, channels

MAX_KERNEL_SIZE = 1024


@dataclass(frozen=True)
class Block:
    """How a row of the yaml becomes layers.

    Attributes:
        build: The block's function. It takes `Ops`, the input, the name, then the yaml's arguments.
        scales_width: Whether its first argument is a channel count that the width multiple scales.
        repeats_inside: Whether the row's number is an argument of the block (after the channels, as in C3) rather
            than a number of copies in sequence.
        takes_list: Whether its input is the list of all the row's sources, as in Concat.
        is_head: Whether it ends the network: it then takes the graph and returns all its outputs.
    """

    build: Callable[..., Any]
    scales_width: bool = False
    repeats_inside: bool = False
    takes_list: bool = False
    is_head: bool = False


BLOCKS: dict[str, Block] = {}
"""Every known block by the yaml's name."""


def block(*names: str, **properties: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the block `names`; `properties` as in `Block`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        BLOCKS.update(dict.fromkeys(names, Block(function, **properties)))
        return function

    return register


@block("Conv", scales_width=True)
def conv(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int | Pair = 1,
    s: int | Pair = 1,
    p: int | Pair | None = None,
    g: int = 1,
    d: int | Pair = 1,
    act: bool = True,
) -> Tensor:
    """Convolution, BatchNorm, activation; "same" padding unless `p` says otherwise."""
    kernel, stride, dilation = _pair(k), _pair(s), _pair(d)
    padding = _same_padding(kernel, dilation) if p is None else _pair(p)
    y = net.conv_batch_norm(x, name, c2, kernel, stride=stride, padding=padding, dilation=dilation, groups=g)
    return _activation(net, y, name) if act else y  # (batch, c2, height / s, width / s)


@block("Bottleneck", scales_width=True)
def bottleneck(net: Ops, x: Tensor, name: str, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> Tensor:
    """1x1 convolution to the hidden width, 3x3 convolution back, and the input added where the widths agree."""
    y = conv(net, x, f"{name}.cv1", int(c2 * e), 1)
    y = conv(net, y, f"{name}.cv2", c2, 3, g=g)
    return net.add(x, y, f"{name}.add") if shortcut and channels(x) == c2 else y  # (batch, c2, height, width)


@block("C3", scales_width=True, repeats_inside=True)
def c3(
    net: Ops, x: Tensor, name: str, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
) -> Tensor:
    """Cross-stage partial block with three convolutions: bottlenecks on one half, the other half passes by."""
    hidden = int(c2 * e)
    y = conv(net, x, f"{name}.cv1", hidden)
    for index in range(n):
        y = bottleneck(net, y, f"{name}.m.{index}", hidden, shortcut, g, e=1.0)
    y = net.concat([y, conv(net, x, f"{name}.cv2", hidden)], f"{name}.concat")
    return conv(net, y, f"{name}.cv3", c2)  # (batch, c2, height, width)


@block("SPPF", scales_width=True)
def sppf(net: Ops, x: Tensor, name: str, c2: int, k: int = 5) -> Tensor:
    """Spatial pyramid pooling, fast: three poolings in a row see windows of k, 2k - 1 and 3k - 2."""
    y = [conv(net, x, f"{name}.cv1", channels(x) // 2)]
    for index in range(3):
        y.append(net.max_pool(y[-1], f"{name}.m.{index}", k, padding=k // 2))
    return conv(net, net.concat(y, f"{name}.concat"), f"{name}.cv2", c2)  # (batch, c2, height, width)


@block("nn.Upsample")
def upsample(net: Ops, x: Tensor, name: str, size: None = None, scale: float = 2, mode: str = "nearest") -> Tensor:
    """Enlarge by a whole factor, repeating pixels."""
    if size is not None or mode != "nearest" or scale != int(scale) or not 1 <= scale <= 64:
        raise GraphError(
            f"{name}: Upsample(size={size}, scale={scale}, mode={mode}) is not a whole nearest enlargement"
        )
    return net.upsample_nearest(x, name, int(scale))  # (batch, channels, height x scale, width x scale)


@block("Concat", takes_list=True)
def concat(net: Ops, x: Sequence[Tensor], name: str, dimension: int = 1) -> Tensor:
    """Join tensors along their channels."""
    return net.concat(x, name, dimension)  # (batch, sum of channels, height, width)


@block("Detect", takes_list=True, is_head=True)
def detect(net: Ops, x: Sequence[Tensor], name: str, graph: ModelGraph) -> dict[str, Tensor]:
    """One 1x1 convolution a level: the raw heads, before any sigmoid.

    Each is (batch, anchors x (5 + classes), height / stride, width / stride), channels ordered by anchor, then
    x, y, width, height, objectness, classes.
    """
    if len(x) != len(graph.strides):
        raise GraphError(f"{name}: Detect reads {len(x)} levels but the metadata have strides for {len(graph.strides)}")
    return {
        f"head{level}": net.conv_with_bias(tensor, f"{name}.m.{level}", graph.head_channels)
        for level, tensor in enumerate(x)
    }


def _activation(net: Ops, x: Tensor, name: str) -> Tensor:
    """The activation that the checkpoint has at ``NAME.act``."""
    metadata = net.weights.metadata
    return net.activation(x, f"{name}.act", metadata.activations.get(f"{name}.act", metadata.activation))


def _pair(value: int | Pair) -> Pair:
    """A size given once or per direction, as (vertical, horizontal)."""
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or not 0 <= v <= MAX_KERNEL_SIZE for v in pair):
        raise GraphError(f"{value!r:.40} is no size of a kernel, stride or padding")
    return pair[0], pair[1]


def _same_padding(kernel: Pair, dilation: Pair) -> Pair:
    """Padding that keeps the size at stride 1 (models/common.py, autopad)."""
    vertical, horizontal = (d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return vertical, horizontal
