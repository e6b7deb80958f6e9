"""The whole network: against the official YOLOv5's own numbers, and with weights that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference import TINY_YAML, all_weights, made_up_weights, official_metadata, tiny_metadata
from yolotrt.engines.base import BuildOptions
from yolotrt.engines.build import build_engine, open_session
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.errors import GraphError, NetworkError, WeightsError, YolotrtError
from yolotrt.network import recorder
from yolotrt.network.builder import NetworkBuilder, summarise
from yolotrt.weights import Metadata, Weights, load_weights

HEADS_TOLERANCE = 1e-4
"""Six times the noise of float32 itself: two runs of the official code with BatchNorm folded differ by 1.7e-5."""


def build(weights: Weights, batch: int = 1, height: int = 32, width: int = 48, **settings: Any) -> NetworkBuilder:
    builder = NetworkBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float32, **settings)
    builder.build(batch, height, width)
    return builder


@cache
def tiny() -> Weights:
    return all_weights(tiny_metadata())


# --- against the official code ---


@cache
def checkpoint(path: Path) -> Weights:
    return load_weights(path)


def input_of(height: int, width: int, batch: int = 1) -> np.ndarray:
    """The golden data's input: its first picture has the values that the heads were computed from."""
    pictures = [np.random.RandomState(seed).rand(1, 3, height, width).astype(np.float32) for seed in range(batch)]
    return np.concatenate(pictures)


def heads_of(weights: Weights, images: np.ndarray, **options: Any) -> list[np.ndarray]:
    """All outputs of the network, in its order."""
    engine = build_engine(weights, backend="onnxruntime", options=BuildOptions(imgsz=images.shape[2:], **options))
    with OnnxRuntimeBackend().open(engine, threads=2) as session:
        return [head.copy() for head in session.run(images)]


@pytest.mark.parametrize(
    ("tag", "height", "width"),
    [
        ("yolov5n", 384, 640),
        ("yolov5n", 640, 640),
        ("yolov5n_v60", 384, 640),
        ("pv_nc5_v70", 384, 640),
        ("derived_p6_random_nc80", 384, 640),
        ("derived_v50_focus_spp_nc80", 384, 640),
        ("derived_v31_csp_hswish_nc3", 384, 640),
        ("derived_v20_leaky_nc2_legacy", 384, 640),
        ("derived_seg_nc80", 384, 640),
    ],
)
def test_heads_are_those_of_the_official_code(golden, tag, height, width):
    weights = checkpoint(golden / f"weights/{tag}.pt")
    heads = heads_of(weights, input_of(height, width))
    with np.load(golden / f"expected/{tag}_raw.npz") as expected:
        names = [name for name in expected if name.startswith(f"{height}x{width}_") and "decoded" not in name]
        for name, head in zip(names, heads, strict=True):  # the levels, then the prototypes
            np.testing.assert_allclose(head, expected[name], rtol=0, atol=HEADS_TOLERANCE, err_msg=name)


def test_every_picture_of_a_batch_gets_what_it_gets_alone(golden):
    weights = checkpoint(golden / "weights/yolov5n.pt")
    images = input_of(64, 96, batch=4)
    alone = [heads_of(weights, image[None]) for image in images]
    static = heads_of(weights, images, min_batch=4, opt_batch=4, max_batch=4)
    engine = build_engine(
        weights, backend="onnxruntime", options=BuildOptions(imgsz=(64, 96), min_batch=1, opt_batch=4, max_batch=8)
    )
    with open_session(engine, threads=2) as session:
        for count in (1, 3, 4):
            dynamic = [head.copy() for head in session.run(images[:count])]
            for level, head in enumerate(dynamic):
                assert head.shape == (count, *static[level].shape[1:])
                # ONNX Runtime may sum in another order for another batch
                np.testing.assert_allclose(head, static[level][:count], rtol=0, atol=HEADS_TOLERANCE)
                for picture in range(count):
                    np.testing.assert_allclose(head[picture], alone[picture][level][0], rtol=0, atol=HEADS_TOLERANCE)
        assert session.run(input_of(64, 96, batch=8))[0].shape[0] == 8


