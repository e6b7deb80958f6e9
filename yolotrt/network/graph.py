"""The layer list of a YOLOv5 model, read from its yaml description.

YOLOv5 describes a model by rows ``[from, number, module, args]`` (backbone, then head) with two multiples that scale
its depth and width (models/yolo.py, parse_model). `ModelGraph` is that list with every reference made absolute and
every number scaled, and nothing else: what a block does stands in `yolotrt.network.blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yolotrt.errors import GraphError
from yolotrt.weights.model import Anchors, Metadata

INPUT = -1
"""The source index that stands for the network's input."""

PLAIN_CONV = "nn.Conv2d"
HEAD_CHANNELS = "na * (nc + 5)"
"""How release 1.0's yaml gives the channels of a head."""

MAX_LAYERS = 1000
MAX_REPEATS = 1000
MAX_CHANNELS = 1 << 16

Argument = int | float | bool | str | None | tuple[Any, ...]

_LITERALS: dict[str, Argument] = {"None": None, "True": True, "False": False}


@dataclass(frozen=True)
class Layer:
    """One row of the model's yaml.

    Attributes:
        index: Position in the list; the layer's arrays are named ``model.INDEX...``.
        sources: Indices of the layers that it reads; `INPUT` is the network's input.
        block: The yaml's module name, such as ``C3`` or ``nn.Upsample``.
        repeats: How often the block is repeated, after scaling by the depth multiple.
        args: The yaml's arguments; names such as ``nc`` are replaced by their values, widths are not yet scaled.
    """

    index: int
    sources: tuple[int, ...]
    block: str
    repeats: int
    args: tuple[Argument, ...]

    @property
    def name(self) -> str:
        """The prefix of its arrays, such as ``model.9``."""
        return f"model.{self.index}"

    def __str__(self) -> str:
        return f"layer {self.index} ({self.block})"


@dataclass(frozen=True)
class ModelGraph:
    """A YOLOv5 model as a list of layers in the order of computation.

    Attributes:
        layers: At least one; the last one is the head.
        class_count: Number of classes.
        anchors: Per level, per anchor: width and height in network-input pixels.
        strides: Input pixels per cell of each level.
        width_multiple: Factor on every channel count.
        channel_multiple: Scaled channel counts are rounded up to a multiple of this.
        input_channels: 3 for colour pictures.
    """

    layers: tuple[Layer, ...]
    class_count: int
    anchors: Anchors
    strides: tuple[int, ...]
    width_multiple: float
    channel_multiple: int
    input_channels: int

    @property
    def head(self) -> Layer:
        """The last layer."""
        return self.layers[-1]

    @property
    def anchors_per_level(self) -> int:
        """Number of anchors of each detection level (0 without levels)."""
        return len(self.anchors[0]) if self.anchors else 0

    @property
    def head_channels(self) -> int:
        """Channels of each raw head without mask coefficients: anchors x (x, y, width, height, objectness, classes)."""
        return self.anchors_per_level * (self.class_count + 5)

    @property
    def output_channels(self) -> int:
        """Channels of each raw head."""
        return self.head_channels + self.anchors_per_level * self.mask_count

    @property
    def mask_count(self) -> int:
        """Mask coefficients of each row, which is the number of prototypes; 0 without segmentation."""
        return self._segment_argument(2, 32) if self.head.block == "Segment" else 0

    @property
    def prototype_channels(self) -> int:
        """Channels inside the prototypes' convolutions."""
        return self.scaled_width(self._segment_argument(3, 256))

    @property
    def has_separate_heads(self) -> bool:
        """Whether the heads are rows before Detect, which then has no convolutions, as in release 1.0."""
        return all(source != INPUT and self.layers[source].block == PLAIN_CONV for source in self.head.sources)

    @property
    def size_multiple(self) -> int:
        """Input height and width must be multiples of this: the largest stride."""
        return max(self.strides, default=32)

    def scaled_width(self, channels: int) -> int:
        """Scale a yaml's channel count (YOLOv5's make_divisible; the head's own width stays as it is)."""
        if channels == self.head_channels:
            return channels
        return math.ceil(channels * self.width_multiple / self.channel_multiple) * self.channel_multiple

    def _segment_argument(self, index: int, default: int) -> int:
        """An argument of Segment: [classes, anchors, mask coefficients, prototype channels]."""
        value = self.head.args[index] if len(self.head.args) > index else default
        if not _is_integer(value) or not 1 <= int(str(value)) <= MAX_CHANNELS:
            raise GraphError(f"{self.head} has the argument {value!r:.80}: expected a number from 1 to {MAX_CHANNELS}")
        return int(str(value))

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> ModelGraph:
        """Read the layer list of a model.

        Raises:
            GraphError: if the description is malformed, or a layer reads itself, a later layer or none that exists.
        """
        yaml = metadata.yaml
        depth = _number(yaml, "depth_multiple", 1.0, low=0.0, high=100.0)
        rows = [row for part in ("backbone", "head") for row in _rows(yaml, part)]
        if not 1 <= len(rows) <= MAX_LAYERS:
            raise GraphError(
                f"the model's yaml has {len(rows)} layers: expected 1 to {MAX_LAYERS}: export the weights again"
            )
        symbols: dict[str, Argument] = {**_LITERALS, "nc": len(metadata.names), "anchors": metadata.anchors}
        if metadata.anchors:
            symbols[HEAD_CHANNELS] = len(metadata.anchors[0]) * (len(metadata.names) + 5)
        layers = [_layer(index, row, depth, symbols) for index, row in enumerate(rows)]
        if layers[-1].block == "Detect" and not layers[-1].sources:
            layers[-1] = replace(layers[-1], sources=_separate_heads(layers))
        return cls(
            layers=tuple(layers),
            class_count=len(metadata.names),
            anchors=metadata.anchors,
            strides=metadata.strides,
            width_multiple=_number(yaml, "width_multiple", 1.0, low=0.0, high=100.0),
            channel_multiple=int(_number(yaml, "channel_multiple", 8, low=1, high=1024)),
            input_channels=int(_number(yaml, "ch", 3, low=1, high=1024)),
        )


