"""What the engine inspector says, in the forms of TensorRT 8.6, 10 and 11.

The layers are shortened, but have the fields and spellings of real ones: the sample files of NVIDIA's
trt-engine-explorer (8.x), trtexec's output of 10.x, and the migration guide for 11.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from yolotrt.engines.inspector import convolution_precisions, count_precisions

NAME = "model.2.m.0.cv1.conv"


def tensor(kind: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "x", "Location": "Device", "Dimensions": [1, 8, 4, 4], key: kind}


def convolution(kind: str = "", name: str = NAME, **fields: Any) -> dict[str, Any]:
    """A convolution by one of TensorRT's own kernels."""
    layer = {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("Channel major FP16 format where channel % 8 == 0")],
        "Outputs": [],
        "ParameterType": "Convolution",
        "Weights": {"Type": kind, "Count": 1250},
        "TacticName": "",
    }
    return {**layer, **fields}


def without(layer: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in layer.items() if key not in keys}


def precision(*layers: Any, name: str = NAME) -> str:
    text = json.dumps({"Layers": list(layers), "Bindings": ["images"]})
    return convolution_precisions(text, [name])[name]


SM80 = "sm80_xmma_fprop_implicit_gemm_{}_nhwckrsc_nhwc_tilesize64x32x64_stage6_warpsize2x1x2_g1_tensor16x8x16"
NO_WEIGHTS = without(convolution(), "Weights", "ParameterType")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # the weights' type, of 8.x and 10.x
        (convolution("Half"), "fp16"),
        (convolution("FP16"), "fp16"),
        (convolution("Float"), "fp32"),
        (convolution("FP32"), "fp32"),
        (convolution("Int8"), "int8"),
        (convolution("BFloat16"), "bf16"),
        (convolution("FP8"), "fp8"),
        (convolution("Float", LayerType="CublasConvolution"), "fp32"),
        (convolution("Half", LayerType="CaskGemmConvolution"), "fp16"),
        # the weights are float32, the kernel rounds them
        (convolution("Float", TacticName=SM80.format("tf32f32_tf32f32_f32")), "tf32"),
        (convolution("Float", TacticName=SM80.format("f32f32_tf32f32_f32")), "tf32"),
        (convolution("Float", TacticName=SM80.format("f32f32_f32f32_f32")), "fp32"),
        (convolution("Half", TacticName=SM80.format("f16f16_f16f16_f16")), "fp16"),
        # weights are not told: the input's type, in words
        ({**NO_WEIGHTS, "Inputs": [tensor("Thirty-two wide channel vectorized row major Int8 format")]}, "int8"),
        ({**NO_WEIGHTS, "Inputs": [tensor("Two wide channel vectorized row major FP16 format")]}, "fp16"),
        ({**NO_WEIGHTS, "Inputs": [tensor("Row major linear FP32")]}, "fp32"),
        ({**NO_WEIGHTS, "Inputs": [tensor("Row major linear BFloat16 format")]}, "bf16"),
        ({**NO_WEIGHTS, "LayerType": "ConvActPool", "Inputs": [tensor("Row major Int8 format")]}, "int8"),
        # the same in 10.x, in one word
        ({**NO_WEIGHTS, "Inputs": [tensor("Half")]}, "fp16"),
        ({**NO_WEIGHTS, "Inputs": [tensor("Float")]}, "fp32"),
        # the same in 11, which tells format and type apart
        ({**NO_WEIGHTS, "Inputs": [{**tensor("Half", "Datatype"), "Format": "Row major linear (kLINEAR)"}]}, "fp16"),
        ({**NO_WEIGHTS, "Inputs": [{**tensor("Int8", "DataType"), "Format": "N/A due to dynamic shapes"}]}, "int8"),
        # dynamic shapes: the kernel's name is left
        (
            {
                **NO_WEIGHTS,
                "Inputs": [tensor("N/A due to dynamic shapes")],
                "TacticName": SM80.format("f16f16_f16f32_f32"),
            },
            "fp16",
        ),
        (
            {
                **NO_WEIGHTS,
                "Inputs": [tensor("N/A due to dynamic shapes")],
                "TacticName": SM80.format("interleaved_i8i8_i8i32_f32"),
            },
            "int8",
        ),
        ({**NO_WEIGHTS, "Inputs": [], "TacticName": SM80.format("tf32f32_tf32f32_f32")}, "tf32"),
        ({**NO_WEIGHTS, "Inputs": [], "TacticName": "ampere_scudnn_128x64_relu_small_nn_v1"}, "fp32"),
        ({**NO_WEIGHTS, "Inputs": [tensor("N/A due to dynamic shapes")]}, "unknown"),
    ],
)
def test_a_convolutions_precision_is_read(layer, expected):
    assert precision(layer) == expected


