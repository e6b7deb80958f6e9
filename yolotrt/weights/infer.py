"""What a file without metadata holds, concluded from the names and sizes of its tensors.

Known are the official YOLOv5 architectures with any depth and width: releases 6.0 to 7.0 (models/yolov5s.yaml,
models/hub/yolov5s6.yaml, models/segment/yolov5s-seg.yaml, and the classifiers made of their backbones) and 4.0 to 5.0
(Focus and SPP instead of a 6x6 convolution and SPPF). The description that comes out is checked against the size of
every tensor, so that a network of another kind is refused and never run wrongly.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolotrt.errors import WeightsError
from yolotrt.weights.model import Anchors, FloatArray, Metadata

Row = list[Any]
Tensors = Mapping[str, FloatArray]

CHANNEL_MULTIPLE = 8
"""Channel counts are rounded up to a multiple of this (YOLOv5 models/yolo.py, parse_model)."""

SIZES = {(0.33, 0.25): "n", (0.33, 0.5): "s", (0.67, 0.75): "m", (1.0, 1.0): "l", (1.33, 1.25): "x"}
"""Size letter by depth and width multiple (YOLOv5 models/yolov5*.yaml)."""

STANDARD_ANCHORS: dict[int, Anchors] = {
    3: (
        ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
        ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
        ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
    ),
    4: (
        ((19.0, 27.0), (44.0, 40.0), (38.0, 94.0)),
        ((96.0, 68.0), (86.0, 152.0), (180.0, 137.0)),
        ((140.0, 301.0), (303.0, 264.0), (238.0, 542.0)),
        ((436.0, 615.0), (739.0, 380.0), (925.0, 792.0)),
    ),
}
"""By number of levels: width and height in pixels (YOLOv5 models/yolov5s.yaml and models/hub/yolov5s6.yaml)."""

CLASSIFIER_FEATURES = 1280
"""Channels before the linear layer of YOLOv5's Classify block (models/common.py)."""

CLASSIFIER_NORM = "model.9.conv.bn"
TORCH_EPSILON = 1e-5
"""Classify is made after YOLOv5 sets its own epsilon, and keeps PyTorch's (models/yolo.py, ClassificationModel)."""

PROTOTYPE_CHANNELS = 256
"""Channels inside the Proto block before scaling (YOLOv5 models/segment/yolov5s-seg.yaml)."""

CLASSIFIER_IMAGE_SIZE = 224
"""What YOLOv5's classifiers are trained at (classify/train.py)."""

_STRIDES = (8, 16, 32, 64)
_WIDTHS = {3: (128, 256, 512, 1024), 4: (128, 256, 512, 768, 1024)}
_LEVELS_OF_LAST_LAYER = {24: 3, 33: 4}
_CLASSIFIER_LAYER = 9

_PICTURE_CHANNELS = 3
# The blocks whose channels are scaled, and the convolution in each that gives its output.
_LAST_PART = {"Conv": "", "Focus": ".conv", "C3": ".cv3", "SPP": ".cv2", "SPPF": ".cv2"}

_NAME = re.compile(r"model\.([0-9]{1,4})\.(.+)")
_DETECT_BUFFER = re.compile(r"model\.[0-9]{1,4}\.(anchors|anchor_grid|strides?)")
_COUNTER = ".num_batches_tracked"
_REMEDY = "convert the .pt checkpoint with gen_wts.py and pass the result"


@dataclass(frozen=True)
class _Layout:
    """Which of the official architectures it is.

    Attributes:
        task: As in `Metadata`.
        levels: Detection levels; a classifier has the backbone of a model with 3.
        has_focus: Releases 4.0 and 5.0: the first layer is Focus, and pooling is SPP.
        pools_before_last_c3: Official in the same releases; later the pooling ends the backbone.
    """

    task: str
    levels: int
    has_focus: bool
    pools_before_last_c3: bool

    @property
    def release(self) -> str:
        """The releases with this layout."""
        return "v4.0-v5.0" if self.has_focus else "v6.0+"


