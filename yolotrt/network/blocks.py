"""The blocks of YOLOv5, each as the TensorRT layers that it consists of.

A function here is one module of a YOLOv5 yaml. It is registered under the yaml's name, takes the yaml's arguments in
the yaml's order (without the input channels, which the input tensor tells) and names its parts as YOLOv5 names its
arrays, so that ``model.2.m.0.cv1`` means the same here, in the checkpoint and in the engine. Tensors are
(batch, channels, height, width); the comment at each function says how its output's shape follows from its input's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolotrt.errors import GraphError
from yolotrt.network.graph import ModelGraph
from yolotrt.network.ops import Ops, Pair, Tensor, channels
from yolotrt.weights.infer import CLASSIFIER_FEATURES
from yolotrt.weights.model import FloatArray

MAX_KERNEL_SIZE = 1024

TRANSFORMER_HEADS = 4
"""Attention heads of C3TR (YOLOv5 models/common.py)."""

HEAD, PROTOTYPES, LOGITS = "head", "prototypes", "logits"
"""Names of the network's outputs; a level's number follows `HEAD`."""


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


@block("nn.Conv2d", scales_width=True)
def plain_conv(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int | Pair = 1,
    s: int | Pair = 1,
    p: int | Pair = 0,
    d: int | Pair = 1,
    g: int = 1,
    bias: bool = True,
) -> Tensor:
    """torch.nn.Conv2d: no BatchNorm, no activation. The heads of release 1.0 are rows of their own."""
    kernel = _pair(k)
    return net.conv_with_bias(
        x, name, c2, kernel, stride=_pair(s), padding=_pair(p), dilation=_pair(d), groups=g, has_bias=bias
    )  # (batch, c2, height / s, width / s)


@block("nn.ConvTranspose2d", scales_width=True)
def conv_transpose(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int | Pair = 1,
    s: int | Pair = 1,
    p1: int | Pair = 0,
    p2: int | Pair = 0,
    g: int = 1,
    bias: bool = True,
) -> Tensor:
    """torch.nn.ConvTranspose2d, with the output padding `p2`."""
    return net.transposed_conv(
        x,
        name,
        c2,
        _pair(k),
        stride=_pair(s),
        padding=_pair(p1),
        output_padding=_pair(p2),
        groups=g,
        has_bias=bias,
    )  # (batch, c2, (height - 1) s - 2 p1 + k + p2, likewise)


@block("DWConv", scales_width=True)
def dw_conv(
    net: Ops, x: Tensor, name: str, c2: int, k: int | Pair = 1, s: int | Pair = 1, d: int | Pair = 1, act: bool = True
) -> Tensor:
    """Depth-wise Conv: as many groups as input and output channels allow."""
    groups = math.gcd(channels(x), c2)
    if isinstance(d, bool):  # before release 6.2 the activation stood here, and there was no dilation
        return conv(net, x, name, c2, k, s, g=groups, act=d)
    return conv(net, x, name, c2, k, s, g=groups, d=d, act=act)


@block("DWConvTranspose2d", scales_width=True)
def dw_conv_transpose(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int | Pair = 1,
    s: int | Pair = 1,
    p1: int | Pair = 0,
    p2: int | Pair = 0,
) -> Tensor:
    """Depth-wise transposed convolution."""
    return conv_transpose(net, x, name, c2, k, s, p1, p2, math.gcd(channels(x), c2))


@block("Focus", scales_width=True)
def focus(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int | Pair = 1,
    s: int | Pair = 1,
    p: int | Pair | None = None,
    g: int = 1,
    act: bool = True,
) -> Tensor:
    """Four neighbouring pixels become channels, then Conv; see `Ops.space_to_depth_conv`."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise GraphError(f"{name}: Focus cannot halve {x.shape[2]} x {x.shape[3]} pixels")
    kernel = _pair(k)
    padding = _same_padding(kernel, (1, 1)) if p is None else _pair(p)
    part = f"{name}.conv"
    y = net.space_to_depth_conv(x, part, c2, kernel, stride=_pair(s), padding=padding, groups=g)
    return _activation(net, y, part) if act else y  # (batch, c2, height / 2s, width / 2s)


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

    def inner(y: Tensor) -> Tensor:
        for index in range(n):
            y = bottleneck(net, y, f"{name}.m.{index}", channels(y), shortcut, g, e=1.0)
        return y

    return _cross_stage(net, x, name, c2, e, inner)


