"""Zero points: bounds from below that hold, and integers that use the whole range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.network.test_quantize import all_scales, float_network, int8_network
from tests.reference import all_weights, complete, tiny_metadata
from yolotrt.calibration.activations import OnnxActivations
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.network import recorder
from yolotrt.network.quantize import ONNX_RUNTIME, TENSORRT, Quantization, computed_tensors, copies, scale_groups
from yolotrt.network.ranges import FLOORS, lowest_values, use_whole_range, whole_range_step


@pytest.fixture(scope="module")
def tiny():
    return all_weights(tiny_metadata())


def quantizers(network: recorder.Network) -> dict[str, recorder.QuantizeLayer]:
    """The layers that quantize activations, by the tensor's name."""
    return {
        layer.inputs[0].name: layer
        for layer in network.layers
        if isinstance(layer, recorder.QuantizeLayer) and not layer.dequantize and not layer.inputs[1].shape
    }


def step(layer: recorder.QuantizeLayer) -> float:
    return float(layer.inputs[1].source.weights.array)


def test_no_value_of_a_network_is_below_its_bound(tiny):
    activations = OnnxActivations(tiny, tiny.metadata.imgsz)
    network = float_network(tiny)
    lowest = lowest_values(network)
    picture = np.random.default_rng(0).random((1, 3, *tiny.metadata.imgsz), np.float32) * 40 - 20
    met = 0
    for name, values in activations.observe(picture):
        if name in lowest and name not in activations.floors:
            met += 1
            assert values.min() >= lowest[name]
    assert met > 5
    for name, floor in activations.floors.items():
        assert lowest[name] == floor


def test_all_tensors_that_activations_give_have_a_bound(tiny):
    network = float_network(tiny)
    lowest = lowest_values(network)
    for layer in network.layers:
        if layer.name.endswith((".act", ".act.sigmoid", ".add")) or copies(layer):
            assert layer.output.name in lowest
    assert "images" not in lowest


@pytest.mark.parametrize(
    ("kind", "alpha", "beta", "real"),
    [
        ("SIGMOID", None, None, lambda x: x / (1 + np.exp(-x))),
        ("HARD_SIGMOID", 1 / 6, 0.5, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
        ("TANH", None, None, lambda x: x * np.tanh(np.log1p(np.exp(x)))),
    ],
)
def test_bounds_of_products_are_the_least_values_of_their_functions(kind, alpha, beta, real):
    network = recorder.Network()
    x = network.add_input("x", recorder.float32, (1, 1, 4, 4))
    inner = x
    if kind == "TANH":
        inner = network.add_activation(x, recorder.ActivationType.SOFTPLUS).get_output(0)
    layer = network.add_activation(inner, recorder.ActivationType[kind])
    if alpha is not None:
        layer.alpha, layer.beta = alpha, beta
    product = network.add_elementwise(x, layer.get_output(0), recorder.ElementWiseOperation.PROD).get_output(0)
    product.name = "product"
    least = real(np.linspace(-20, 20, 4_000_001)).min()
    assert lowest_values(network)["product"] == pytest.approx(least, abs=2e-4)
    assert lowest_values(network)["product"] <= least + 1e-4


def test_tensors_that_copy_each_other_keep_one_step_and_zero_point(tiny):
    network, _ = int8_network(tiny, ONNX_RUNTIME)
    use_whole_range(network)
    found = quantizers(network)
    shifted = 0
    for group in scale_groups(float_network(tiny)):
        pairs = {(step(found[name]), found[name].zero_point) for name in group if name in found}
        assert len(pairs) <= 1
        shifted += bool(pairs) and pairs.pop()[1] != 0
    assert shifted > 5


def test_the_integers_reach_from_the_bound_to_the_largest_value(tiny):
    symmetric, _ = int8_network(tiny, ONNX_RUNTIME)
    network, _ = int8_network(tiny, ONNX_RUNTIME)
    use_whole_range(network)
    lowest = lowest_values(float_network(tiny))
    for name, layer in quantizers(network).items():
        largest = 127 * step(quantizers(symmetric)[name])
        low = max(lowest.get(name, 0.0), -largest)
        if layer.zero_point == 0:
            continue
        assert (127 - layer.zero_point) * step(layer) == pytest.approx(largest, abs=step(layer))
        assert (-128 - layer.zero_point) * step(layer) <= low + step(layer)
        assert -128 <= layer.zero_point <= 127
        assert step(layer) < step(quantizers(symmetric)[name])
        for reader in layer.output.consumers:
            assert reader.zero_point == layer.zero_point
    sigmoid = next(layer for name, layer in quantizers(network).items() if name.endswith(".sigmoid"))
    assert (step(sigmoid), sigmoid.zero_point) == (pytest.approx(1 / 255), -128)


def test_only_libraries_with_zero_points_get_them(tiny):
    options = replace(complete(imgsz=tiny.metadata.imgsz), precision="int8")
    options = replace(options, quantization=Quantization(all_scales(tiny)))
    points = {}
    for placement in (ONNX_RUNTIME, replace(TENSORRT, high_precision="fp32")):
        model = onnx.load_from_string(build_plan(recorder, tiny, options, BuildHooks(placement)).data)
        values = {row.name: onnx.numpy_helper.to_array(row) for row in model.graph.initializer}
        points[placement] = {
            int(values[node.input[2]]) - 128
            for node in model.graph.node
            if node.op_type == "QuantizeLinear" and values[node.input[2]].dtype == np.uint8
        }
    assert points.pop(ONNX_RUNTIME) > {-128}
    assert list(points.values()) == [{0}]


def test_the_whole_range_is_never_coarser_than_the_symmetric_one():
    for largest in (0.01, 0.2785, 1.0, 50.0):
        for lowest in (0.0, -0.2785, -6.0, -1000.0):
            assert largest / 255 <= whole_range_step(largest, lowest) <= largest / 127
    assert whole_range_step(10, 0.0) == pytest.approx(10 / 255)
    assert whole_range_step(1, -6.0) == pytest.approx(2 / 255)  # what is below minus the largest value is cut off


def test_a_convolution_that_others_read_as_well_has_no_floor():
    network = recorder.Network()
    x = network.add_input("x", recorder.float32, (1, 2, 4, 4))
    kernel = recorder.Weights(np.ones((2, 2, 1, 1), np.float32))
    bias = recorder.Weights(np.zeros(2, np.float32))
    y = network.add_convolution_nd(x, 2, (1, 1), kernel, bias).get_output(0)
    y.name = "y"
    activation = network.add_activation(y, recorder.ActivationType.RELU)
    activation.name = "relu"
    assert lowest_values(network)["y"] == FLOORS[recorder.ActivationType.RELU] == 0
    pool = network.add_pooling_nd(y, recorder.PoolingType.MAX, (1, 1))
    pool.name = "pool"
    assert "y" not in lowest_values(network)
    assert computed_tensors(network) >= {"y"}


def test_a_product_with_an_activation_of_something_else_has_no_bound():
    network = recorder.Network()
    x, y = (network.add_input(name, recorder.float32, (1, 1, 4, 4)) for name in "xy")
    gate = network.add_activation(y, recorder.ActivationType.SIGMOID)
    gate.name = "gate"
    product = network.add_elementwise(x, gate.get_output(0), recorder.ElementWiseOperation.PROD)
    product.name = product.get_output(0).name = "product"
    assert "product" not in lowest_values(network)
