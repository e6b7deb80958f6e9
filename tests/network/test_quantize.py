"""Where INT8 begins and ends: the table's rules, and that Q/DQ compute what their definition says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.reference import all_weights, complete, made_up_weights, official_metadata, tiny_metadata
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.errors import InputError, WeightsError
from yolotrt.network import quantize, recorder
from yolotrt.network.builder import NetworkBuilder
from yolotrt.network.quantize import (
    ONNX_RUNTIME,
    SMALLEST_CHANNEL,
    TENSORRT,
    TENSORRT_8,
    Placement,
    Quantization,
    computed_tensors,
    kernel_scales,
    scale_groups,
)
from yolotrt.weights import Weights

SCALE = 0.05
FLOAT_TENSORRT = replace(TENSORRT, high_precision="fp32")


def float_network(weights: Weights) -> recorder.Network:
    network = recorder.Network()
    NetworkBuilder(network, recorder, weights, compute_dtype=recorder.float32).build(1, *weights.metadata.imgsz)
    return network


def all_scales(weights: Weights, scale: float = SCALE) -> dict[str, float]:
    return {name: scale for group in scale_groups(float_network(weights)) for name in group}


def int8_network(
    weights: Weights, placement: Placement, keep: tuple[str, ...] = (), scales: Mapping[str, float] | None = None
) -> tuple[recorder.Network, NetworkBuilder]:
    network = recorder.Network()
    quantization = Quantization(all_scales(weights) if scales is None else scales, keep)
    builder = NetworkBuilder(
        network, recorder, weights, compute_dtype=recorder.float32, quantization=quantization, placement=placement
    )
    builder.build(1, *weights.metadata.imgsz)
    return network, builder


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return all_weights(tiny_metadata())


def layers(network: recorder.Network, kind: type[recorder.Layer]) -> dict[str, Any]:
    return {layer.name: layer for layer in network.layers if isinstance(layer, kind)}


def reads_int8(layer: recorder.Layer) -> bool:
    return all(is_dequantized(tensor) for tensor in layer.inputs)


def is_dequantized(tensor: recorder.Tensor) -> bool:
    return isinstance(tensor.source, recorder.QuantizeLayer) and tensor.source.dequantize


# --- placement ---


def test_tensorrt_gets_q_dq_before_its_8_bit_layers_and_nowhere_else(tiny):
    network, builder = int8_network(tiny, TENSORRT)
    convolutions = layers(network, recorder.ConvolutionLayer)
    in_floats = {"model.0.conv", *(name for name in convolutions if name.startswith("model.7.m."))}
    assert {name for name, layer in convolutions.items() if not reads_int8(layer)} == in_floats
    assert set(builder.int8_convolutions) == set(convolutions) - in_floats
    for kind in (recorder.ConcatenationLayer, recorder.PoolingLayer, recorder.ResizeLayer):
        assert all(reads_int8(layer) for layer in layers(network, kind).values())
    for name, layer in layers(network, recorder.ElementWiseLayer).items():
        assert reads_int8(layer) == name.endswith(".add"), name  # the product in SiLU follows its convolution
    for layer in convolutions.values():
        if layer.output.name not in {"head0", "head1"}:
            assert not any(isinstance(reader, recorder.QuantizeLayer) for reader in layer.output.consumers)


def test_onnx_runtime_gets_q_dq_around_every_8_bit_layer(tiny):
    network, _ = int8_network(tiny, ONNX_RUNTIME)
    floats = [
        layer for layer in network.layers if not isinstance(layer, recorder.QuantizeLayer | recorder.ConstantLayer)
    ]
    for layer in floats:
        readers = [reader for reader in layer.output.consumers if not reader.name.startswith("model.7.m.")]  # heads
        writes = all(isinstance(reader, recorder.QuantizeLayer) for reader in readers)
        assert writes or layer.name.startswith("model.0."), layer.name


def test_a_tensor_is_quantized_once_for_all_its_readers(tiny):
    network, _ = int8_network(tiny, TENSORRT)
    quantized = [
        layer.inputs[0].name
        for layer in layers(network, recorder.QuantizeLayer).values()
        if not layer.dequantize and not isinstance(layer.inputs[0].source, recorder.ConstantLayer)
    ]
    assert len(quantized) == len(set(quantized))


def test_activation_scales_are_scalars_and_kernel_scales_go_along_the_output_channels(tiny):
    network, _ = int8_network(tiny, TENSORRT)
    for layer in layers(network, recorder.QuantizeLayer).values():
        value, scale = layer.inputs
        assert scale.dtype == recorder.float32
        if ".kernel" in layer.name:
            assert (layer.axis, scale.shape) == (0, (value.shape[0],))
        else:
            assert (layer.axis, scale.shape) == (-1, ())


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (("model.2",), lambda name: name.startswith("model.2.")),
        (("model.2.m.0",), lambda name: name.startswith("model.2.m.0.")),
        (("model.2.cv1.conv", "model.1"), lambda name: name in ("model.2.cv1.conv", "model.1.conv")),
    ],
)
def test_kept_layers_stay_in_floating_point(tiny, keep, expected):
    before, _ = int8_network(tiny, TENSORRT)
    network, _ = int8_network(tiny, TENSORRT, keep)
    changed = {
        name
        for name, layer in layers(network, recorder.ConvolutionLayer).items()
        if reads_int8(layer) != reads_int8(layers(before, recorder.ConvolutionLayer)[name])
    }
    assert changed == {name for name in layers(network, recorder.ConvolutionLayer) if expected(name)} != set()


def test_a_kept_layer_reads_what_its_input_was_before_others_quantized_it(tiny):
    network, _ = int8_network(tiny, ONNX_RUNTIME, ("model.2.cv1",))
    convolutions = layers(network, recorder.ConvolutionLayer)
    assert convolutions["model.2.cv1.conv"].inputs[0].name == "model.1.act"
    assert convolutions["model.2.cv2.conv"].inputs[0].name == "model.1.act.dq"
    assert not any(is_dequantized(convolutions[f"model.7.m.{level}"].inputs[0]) for level in (0, 1))


@pytest.mark.parametrize("name", ["model.99", "model.2.cv", "cv1"])
def test_a_layer_to_keep_must_exist(tiny, name):
    with pytest.raises(InputError, match=f"--int8-keep {name}: the model has no layer of that name"):
        int8_network(tiny, TENSORRT, ("model.2", name))


def test_groups_of_a_shared_scale_are_what_copies_values():
    groups = scale_groups(float_network(made_up_weights(official_metadata("n"))))
    by_name = {name: set(group) for group in groups for name in group}
    assert by_name["model.9.cv1.act"] == {"model.9.cv1.act", "model.9.concat", *(f"model.9.m.{i}" for i in range(3))}
    assert by_name["model.16"] == {
        "model.16",
        "model.15",
        "model.14.act",
        "model.4.cv3.act",
        "model.18.act",
        "model.19",
    }
    assert by_name["model.2.concat"] == {"model.2.concat", "model.2.m.0.add", "model.2.cv2.act"}
    assert by_name["model.1.act"] == {"model.1.act"}
    assert not [name for name in by_name if "sigmoid" in name or "model.24" in name or "head" in name]


def test_computed_tensors_are_those_that_copy_nothing(tiny):
    network = float_network(tiny)
    copying = {"model.2.concat", "model.4.m.0", "model.4.m.1", "model.4.m.2", "model.4.concat", "model.5", "model.6"}
    named = {name for group in scale_groups(network) for name in group}
    assert named - computed_tensors(network) == copying


# --- arithmetic ---


def fake_quantized(x: np.ndarray, scale: Any) -> np.ndarray:
    """The definition: nearest integer, ties to even, saturated."""
    return (np.clip(np.rint(x / scale), -128, 127) * scale).astype(np.float32)


def convolved(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 1x1 convolution of (1, channels, height, width)."""
    return np.einsum("oc,bchw->bohw", kernel[:, :, 0, 0].astype(np.float64), x.astype(np.float64)) + bias[:, None, None]


