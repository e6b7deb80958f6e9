"""Each block computes what its definition in the YOLOv5 papers and documentation says.

The references are plain torch functions in float64, written here from those definitions, with the same random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.reference import TINY_YAML, MadeUpWeights, made_up_weights, tiny_metadata
from yolotrt.engines.trt_log import shared_logger
from yolotrt.errors import GraphError, NetworkError, YolotrtError
from yolotrt.network import recorder
from yolotrt.network.blocks import BLOCKS
from yolotrt.network.graph import ModelGraph
from yolotrt.network.onnx_writer import write_onnx
from yolotrt.network.ops import Ops
from yolotrt.weights import Metadata, Weights

torch = pytest.importorskip("torch", reason="torch, which computes the references, is not installed")
F = torch.nn.functional

Tensors = Mapping[str, Any]

TOLERANCE = 2e-5
"""Values around 1, sums of at most a few hundred products in float32: 300 x 2^-24 is 1.8e-5."""

ODD = (1, 12, 13, 9)
"""Batch, channels, height, width."""

EPSILON = 1e-3


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def compute(
    block: str, x: np.ndarray | list[np.ndarray], *args: Any, weights: Weights | None = None, **metadata: Any
) -> tuple[list[np.ndarray], Tensors]:
    """The outputs of one block named ``model.0``, and its weights as torch tensors."""
    weights = weights or made_up_weights(tiny_metadata(**metadata))
    network = recorder.Network()
    net = Ops(network, recorder, weights, recorder.float32)
    arrays = x if isinstance(x, list) else [x]
    inputs = [network.add_input(f"x{index}", recorder.float32, array.shape) for index, array in enumerate(arrays)]
    result = BLOCKS[block].build(net, inputs if isinstance(x, list) else inputs[0], "model.0", *args)
    outputs = result if isinstance(result, dict) else {"y": result}
    for name, tensor in outputs.items():
        net.output(tensor, name)
    session = onnxruntime.InferenceSession(write_onnx(network), providers=["CPUExecutionProvider"])
    made = weights.made if isinstance(weights, MadeUpWeights) else weights.tensors
    tensors = {name: torch.from_numpy(array).double() for name, array in made.items()}
    return session.run(list(outputs), {f"x{index}": array for index, array in enumerate(arrays)}), tensors


def assert_close(actual: np.ndarray, expected: Any) -> None:
    expected = expected.numpy()
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.1, "the reference is next to nothing: the comparison says nothing"
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


# --- the references ---

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "SiLU": F.silu,
    "Hardswish": F.hardswish,
    "LeakyReLU(0.1)": lambda x: F.leaky_relu(x, 0.1),
    "LeakyReLU(0.25)": lambda x: F.leaky_relu(x, 0.25),
    "LeakyReLU": F.leaky_relu,
    "ReLU": F.relu,
    "Mish": F.mish,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Identity": lambda x: x,
}


def convolution(t, name, x, stride=1, padding=None, groups=1, dilation=1, activation=F.silu, epsilon=EPSILON):
    """Convolution without bias, BatchNorm with its running statistics, activation."""
    kernel = t[f"{name}.conv.weight"]
    if padding is None:  # half of the pixels that the kernel spans (models/common.py, autopad)
        dilations = dilation if isinstance(dilation, tuple) else (dilation, dilation)
        padding = tuple((d * (k - 1) + 1) // 2 for k, d in zip(kernel.shape[2:], dilations, strict=True))
    y = F.conv2d(x, kernel, None, stride, padding, dilation, groups)
    statistics = (t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return activation(F.batch_norm(y, *statistics, training=False, eps=epsilon))


def bottleneck(t, name, x, shortcut=True, groups=1):
    y = convolution(t, f"{name}.cv2", convolution(t, f"{name}.cv1", x), groups=groups)
    return x + y if shortcut else y


def c3(t, name, x, repeats, shortcut=True, groups=1):
    y = convolution(t, f"{name}.cv1", x)
    for index in range(repeats):
        y = bottleneck(t, f"{name}.m.{index}", y, shortcut, groups)
    return convolution(t, f"{name}.cv3", torch.cat([y, convolution(t, f"{name}.cv2", x)], 1))


def pyramid_pooling(t, name, x, size):
    """Windows of k, 2k - 1 and 3k - 2 side by side, which SPPF gets by pooling in a row."""
    y = convolution(t, f"{name}.cv1", x)
    pools = [F.max_pool2d(y, k, 1, k // 2) for k in (size, 2 * size - 1, 3 * size - 2)]
    return convolution(t, f"{name}.cv2", torch.cat([y, *pools], 1))


# --- Conv ---


# The yaml's arguments, and the same as the reference's.
@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8,), {}),
        ((8, 3), {}),
        ((8, 4), {}),
        ((8, 5, 2), {"stride": 2}),
        ((8, 6, 2, 2), {"stride": 2, "padding": 2}),  # the first layer since release 6.0
        ((8, 3, 1, 0), {"padding": 0}),
        ((8, (1, 3)), {}),
        ((8, (3, 5), (2, 1)), {"stride": (2, 1)}),
        ((8, [3, 1], [1, 2], [1, 0]), {"stride": (1, 2), "padding": (1, 0)}),
        ((12, 3, 1, None, 4), {"groups": 4}),
        ((24, 3, 2, None, 12), {"stride": 2, "groups": 12}),
        ((8, 3, 1, None, 1, 2), {"dilation": 2}),
        ((8, 3, 1, None, 1, (2, 3)), {"dilation": (2, 3)}),
        ((8, 3, 1, None, 1, 1, False), {"activation": ACTIVATIONS["Identity"]}),
    ],
)
def test_conv(args, options):
    x = picture(*ODD)
    (y,), tensors = compute("Conv", x, *args)
    assert_close(y, convolution(tensors, "model.0", torch.from_numpy(x).double(), **options))


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_an_odd_kernel_keeps_the_size(size):
    (y,), _ = compute("Conv", picture(*ODD), 8, size)
    assert y.shape == (1, 8, *ODD[2:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_conv_has_the_checkpoints_activation(activation):
    x = 3 * picture(*ODD)  # into the flat parts of Hardswish
    (y,), tensors = compute("Conv", x, 8, 3, activation=activation)
    reference = ACTIVATIONS[activation]
    assert_close(y, convolution(tensors, "model.0", torch.from_numpy(x).double(), activation=reference))


def test_every_activation_is_tested():
    with pytest.raises(NetworkError) as problem:
        compute("Conv", picture(*ODD), 8, activation="unknown")
    known = str(problem.value).partition("known are ")[2].split(", ")
    assert {activation.partition("(")[0] for activation in ACTIVATIONS} == set(known)


def test_a_module_can_have_an_activation_of_its_own():
    x = picture(*ODD)
    (y,), tensors = compute("Bottleneck", x, 12, activation="ReLU", activations={"model.0.cv1.act": "LeakyReLU(0.1)"})
    x = torch.from_numpy(x).double()
    hidden = convolution(tensors, "model.0.cv1", x, activation=ACTIVATIONS["LeakyReLU(0.1)"])
    assert_close(y, x + convolution(tensors, "model.0.cv2", hidden, activation=F.relu))


def test_the_epsilon_of_batch_norm_is_the_metadatas():
    x = picture(*ODD)
    (y,), tensors = compute("Conv", x, 8, batch_norm_epsilon=0.25)
    assert_close(y, convolution(tensors, "model.0", torch.from_numpy(x).double(), epsilon=0.25))


def test_a_batch_norm_can_have_an_epsilon_of_its_own():
    x = picture(*ODD)
    (y,), tensors = compute("Bottleneck", x, 12, batch_norm_epsilons={"model.0.cv1.bn": 0.25})
    x = torch.from_numpy(x).double()
    hidden = convolution(tensors, "model.0.cv1", x, epsilon=0.25)
    assert_close(y, x + convolution(tensors, "model.0.cv2", hidden))


def test_a_convolution_that_was_fused_before_has_a_bias_instead():
    x = picture(*ODD)
    kernel, bias = picture(8, 12, 3, 3), picture(8)
    tensors = {"model.0.conv.weight": kernel, "model.0.conv.bias": bias}
    (y,), _ = compute("Conv", x, 8, 3, 1, None, 1, 1, False, weights=Weights(tensors, tiny_metadata()))
    x, kernel, bias = (torch.from_numpy(array).double() for array in (x, kernel, bias))
    np.testing.assert_allclose(y, F.conv2d(x, kernel, bias, padding=1).numpy(), rtol=TOLERANCE, atol=10 * TOLERANCE)


# --- Bottleneck, C3, SPPF ---


@pytest.mark.parametrize(
    ("args", "shortcut", "groups"),
    [
        ((12,), True, 1),
        ((12, True), True, 1),
        ((12, False), False, 1),
        ((16,), False, 1),  # another width: nothing to add to
        ((16, False), False, 1),
        ((12, True, 3), True, 3),
    ],
)
def test_bottleneck(args, shortcut, groups):
    x = picture(*ODD)
    (y,), tensors = compute("Bottleneck", x, *args)
    assert tensors["model.0.cv1.conv.weight"].shape == (args[0] // 2, 12, 1, 1)
    assert_close(y, bottleneck(tensors, "model.0", torch.from_numpy(x).double(), shortcut, groups))


def test_bottleneck_with_another_hidden_width():
    x = picture(*ODD)
    (y,), tensors = compute("Bottleneck", x, 12, True, 1, 0.75)
    assert tensors["model.0.cv1.conv.weight"].shape == (9, 12, 1, 1)
    assert_close(y, bottleneck(tensors, "model.0", torch.from_numpy(x).double()))


@pytest.mark.parametrize(
    ("args", "repeats", "shortcut", "groups"),
    [
        ((16,), 1, True, 1),
        ((16, 3), 3, True, 1),
        ((10, 2, False), 2, False, 1),
        ((16, 2, True, 2), 2, True, 2),
    ],
)
def test_c3(args, repeats, shortcut, groups):
    x = picture(*ODD)
    (y,), tensors = compute("C3", x, *args)
    assert y.shape == (1, args[0], *ODD[2:])
    assert_close(y, c3(tensors, "model.0", torch.from_numpy(x).double(), repeats, shortcut, groups))


@pytest.mark.parametrize("args", [(16,), (16, 3), (10, 5), (12, 9)])
def test_sppf(args):
    x = picture(*ODD)
    (y,), tensors = compute("SPPF", x, *args)
    assert tensors["model.0.cv1.conv.weight"].shape == (6, 12, 1, 1)  # half of the input's channels
    assert_close(y, pyramid_pooling(tensors, "model.0", torch.from_numpy(x).double(), args[1] if args[1:] else 5))


def test_blocks_take_a_batch():
    x = picture(3, *ODD[1:])
    (y,), tensors = compute("C3", x, 16, 2)
    assert_close(y, c3(tensors, "model.0", torch.from_numpy(x).double(), 2))


# --- blocks without weights ---


@pytest.mark.parametrize("scale", [1, 2, 3, 2.0])
def test_upsample_repeats_pixels(scale):
    x = picture(*ODD)
    (y,), _ = compute("nn.Upsample", x, None, scale, "nearest")
    np.testing.assert_array_equal(y, F.interpolate(torch.from_numpy(x), scale_factor=scale, mode="nearest").numpy())


@pytest.mark.parametrize(
    "args",
    [
        (None, 1.5, "nearest"),
        (None, 2, "bilinear"),
        (32, 2, "nearest"),
        (None, 0, "nearest"),
        (None, -2, "nearest"),
        (None, 65, "nearest"),
    ],
)
def test_other_enlargements_are_refused(args):
    with pytest.raises(GraphError, match=r"model\.0: Upsample\(.*\) is not a whole nearest enlargement"):
        compute("nn.Upsample", picture(*ODD), *args)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_concat(axis):
    sizes = [list(ODD), list(ODD), list(ODD)]
    for number, size in enumerate(sizes, 1):
        size[axis] = number
    arrays = [picture(*size) for size in sizes]
    (y,), _ = compute("Concat", arrays, axis)
    np.testing.assert_array_equal(y, np.concatenate(arrays, axis))


def test_detect_is_one_convolution_a_level():
    metadata = tiny_metadata()
    levels = [picture(2, 6, 8, 12), picture(2, 10, 4, 6)]
    heads, tensors = compute("Detect", levels, ModelGraph.from_metadata(metadata))
    assert len(heads) == 2
    for level, (x, head) in enumerate(zip(levels, heads, strict=True)):
        kernel, bias = tensors[f"model.0.m.{level}.weight"], tensors[f"model.0.m.{level}.bias"]
        assert head.shape[1] == 2 * (5 + 2)  # anchors x (box, objectness and classes)
        assert_close(head, F.conv2d(torch.from_numpy(x).double(), kernel, bias))


# --- blocks of other releases ---


def csp(t, name, x, repeats, shortcut=True, groups=1, activation=F.silu, joined=F.silu):
    """The parts of C3, but the halves end in plain convolutions and are normalised together (release 1.0 to 3.1)."""
    y = convolution(t, f"{name}.cv1", x, activation=activation)
    for index in range(repeats):
        inner = convolution(t, f"{name}.m.{index}.cv1", y, activation=activation)
        inner = convolution(t, f"{name}.m.{index}.cv2", inner, groups=groups, activation=activation)
        y = y + inner if shortcut else inner
    halves = torch.cat([F.conv2d(y, t[f"{name}.cv3.weight"]), F.conv2d(x, t[f"{name}.cv2.weight"])], 1)
    statistics = (t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    y = joined(F.batch_norm(halves, *statistics, training=False, eps=EPSILON))
    return convolution(t, f"{name}.cv4", y, activation=activation)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((16,), {"repeats": 1}),
        ((10, 2, False), {"repeats": 2, "shortcut": False}),
        ((16, 2, True, 2), {"repeats": 2, "groups": 2}),
    ],
)
def test_bottleneck_csp(args, options):
    x = picture(*ODD)
    (y,), tensors = compute("BottleneckCSP", x, *args)
    assert tensors["model.0.bn.weight"].shape == (2 * (args[0] // 2),)
    assert_close(y, csp(tensors, "model.0", torch.from_numpy(x).double(), **options))


def test_bottleneck_csp_has_an_activation_of_its_own_after_the_join():
    """As in release 3: Hardswish in the convolutions, LeakyReLU after the shared BatchNorm."""
    x = picture(*ODD)
    (y,), tensors = compute(
        "BottleneckCSP", x, 16, 2, activation="Hardswish", activations={"model.0.act": "LeakyReLU(0.1)"}
    )
    reference = csp(
        tensors,
        "model.0",
        torch.from_numpy(x).double(),
        2,
        activation=ACTIVATIONS["Hardswish"],
        joined=ACTIVATIONS["LeakyReLU(0.1)"],
    )
    assert_close(y, reference)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8,), {}),
        ((8, 3), {}),
        ((8, 5, 2), {"stride": 2}),
        ((8, 3, 1, 0), {"padding": 0}),
        ((8, (1, 3), (2, 1)), {"stride": (2, 1)}),
        ((12, 3, 1, None, 2), {"groups": 2}),
        ((8, 3, 1, None, 1, False), {"activation": ACTIVATIONS["Identity"]}),
    ],
)
def test_focus(args, options):
    x = picture(2, 5, 14, 10)
    (y,), tensors = compute("Focus", x, *args)
    pixels = torch.from_numpy(x).double()
    corners = [pixels[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
    assert_close(y, convolution(tensors, "model.0.conv", torch.cat(corners, 1), **options))


@pytest.mark.parametrize(("height", "width"), [(13, 10), (14, 9)])
def test_focus_of_odd_sizes_is_refused(height, width):
    with pytest.raises(GraphError, match=rf"model\.0: Focus cannot halve {height} x {width} pixels"):
        compute("Focus", picture(1, 3, height, width), 8, 3)


@pytest.mark.parametrize("sizes", [(5, 9, 13), (3, 5, 7), (13, 9, 5), (5,), (1, 3), (3, 3)])
def test_spp(sizes):
    x = picture(*ODD)
    (y,), tensors = compute("SPP", x, 16, sizes)
    hidden = convolution(tensors, "model.0.cv1", torch.from_numpy(x).double())
    pools = [F.max_pool2d(hidden, size, 1, size // 2) for size in sizes]
    assert_close(y, convolution(tensors, "model.0.cv2", torch.cat([hidden, *pools], 1)))


def test_spp_of_release_5_is_sppf():
    x = picture(*ODD)
    (y,), tensors = compute("SPP", x, 16)
    assert_close(y, pyramid_pooling(tensors, "model.0", torch.from_numpy(x).double(), 5))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((12, 3), {"groups": 12}),
        ((24, 3, 2), {"stride": 2, "groups": 12}),
        ((8, 5), {"groups": 4}),
        ((12, 3, 1, 2), {"groups": 12, "dilation": 2}),
        ((12, 3, 1, 1, False), {"groups": 12, "activation": ACTIVATIONS["Identity"]}),
        ((12, 3, 1, False), {"groups": 12, "activation": ACTIVATIONS["Identity"]}),  # before release 6.2
        ((12, 3, 1, True), {"groups": 12}),
    ],
)
def test_depth_wise_convolution(args, options):
    x = picture(*ODD)
    (y,), tensors = compute("DWConv", x, *args)
    assert_close(y, convolution(tensors, "model.0", torch.from_numpy(x).double(), **options))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8,), {}),
        ((8, 3), {}),
        ((8, 3, 2, 1), {"stride": 2, "padding": 1}),
        ((8, (3, 1), 1, (1, 0), 2), {"padding": (1, 0), "dilation": 2}),
        ((8, 3, 1, 1, 1, 4), {"padding": 1, "groups": 4}),
        ((8, 1, 1, 0, 1, 1, False), {}),
    ],
)
def test_plain_convolution(args, options):
    x = picture(*ODD)
    (y,), t = compute("nn.Conv2d", x, *args)
    bias = t.get("model.0.bias")
    assert (bias is None) == (args[-1] is False)
    assert_close(y, F.conv2d(torch.from_numpy(x).double(), t["model.0.weight"], bias, **options))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8, 2, 2), {"stride": 2}),
        ((8, 4, 2, 1), {"stride": 2, "padding": 1}),
        ((8, 3, 2, 1, 1), {"stride": 2, "padding": 1, "output_padding": 1}),
        ((8, (3, 5), (1, 3), (0, 2), (0, 1)), {"stride": (1, 3), "padding": (0, 2), "output_padding": (0, 1)}),
        ((8, 3, 2, 1, 0, 4), {"stride": 2, "padding": 1, "groups": 4}),
        ((8, 2, 2, 0, 0, 1, False), {"stride": 2}),
    ],
)
def test_transposed_convolution(args, options):
    x = picture(*ODD)
    (y,), t = compute("nn.ConvTranspose2d", x, *args)
    bias = t.get("model.0.bias")
    assert (bias is None) == (args[-1] is False)
    assert_close(y, F.conv_transpose2d(torch.from_numpy(x).double(), t["model.0.weight"], bias, **options))


@pytest.mark.parametrize(("channels", "groups"), [(12, 12), (8, 4), (24, 12)])
def test_depth_wise_transposed_convolution(channels, groups):
    x = picture(*ODD)
    (y,), t = compute("DWConvTranspose2d", x, channels, 4, 2, 1)
    assert t["model.0.weight"].shape == (12, channels // groups, 4, 4)
    pixels = torch.from_numpy(x).double()
    assert_close(
        y, F.conv_transpose2d(pixels, t["model.0.weight"], t["model.0.bias"], stride=2, padding=1, groups=groups)
    )


def cross(t, name, x, stride=1, groups=1, shortcut=False):
    y = convolution(t, f"{name}.cv1", x, stride=(1, stride))
    y = convolution(t, f"{name}.cv2", y, stride=(stride, 1), groups=groups)
    return x + y if shortcut else y


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8,), {}),
        ((8, 5, 2), {"stride": 2}),
        ((12, 3, 1, 3, 1.0, True), {"groups": 3, "shortcut": True}),
        ((16, 3, 1, 1, 0.5, True), {}),  # another width: nothing to add to
    ],
)
def test_cross_convolution(args, options):
    x = picture(*ODD)
    (y,), tensors = compute("CrossConv", x, *args)
    size = args[1] if args[1:] else 3
    assert tensors["model.0.cv1.conv.weight"].shape[2:] == (1, size)
    assert tensors["model.0.cv2.conv.weight"].shape[2:] == (size, 1)
    assert_close(y, cross(tensors, "model.0", torch.from_numpy(x).double(), **options))


def ghost(t, name, x, stride=1, groups=1, activation=F.silu):
    y = convolution(t, f"{name}.cv1", x, stride=stride, groups=groups, activation=activation)
    cheap = convolution(t, f"{name}.cv2", y, groups=y.shape[1], activation=activation)
    return torch.cat([y, cheap], 1)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8,), {}),
        ((16, 3, 2), {"stride": 2}),
        ((12, 3, 1, 3), {"groups": 3}),
        ((12, 1, 1, 1, False), {"activation": ACTIVATIONS["Identity"]}),
    ],
)
def test_ghost_convolution(args, options):
    x = picture(*ODD)
    (y,), tensors = compute("GhostConv", x, *args)
    assert y.shape[1] == args[0]
    assert_close(y, ghost(tensors, "model.0", torch.from_numpy(x).double(), **options))


def ghost_bottleneck(t, name, x, stride=1):
    linear = ACTIVATIONS["Identity"]
    y = ghost(t, f"{name}.conv.0", x)
    if stride == 2:
        y = convolution(t, f"{name}.conv.1", y, stride=2, groups=y.shape[1], activation=linear)
        x = convolution(t, f"{name}.shortcut.0", x, stride=2, groups=x.shape[1], activation=linear)
        x = convolution(t, f"{name}.shortcut.1", x, activation=linear)
    return ghost(t, f"{name}.conv.2", y, activation=linear) + x


@pytest.mark.parametrize(("args", "stride"), [((12,), 1), ((12, 3, 1), 1), ((16, 3, 2), 2), ((20, 5, 2), 2)])
def test_ghost_bottleneck(args, stride):
    x = picture(*ODD)
    (y,), tensors = compute("GhostBottleneck", x, *args)
    assert_close(y, ghost_bottleneck(tensors, "model.0", torch.from_numpy(x).double(), stride))


def transformer(t, name, x, layers):
    """torch's own attention over the pixels as a sequence (pixels, batch, channels)."""
    batch, width, height, breadth = x.shape
    y = x.reshape(batch, width, -1).permute(2, 0, 1)
    y = y + F.linear(y, t[f"{name}.linear.weight"], t[f"{name}.linear.bias"])
    for index in range(layers):
        part = f"{name}.tr.{index}"
        attention = torch.nn.MultiheadAttention(width, 4, dtype=torch.float64)
        with torch.no_grad():
            for parameter, value in attention.named_parameters():
                value.copy_(t[f"{part}.ma.{parameter}"])
            q, k, v = (F.linear(y, t[f"{part}.{letter}.weight"]) for letter in "qkv")
            y = attention(q, k, v)[0] + y
        y = F.linear(F.linear(y, t[f"{part}.fc1.weight"]), t[f"{part}.fc2.weight"]) + y
    return y.permute(1, 2, 0).reshape(batch, width, height, breadth)