def test_half_precision_is_close(golden):
    """fp16 rounds each activation to 11 bits, 2^-11 relative, and some 60 layers add up to a few per mille of the
    heads' range (about -20 to 6). Which way it rounds is chance, so the mean error is far below the largest."""
    weights = checkpoint(golden / "weights/yolov5n.pt")
    heads = heads_of(weights, input_of(384, 640), precision="fp16")
    with np.load(golden / "expected/yolov5n_raw.npz") as expected:
        errors = [np.abs(head - expected[f"384x640_head{level}"]) for level, head in enumerate(heads)]
    assert max(error.max() for error in errors) < 0.06  # measured: 0.027
    assert max(error.mean() for error in errors) < 0.005  # measured: 0.0019
    assert min(error.max() for error in errors) > HEADS_TOLERANCE, "this was computed in float32"


# --- what the builder makes ---


def test_input_and_heads_are_float32_and_named():
    network = recorder.Network()
    outputs = NetworkBuilder(network, recorder, tiny(), compute_dtype=recorder.float16).build(-1, 32, 48)
    assert [(x.name, x.shape, x.dtype) for x in network.inputs] == [("images", (-1, 3, 32, 48), recorder.float32)]
    assert {name: (x.name, x.shape, x.dtype) for name, x in outputs.items()} == {
        "head0": ("head0", (-1, 14, 8, 12), recorder.float32),
        "head1": ("head1", (-1, 14, 4, 6), recorder.float32),
    }
    assert network.outputs == list(outputs.values())


@pytest.mark.parametrize(("compute_dtype", "kept"), [(recorder.float32, np.float32), (recorder.float16, np.float16)])
def test_all_weights_have_the_compute_type_and_are_kept_alive(compute_dtype, kept):
    network = recorder.Network()
    builder = NetworkBuilder(network, recorder, tiny(), compute_dtype=compute_dtype)
    builder.build(1, 32, 48)
    arrays = [
        weights.array
        for layer in network.layers
        if isinstance(layer, recorder.ConvolutionLayer)
        for weights in (layer.kernel, layer.bias)
    ]
    assert {array.dtype for array in arrays} == {np.dtype(kept)}
    assert {id(array) for array in arrays} == {id(array) for array in builder.keep_alive}


def test_the_summary_has_every_layer_with_its_shape():
    builder = build(tiny(), batch=2)
    assert [(str(entry.layer), entry.shapes) for entry in builder.summary] == [
        ("layer 0 (Conv)", ((2, 8, 16, 24),)),
        ("layer 1 (Conv)", ((2, 16, 8, 12),)),
        ("layer 2 (C3)", ((2, 16, 8, 12),)),
        ("layer 3 (Conv)", ((2, 32, 4, 6),)),
        ("layer 4 (SPPF)", ((2, 32, 4, 6),)),
        ("layer 5 (nn.Upsample)", ((2, 32, 8, 12),)),
        ("layer 6 (Concat)", ((2, 48, 8, 12),)),
        ("layer 7 (Detect)", ((2, 14, 8, 12), (2, 14, 4, 6))),
    ]


def test_the_summary_counts_parameters_and_operations_for_one_picture():
    """Layer 0: 8 kernels of 3x3x3 at 16 x 24 places, a bias each; its BatchNorm has 2 values a channel."""
    first = build(tiny(), batch=2).summary[0]
    assert first.parameters == 8 * 27 + 2 * 8
    assert first.operations == 2 * (8 * 27 + 8) * 16 * 24
    assert sum(entry.parameters for entry in build(tiny()).summary) == sum(
        array.size for name, array in tiny().tensors.items() if ".running_" not in name
    )