@dataclass(frozen=True)
class _LastLayer:
    """What the last layer tells.

    Attributes:
        class_count: Number of classes.
        anchors: Pixels; empty for classification.
        mask_count: Mask coefficients of each row; 0 without segmentation.
        has_own_anchors: Whether the file has anchors.
    """

    class_count: int
    anchors: Anchors = ()
    mask_count: int = 0
    has_own_anchors: bool = False

    @property
    def channels(self) -> int:
        """Channels of a detection level without mask coefficients."""
        return len(self.anchors[0]) * (self.class_count + 5) if self.anchors else 0


def infer_metadata(tensors: Mapping[str, FloatArray]) -> Metadata:
    """Describe the YOLOv5 model that the tensors make up.

    Args:
        tensors: Arrays by YOLOv5's names, in their shapes or flat; only sizes count, and the values of
            ``model.N.anchors`` (in cells), ``model.N.anchor_grid`` (in pixels) and ``model.N.strides`` where present.

    Returns:
        Metadata whose `inferred` says what was concluded or assumed. Class names are placeholders.

    Raises:
        WeightsError: if it is none of the known architectures; the message names the tensor that does not fit.
    """
    layout = _layout(tensors)
    head = _classifier_head(tensors) if layout.task == "classify" else _detection_head(tensors, layout)
    backbone, heads, depth, width = _best_fit(tensors, layout, head)
    _require_fit(network_tensors(tensors), [*backbone, *heads], depth, width, head)
    levels = len(head.anchors)
    side = CLASSIFIER_IMAGE_SIZE if layout.task == "classify" else {3: 640, 4: 1280}[levels]
    yaml = {
        "nc": head.class_count,
        "depth_multiple": depth,
        "width_multiple": width,
        "anchors": [[_number(length) for anchor in level for length in anchor] for level in head.anchors],
        "backbone": backbone,
        "head": heads,
        "ch": _PICTURE_CHANNELS,
    }
    return Metadata(
        yaml=yaml,
        names=tuple(f"class{index}" for index in range(head.class_count)),
        strides=_STRIDES[:levels],
        anchors=head.anchors,
        task=layout.task,
        version=layout.release,
        batch_norm_epsilons={CLASSIFIER_NORM: TORCH_EPSILON} if layout.task == "classify" else {},
        imgsz=(side, side),
        inferred=_inferred(layout, head, depth, width),
    )