def one_convolution(placement: Placement, scales: Mapping[str, float], kernel: np.ndarray, bias: np.ndarray) -> bytes:
    """A network of two layers: a convolution that is kept, so that the second one reads no picture."""
    from yolotrt.network.ops import Ops

    builder = recorder.Builder()
    network = builder.create_network()
    quantizer = quantize.Quantizer(Quantization(scales), placement, ("none",), ("head",))
    ops = Ops(network, recorder, None, recorder.float32, quantizer=quantizer)
    x = ops.input("x", (1, kernel.shape[1], 8, 8))
    ops.output(ops.unary(ops.convolution(x, "conv", kernel, bias), "relu", "RELU"), "y")
    return builder.build_serialized_network(network, builder.create_builder_config())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("placement", [TENSORRT, ONNX_RUNTIME], ids=["tensorrt", "onnxruntime"])
def test_an_int8_convolution_computes_what_its_definition_says(placement, seed):
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((6, 5, 1, 1)).astype(np.float32) * np.logspace(-2, 1, 6)[:, None, None, None]
    kernel, bias = kernel.astype(np.float32), random.standard_normal(6).astype(np.float32)
    x = (3 * random.standard_normal((1, 5, 8, 8))).astype(np.float32)  # some values saturate
    scales = {"x": 0.04, "conv": 0.25}
    model = one_convolution(placement, scales, kernel, bias)
    (found,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    weights = fake_quantized(kernel, kernel_scales(kernel)[:, None, None, None])
    real = convolved(fake_quantized(x, 0.04), weights, bias)
    if placement is TENSORRT:
        # the bias is rounded to steps of input scale x kernel scale, of at most 0.04 x 0.3
        np.testing.assert_allclose(found, np.maximum(real, 0), atol=0.007)
    else:
        # half a step of the output, and the bias's rounding
        saturated = np.clip(real, -128 * 0.25, 127 * 0.25)
        np.testing.assert_allclose(found, np.maximum(saturated, 0), atol=0.125 + 0.007)
        assert np.all(found % 0.25 == 0)


def test_kernels_and_biases_are_stored_as_integers():
    weights = all_weights(tiny_metadata())
    quantization = Quantization(all_scales(weights))
    options = replace(complete(imgsz=(32, 48)), precision="int8", quantization=quantization)
    model = onnx.load_from_string(build_plan(recorder, weights, options, BuildHooks(ONNX_RUNTIME)).data)
    types = {}
    for item in model.graph.initializer:
        types[item.name] = onnx.helper.tensor_dtype_to_np_dtype(item.data_type).name
    assert types["model.1.conv.kernel.q"] == "int8"
    assert types["model.1.conv.bias.q"] == "int32"
    assert not [name for name in types if name.endswith("conv.kernel")]
    zero_points = {types[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert zero_points == {"uint8"}


def test_kernel_scales_make_the_largest_weight_of_a_channel_127():
    kernel = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    integers = np.rint(kernel / kernel_scales(kernel)[:, None, None, None])
    np.testing.assert_array_equal(np.abs(integers).reshape(8, -1).max(1), 127)


@pytest.mark.parametrize("largest", [0.0, 1e-30, 1e-4])
def test_channels_that_are_switched_off_get_a_usable_scale(largest):
    kernel = np.full((2, 3, 1, 1), 0.5, np.float32)
    kernel[1] = largest
    np.testing.assert_allclose(kernel_scales(kernel), np.array([0.5, 0.5 * SMALLEST_CHANNEL]) / 127, rtol=1e-6)


def test_a_kernel_of_zeros_gets_positive_scales():
    assert np.all(kernel_scales(np.zeros((4, 2, 1, 1), np.float32)) > 0)


def test_weights_that_are_not_finite_are_refused(tiny):
    tensors = {name: array.copy() for name, array in tiny.tensors.items()}
    tensors["model.1.conv.weight"][0] = np.nan
    with pytest.raises(WeightsError, match=r"model\.1\.conv.* is not finite"):
        int8_network(Weights(tensors, tiny.metadata), TENSORRT)


def test_int8_heads_stay_near_those_of_fp32(tiny):
    """With ranges that fit, a value is off by at most half a 127th of its range: a few percent after eight layers."""
    from yolotrt.calibration.activations import OnnxActivations

    picture = np.random.default_rng(1).random((1, 3, 32, 48), np.float32)
    activations = OnnxActivations(tiny, (32, 48))
    largest = {name: float(np.abs(values).max()) for name, values in activations.observe(picture)}
    scales = {
        name: max(largest[member] for member in group if member in largest) / 127
        for group in activations.groups
        for name in group
    }
    expected = heads(tiny, picture, "fp32", ONNX_RUNTIME, None)
    for placement in (FLOAT_TENSORRT, ONNX_RUNTIME):
        found = heads(tiny, picture, "int8", placement, Quantization(scales))
        for a, b in zip(expected, found, strict=True):
            assert np.abs(a - b).max() > 0
            assert np.sqrt(np.square(a - b).mean() / np.square(a).mean()) < 0.08


def test_split_silu_is_silu_and_only_after_the_pictures_convolution(tiny):
    picture = np.random.default_rng(1).random((1, 3, 32, 48), np.float32)
    quantization = Quantization(all_scales(tiny), ("model.3",))
    whole, split = (heads(tiny, picture, "int8", placement, quantization) for placement in (FLOAT_TENSORRT, TENSORRT_8))
    for a, b in zip(whole, split, strict=True):
        # a value in a million next to where it is rounded the other way
        assert np.sqrt(np.square(a - b).mean() / np.square(a).mean()) < 0.01
    network, _ = int8_network(tiny, TENSORRT_8, ("model.3",))
    tanhs = {name for name, layer in layers(network, recorder.ActivationLayer).items() if name.endswith(".tanh")}
    assert tanhs == {"model.0.act.tanh"}


def heads(
    weights: Weights, picture: np.ndarray, precision: str, placement: Placement, quantization: Quantization | None
) -> list[np.ndarray]:
    options = replace(complete(imgsz=picture.shape[2:]), precision=precision, quantization=quantization)
    plan = build_plan(recorder, weights, options, BuildHooks(placement)).data
    return onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"]).run(None, {"images": picture})


# --- libraries ---


def test_onnx_runtime_computes_all_but_the_first_and_the_heads_in_8_bits():
    weights = made_up_weights(official_metadata("n"))
    options = replace(complete(), precision="int8", quantization=Quantization(all_scales(weights)))
    plan = OnnxRuntimeBackend().build(weights, options)
    assert plan.findings == {"convolutions": {"int8": 56, "fp32": 4}}


class _Layer:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Network:
    """Takes what TensorRT of a version takes."""

    def __init__(self, arguments: int) -> None:
        self._arguments = arguments

    def add_quantize(self, *arguments: Any) -> _Layer:
        if len(arguments) != self._arguments:
            raise TypeError("incompatible function arguments")
        return _Layer(*arguments)

    add_dequantize = add_quantize


class _Flags:
    pass


class _StrongFlags:
    STRONGLY_TYPED = 0


@pytest.mark.parametrize(("flags", "arguments"), [(_Flags, 2), (_StrongFlags, 3)], ids=["8.6", "10 and later"])
def test_the_form_of_q_dq_follows_the_librarys_version(flags, arguments):
    class Trt:
        NetworkDefinitionCreationFlag = flags
        int8 = "int8"

    network = _Network(arguments)
    q = quantize.add_quantize(network, Trt, "x", "scale")
    dq = quantize.add_dequantize(network, Trt, "q", "scale", "float16")
    assert q.arguments == ("x", "scale", "int8")[:arguments]
    assert dq.arguments == ("q", "scale", "float16")[:arguments]
