"""BatchNorm folded into a convolution computes the same."""

from __future__ import annotations

import numpy as np
import pytest

from yolotrt.errors import WeightsError
from yolotrt.weights import Metadata, Weights, load_weights
from yolotrt.weights.folding import fold_batch_norm, folded_convolution

METADATA = Metadata(yaml={}, names=("cat",), batch_norm_epsilon=0.25)
CHANNELS, INPUTS = 5, 3


def random_batch_norm(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "gamma": generator.normal(1, 0.5, CHANNELS).astype(np.float32),
        "beta": generator.normal(0, 1, CHANNELS).astype(np.float32),
        "mean": generator.normal(0, 1, CHANNELS).astype(np.float32),
        "variance": generator.uniform(0.01, 2, CHANNELS).astype(np.float32),
    }


def batch_norm(x: np.ndarray, gamma, beta, mean, variance, epsilon: float) -> np.ndarray:
    """As the paper has it; x is (pixels, channels)."""
    return gamma * ((x - mean) / np.sqrt(variance.astype(np.float64) + epsilon)) + beta


def block(**changes: np.ndarray | None) -> Weights:
    """A Conv block `model.0`; a change to None removes the tensor."""
    parts = random_batch_norm(1)
    tensors = {
        "conv.weight": np.random.default_rng(2).normal(size=(CHANNELS, INPUTS, 1, 1)).astype(np.float32),
        "bn.weight": parts["gamma"],
        "bn.bias": parts["beta"],
        "bn.running_mean": parts["mean"],
        "bn.running_var": parts["variance"],
    } | {name.replace("__", "."): array for name, array in changes.items()}
    return Weights({f"model.0.{name}": array for name, array in tensors.items() if array is not None}, METADATA)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("channel_axis", [0, 1])
def test_the_folded_convolution_computes_what_both_layers_computed(has_bias, channel_axis):
    generator = np.random.default_rng(3)
    kernel = generator.normal(size=(CHANNELS, INPUTS)).astype(np.float32)
    bias = generator.normal(size=CHANNELS).astype(np.float32) if has_bias else None
    parts = random_batch_norm(4)
    stored = np.moveaxis(kernel[:, :, None, None], 0, channel_axis)

    folded, folded_bias = fold_batch_norm(stored, **parts, epsilon=1e-3, bias=bias, channel_axis=channel_axis)

    x = generator.normal(size=(50, INPUTS))  # a 1x1 convolution of 50 pixels
    expected = batch_norm(x @ kernel.T.astype(np.float64) + (0 if bias is None else bias), **parts, epsilon=1e-3)
    actual = x @ np.moveaxis(folded, channel_axis, 0)[:, :, 0, 0].T.astype(np.float64) + folded_bias
    assert folded.dtype == folded_bias.dtype == np.float32
    assert folded.shape == stored.shape
    # Kernel and bias are each rounded once to 24 bits; the sums are of the order of 10.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_the_result_is_the_formula_rounded_once():
    parts = random_batch_norm(5)
    weight = np.random.default_rng(6).normal(size=(CHANNELS, INPUTS, 3, 3)).astype(np.float32)
    exact = {name: array.astype(np.longdouble) for name, array in parts.items()}
    scale = exact["gamma"] / np.sqrt(exact["variance"] + np.longdouble(1e-3))
    folded, folded_bias = fold_batch_norm(weight, **parts, epsilon=1e-3)
    # Half a unit in the last place of float32 is 2**-24 relative; float32 arithmetic would be off by several.
    np.testing.assert_allclose(folded, weight * scale[:, None, None, None], rtol=2**-24 * 1.001)
    np.testing.assert_allclose(folded_bias, exact["beta"] - exact["mean"] * scale, rtol=2**-24 * 1.001)


def test_a_block_is_folded_with_the_epsilon_of_its_metadata():
    weights = block()
    kernel, bias = folded_convolution(weights, "model.0", (CHANNELS, INPUTS, 1, 1))
    expected = fold_batch_norm(weights.tensors["model.0.conv.weight"], **random_batch_norm(1), epsilon=0.25)
    np.testing.assert_array_equal(kernel, expected[0])
    np.testing.assert_array_equal(bias, expected[1])