def network_tensors(tensors: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Those tensors that a network computes with: no anchors and strides, which are metadata, and no counters."""
    return {n: array for n, array in tensors.items() if not is_detect_buffer(n) and not n.endswith(_COUNTER)}


def is_detect_buffer(name: str) -> bool:
    """Whether the tensor holds a detection layer's anchors or strides."""
    return _DETECT_BUFFER.fullmatch(name) is not None


def last_layer(tensors: Iterable[str]) -> int | None:
    """The N of the last ``model.N.``, or None if no tensor is named so."""
    return max((int(match[1]) for match in map(_NAME.match, tensors) if match), default=None)


def _layout(tensors: Tensors) -> _Layout:
    """Recognise the architecture by the names of a few layers."""
    stranger = next((name for name in tensors if not _NAME.fullmatch(name)), None)
    if stranger is not None or not tensors:
        what = f"tensor {stranger!r:.120} is" if tensors else "no tensors are there, so they are"
        raise WeightsError(f"{what} not of a YOLOv5 model (model.0.conv.weight ...): {_REMEDY}")
    if any(name.startswith("model.2.cv4.") for name in tensors):
        raise WeightsError(
            "tensor model.2.cv4.conv.weight is of a BottleneckCSP block (YOLOv5 before v4.0), whose activations the "
            f"tensors do not tell: {_REMEDY}"
        )
    last = last_layer(tensors)
    has_focus = "model.0.conv.conv.weight" in tensors
    if last == _CLASSIFIER_LAYER and "model.9.linear.weight" in tensors:
        return _Layout("classify", 3, has_focus, pools_before_last_c3=False)
    levels = _LEVELS_OF_LAST_LAYER.get(last if last is not None else -1)
    if levels is None:
        raise WeightsError(
            f"the last layer is model.{last}, in YOLOv5 model.24, model.33 (P6) or model.9 (classification): {_REMEDY}"
        )
    task = "segment" if any(name.startswith(f"model.{last}.proto.") for name in tensors) else "detect"
    last_of_backbone = 2 * len(_WIDTHS[levels]) + 1
    ends_with_c3 = any(name.startswith(f"model.{last_of_backbone}.m.") for name in tensors)
    return _Layout(task, levels, has_focus, pools_before_last_c3=ends_with_c3)


def _classifier_head(tensors: Tensors) -> _LastLayer:
    """The number of classes is that of the linear layer's biases."""
    return _LastLayer(_size(tensors, "model.9.linear.bias"))


def _detection_head(tensors: Tensors, layout: _Layout) -> _LastLayer:
    """Classes and anchors of Detect or Segment."""
    name = f"model.{last_layer(tensors)}"
    mask_count = _out_channels(tensors, f"{name}.proto.cv3") if layout.task == "segment" else 0
    anchors = _anchors(tensors, name, layout.levels)
    per_level = len((anchors or STANDARD_ANCHORS[layout.levels])[0])
    channels = _size(tensors, f"{name}.m.0.bias")
    class_count = channels // per_level - 5 - mask_count
    if channels % per_level or class_count < 1:
        raise WeightsError(
            f"tensor {name}.m.0.bias has {channels} values, which is no {per_level} anchors x (5 + classes"
            f"{f' + {mask_count} mask coefficients' if mask_count else ''}): {_REMEDY}"
        )
    return _LastLayer(class_count, anchors or STANDARD_ANCHORS[layout.levels], mask_count, bool(anchors))


def _anchors(tensors: Tensors, name: str, levels: int) -> Anchors:
    """The file's anchors in pixels, or nothing if it has none."""
    strides = np.array(_STRIDES[:levels])
    for key in (f"{name}.strides", f"{name}.stride"):
        if key in tensors and not np.array_equal(tensors[key].reshape(-1), strides):
            found = ", ".join(f"{value:g}" for value in tensors[key].reshape(-1)[:8])
            raise WeightsError(f"tensor {key} holds {found}, in YOLOv5 it is {strides.tolist()}: {_REMEDY}")
    # YOLOv5 itself decodes with `anchors`; tensorrtx has only the other one.
    for key, scale in ((f"{name}.anchors", strides), (f"{name}.anchor_grid", np.ones(levels))):
        if key in tensors:
            array = tensors[key]
            if not array.size or array.size % (2 * levels):
                raise WeightsError(
                    f"tensor {key} has {array.size} values, not 2 x anchors x {levels} levels: {_REMEDY}"
                )
            pixels = array.reshape(levels, -1, 2) * scale[:, None, None]  # (levels, anchors, 2)
            return tuple(tuple((float(w), float(h)) for w, h in level) for level in pixels)
    return ()


def _best_fit(tensors: Tensors, layout: _Layout, head: _LastLayer) -> tuple[list[Row], list[Row], float, float]:
    """Backbone and head rows, depth and width multiple; whether all tensors fit them is checked afterwards."""
    heads = _head_rows(layout, head)
    # The second C3 has 9 repeats up to v5.0 and 6 from v6.0 on, whatever the other layers are.
    for second_repeats in (6, 9):
        backbone = _backbone_rows(layout, second_repeats)
        depth = _depth_multiple(tensors, [*backbone, *heads])
        if depth is not None:
            return backbone, heads, depth, _width_multiple(tensors, [*backbone, *heads], head)
    counts = [f"{count} in model.{layer}.m" for layer, count in _bottlenecks(tensors, [*backbone, *heads]).items()]
    raise WeightsError(f"the C3 blocks have {', '.join(counts)} bottlenecks, which no depth multiple gives: {_REMEDY}")


def _backbone_rows(layout: _Layout, second_repeats: int) -> list[Row]:
    """The rows of the backbone; a classifier's ends before the pooling."""
    widths = _WIDTHS[layout.levels]
    repeats = (3, second_repeats, 9, 3, 3)
    rows: list[Row] = [[-1, 1, "Focus", [64, 3]] if layout.has_focus else [-1, 1, "Conv", [64, 6, 2, 2]]]
    for width, number in zip(widths, repeats, strict=False):
        rows += [[-1, 1, "Conv", [width, 3, 2]], [-1, number, "C3", [width]]]
    if layout.task == "classify":
        return rows
    if layout.pools_before_last_c3:
        return [*rows[:-1], _pooling(layout), [-1, 3, "C3", [1024, False]]]
    return [*rows, _pooling(layout)]


def _pooling(layout: _Layout) -> Row:
    """SPPF(5) computes what SPP(5, 9, 13) does; only v5.0's P6 models have other windows."""
    if not layout.has_focus:
        return [-1, 1, "SPPF", [1024, 5]]
    is_official_p6 = layout.levels == 4 and layout.pools_before_last_c3
    return [-1, 1, "SPP", [1024, [3, 5, 7] if is_official_p6 else [5, 9, 13]]]


def _head_rows(layout: _Layout, head: _LastLayer) -> list[Row]:
    """The rows of the head: down to the finest level, up again, and the last layer."""
    if layout.task == "classify":
        return [[-1, 1, "Classify", [head.class_count]]]
    widths = _WIDTHS[layout.levels]
    first = 2 * len(widths) + 2
    rows: list[Row] = []
    laterals: list[int] = []
    for level in range(len(widths) - 2, 0, -1):
        laterals.append(first + len(rows))
        rows += [
            [-1, 1, "Conv", [widths[level], 1, 1]],
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 2 + 2 * level], 1, "Concat", [1]],
            [-1, 3, "C3", [widths[level], False]],
        ]
    outputs = [first + len(rows) - 1]
    for level, lateral in enumerate(reversed(laterals), start=1):
        rows += [
            [-1, 1, "Conv", [widths[level], 3, 2]],
            [[-1, lateral], 1, "Concat", [1]],
            [-1, 3, "C3", [widths[level + 1], False]],
        ]
        outputs.append(first + len(rows) - 1)
    if layout.task == "segment":
        return [*rows, [outputs, 1, "Segment", ["nc", "anchors", head.mask_count, PROTOTYPE_CHANNELS]]]
    return [*rows, [outputs, 1, "Detect", ["nc", "anchors"]]]


