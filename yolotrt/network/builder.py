"""From weights to a network definition: walks the model's layer list and lets each block add its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yolotrt.errors import GraphError, NetworkError, WeightsError, YolotrtError
from yolotrt.network import recorder
from yolotrt.network.blocks import BLOCKS, Block
from yolotrt.network.graph import INPUT, Layer, ModelGraph
from yolotrt.network.ops import MAX_TENSOR_VOLUME, Ops, OutlineOps, Tensor
from yolotrt.network.quantize import TENSORRT, Placement, Quantization, Quantizer
from yolotrt.weights import Weights
from yolotrt.weights.model import FloatArray

INPUT_NAME = "images"
PICTURE_CHANNELS = 3

DERIVED_TENSORS = ("anchors", "anchor_grid", "stride", "strides", "num_batches_tracked")
"""Last parts of names that a checkpoint stores beside the layers' weights; the metadata hold what they say."""

MAX_TENSORS = 100_000
"""A hundred times as many as the largest YOLOv5 model has."""

STATISTICS = (".running_mean", ".running_var")
"""What BatchNorm measures, as opposed to what it learns."""


@dataclass(frozen=True)
class LayerSummary:
    """What the builder saw of one layer of the yaml.

    Attributes:
        layer: The row of the yaml.
        shapes: Shape of each output, (batch, channels, height, width).
        parameters: Trained values; BatchNorm has two a channel, its statistics do not count, as in YOLOv5.
        operations: Multiplications and additions of its convolutions and matrix products for one picture.
    """

    layer: Layer
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    operations: int


