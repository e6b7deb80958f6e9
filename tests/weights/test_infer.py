"""Metadata concluded from tensor names and sizes, against synthetic models of all sizes and the golden checkpoints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from yolotrt.errors import WeightsError
from yolotrt.weights import load_weights
from yolotrt.weights.infer import infer_metadata, is_detect_buffer, last_layer, network_tensors

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}

UPSAMPLE = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
BACKBONE_P5 = [
    [-1, 1, "Conv", [64, 6, 2, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 3, "C3", [128]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 6, "C3", [256]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 9, "C3", [512]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 3, "C3", [1024]],
    [-1, 1, "SPPF", [1024, 5]],
]
HEAD_P5 = [
    [-1, 1, "Conv", [512, 1, 1]],
    UPSAMPLE,
    [[-1, 6], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [256, 1, 1]],
    UPSAMPLE,
    [[-1, 4], 1, "Concat", [1]],
    [-1, 3, "C3", [256, False]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 14], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 10], 1, "Concat", [1]],
    [-1, 3, "C3", [1024, False]],
    [[17, 20, 23], 1, "Detect", ["nc", "anchors"]],
]
BACKBONE_P6 = [
    *BACKBONE_P5[:7],
    [-1, 1, "Conv", [768, 3, 2]],
    [-1, 3, "C3", [768]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 3, "C3", [1024]],
    [-1, 1, "SPPF", [1024, 5]],
]
HEAD_P6 = [
    [-1, 1, "Conv", [768, 1, 1]],
    UPSAMPLE,
    [[-1, 8], 1, "Concat", [1]],
    [-1, 3, "C3", [768, False]],
    [-1, 1, "Conv", [512, 1, 1]],
    UPSAMPLE,
    [[-1, 6], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [256, 1, 1]],
    UPSAMPLE,
    [[-1, 4], 1, "Concat", [1]],
    [-1, 3, "C3", [256, False]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 20], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 16], 1, "Concat", [1]],
    [-1, 3, "C3", [768, False]],
    [-1, 1, "Conv", [768, 3, 2]],
    [[-1, 12], 1, "Concat", [1]],
    [-1, 3, "C3", [1024, False]],
    [[23, 26, 29, 32], 1, "Detect", ["nc", "anchors"]],
]
FOCUS = [-1, 1, "Focus", [64, 3]]
# models/yolov5s.yaml and models/hub/yolov5s6.yaml of release 5.0
BACKBONE_V50 = [
    FOCUS,
    *BACKBONE_P5[1:4],
    [-1, 9, "C3", [256]],
    *BACKBONE_P5[5:8],
    [-1, 1, "SPP", [1024, [5, 9, 13]]],
    [-1, 3, "C3", [1024, False]],
]
BACKBONE_V50_P6 = [
    FOCUS,
    *BACKBONE_P5[1:4],
    [-1, 9, "C3", [256]],
    *BACKBONE_P6[5:10],
    [-1, 1, "SPP", [1024, [3, 5, 7]]],
    [-1, 3, "C3", [1024, False]],
]
SEGMENT = [[17, 20, 23], 1, "Segment", ["nc", "anchors", 32, 256]]


class Synthetic:
    """Tensors of a YOLOv5 model without memory: each is one value, seen as an array of the right shape."""

    def __init__(self, rows, depth, width, nc=80, anchors_per_level=3, is_fused=False):
        self.tensors = {}
        self.width, self.is_fused = width, is_fused
        self.nc, self.anchors_per_level = nc, anchors_per_level
        channels = []
        for index, (source, number, block, args) in enumerate(rows):
            name = f"model.{index}"
            inputs = [3 if index == 0 else channels[s] for s in (source if isinstance(source, list) else [source])]
            repeats = max(round(number * depth), 1) if number > 1 else 1
            channels.append(getattr(self, block.replace("nn.", "").lower())(name, inputs, repeats, *args))

    def add(self, name, *shape):
        self.tensors[name] = np.broadcast_to(np.float32(0.5), shape)

    def scaled(self, channels):
        """parse_model: everything but the head's own width is scaled and rounded up to 8."""
        if channels == self.anchors_per_level * (self.nc + 5):
            return channels
        return math.ceil(channels * self.width / 8) * 8

    def convolution(self, name, c1, c2, k=1):
        self.add(f"{name}.conv.weight", c2, c1, k, k)
        for part in ["conv.bias"] if self.is_fused else ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]:
            self.add(f"{name}.{part}", c2)
        return c2

    def conv(self, name, inputs, repeats, c2, k, *_):
        return self.convolution(name, inputs[0], self.scaled(c2), k)

    def focus(self, name, inputs, repeats, c2, k):
        return self.convolution(f"{name}.conv", inputs[0] * 4, self.scaled(c2), k)

    def c3(self, name, inputs, repeats, c2, shortcut=True):
        c2 = self.scaled(c2)
        self.convolution(f"{name}.cv1", inputs[0], c2 // 2)
        self.convolution(f"{name}.cv2", inputs[0], c2 // 2)
        for index in range(repeats):
            self.convolution(f"{name}.m.{index}.cv1", c2 // 2, c2 // 2)
            self.convolution(f"{name}.m.{index}.cv2", c2 // 2, c2 // 2, 3)
        return self.convolution(f"{name}.cv3", c2, c2)

    def sppf(self, name, inputs, repeats, c2, k):
        self.convolution(f"{name}.cv1", inputs[0], inputs[0] // 2)
        return self.convolution(f"{name}.cv2", inputs[0] * 2, self.scaled(c2))

    spp = sppf

    def upsample(self, name, inputs, repeats, *_):
        return inputs[0]

    def concat(self, name, inputs, repeats, axis):
        return sum(inputs)

    def detect(self, name, inputs, repeats, *_, masks=0):
        outputs = self.anchors_per_level * (self.nc + 5 + masks)
        for level, channels in enumerate(inputs):
            self.add(f"{name}.m.{level}.weight", outputs, channels, 1, 1)
            self.add(f"{name}.m.{level}.bias", outputs)

    def segment(self, name, inputs, repeats, nc, anchors, masks, hidden):
        self.detect(name, inputs, repeats, masks=masks)
        hidden = math.ceil(hidden * self.width / 8) * 8
        self.convolution(f"{name}.proto.cv1", inputs[0], hidden, 3)
        self.convolution(f"{name}.proto.cv2", hidden, hidden, 3)
        self.convolution(f"{name}.proto.cv3", hidden, masks)

    def classify(self, name, inputs, repeats, nc):
        self.convolution(f"{name}.conv", inputs[0], 1280)
        self.add(f"{name}.linear.weight", nc, 1280)
        self.add(f"{name}.linear.bias", nc)


def tiny(**changes):
    """The tensors of a yolov5n with 2 classes."""
    return Synthetic([*BACKBONE_P5, *HEAD_P5], 0.33, 0.25, nc=2, **changes).tensors


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(
    ("suffix", "backbone", "head", "version"),
    [
        ("", BACKBONE_P5, HEAD_P5, "v6.0+"),
        ("6", BACKBONE_P6, HEAD_P6, "v6.0+"),
        ("", BACKBONE_V50, HEAD_P5, "v4.0-v5.0"),
        ("6", BACKBONE_V50_P6, HEAD_P6, "v4.0-v5.0"),
        ("-seg", BACKBONE_P5, [*HEAD_P5[:-1], SEGMENT], "v6.0+"),
    ],
)
@pytest.mark.parametrize("letter", SIZES)
def test_every_official_model_is_recognised(letter, suffix, backbone, head, version, is_fused):
    depth, width = SIZES[letter]
    metadata = infer_metadata(Synthetic([*backbone, *head], depth, width, nc=7, is_fused=is_fused).tensors)
    yaml = metadata.yaml
    assert (yaml["nc"], yaml["depth_multiple"], yaml["width_multiple"], yaml["ch"]) == (7, depth, width, 3)
    assert yaml["backbone"] == backbone
    assert yaml["head"] == head
    assert metadata.task == ("segment" if suffix == "-seg" else "detect")
    assert metadata.names == tuple(f"class{index}" for index in range(7))
    assert metadata.strides == ((8, 16, 32, 64) if suffix == "6" else (8, 16, 32))
    assert metadata.imgsz == ((1280, 1280) if suffix == "6" else (640, 640))
    assert metadata.version == version
    assert metadata.inferred[0].startswith(f"yolov5{letter}{suffix} (depth {depth:.2f}, width {width:.2f}")
    assert "7 classes" in metadata.inferred[0]
    json.loads(metadata.to_json())


@pytest.mark.parametrize("letter", SIZES)
def test_a_classifier_is_recognised(letter):
    depth, width = SIZES[letter]
    rows = [*BACKBONE_P5[:9], [-1, 1, "Classify", [10]]]
    metadata = infer_metadata(Synthetic(rows, depth, width).tensors)
    assert metadata.yaml["backbone"] + metadata.yaml["head"] == rows
    assert (metadata.yaml["depth_multiple"], metadata.yaml["width_multiple"]) == (depth, width)
    assert metadata.task == "classify"
    assert metadata.class_count == 10
    assert metadata.anchors == metadata.strides == ()
    assert metadata.imgsz == (224, 224)
    assert metadata.inferred[0] == f"yolov5{letter}-cls (depth {depth:.2f}, width {width:.2f}), 10 classes"


@pytest.mark.parametrize(("backbone", "head"), [(BACKBONE_P5, HEAD_P5), (BACKBONE_P6, HEAD_P6)])
@pytest.mark.parametrize("depth", [0.1, 0.2, 0.33, 0.5, 0.6, 0.83, 1.17, 1.5, 2.0])
@pytest.mark.parametrize("width", [0.0625, 0.078125, 0.125, 0.3, 0.375, 0.42, 0.6, 1.1, 1.5])
def test_custom_multiples_give_the_same_tensors(backbone, head, depth, width):
    tensors = Synthetic([*backbone, *head], depth, width, nc=3).tensors
    yaml = infer_metadata(tensors).yaml
    # Several multiples can round to the same network; any of them is right.
    again = Synthetic(yaml["backbone"] + yaml["head"], yaml["depth_multiple"], yaml["width_multiple"], nc=3).tensors
    assert {name: array.shape for name, array in again.items()} == {n: array.shape for n, array in tensors.items()}


def test_a_custom_size_is_called_so():
    tensors = Synthetic([*BACKBONE_P5, *HEAD_P5], 1.0, 0.5).tensors
    assert infer_metadata(tensors).inferred[0].startswith("a custom YOLOv5 (depth 1.00, width 0.50), 80 classes")


@pytest.mark.parametrize("nc", [1, 2, 80, 251, 1000])
@pytest.mark.parametrize("anchors_per_level", [1, 2, 3, 5])
def test_any_number_of_classes_and_anchors_is_recognised(nc, anchors_per_level):
    # With 251 classes and 3 anchors the head is 768 wide, which parse_model then does not scale in the other layers.
    tensors = Synthetic([*BACKBONE_P6, *HEAD_P6], 0.33, 0.25, nc=nc, anchors_per_level=anchors_per_level).tensors
    pixels = np.arange(1, 1 + 4 * anchors_per_level * 2, dtype=np.float32)
    metadata = infer_metadata({**tensors, "model.33.anchor_grid": pixels})
    assert metadata.class_count == nc
    assert np.array_equal(np.ravel(metadata.anchors), pixels)
    assert np.shape(metadata.anchors) == (4, anchors_per_level, 2)
    assert metadata.yaml["anchors"][1][0] == 1 + 2 * anchors_per_level
    assert metadata.inferred[0].endswith("anchors from the file")


def test_standard_anchors_are_assumed_where_none_are_and_said_so():
    metadata = infer_metadata(tiny())
    assert metadata.anchors[0] == ((10, 13), (16, 30), (33, 23))
    assert metadata.yaml["anchors"][2] == [116, 90, 156, 198, 373, 326]
    assert metadata.inferred[0].endswith("standard anchors assumed, 3 per level")
    p6 = infer_metadata(Synthetic([*BACKBONE_P6, *HEAD_P6], 0.33, 0.25).tensors)
    assert p6.anchors[3] == ((436, 615), (739, 380), (925, 792))


def test_anchors_in_cells_count_more_than_those_in_pixels():
    cells = np.ones((3, 3, 2), np.float32)
    grid = np.full((3, 1, 3, 1, 1, 2), 99, np.float32)
    metadata = infer_metadata({**tiny(), "model.24.anchors": cells, "model.24.anchor_grid": grid})
    assert metadata.anchors == (((8.0, 8.0),) * 3, ((16.0, 16.0),) * 3, ((32.0, 32.0),) * 3)


def test_class_names_are_not_guessed():
    metadata = infer_metadata(Synthetic([*BACKBONE_P5, *HEAD_P5], 0.33, 0.5, nc=80).tensors)
    assert metadata.names[0] == "class0"
    assert "class names unknown: class0 to class79" in metadata.inferred


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(
    "tag",
    [
        "yolov5n",
        "yolov5n_v60",
        "pv_nc5_v70",
        "derived_p6_random_nc80",
        "derived_v50_focus_spp_nc80",
        "derived_seg_nc80",
    ],
)
def test_a_real_checkpoint_without_its_metadata_is_described_as_by_yolov5(tag, is_flat, golden):
    expected = json.loads((golden / "expected" / f"{tag}.json").read_text())
    tensors = load_weights(golden / "weights" / f"{tag}.pt").tensors
    metadata = infer_metadata({name: array.reshape(-1) if is_flat else array for name, array in tensors.items()})
    for key in ("nc", "depth_multiple", "width_multiple", "backbone", "head"):
        assert metadata.yaml[key] == expected["yaml"][key]
    assert [np.ravel(level).tolist() for level in metadata.anchors] == expected["anchors_px"]
    assert list(metadata.strides) == expected["stride"]


@pytest.mark.parametrize("tag", ["derived_v20_leaky_nc2_legacy", "derived_v31_csp_hswish_nc3"])
def test_models_whose_activations_cannot_be_told_are_refused(tag, golden):
    with pytest.raises(WeightsError, match=r"model.2.cv4.conv.weight is of a BottleneckCSP block"):
        infer_metadata(load_weights(golden / "weights" / f"{tag}.pt").tensors)


def array(size):
    return np.zeros(size, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv1.weight": array(3)}, r"tensor 'conv1.weight' is not of a YOLOv5 model"),
        ({"module.model.0.conv.weight": array(3)}, r"tensor 'module.model.0.conv.weight' is not"),
        ({"model.0.conv\n.weight": array(3)}, r"tensor 'model.0.conv\\n.weight' is not|does not belong"),
        (
            {"model.5.conv.weight": array(7)},
            r"tensor model.5.conv.weight has shape \(7,\) \(7 values\), in .* it has \(128, 64, 3, 3\)",
        ),
        (
            {"model.5.bn.running_var": array(63)},
            r"tensor model.5.bn.running_var has shape \(63,\) .*, in .* it has \(128,\)",
        ),
        (
            {"model.5.bn.weight": array(65)},
            r"tensor model.5.bn.weight has shape \(65,\)|tensor model.5.conv.weight has",
        ),
        ({"model.0.bn.weight": array(0)}, r"tensor model.0\.\S+ has shape .* it has \(\d+.*\)"),
        (
            {"model.13.cv2.conv.weight": None},
            r"tensor model.13.cv2.conv.weight with shape \(64, 256, 1, 1\) is missing",
        ),
        ({"model.13.cv3.bn.weight": None}, r"tensor model.13.cv3.conv.bias is missing"),
        ({"model.6.attention.weight": array(3)}, r"tensor 'model.6.attention.weight' does not belong to a YOLOv5"),
        ({"model.11.conv.weight": array(3)}, r"tensor 'model.11.conv.weight' does not belong"),
        ({"model.2.m.1.cv1.conv.weight": array(9)}, r"C3 blocks have 2 in model.2.m, 2 in .* no depth multiple gives"),
        ({"model.6.m.0.cv1.conv.weight": None}, r"tensor model.6.m\S+ |no depth multiple gives"),
        ({"model.41.m.0.bias": array(3)}, r"the last layer is model.41, in YOLOv5"),
        ({"model.24.m.0.bias": array(20)}, r"model.24.m.0.bias has 20 values, which is no 3 anchors x \(5 \+ classes"),
        ({"model.24.m.0.bias": array(15)}, r"model.24.m.0.bias has 15 values"),
        ({"model.24.m.1.bias": array(24)}, r"tensor model.24.m.1.bias has shape \(24,\) .*, in .* it has \(21,\)"),
        ({"model.24.m.0.bias": None}, r"tensor model.24.m.0.bias is missing"),
        ({"model.24.m.3.bias": array(21)}, r"tensor 'model.24.m.3.bias' does not belong"),
        ({"model.24.anchors": array(16)}, r"tensor model.24.anchors has 16 values, not 2 x anchors x 3"),
        ({"model.24.anchor_grid": array(0)}, r"tensor model.24.anchor_grid has 0 values"),
        ({"model.24.anchor_grid": array(18)}, r"anchor side that is not a positive number"),
        ({"model.24.strides": array(3)}, r"tensor model.24.strides holds 0, 0, 0, in YOLOv5 it is \[8, 16, 32\]"),
        ({"model.24.proto.cv3.bn.weight": array(2)}, r"model.24.m.0.bias has 21 values, which .* 2 mask coefficients"),
    ],
)
def test_what_is_no_yolov5_model_is_refused_by_tensor(changes, message):
    tensors = {name: value for name, value in (tiny() | changes).items() if value is not None}
    with pytest.raises(WeightsError, match=message) as caught:
        infer_metadata(tensors)
    assert len(str(caught.value).splitlines()) == 1


def test_no_tensors_are_no_model():
    with pytest.raises(WeightsError, match="no tensors are there"):
        infer_metadata({})


@pytest.mark.parametrize("name", sorted(tiny()))
def test_every_tensor_is_checked(name):
    """Whichever tensor is left out or has one value more, the model is not taken for a YOLOv5."""
    tensors = tiny()
    with pytest.raises(WeightsError):
        infer_metadata({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(WeightsError):
        infer_metadata(tensors | {name: array(tensors[name].size + 1)})


def test_the_tensors_of_the_network_are_those_that_it_computes_with():
    own = tiny()
    others = ["model.24.anchors", "model.24.anchor_grid", "model.24.strides", "model.24.stride"]
    counter = "model.0.bn.num_batches_tracked"
    assert network_tensors(own | {name: array(18) for name in [*others, counter]}).keys() == own.keys()
    assert all(map(is_detect_buffer, others))
    assert not any(map(is_detect_buffer, [*own, counter]))


@pytest.mark.parametrize(("names", "last"), [([], None), (["fc.bias"], None), (["model.9.x", "model.10.y", "z"], 10)])
def test_the_last_layer_is_the_highest_number(names, last):
    assert last_layer(names) == last