def _depth_multiple(tensors: Tensors, rows: list[Row]) -> float | None:
    """The depth multiple that gives every C3 its number of bottlenecks, if there is one."""
    counts = _bottlenecks(tensors, rows)
    lowest = max((count - 0.5) / rows[layer][1] if count > 1 else 0.0 for layer, count in counts.items())

    def fits(depth: float) -> bool:
        return all(_repeats(rows[layer][1], depth) == count for layer, count in counts.items())

    return _simplest([depth for depth, _ in SIZES], lowest, fits)


def _bottlenecks(tensors: Tensors, rows: list[Row]) -> dict[int, int]:
    """How many bottlenecks each C3 has, by layer."""
    pattern = re.compile(r"model\.([0-9]{1,4})\.m\.[0-9]{1,4}\.cv1\.conv\.weight")
    found = Counter(int(match[1]) for match in map(pattern.fullmatch, tensors) if match)
    return {layer: found[layer] for layer, row in enumerate(rows) if row[2] == "C3"}


def _width_multiple(tensors: Tensors, rows: list[Row], head: _LastLayer) -> float:
    """The width multiple that gives every layer its channels."""
    channels = {
        index: _out_channels(tensors, f"model.{index}{_LAST_PART[row[2]]}")
        for index, row in enumerate(rows)
        if row[2] in _LAST_PART
    }

    def fits(width: float) -> bool:
        return all(_scaled_width(rows[index][3][0], width, head) == count for index, count in channels.items())

    lowest = max((count - CHANNEL_MULTIPLE) / rows[index][3][0] for index, count in channels.items())
    # Where nothing fits, the width of the first layer lets the check of all sizes name the layer that differs.
    return _simplest([width for _, width in SIZES], max(lowest, 0.0), fits) or channels[0] / rows[0][3][0]