# Millions of parameters at the official models' class count, and GFLOPs at 640 x 640, as YOLOv5's README lists them.
PUBLISHED = {
    "n": (1.9, 4.5),
    "s": (7.2, 16.5),
    "m": (21.2, 49.0),
    "l": (46.5, 109.1),
    "x": (86.7, 205.7),
    "n6": (3.2, 4.6),
    "s6": (12.6, 16.8),
    "m6": (35.7, 50.0),
    "l6": (76.8, 111.4),
    "x6": (140.7, 209.8),
}


@pytest.mark.parametrize(("size", "published"), PUBLISHED.items(), ids=PUBLISHED)
def test_parameters_and_operations_are_the_published_ones(size, published):
    layers = summarise(Weights({}, official_metadata(size)), 640, 640)
    millions = sum(layer.parameters for layer in layers) / 1e6
    # some rows of the table count two values a channel of each BatchNorm, some one: a tenth in the largest models
    assert abs(millions - published[0]) < 0.1
    assert round(sum(layer.operations for layer in layers) / 1e9, 1) == published[1]


def test_an_outline_is_what_a_build_sees():
    weights = all_weights(official_metadata("n", class_count=3))
    builder = build(weights, height=64, width=96)
    assert summarise(weights, 64, 96) == builder.summary
    assert summarise(Weights({}, weights.metadata), 64, 96) == builder.summary


def test_an_outline_of_impossible_metadata_is_refused():
    rows = [[-1, 1, "nn.Conv2d", [60000, 1000]], [-1, 1, "Classify", ["nc"]]]
    metadata = tiny_metadata(task="classify", strides=(), anchors=(), yaml={"nc": 2, "backbone": rows, "head": []})
    with pytest.raises(WeightsError, match=r"layer 0 \(nn\.Conv2d\): tensor model\.0\.weight .* no YOLOv5 model has"):
        summarise(Weights({}, metadata), 1024, 1024)


# --- other releases ---

RELEASE_1_ROWS = [
    [-1, 1, "Focus", [16, 3]],
    [-1, 1, "Conv", [32, 3, 2]],
    [-1, 3, "BottleneckCSP", [32]],
    [-1, 1, "nn.Conv2d", ["na * (nc + 5)", 1, 1]],
    [-2, 1, "Conv", [64, 3, 2]],
    [-1, 1, "nn.Conv2d", ["na * (nc + 5)", 1, 1]],
    [[], 1, "Detect", ["nc", "anchors"]],
]


def release_1_metadata() -> Metadata:
    """Its levels come coarsest first."""
    metadata = tiny_metadata(strides=(8, 4), yaml={**TINY_YAML, "backbone": RELEASE_1_ROWS, "head": []})
    return replace(metadata, anchors=metadata.anchors[::-1], activation="LeakyReLU(0.1)")


def test_the_heads_of_release_1_are_layers_of_their_own_coarsest_first():
    weights = all_weights(release_1_metadata())
    assert {name for name in weights.tensors if ".conv" not in name and ".cv" not in name and ".bn" not in name} == {
        "model.3.weight",
        "model.3.bias",
        "model.5.weight",
        "model.5.bias",
    }
    builder = build(weights)
    assert builder.graph.head.sources == (5, 3)
    assert builder.summary[-1].shapes == ((1, 14, 4, 6), (1, 14, 8, 12))
    assert builder.summary[-1].parameters == 0


def test_layers_are_named_as_in_the_checkpoint():
    network = recorder.Network()
    NetworkBuilder(network, recorder, tiny(), compute_dtype=recorder.float32).build(1, 32, 48)
    names = {layer.name for layer in network.layers}
    assert {layer.get_output(0).name for layer in network.layers} - {"head0", "head1"} <= names
    assert {"model.0.conv", "model.2.m.1.cv2.conv", "model.4.m.2", "model.6", "model.7.m.1"} <= names
    assert not any(name.startswith("(Unnamed") for name in names)