def _separate_heads(layers: Sequence[Layer]) -> tuple[int, ...]:
    """What Detect reads where its row does not say: all heads, last first (YOLOv5 1.0 models/yolo.py, parse_model)."""
    return tuple(layer.index for layer in reversed(layers) if layer.block == PLAIN_CONV)


def _number(yaml: Mapping[str, Any], key: str, default: float, *, low: float, high: float) -> float:
    """The number `key` of the yaml, or `default` where it is absent."""
    value = yaml.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise GraphError(f"the model's yaml has {key} = {value!r}: expected a number from {low:g} to {high:g}")
    return value


def _rows(yaml: Mapping[str, Any], part: str) -> Sequence[Any]:
    """The rows of ``backbone`` or ``head``."""
    rows = yaml.get(part, [])
    if not isinstance(rows, list | tuple):
        raise GraphError(f"the model's yaml has a {part} that is no list: export the weights again")
    return rows


def _layer(index: int, row: Any, depth: float, symbols: Mapping[str, Argument]) -> Layer:
    """One row as a `Layer`."""
    where = f"layer {index} of the model's yaml"
    if not isinstance(row, list | tuple) or len(row) != 4:
        raise GraphError(f"{where} is not [from, number, module, args]: {row!r:.80}")
    source, number, block, args = row
    if not isinstance(block, str):
        raise GraphError(f"{where} names no module: {block!r:.80}")
    if not _is_integer(number) or not 1 <= number <= MAX_REPEATS:
        raise GraphError(f"{where} ({block}) is repeated {number!r:.80} times: expected 1 to {MAX_REPEATS}")
    if not isinstance(args, list | tuple):
        raise GraphError(f"{where} ({block}) has arguments that are no list: {args!r:.80}")
    sources = source if isinstance(source, list | tuple) else [source]
    repeats = max(round(number * depth), 1) if number > 1 else number
    if repeats > MAX_REPEATS:
        raise GraphError(f"{where} ({block}) is repeated {repeats} times: expected 1 to {MAX_REPEATS}")
    return Layer(
        index=index,
        sources=tuple(_absolute(item, index, f"{where} ({block})") for item in sources),
        block=block,
        repeats=repeats,
        args=tuple(_argument(item, symbols, f"{where} ({block})") for item in args),
    )


def _absolute(source: Any, index: int, where: str) -> int:
    """A yaml's `from` value as an absolute layer index; negative values count back from the layer itself."""
    if not _is_integer(source):
        raise GraphError(f"{where} reads from {source!r:.80}: expected a layer number")
    absolute = index + source if source < 0 else source
    if not INPUT <= absolute < index:
        raise GraphError(f"{where} reads from layer {absolute}: only earlier layers can be read")
    return int(absolute)


def _argument(value: Any, symbols: Mapping[str, Argument], where: str) -> Argument:
    """A yaml's argument with names replaced, checked to be something that a block can take."""
    if isinstance(value, str):
        return symbols.get(value, value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if not abs(value) <= MAX_CHANNELS:
            raise GraphError(f"{where} has the argument {value}: expected at most {MAX_CHANNELS}")
        return value
    if isinstance(value, list | tuple) and len(value) <= MAX_LAYERS:
        return tuple(_argument(item, symbols, where) for item in value)
    raise GraphError(f"{where} has an argument that no block takes: {value!r:.80}")


def _is_integer(value: Any) -> bool:
    """Whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
