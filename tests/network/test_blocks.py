"""Each block computes what its definition in the YOLOv5 papers and documentation says.

The references are plain torch functions in float64, written here from those definitions, with the same random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.reference import MadeUpWeights, made_up_weights, tiny_metadata
from yolotrt.errors import GraphError, NetworkError, YolotrtError
from yolotrt.network import recorder
from yolotrt.network.blocks import BLOCKS
from yolotrt.network.graph import ModelGraph
from yolotrt.network.onnx_writer import write_onnx
from yolotrt.network.ops import Ops
from yolotrt.weights import Weights

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


def test_every_block_is_tested():
    """A block that is added needs a test here."""
    assert set(BLOCKS) == {"Conv", "Bottleneck", "C3", "SPPF", "nn.Upsample", "Concat", "Detect"}


# --- arguments that no block takes ---


@pytest.mark.parametrize(
    ("block", "args", "error", "message"),
    [
        ("Conv", (8, 3, 1, None, 5), NetworkError, "model.0: 12 input channels cannot be split into 5 groups"),
        ("Conv", (8, 3, 1, None, 0), NetworkError, "model.0: 12 input channels cannot be split into 0 groups"),
        ("Conv", (9, 3, 1, None, 4), NetworkError, "12 input and 9 output channels cannot be split into 4 groups"),
        ("Conv", (8, 0), NetworkError, "kernel_size_nd is (0, 0)"),
        ("Conv", (8, 3, 0), NetworkError, "stride_nd is (0, 0)"),
        ("Conv", (8, -1), GraphError, "-1 is no size of a kernel, stride or padding"),
        ("Conv", (8, 1025), GraphError, "1025 is no size of a kernel, stride or padding"),
        ("Conv", (8, (3, 3, 3)), GraphError, "(3, 3, 3) is no size of a kernel, stride or padding"),
        ("Conv", (8, 2.5), GraphError, "2.5 is no size of a kernel, stride or padding"),
        ("Conv", (8, 15, 1, 0), NetworkError, "kernel (15, 15) is larger than the padded input"),
        ("SPPF", (8, 0), NetworkError, "window_size_nd is (0, 0)"),
    ],
)
def test_wrong_arguments_are_named(block, args, error, message):
    with pytest.raises(YolotrtError) as problem:
        compute(block, picture(*ODD), *args)
    assert type(problem.value) is error
    assert message in str(problem.value)