def test_a_repeated_block_is_a_sequence_of_copies():
    yaml = copy.deepcopy(dict(TINY_YAML))
    yaml["backbone"][3:4] = [[-1, 6, "Bottleneck", [32]], [-1, 1, "Conv", [64, 3, 2]]]  # 3 copies at depth 0.5
    yaml["head"] = [[-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[6, 5], 1, "Detect", ["nc", "anchors"]]]
    weights = all_weights(tiny_metadata(yaml=yaml))
    for copy_index in range(3):
        assert weights.tensors[f"model.3.{copy_index}.cv2.conv.weight"].shape == (16, 8, 3, 3)
    assert "model.3.3.cv2.conv.weight" not in weights.tensors
    build(weights)


def test_what_a_checkpoint_stores_beside_the_weights_is_ignored():
    extra = {f"model.7.{name}": np.zeros(4, np.float32) for name in ("anchors", "anchor_grid", "stride", "strides")}
    extra["model.0.bn.num_batches_tracked"] = np.zeros((), np.float32)
    build(Weights({**tiny().tensors, **extra}, tiny().metadata))


# --- weights and metadata that do not fit ---


def without(name: str) -> Weights:
    return Weights({key: array for key, array in tiny().tensors.items() if key != name}, tiny().metadata)


def with_tensor(name: str, array: np.ndarray) -> Weights:
    return Weights({**tiny().tensors, name: array}, tiny().metadata)


def with_metadata(**changes: Any) -> Weights:
    return Weights(tiny().tensors, tiny_metadata(**changes))


def with_layer(index: int, row: Any) -> Weights:
    """The tiny model with another row, in the order of the layers."""
    yaml = copy.deepcopy(dict(TINY_YAML))
    rows = [*yaml["backbone"], *yaml["head"]]
    rows[index] = row
    return with_metadata(yaml={**yaml, "backbone": rows, "head": []})


Case = tuple[Callable[[], Weights], type[YolotrtError], str]