class NetworkBuilder:
    """Reconstructs a YOLOv5 model in a network definition with raw `add_*` calls.

    Attributes:
        graph: The model's layer list.
        summary: One entry a layer, filled by `build`.
    """

    def __init__(
        self,
        network: Any,
        trt: Any,
        weights: Weights,
        *,
        compute_dtype: Any,
        explain: Callable[[], str] = str,
        io_dtype: Any = None,
        quantization: Quantization | None = None,
        placement: Placement = TENSORRT,
    ) -> None:
        """Prepare to build into an empty network.

        Args:
            network: An `INetworkDefinition` without layers.
            trt: The module that it comes from.
            weights: The model.
            compute_dtype: `trt.float32` or `trt.float16`.
            explain: Returns the library's last error message.
            io_dtype: The type of the network's input and outputs; None is `trt.float32`.
            quantization: Makes it an INT8 network, with `compute_dtype` where it is not INT8.
            placement: Where the library wants INT8 to begin and end.

        Raises:
            GraphError: if the model's yaml is malformed.
        """
        self._network = network
        self.graph = ModelGraph.from_metadata(weights.metadata)
        self.summary: list[LayerSummary] = []
        self._quantizer = None
        if quantization is not None:
            self._quantizer = Quantizer(quantization, placement, (INPUT_NAME,), self._head_rows())
        self._weights = _UsedWeights(weights.tensors, weights.metadata, source=weights)
        self._ops = self._make_ops(network, trt, self._weights, compute_dtype, explain, io_dtype)

    @property
    def keep_alive(self) -> list[Any]:
        """Arrays that must outlive the engine's build, since TensorRT reads them by pointer; see `serialize`."""
        return list(self._ops.keep_alive)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Names of all convolutions."""
        return tuple(self._ops.convolutions)

    @property
    def int8_convolutions(self) -> tuple[str, ...]:
        """Names of those that read INT8 activations and an INT8 kernel."""
        return tuple(self._ops.int8_convolutions)

    def build(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """Add input ``images`` (batch, 3, height, width), all layers, and the heads as outputs; see `build_heads`."""
        return self.mark_outputs(self.build_heads(batch, height, width))

    def mark_outputs(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make tensors the network's outputs, by name."""
        return {name: self._ops.output(tensor, name) for name, tensor in tensors.items()}

    def serialize(self, builder: Any, config: Any) -> bytes | None:
        """Let the library build the plan, while this object keeps the arrays alive that it reads by pointer.

        Returns:
            The plan, or None if the library failed.
        """
        plan = builder.build_serialized_network(self._network, config)
        return None if plan is None else bytes(plan)

    def build_heads(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """Add input ``images`` (batch, 3, height, width) and all layers, but no output.

        Args:
            batch: Number of pictures, or -1 for a dynamic batch.
            height: Input height in pixels, a multiple of the largest stride.
            width: Input width in pixels, likewise.

        Returns:
            The network's outputs by name, of the compute type. Detection: ``head0`` and on, a level each, in the
            model's order (finest first, but for release 1.0), (batch, anchors x (5 + classes), height / stride, width /
            stride). Segmentation: the same with mask coefficients after the classes, and ``prototypes`` (batch,
            coefficients, height / 4, width / 4). Classification: ``logits`` (batch, classes).

        Raises:
            GraphError: if a block is unknown, or its arguments or the image size do not fit.
            WeightsError: if a tensor is missing, has another shape, or is left over.
            NetworkError: if the library refuses a layer.
        """
        self._check_input(height, width)
        image = self._ops.input(INPUT_NAME, (batch, PICTURE_CHANNELS, height, width))
        heads = self._add_layers(image)
        self._check_head_sizes(heads, height, width)
        self._check_no_tensor_is_left()
        if self._quantizer is not None:
            self._quantizer.check_kept_layers_exist()
        return heads

    def _head_rows(self) -> list[str]:
        """Names of the rows whose convolutions give the raw heads."""
        rows = [self.graph.head]
        if self.graph.has_separate_heads:
            rows += [self.graph.layers[source] for source in self.graph.head.sources]
        return [row.name for row in rows]

    def _make_ops(
        self, network: Any, trt: Any, weights: Weights, compute_dtype: Any, explain: Callable[[], str], io_dtype: Any
    ) -> Ops:
        """What adds the layers."""
        return Ops(network, trt, weights, compute_dtype, explain, io_dtype=io_dtype, quantizer=self._quantizer)

    def _add_layers(self, image: Tensor) -> dict[str, Tensor]:
        """Add all layers of the yaml; returns what the head gives."""
        tensors: dict[int, Any] = {INPUT: image}
        for layer in self.graph.layers:
            parameters, operations = self._weights.parameter_count_used, self._ops.operations
            tensors[layer.index] = self._add(layer, tensors)
            result = tensors[layer.index]
            outputs = result.values() if isinstance(result, dict) else [result]
            self.summary.append(
                LayerSummary(
                    layer,
                    shapes=tuple(tuple(tensor.shape) for tensor in outputs),
                    parameters=self._weights.parameter_count_used - parameters,
                    operations=self._ops.operations - operations,
                )
            )
        heads = tensors[self.graph.head.index]
        if not isinstance(heads, dict):
            raise GraphError(f"{self.graph.head} ends the network but is no head: expected Detect, Segment or Classify")
        return heads

    def _add(self, layer: Layer, tensors: Mapping[int, Tensor]) -> Any:
        """Add one row of the yaml."""
        known = BLOCKS.get(layer.block)
        if known is None:
            raise GraphError(self._unknown(layer))
        inputs = [tensors[source] for source in layer.sources]
        if not inputs or any(isinstance(tensor, dict) for tensor in inputs):
            raise GraphError(f"{layer} reads from layers {layer.sources}, which give no tensor")
        if not known.takes_list and len(inputs) != 1:
            raise GraphError(f"{layer} reads from {len(inputs)} layers: it takes one")
        try:
            return self._call(layer, known, inputs if known.takes_list else inputs[0])
        except YolotrtError as error:
            raise type(error)(f"{layer}: {error}") from error
        except (TypeError, ValueError, ArithmeticError) as problem:
            raise GraphError(f"{layer} cannot take the arguments {layer.args!r:.120} ({problem})") from problem
        except MemoryError as problem:
            raise GraphError(f"{layer} is too large for this machine's memory") from problem
        except (AttributeError, RuntimeError) as problem:
            raise NetworkError(f"{layer}: the library failed ({problem}): report this with its version") from problem

    def _unknown(self, layer: Layer) -> str:
        """The message for a block that is not there; says which YOLOv5 the model is."""
        metadata = self._ops.weights.metadata
        release = f", of YOLOv5 {metadata.version}" if metadata.version else ""
        return (
            f"{layer} is a block that this version does not know; the model is for the task {metadata.task}{release}: "
            f"known blocks are {', '.join(sorted(BLOCKS))}"
        )

    def _call(self, layer: Layer, known: Block, x: Any) -> Any:
        """Call the block's function with the yaml's arguments, as YOLOv5's parse_model passes them."""
        if known.is_head:
            return known.build(self._ops, x, layer.name, self.graph)
        args = list(layer.args)
        if known.scales_width:
            args[:1] = [self.graph.scaled_width(_channel_count(args))]
        if known.repeats_inside:
            return known.build(self._ops, x, layer.name, args[0], layer.repeats, *args[1:])
        if layer.repeats == 1:
            return known.build(self._ops, x, layer.name, *args)
        for copy in range(layer.repeats):
            x = known.build(self._ops, x, f"{layer.name}.{copy}", *args)
        return x

    def _check_input(self, height: int, width: int) -> None:
        if self.graph.input_channels != PICTURE_CHANNELS:
            raise GraphError(
                f"the model takes pictures of {self.graph.input_channels} channels: only colour pictures are supported"
            )
        multiple = self.graph.size_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise GraphError(
                f"image size {height}x{width} does not fit this model: both must be multiples of {multiple}: "
                f"use --imgsz {_round_up(height, multiple)} {_round_up(width, multiple)}"
            )

    def _check_head_sizes(self, heads: Mapping[str, Tensor], height: int, width: int) -> None:
        """The strides in the metadata must be those of the graph, or all boxes would be wrong."""
        for level, stride in enumerate(self.graph.strides):
            name = f"head{level}"
            tensor = heads[name]
            expected = (height // stride, width // stride)
            if tuple(tensor.shape[2:]) != expected:
                raise GraphError(
                    f"{name} is {tuple(tensor.shape[2:])} cells large, but its stride of {stride} makes {expected}: "
                    "the metadata do not belong to this graph"
                )

    def _check_no_tensor_is_left(self) -> None:
        left = sorted(name for name in self._weights.unused() if name.rsplit(".", 1)[-1] not in DERIVED_TENSORS)
        if left:
            raise WeightsError(
                f"tensor {left[0]} ({len(left)} in all) is not used by the graph: the weights do not belong to it"
            )


def summarise(weights: Weights, height: int, width: int) -> list[LayerSummary]:
    """What a build would see of each layer, without building: no array is computed.

    Args:
        weights: The model; without tensors, those that its graph needs are taken to be there.
        height: Input height in pixels.
        width: Input width in pixels.

    Raises:
        GraphError, NetworkError, WeightsError: as `NetworkBuilder.build`.
    """
    if not weights.tensors:
        weights = _ImaginedWeights({}, weights.metadata)
    outline = _OutlineBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float32)
    outline.build(1, height, width)
    return outline.summary


class _OutlineBuilder(NetworkBuilder):
    """Walks through the layers without looking at a single weight's value."""

    def _make_ops(
        self, network: Any, trt: Any, weights: Weights, compute_dtype: Any, explain: Callable[[], str], io_dtype: Any
    ) -> Ops:
        return OutlineOps(network, trt, weights, compute_dtype, explain, io_dtype=io_dtype)


@dataclass(frozen=True)
class _ImaginedWeights(Weights):
    """Has every tensor that is asked for; the values mean nothing."""

    names: set[str] = field(default_factory=set)

    def take(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        self.names.add(name)
        if len(self.names) > MAX_TENSORS or math.prod(shape) > MAX_TENSOR_VOLUME:
            raise WeightsError(f"tensor {name} with shape {shape} is one that no YOLOv5 model has: check its metadata")
        return np.empty(shape, np.float32)


@dataclass(frozen=True)
class _UsedWeights(Weights):
    """Weights that remember what was taken from them.

    Attributes:
        source: The weights.
        taken: Number of values of each tensor that was taken.
    """

    source: Weights
    taken: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        array = self.source.take(name, shape)
        self.taken[name] = array.size
        return array

    @property
    def parameter_count_used(self) -> int:
        """Values that training changes in the tensors that were taken."""
        return sum(size for name, size in self.taken.items() if not name.endswith(STATISTICS))

    def unused(self) -> set[str]:
        """Names that were never taken."""
        return set(self.tensors) - self.taken.keys()


def _channel_count(args: list[Any]) -> int:
    """The block's first argument, which must be a channel count."""
    if not args or isinstance(args[0], bool) or not isinstance(args[0], int) or args[0] < 1:
        raise ValueError("the first argument must be a number of channels")
    return args[0]


def _round_up(value: int, multiple: int) -> int:
    return max(-(-value // multiple), 1) * multiple