def test_a_flat_kernel_is_shaped_first():
    weights = block()
    flat = Weights({name: array.reshape(-1) for name, array in weights.tensors.items()}, METADATA)
    shape = (CHANNELS, INPUTS, 1, 1)
    for actual, expected in zip(
        folded_convolution(flat, "model.0", shape), folded_convolution(weights, "model.0", shape), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_a_block_that_was_fused_before_is_taken_as_it_is():
    bias = np.arange(CHANNELS, dtype=np.float32)
    weights = block(conv__bias=bias, bn__weight=None, bn__bias=None, bn__running_mean=None, bn__running_var=None)
    kernel, folded_bias = folded_convolution(weights, "model.0", (CHANNELS, INPUTS, 1, 1))
    assert kernel is weights.tensors["model.0.conv.weight"]
    assert folded_bias is bias


def test_a_convolution_with_a_bias_and_batch_norm_keeps_both():
    bias = np.arange(CHANNELS, dtype=np.float32)
    weights = block(conv__bias=bias)
    _, folded_bias = folded_convolution(weights, "model.0", (CHANNELS, INPUTS, 1, 1))
    expected = fold_batch_norm(weights.tensors["model.0.conv.weight"], **random_batch_norm(1), epsilon=0.25, bias=bias)
    np.testing.assert_array_equal(folded_bias, expected[1])


def test_a_transposed_convolution_counts_output_channels_on_axis_1():
    weights = block(conv__weight=np.ones((INPUTS, CHANNELS, 2, 2), np.float32))
    kernel, bias = folded_convolution(weights, "model.0", (INPUTS, CHANNELS, 2, 2), channel_axis=1)
    assert kernel.shape == (INPUTS, CHANNELS, 2, 2)
    assert bias.shape == (CHANNELS,)
    parts = random_batch_norm(1)
    np.testing.assert_allclose(kernel[0, :, 0, 0], parts["gamma"] / np.sqrt(parts["variance"] + 0.25), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn__running_var": np.array([1, 1, -0.5, 1, 1], np.float32)}, r"bn.running_var holds -0.5 at index 2"),
        ({"bn__running_var": np.array([1, np.nan, 1, 1, 1], np.float32)}, r"bn.running_var holds nan at index 1"),
        ({"bn__weight": np.full(CHANNELS, 3e38, np.float32)}, r"tensor model.0.conv.weight is not finite"),
        ({"bn__running_mean": np.full(CHANNELS, np.nan, np.float32)}, r"tensor model.0.conv.bias is not finite"),
        ({"bn__running_mean": None}, r"tensor model.0.bn.running_mean with shape \(5,\) is missing"),
        ({"bn__weight": None}, r"tensor model.0.bn.weight with shape \(5,\) is missing"),
        ({"bn__bias": np.zeros(4, np.float32)}, r"tensor model.0.bn.bias has shape \(4,\), the graph needs \(5,\)"),
        ({"conv__weight": np.zeros((1, 5, 3, 1), np.float32)}, r"tensor model.0.conv.weight has shape"),
    ],
)
def test_broken_weights_are_refused_by_tensor(changes, message):
    if "bn__weight" in changes and changes["bn__weight"] is not None:
        changes = {**changes, "conv__weight": np.full((CHANNELS, INPUTS, 1, 1), 10, np.float32)}
    with pytest.raises(WeightsError, match=message):
        folded_convolution(block(**changes), "model.0", (CHANNELS, INPUTS, 1, 1))


def test_every_block_of_a_real_checkpoint_can_be_folded(golden):
    weights = load_weights(golden / "weights" / "yolov5n.pt")
    names = [name.removesuffix(".bn.weight") for name in weights.tensors if name.endswith(".bn.weight")]
    assert len(names) == 57  # 11 Conv, 8 C3 with 3 each, 10 bottlenecks with 2 each, SPPF with 2
    for name in names:
        kernel, _ = folded_convolution(weights, name, weights.tensors[f"{name}.conv.weight"].shape)
        assert kernel.any()