WRONG: dict[str, Case] = {
    "missing tensor": (
        lambda: without("model.2.m.1.cv1.conv.weight"),
        WeightsError,
        "layer 2 (C3): tensor model.2.m.1.cv1.conv.weight with shape (8, 8, 1, 1) is missing from the weights",
    ),
    "missing BatchNorm": (
        lambda: without("model.0.bn.running_var"),
        WeightsError,
        "layer 0 (Conv): tensor model.0.bn.running_var with shape (8,) is missing",
    ),
    "missing bias": (
        lambda: without("model.7.m.1.bias"),
        WeightsError,
        "layer 7 (Detect): tensor model.7.m.1.bias with shape (14,) is missing",
    ),
    "wrong shape": (
        lambda: with_tensor("model.1.conv.weight", np.zeros((16, 8, 1, 1), np.float32)),
        WeightsError,
        "layer 1 (Conv): tensor model.1.conv.weight has shape (16, 8, 1, 1), the graph needs (16, 8, 3, 3)",
    ),
    "transposed shape": (
        lambda: with_tensor("model.1.conv.weight", np.zeros((8, 16, 3, 3), np.float32)),
        WeightsError,
        "layer 1 (Conv): tensor model.1.conv.weight has shape (8, 16, 3, 3), the graph needs (16, 8, 3, 3)",
    ),
    "a tensor too many": (
        lambda: with_tensor("model.8.conv.weight", np.zeros((8, 8, 1, 1), np.float32)),
        WeightsError,
        "tensor model.8.conv.weight (1 in all) is not used by the graph: the weights do not belong to it",
    ),
    "a layer too many": (
        lambda: with_layer(4, [-1, 1, "nn.Upsample", ["None", 1, "nearest"]]),
        WeightsError,
        "tensor model.4.cv1.bn.bias (10 in all) is not used by the graph",
    ),
    "no tensors": (lambda: Weights({}, tiny().metadata), WeightsError, "layer 0 (Conv): tensor model.0.conv.weight"),
    "wrong class count": (
        lambda: with_metadata(names=("cat",), yaml={**TINY_YAML, "nc": 1}),
        WeightsError,
        "layer 7 (Detect): tensor model.7.m.0.weight has shape (14, 48, 1, 1), the graph needs (12, 48, 1, 1)",
    ),
    "wrong number of anchors": (
        lambda: with_metadata(anchors=(((10.0, 13.0),), ((30.0, 61.0),))),
        WeightsError,
        "layer 7 (Detect): tensor model.7.m.0.weight has shape (14, 48, 1, 1), the graph needs (7, 48, 1, 1)",
    ),
    "wrong width": (
        lambda: with_metadata(yaml={**TINY_YAML, "width_multiple": 1.0}),
        WeightsError,
        "layer 0 (Conv): tensor model.0.conv.weight has shape (8, 3, 3, 3), the graph needs (16, 3, 3, 3)",
    ),
    "wrong depth": (
        lambda: with_metadata(yaml={**TINY_YAML, "depth_multiple": 0.25}),
        WeightsError,
        "tensor model.2.m.1.cv1.bn.bias (10 in all) is not used by the graph",
    ),
    "unknown block": (
        lambda: with_layer(3, [-1, 1, "MetaAconC", [64]]),
        GraphError,
        "layer 3 (MetaAconC) is a block that this version does not know; the model is for the task detect",
    ),
    "a network without a head": (
        lambda: with_layer(7, [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]),
        GraphError,
        "layer 7 (nn.Upsample) ends the network but is no head: expected Detect, Segment or Classify",
    ),
    "a layer that reads the head": (
        lambda: made_up_weights(with_layer(6, [[5, 2], 1, "Detect", []]).metadata),
        GraphError,
        "layer 7 (Detect) reads from layers (6, 4), which give no tensor",
    ),
    "a layer that reads nothing": (
        lambda: with_layer(6, [[], 1, "Concat", [1]]),
        GraphError,
        "layer 6 (Concat) reads from layers (), which give no tensor",
    ),
    "a block with two inputs": (
        lambda: with_layer(5, [[4, 3], 1, "nn.Upsample", ["None", 2, "nearest"]]),
        GraphError,
        "layer 5 (nn.Upsample) reads from 2 layers: it takes one",
    ),
    "too many arguments": (
        lambda: with_layer(0, [-1, 1, "Conv", [16, 3, 2, None, 1, 1, True, 9]]),
        GraphError,
        "layer 0 (Conv) cannot take the arguments (16, 3, 2, None, 1, 1, True, 9)",
    ),
    "no arguments": (lambda: with_layer(0, [-1, 1, "Conv", []]), GraphError, "layer 0 (Conv) cannot take the"),
    "negative channels": (
        lambda: with_layer(0, [-1, 1, "Conv", [-16, 3, 2]]),
        GraphError,
        "layer 0 (Conv) cannot take the arguments (-16, 3, 2) (the first argument must be a number of channels)",
    ),
    "a kernel of text": (
        lambda: with_layer(0, [-1, 1, "Conv", [16, "big", 2]]),
        GraphError,
        "layer 0 (Conv): 'big' is no size of a kernel, stride or padding",
    ),
    "shapes that do not join": (
        lambda: with_layer(6, [[5, 4], 1, "Concat", [1]]),
        NetworkError,
        "layer 6 (Concat): Concatenation layer model.6: shapes (1, 32, 8, 12) and (1, 32, 4, 6) differ besides axis 1",
    ),
    "another number of levels": (
        lambda: with_layer(7, [[6], 1, "Detect", ["nc", "anchors"]]),
        GraphError,
        "layer 7 (Detect): model.7: Detect reads 1 levels but the metadata have strides for 2",
    ),
    "strides that are not the graph's": (
        lambda: with_metadata(strides=(8, 16)),
        GraphError,
        "head0 is (8, 12) cells large, but its stride of 8 makes (4, 6): the metadata do not belong to this graph",
    ),
    "levels in the wrong order": (
        lambda: with_metadata(strides=(8, 4)),
        GraphError,
        "head0 is (8, 12) cells large, but its stride of 8 makes (4, 6)",
    ),
    "an unknown activation": (
        lambda: with_metadata(activation="FReLU"),
        NetworkError,
        "layer 0 (Conv): model.0.act: activation 'FReLU' is not known: known are Hardswish",
    ),
    "an activation's argument that is no number": (
        lambda: with_metadata(activations={"model.2.cv1.act": "LeakyReLU(steep)"}),
        NetworkError,
        "layer 2 (C3): model.2.cv1.act: activation argument 'steep' is no number",
    ),
}