@block("BottleneckCSP", scales_width=True, repeats_inside=True)
def bottleneck_csp(
    net: Ops, x: Tensor, name: str, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
) -> Tensor:
    """C3's predecessor: both halves end in a plain convolution, and BatchNorm and activation follow where they join."""
    hidden = int(c2 * e)
    y = conv(net, x, f"{name}.cv1", hidden)
    for index in range(n):
        y = bottleneck(net, y, f"{name}.m.{index}", hidden, shortcut, g, e=1.0)
    norm = f"{name}.bn"
    halves = [
        net.conv_before_shared_norm(tensor, f"{name}.{part}", hidden, norm=norm, norm_channels=2 * hidden, first=first)
        for tensor, part, first in ((y, "cv3", 0), (x, "cv2", hidden))
    ]
    y = _activation(net, net.concat(halves, f"{name}.concat"), name)
    return conv(net, y, f"{name}.cv4", c2)  # (batch, c2, height, width)


@block("CrossConv", scales_width=True)
def cross_conv(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: int = 3,
    s: int = 1,
    g: int = 1,
    e: float = 1.0,
    shortcut: bool = False,
) -> Tensor:
    """A convolution along the rows, then one along the columns, and the input added where the widths agree."""
    y = conv(net, x, f"{name}.cv1", int(c2 * e), (1, k), (1, s))
    y = conv(net, y, f"{name}.cv2", c2, (k, 1), (s, 1), g=g)
    return net.add(x, y, f"{name}.add") if shortcut and channels(x) == c2 else y  # (batch, c2, height / s, width / s)


@block("C3x", scales_width=True, repeats_inside=True)
def c3x(
    net: Ops, x: Tensor, name: str, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5
) -> Tensor:
    """C3 with CrossConv in place of its bottlenecks."""

    def inner(y: Tensor) -> Tensor:
        for index in range(n):
            y = cross_conv(net, y, f"{name}.m.{index}", channels(y), 3, 1, g, 1.0, shortcut)
        return y

    return _cross_stage(net, x, name, c2, e, inner)


@block("C3TR", scales_width=True, repeats_inside=True)
def c3tr(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    n: int = 1,
    shortcut: bool = True,  # noqa: ARG001 - a place in the yaml's arguments, without meaning in YOLOv5 too
    g: int = 1,  # noqa: ARG001 - likewise
    e: float = 0.5,
) -> Tensor:
    """C3 with transformer layers in place of its bottlenecks."""
    return _cross_stage(net, x, name, c2, e, lambda y: _transformer_block(net, y, f"{name}.m", TRANSFORMER_HEADS, n))


@block("C3SPP", scales_width=True)
def c3spp(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    k: Sequence[int] = (5, 9, 13),
    n: int = 1,  # noqa: ARG001 - a place in the yaml's arguments, without meaning in YOLOv5 too
    shortcut: bool = True,  # noqa: ARG001 - likewise
    g: int = 1,  # noqa: ARG001 - likewise
    e: float = 0.5,
) -> Tensor:
    """C3 with SPP in place of its bottlenecks."""
    return _cross_stage(net, x, name, c2, e, lambda y: spp(net, y, f"{name}.m", channels(y), k))


@block("C3Ghost", scales_width=True, repeats_inside=True)
def c3ghost(
    net: Ops,
    x: Tensor,
    name: str,
    c2: int,
    n: int = 1,
    shortcut: bool = True,  # noqa: ARG001 - a place in the yaml's arguments, without meaning in YOLOv5 too
    g: int = 1,  # noqa: ARG001 - likewise
    e: float = 0.5,
) -> Tensor:
    """C3 with GhostBottleneck in place of its bottlenecks."""

    def inner(y: Tensor) -> Tensor:
        for index in range(n):
            y = ghost_bottleneck(net, y, f"{name}.m.{index}", channels(y))
        return y

    return _cross_stage(net, x, name, c2, e, inner)


@block("GhostConv", scales_width=True)
def ghost_conv(
    net: Ops, x: Tensor, name: str, c2: int, k: int | Pair = 1, s: int | Pair = 1, g: int = 1, act: bool = True
) -> Tensor:
    """Half of the channels by a convolution, the other half from those by a cheap depth-wise 5x5 one."""
    hidden = c2 // 2
    y = conv(net, x, f"{name}.cv1", hidden, k, s, g=g, act=act)
    cheap = conv(net, y, f"{name}.cv2", hidden, 5, g=hidden, act=act)
    return net.concat([y, cheap], f"{name}.concat")  # (batch, 2 (c2 // 2), height / s, width / s)