# The block, its number of repeats, and what it has in place of C3's bottlenecks.
CROSS_STAGE: dict[str, tuple[tuple[Any, ...], Callable[[Tensors, str, Any], Any]]] = {
    "C3x": ((16, 2), lambda t, name, y: cross(t, f"{name}.1", cross(t, f"{name}.0", y, shortcut=True), shortcut=True)),
    "C3x-plain": ((16, 1, False, 2), lambda t, name, y: cross(t, f"{name}.0", y, groups=2)),
    "C3TR": ((16, 2), lambda t, name, y: transformer(t, name, y, 2)),
    "C3SPP": (
        (16, (3, 5)),
        lambda t, name, y: convolution(
            t,
            f"{name}.cv2",
            torch.cat([h := convolution(t, f"{name}.cv1", y), *(F.max_pool2d(h, k, 1, k // 2) for k in (3, 5))], 1),
        ),
    ),
    "C3Ghost": ((16, 2), lambda t, name, y: ghost_bottleneck(t, f"{name}.1", ghost_bottleneck(t, f"{name}.0", y))),
}


@pytest.mark.parametrize("case", CROSS_STAGE)
@pytest.mark.parametrize("batch", [1, 3])
def test_relatives_of_c3(case, batch):
    args, inner = CROSS_STAGE[case]
    x = picture(batch, *ODD[1:])
    (y,), t = compute(case.partition("-")[0], x, *args)
    pixels = torch.from_numpy(x).double()
    halves = [inner(t, "model.0.m", convolution(t, "model.0.cv1", pixels)), convolution(t, "model.0.cv2", pixels)]
    assert_close(y, convolution(t, "model.0.cv3", torch.cat(halves, 1)))


@pytest.mark.parametrize(
    ("args", "options"), [((2,), {}), ((2, 1), {"stride": 1}), ((3, 2, 1), {"stride": 2, "padding": 1})]
)
def test_max_pooling(args, options):
    x = picture(*ODD)
    (y,), _ = compute("nn.MaxPool2d", x, *args)
    np.testing.assert_array_equal(y, F.max_pool2d(torch.from_numpy(x), args[0], **options).numpy())


@pytest.mark.parametrize("gain", [1, 2, 3])
def test_contract_makes_squares_of_pixels_channels_and_expand_reverses_it(gain):
    x = picture(2, 5, 3 * gain, 7 * gain)
    (contracted,), _ = compute("Contract", x, gain)
    squares = [x[:, :, row::gain, column::gain] for row in range(gain) for column in range(gain)]
    np.testing.assert_array_equal(contracted, np.concatenate(squares, 1))
    (expanded,), _ = compute("Expand", contracted, gain)
    np.testing.assert_array_equal(expanded, x)


def test_segment_has_mask_coefficients_and_prototypes():
    metadata = segment_metadata()
    levels = [picture(2, 6, 8, 12), picture(2, 10, 4, 6)]
    (*heads, prototypes), t = compute("Segment", levels, ModelGraph.from_metadata(metadata))
    for level, (x, head) in enumerate(zip(levels, heads, strict=True)):
        assert head.shape[1] == 2 * (5 + 2 + 3)  # anchors x (box, objectness, classes, coefficients)
        kernel, bias = t[f"model.0.m.{level}.weight"], t[f"model.0.m.{level}.bias"]
        assert_close(head, F.conv2d(torch.from_numpy(x).double(), kernel, bias))
    y = convolution(t, "model.0.proto.cv1", torch.from_numpy(levels[0]).double())
    assert y.shape[1] == 24  # 40 x 0.5, rounded up to a multiple of 8
    y = convolution(t, "model.0.proto.cv2", F.interpolate(y, scale_factor=2, mode="nearest"))
    assert_close(prototypes, convolution(t, "model.0.proto.cv3", y))
    assert prototypes.shape == (2, 3, 16, 24)


def segment_metadata() -> Metadata:
    rows = [*TINY_YAML["head"][:-1], [[6, 4], 1, "Segment", ["nc", "anchors", 3, 40]]]
    return tiny_metadata(task="segment", yaml={**TINY_YAML, "head": rows})


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["nc"], {}),
        (["nc", 3, 2], {"stride": 2}),
        (["nc", 3, 1, 0, 2], {"padding": 0, "groups": 2}),
    ],
)
@pytest.mark.parametrize("inputs", [1, 2])
def test_classify(args, options, inputs):
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Classify", args]]
    yaml = {"nc": 2, "backbone": rows, "head": []}
    graph = ModelGraph.from_metadata(tiny_metadata(task="classify", strides=(), anchors=(), yaml=yaml))
    levels = [picture(2, 12, 7, 5)] * inputs
    (logits,), t = compute("Classify", levels, graph)
    x = torch.cat([torch.from_numpy(level).double() for level in levels], 1)
    y = convolution(t, "model.0.conv", x, **options).mean((2, 3))
    assert y.shape == (2, 1280)
    assert_close(logits, F.linear(y, t["model.0.linear.weight"], t["model.0.linear.bias"]))


# --- every block in TensorRT-RTX ---

# One or two calls of each block; Detect, Segment and Classify are built with whole models elsewhere.
CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("Conv", (8, 3, 2)),
    ("nn.Conv2d", (8, 3)),
    ("nn.ConvTranspose2d", (8, 3, 2, 1, 1)),
    ("DWConv", (24, 3, 2)),
    ("DWConvTranspose2d", (24, 4, 2, 1)),
    ("Focus", (8, 3)),
    ("Bottleneck", (12,)),
    ("BottleneckCSP", (16, 2)),
    ("C3", (16, 2)),
    ("C3x", (16, 2)),
    ("C3TR", (16, 2)),
    ("C3SPP", (16,)),
    ("C3Ghost", (16, 2)),
    ("CrossConv", (8, 3, 2)),
    ("GhostConv", (16, 3)),
    ("GhostBottleneck", (16, 3, 2)),
    ("SPP", (16,)),
    ("SPPF", (16,)),
    ("nn.Upsample", (None, 2, "nearest")),
    ("nn.MaxPool2d", (3, 2, 1)),
    ("Contract", (2,)),
    ("Expand", (2,)),
]


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("block", "args"), CALLS, ids=[block for block, _ in CALLS])
def test_tensorrt_rtx_takes_every_block(block, args, precision):
    """With a dynamic batch, the recorder's shapes and no line of the log that says ERROR."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    logger = shared_logger(rtx)
    logger.errors.clear()
    shapes = []
    for api in (recorder, rtx):
        builder = api.Builder(logger)
        network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        net = Ops(network, api, made_up_weights(tiny_metadata(activation="Hardswish")), getattr(api, precision))
        y = BLOCKS[block].build(net, net.input("x", (-1, 12, 14, 10)), "model.0", *args)
        shapes.append(tuple(y.shape))
        net.output(y, "y")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("x", *((batch, 12, 14, 10) for batch in (1, 2, 3)))
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None, logger.last_error
    assert shapes[0] == shapes[1]
    assert logger.errors == []


def test_every_block_is_in_the_table():
    """A block that is added needs a row there, and a test above."""
    heads = {"Detect", "Segment", "Classify", "Concat"}
    assert set(BLOCKS) == {block for block, _ in CALLS} | heads


# --- arguments that no block takes ---


@pytest.mark.parametrize(
    ("block", "args", "error", "message"),
    [
        ("Conv", (8, 3, 1, None, 5), NetworkError, "model.0: 12 channels cannot be split into 5 groups"),
        ("Conv", (8, 3, 1, None, 0), NetworkError, "model.0: 12 channels cannot be split into 0 groups"),
        ("Conv", (9, 3, 1, None, 4), NetworkError, "12 input and 9 output channels cannot be split into 4 groups"),
        ("Conv", (8, 0), NetworkError, "kernel_size_nd is (0, 0)"),
        ("Conv", (8, 3, 0), NetworkError, "stride_nd is (0, 0)"),
        ("Conv", (8, -1), GraphError, "-1 is no size of a kernel, stride or padding"),
        ("Conv", (8, 1025), GraphError, "1025 is no size of a kernel, stride or padding"),
        ("Conv", (8, (3, 3, 3)), GraphError, "(3, 3, 3) is no size of a kernel, stride or padding"),
        ("Conv", (8, 2.5), GraphError, "2.5 is no size of a kernel, stride or padding"),
        ("Conv", (8, 15, 1, 0), NetworkError, "kernel (15, 15) is larger than the padded input"),
        ("SPPF", (8, 0), NetworkError, "window_size_nd is (0, 0)"),
        ("SPP", (8, (4,)), GraphError, "model.0: SPP with a window of 4, which would change the size"),
        ("C3TR", (12,), GraphError, "model.0.m.tr.0.ma: 6 channels cannot be split into 4 attention heads"),
        ("Contract", (2,), GraphError, "model.0: 13 x 9 pixels cannot be divided into squares of 2"),
        ("Expand", (5,), GraphError, "model.0: 12 channels do not make squares of 5 x 5 pixels"),
        ("DWConvTranspose2d", (12, 3, 2, 0, 1), NetworkError, "an output padding of (1, 1) is larger than the padding"),
        ("nn.ConvTranspose2d", (8, 3, 2, 1, 0, 5), NetworkError, "model.0: 8 channels cannot be split into 5 groups"),
    ],
)
def test_wrong_arguments_are_named(block, args, error, message):
    with pytest.raises(YolotrtError) as problem:
        compute(block, picture(*ODD), *args)
    assert type(problem.value) is error
    assert message in str(problem.value)