@pytest.mark.parametrize(("weights", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(weights, error, message):
    with pytest.raises(error) as problem:
        build(weights(), height=32, width=48)
    assert message in str(problem.value)
    assert type(problem.value) is error
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        ((33, 48), "image size 33x48 does not fit this model: both must be multiples of 8: use --imgsz 40 48"),
        ((32, 47), "image size 32x47 does not fit this model: both must be multiples of 8: use --imgsz 32 48"),
        ((1, 1), "use --imgsz 8 8"),
        ((0, 32), "use --imgsz 8 32"),
        ((-32, 32), "use --imgsz 8 32"),
    ],
)
def test_a_wrong_image_size_comes_with_the_right_one(size, advice):
    with pytest.raises(GraphError) as problem:
        build(tiny(), height=size[0], width=size[1])
    assert advice in str(problem.value)


@pytest.mark.parametrize("size", [(8, 8), (8, 4096), (32, 48)])
def test_any_multiple_of_the_largest_stride_is_an_image_size(size):
    build(tiny(), height=size[0], width=size[1])


def test_weights_beyond_the_range_of_half_precision_are_refused():
    weights = with_tensor("model.7.m.0.bias", np.full(14, 7e4, np.float32))
    build(weights)
    with pytest.raises(WeightsError, match=r"layer 7 \(Detect\): model\.7\.m\.0 has weights beyond the range of fp16"):
        NetworkBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float16).build(1, 32, 48)


class SilentNetwork:
    """A library that refuses a layer by returning None, and gives the reason elsewhere."""

    def __init__(self, refused: str) -> None:
        self._network = recorder.Network()
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == self._refused else getattr(self._network, name)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("add_input", "input images of shape (1, 3, 32, 48) was refused (no memory)"),
        ("add_convolution_nd", "layer 0 (Conv): model.0.conv: the layer was refused (no memory)"),
        ("add_elementwise", "layer 0 (Conv): model.0.act: the layer was refused (no memory)"),
        ("add_concatenation", "layer 2 (C3): model.2.concat: the layer was refused (no memory)"),
        ("add_pooling_nd", "layer 4 (SPPF): model.4.m.0: the layer was refused (no memory)"),
        ("add_resize", "layer 5 (nn.Upsample): model.5: the layer was refused (no memory)"),
    ],
)
def test_a_layer_that_the_library_refuses_is_named_with_the_librarys_reason(refused, message):
    network = SilentNetwork(refused)
    builder = NetworkBuilder(network, recorder, tiny(), compute_dtype=recorder.float32, explain=lambda: "no memory\n")
    with pytest.raises(NetworkError) as problem:
        builder.build(1, 32, 48)
    assert str(problem.value) == message


def test_a_tensor_too_large_for_tensorrt_is_refused():
    with pytest.raises(NetworkError, match=r"model\.0\.conv: an output of shape .* is too large"):
        build(tiny(), batch=1000, height=16384, width=16384)