@block("GhostBottleneck", scales_width=True)
def ghost_bottleneck(net: Ops, x: Tensor, name: str, c2: int, k: int = 3, s: int = 1) -> Tensor:
    """Two GhostConv and the input added; with stride 2 depth-wise convolutions halve the size on both ways."""
    y = ghost_conv(net, x, f"{name}.conv.0", c2 // 2)
    if s == 2:
        y = dw_conv(net, y, f"{name}.conv.1", c2 // 2, k, s, act=False)
        x = dw_conv(net, x, f"{name}.shortcut.0", channels(x), k, s, act=False)
        x = conv(net, x, f"{name}.shortcut.1", c2, act=False)
    y = ghost_conv(net, y, f"{name}.conv.2", c2, act=False)
    return net.add(y, x, f"{name}.add")  # (batch, c2, height / s, width / s)


@block("SPP", scales_width=True)
def spp(net: Ops, x: Tensor, name: str, c2: int, k: Sequence[int] = (5, 9, 13)) -> Tensor:
    """Spatial pyramid pooling: the largest values in windows of several sizes side by side.

    A window of 9 is a window of 5 over windows of 5: where sizes ascend, each pooling goes on from the one before.
    """
    y = [conv(net, x, f"{name}.cv1", channels(x) // 2)]
    reached = 1
    for index, size in enumerate(k):
        if size % 2 == 0:
            raise GraphError(f"{name}: SPP with a window of {size}, which would change the size: expected odd sizes")
        source, window = (y[-1], size - reached + 1) if size >= reached else (y[0], size)
        y.append(net.max_pool(source, f"{name}.m.{index}", window, padding=window // 2))
        reached = size
    return conv(net, net.concat(y, f"{name}.concat"), f"{name}.cv2", c2)  # (batch, c2, height, width)


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


@block("nn.MaxPool2d")
def max_pool(net: Ops, x: Tensor, name: str, k: int, s: int | None = None, p: int = 0) -> Tensor:
    """torch.nn.MaxPool2d with a square window."""
    return net.max_pool(x, name, k, stride=k if s is None else s, padding=p)


@block("Contract")
def contract(net: Ops, x: Tensor, name: str, gain: int = 2) -> Tensor:
    """Squares of gain x gain pixels become channels: row in the square, then column, then channel."""
    _, c1, height, width = x.shape
    if height % gain or width % gain:
        raise GraphError(f"{name}: {height} x {width} pixels cannot be divided into squares of {gain}")
    rows, columns = height // gain, width // gain
    y = net.reshape(x, f"{name}.split", (c1, rows, gain, columns, gain), then_transpose=(0, 3, 5, 1, 2, 4))
    return net.reshape(y, name, (c1 * gain * gain, rows, columns))  # (batch, c1 gain^2, height / gain, width / gain)


@block("Expand")
def expand(net: Ops, x: Tensor, name: str, gain: int = 2) -> Tensor:
    """The reverse of Contract."""
    _, c1, height, width = x.shape
    if c1 % gain**2:
        raise GraphError(f"{name}: {c1} channels do not make squares of {gain} x {gain} pixels")
    left = c1 // gain**2
    y = net.reshape(x, f"{name}.split", (gain, gain, left, height, width), then_transpose=(0, 3, 4, 1, 5, 2))
    return net.reshape(y, name, (left, height * gain, width * gain))  # (batch, c1 / gain^2, height gain, width gain)


@block("Concat", takes_list=True)
def concat(net: Ops, x: Sequence[Tensor], name: str, dimension: int = 1) -> Tensor:
    """Join tensors along their channels."""
    return net.concat(x, name, dimension)  # (batch, sum of channels, height, width)


@block("Detect", takes_list=True, is_head=True)
def detect(net: Ops, x: Sequence[Tensor], name: str, graph: ModelGraph) -> dict[str, Tensor]:
    """One 1x1 convolution a level: the raw heads, before any sigmoid.

    Each is (batch, anchors x (5 + classes + mask coefficients), height / stride, width / stride), channels ordered by
    anchor, then x, y, width, height, objectness, classes, mask coefficients. In release 1.0 the convolutions are rows
    of their own, and Detect has none.
    """
    if len(x) != len(graph.strides):
        raise GraphError(
            f"{name}: {graph.head.block} reads {len(x)} levels but the metadata have strides for {len(graph.strides)}"
        )
    if graph.has_separate_heads:
        return {f"{HEAD}{level}": tensor for level, tensor in enumerate(x)}
    return {
        f"{HEAD}{level}": net.conv_with_bias(tensor, f"{name}.m.{level}", graph.output_channels)
        for level, tensor in enumerate(x)
    }


@block("Segment", takes_list=True, is_head=True)
def segment(net: Ops, x: Sequence[Tensor], name: str, graph: ModelGraph) -> dict[str, Tensor]:
    """Detect with mask coefficients, and their prototypes: (batch, coefficients, height / 4, width / 4)."""
    heads = detect(net, x, name, graph)
    part = f"{name}.proto"
    y = conv(net, x[0], f"{part}.cv1", graph.prototype_channels, 3)
    y = net.upsample_nearest(y, f"{part}.upsample", 2)
    y = conv(net, y, f"{part}.cv2", graph.prototype_channels, 3)
    return {**heads, PROTOTYPES: conv(net, y, f"{part}.cv3", graph.mask_count)}


@block("Classify", takes_list=True, is_head=True)
def classify(net: Ops, x: Sequence[Tensor], name: str, graph: ModelGraph) -> dict[str, Tensor]:
    """Convolution, average over the pixels, linear layer: the raw scores (batch, classes), before the softmax."""
    _, *convolution = graph.head.args
    y = x[0] if len(x) == 1 else net.concat(x, f"{name}.concat")
    y = conv(net, y, f"{name}.conv", CLASSIFIER_FEATURES, *convolution)
    y = net.mean_of_pixels(y, f"{name}.pool")
    kernel = net.weights.take(f"{name}.linear.weight", (graph.class_count, CLASSIFIER_FEATURES))
    bias = net.weights.take(f"{name}.linear.bias", (graph.class_count,))
    return {LOGITS: net.reshape(net.linear(y, f"{name}.linear", kernel, bias), f"{name}.flat", (graph.class_count,))}


def _cross_stage(net: Ops, x: Tensor, name: str, c2: int, e: float, inner: Callable[[Tensor], Tensor]) -> Tensor:
    """What all C3 share: `inner` on one half of the channels, the other passes by, and a convolution joins them."""
    hidden = int(c2 * e)
    y = inner(conv(net, x, f"{name}.cv1", hidden))
    y = net.concat([y, conv(net, x, f"{name}.cv2", hidden)], f"{name}.concat")
    return conv(net, y, f"{name}.cv3", c2)  # (batch, c2, height, width)


def _transformer_block(net: Ops, x: Tensor, name: str, heads: int, layers: int) -> Tensor:
    """Transformer layers over the pixels, after a learnt linear function of each pixel is added to it."""
    width = channels(x)
    position = net.linear(x, f"{name}.linear", *_linear_weights(net, f"{name}.linear", width))
    y = net.add(x, position, f"{name}.add")
    for index in range(layers):
        y = _transformer_layer(net, y, f"{name}.tr.{index}", heads)
    return y  # (batch, channels, height, width)


def _linear_weights(net: Ops, name: str, width: int) -> tuple[FloatArray, FloatArray]:
    """Kernel (width, width) and bias (width,) of a linear layer."""
    return net.weights.take(f"{name}.weight", (width, width)), net.weights.take(f"{name}.bias", (width,))


def _transformer_layer(net: Ops, x: Tensor, name: str, heads: int) -> Tensor:
    """Attention and a perceptron without activation, each added to its input; YOLOv5 has no LayerNorm here."""
    width = channels(x)

    def linear(tensor: Tensor, part: str) -> Tensor:
        return net.linear(tensor, f"{name}.{part}", net.weights.take(f"{name}.{part}.weight", (width, width)))

    y = net.add(_attention(net, [linear(x, part) for part in "qkv"], f"{name}.ma", heads), x, f"{name}.add1")
    return net.add(linear(linear(y, "fc1"), "fc2"), y, f"{name}.add2")  # (batch, channels, height, width)


def _attention(net: Ops, x: Sequence[Tensor], name: str, heads: int) -> Tensor:
    """torch.nn.MultiheadAttention of query, key and value over the pixels."""
    width, (height, breadth) = channels(x[0]), x[0].shape[2:]
    if width % heads:
        raise GraphError(f"{name}: {width} channels cannot be split into {heads} attention heads")
    kernels = np.split(net.weights.take(f"{name}.in_proj_weight", (3 * width, width)), 3)
    biases = np.split(net.weights.take(f"{name}.in_proj_bias", (3 * width,)), 3)
    scale = np.float32(1 / math.sqrt(width // heads))
    kernels[0], biases[0] = kernels[0] * scale, biases[0] * scale
    query, key, value = (
        net.reshape(
            net.linear(tensor, f"{name}.in_proj.{part}", kernel, bias),
            f"{name}.{part}.heads",
            (heads, width // heads, height * breadth),
        )  # (batch, heads, width / heads, pixels)
        for tensor, part, kernel, bias in zip(x, "qkv", kernels, biases, strict=True)
    )
    scores = net.matrix_multiply(query, key, f"{name}.scores", transpose_a=True)  # (batch, heads, pixels, pixels)
    shares = net.softmax(scores, f"{name}.softmax", axis=3)
    y = net.matrix_multiply(value, shares, f"{name}.values", transpose_b=True)  # (batch, heads, width / heads, pixels)
    y = net.reshape(y, f"{name}.joined", (width, height, breadth))
    return net.linear(y, f"{name}.out_proj", *_linear_weights(net, f"{name}.out_proj", width))


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
    vertical, horizontal = ((d * (k - 1) + 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return vertical, horizontal