@pytest.mark.parametrize(
    ("shown", "is_found"),
    [
        (f"{NAME} + PWN(PWN(model.2.m.0.cv1.sigmoid), model.2.m.0.cv1)", True),
        (f"PWN(model.0) + {NAME}", True),
        (f"model.2.m.0.cv2.conv || {NAME}", True),
        (f"{{ForeignNode[{NAME}...model.24]}}", True),
        ("model.2.m.0.cv1.conv2", False),
        ("12.model.2.m.0.cv1.conv", False),
        ("model.2.m.0.cv1", False),
    ],
)
def test_fused_layers_are_found_by_the_whole_name(shown, is_found):
    assert precision(convolution("Half", name=shown)) == ("fp16" if is_found else "unknown")


def test_a_compiled_layer_is_found_by_its_metadata():
    compiled = {
        "Name": "__myl_ConvSigmMul_myl0_7",
        "LayerType": "kgen",
        "Inputs": [tensor("Half"), tensor("Float")],
        "TacticName": "__myl_ConvSigmMul_0x1234",
        "Metadata": f"model.1.conv\x1f{NAME}\x1e{NAME}.sigmoid",
    }
    assert precision(compiled) == "fp16"


def test_control_characters_in_the_text_are_no_obstacle():
    text = '{"Layers": [{"Name": "a", "LayerType": "kgen", "Inputs": [{"Datatype": "Half"}], "Metadata": "x\x1ey"}]}'
    assert convolution_precisions(text, ["x", "y", "z"]) == {"x": "fp16", "y": "fp16", "z": "unknown"}


@pytest.mark.parametrize("kind", ["Reformat", "NoOp", "shape_call", "signal"])
def test_layers_that_only_move_data_are_passed_over(kind):
    moving = convolution("Float", name=f"Reformatting CopyNode for Input Tensor 0 to {NAME}", LayerType=kind)
    assert precision(moving, convolution("Half")) == "fp16"
    assert precision(moving) == "unknown"


def test_the_convolution_counts_rather_than_what_was_fused_with_its_neighbours():
    neighbour = {"Name": "pointwise", "LayerType": "PointWiseV2", "Inputs": [tensor("Float")], "Metadata": NAME}
    by_tactic = {**NO_WEIGHTS, "LayerType": "fusion", "Inputs": [tensor("Half")], "TacticName": SM80}
    assert precision(neighbour, by_tactic) == "fp16"
    assert precision(neighbour, by_tactic, convolution("Int8")) == "int8"
    assert precision(neighbour) == "fp32"


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", "{}", '{"Layers": null}', '{"Layers": ["model.0.conv + PWN"]}', '{"Layers": [{"Name": 3}]}'],
)
def test_what_is_not_understood_is_unknown(text):
    assert convolution_precisions(text, ["model.0.conv"]) == {"model.0.conv": "unknown"}


@pytest.mark.parametrize("fields", [{"Weights": 3}, {"Weights": {}, "Inputs": None}, {"Weights": {}, "Inputs": ["x"]}])
def test_fields_of_other_types_are_unknown(fields):
    assert precision({**convolution("Half"), "Inputs": [], **fields}) == "unknown"


def test_precisions_are_counted_most_frequent_first():
    assert list(count_precisions({"a": "fp32", "b": "fp16", "c": "fp16"}).items()) == [("fp16", 2), ("fp32", 1)]
    assert count_precisions({}) == {}