def _simplest(official: list[float], lowest: float, fits: Callable[[float], bool]) -> float | None:
    """The first official multiple that fits, else the number of fewest digits not far above `lowest` that does."""
    candidates = official + [
        round((math.floor(lowest * 10**digits) + step) / 10**digits, digits)
        for digits in (1, 2, 3, 4)
        for step in (0, 1)
    ]
    return next((value for value in candidates if value > 0 and fits(value)), None)


def _repeats(number: int, depth: float) -> int:
    """A row's number, scaled (YOLOv5 models/yolo.py, parse_model)."""
    return max(round(number * depth), 1) if number > 1 else number


def _scaled_width(channels: int, width: float, head: _LastLayer) -> int:
    """A row's channels, scaled; a count that happens to equal the last layer's stays as it is (parse_model again)."""
    return channels if channels == head.channels else _divisible(channels * width)


def _divisible(channels: float) -> int:
    """Rounded up to a multiple of `CHANNEL_MULTIPLE` (YOLOv5 utils/general.py, make_divisible)."""
    return math.ceil(channels / CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def _require_fit(tensors: Tensors, rows: list[Row], depth: float, width: float, head: _LastLayer) -> None:
    """Compare every tensor with that in the described network, in both directions; of flat ones the size counts."""
    model = f"a YOLOv5 model of depth {depth:.2f}, width {width:.2f} and {head.class_count} classes"
    expected = _expected_shapes(tensors, rows, depth, width, head)
    for name, shape in expected.items():
        if name not in tensors:
            raise WeightsError(f"tensor {name} with shape {shape} is missing from {model}: {_REMEDY}")
        found = tensors[name]
        if found.size != math.prod(shape):
            raise WeightsError(
                f"tensor {name} has shape {found.shape} ({found.size} values), in {model} it has {shape} "
                f"({math.prod(shape)}): {_REMEDY}"
            )
    for name in tensors:
        if name not in expected:
            raise WeightsError(f"tensor {name!r:.120} does not belong to {model}: {_REMEDY}")


def _expected_shapes(
    tensors: Tensors, rows: list[Row], depth: float, width: float, head: _LastLayer
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the described network."""
    table = _ShapeTable(tensors, width, head)
    channels: list[int] = []
    for index, (source, number, block, args) in enumerate(rows):
        sources = [item if item >= 0 else index + item for item in (source if isinstance(source, list) else [source])]
        inputs = [channels[item] if item >= 0 else _PICTURE_CHANNELS for item in sources]
        scales_width = block in _LAST_PART
        channels.append(_scaled_width(args[0], width, head) if scales_width else sum(inputs))
        table.add(f"model.{index}", block, inputs, channels[-1], args, _repeats(number, depth))
    return table.shapes


class _ShapeTable:
    """Collects the shape of every tensor in `shapes`, block by block.

    The parts of the blocks are those of YOLOv5's models/common.py. Where the file has no BatchNorm after a convolution,
    it is taken to be folded in, and the convolution has a bias.
    """

    def __init__(self, tensors: Tensors, width: float, head: _LastLayer) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors = tensors
        self._width = width
        self._head = head

    def add(self, name: str, block: str, inputs: list[int], outputs: int, args: list[Any], repeats: int) -> None:
        """Add the tensors of one row; Upsample and Concat have none."""
        match block:
            case "Conv":
                self._conv(name, inputs[0], outputs, args[1])
            case "Focus":  # moves four neighbours into the channels first
                self._conv(f"{name}.conv", 4 * inputs[0], outputs, args[1])
            case "C3":
                self._c3(name, inputs[0], outputs, repeats)
            case "SPP" | "SPPF":  # joins the input with three poolings of it
                self._conv(f"{name}.cv1", inputs[0], inputs[0] // 2)
                self._conv(f"{name}.cv2", inputs[0] // 2 * 4, outputs)
            case "Classify":
                self._conv(f"{name}.conv", inputs[0], CLASSIFIER_FEATURES)
                self._with_bias(f"{name}.linear", self._head.class_count, CLASSIFIER_FEATURES)
            case "Detect":
                self._detect(name, inputs)
            case "Segment":
                self._detect(name, inputs)
                self._prototypes(name, inputs[0], _divisible(args[3] * self._width))

    def _conv(self, name: str, inputs: int, outputs: int, kernel: int = 1) -> None:
        """A convolution and its BatchNorm."""
        self.shapes[f"{name}.conv.weight"] = (outputs, inputs, kernel, kernel)
        if f"{name}.bn.weight" in self._tensors:
            for part in ("weight", "bias", "running_mean", "running_var"):
                self.shapes[f"{name}.bn.{part}"] = (outputs,)
        else:
            self.shapes[f"{name}.conv.bias"] = (outputs,)

    def _with_bias(self, name: str, outputs: int, *inputs: int) -> None:
        """A linear layer (inputs) or 1x1 convolution (inputs, 1, 1) with a bias."""
        self.shapes[f"{name}.weight"] = (outputs, *inputs)
        self.shapes[f"{name}.bias"] = (outputs,)

    def _c3(self, name: str, inputs: int, outputs: int, repeats: int) -> None:
        hidden = outputs // 2
        self._conv(f"{name}.cv1", inputs, hidden)
        self._conv(f"{name}.cv2", inputs, hidden)
        self._conv(f"{name}.cv3", 2 * hidden, outputs)
        for index in range(repeats):
            self._conv(f"{name}.m.{index}.cv1", hidden, hidden)
            self._conv(f"{name}.m.{index}.cv2", hidden, hidden, 3)

    def _detect(self, name: str, inputs: list[int]) -> None:
        """A 1x1 convolution a level."""
        outputs = self._head.channels + len(self._head.anchors[0]) * self._head.mask_count
        for level, channels in enumerate(inputs):
            self._with_bias(f"{name}.m.{level}", outputs, channels, 1, 1)

    def _prototypes(self, name: str, inputs: int, hidden: int) -> None:
        """Segment's Proto block."""
        self._conv(f"{name}.proto.cv1", inputs, hidden, 3)
        self._conv(f"{name}.proto.cv2", hidden, hidden, 3)
        self._conv(f"{name}.proto.cv3", hidden, self._head.mask_count)


def _size(tensors: Tensors, name: str) -> int:
    """Number of values of a tensor that must be there."""
    if name not in tensors:
        raise WeightsError(f"tensor {name} is missing, which every YOLOv5 model of this kind has: {_REMEDY}")
    return tensors[name].size


def _out_channels(tensors: Tensors, name: str) -> int:
    """Output channels of a Conv block: it has one BatchNorm weight, or one bias, each."""
    has_batch_norm = f"{name}.bn.weight" in tensors
    return _size(tensors, f"{name}.bn.weight" if has_batch_norm else f"{name}.conv.bias")


def _inferred(layout: _Layout, head: _LastLayer, depth: float, width: float) -> tuple[str, ...]:
    """What the user should know, one phrase each."""
    letter = SIZES.get((depth, width))
    model = f"yolov5{letter}" if letter else "a custom YOLOv5"
    model += "6" * (letter is not None and layout.levels == 4)
    model += {"detect": "", "segment": "-seg", "classify": "-cls"}[layout.task]
    details = ", ".join([f"depth {depth:.2f}", f"width {width:.2f}", *(["P6"] if layout.levels == 4 else [])])
    has_anchors = layout.task != "classify"
    origin = "anchors from the file" if head.has_own_anchors else "YOLOv5's standard anchors assumed, 3 per level"
    return (
        f"{model} ({details}), {head.class_count} classes" + (f", {origin}" if has_anchors else ""),
        f"class names unknown: class0 to class{head.class_count - 1}",
        f"release {layout.release} and SiLU activations assumed",
    )


def _number(value: float) -> float:
    """A whole number as an int, as YOLOv5's yaml files have it."""
    return int(value) if value.is_integer() else value
