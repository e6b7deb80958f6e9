"""A network definition that needs no TensorRT: it checks each call as TensorRT does and remembers it.

The module stands in for `tensorrt`: it has the names of TensorRT's strongly typed Python API that this project uses,
with the same meaning, so that one builder serves all. `Builder.build_serialized_network` gives an ONNX model instead of
a plan (see `yolotrt.network.onnx_writer`). Where TensorRT logs an error and returns None, an exception is raised at the
faulty call (`yolotrt.errors.NetworkError`), since there is no logger to look at.
"""

from __future__ import annotations

import enum
import graphlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from yolotrt.errors import NetworkError

Shape = tuple[int, ...]

DYNAMIC = -1
"""A dimension whose size is only known when the engine runs."""

MAX_RANK = 8
"""TensorRT's Dims.MAX_DIMS."""


class DataType(enum.Enum):
    """Element types, with TensorRT's names."""

    FLOAT = "float32"
    HALF = "float16"
    INT8 = "int8"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return np.dtype(self.value).itemsize

    @classmethod
    def of(cls, dtype: npt.DTypeLike) -> DataType:
        """The type that corresponds to a NumPy dtype."""
        name = np.dtype(dtype).name
        try:
            return cls(name)
        except ValueError:
            raise NetworkError(f"weights of type {name} are not supported: convert them to float32") from None


float32, float16, int8, int32, int64 = DataType.FLOAT, DataType.HALF, DataType.INT8, DataType.INT32, DataType.INT64
_FLOATS = (float32, float16)

ActivationType = enum.Enum("ActivationType", "RELU SIGMOID TANH LEAKY_RELU ELU SOFTPLUS CLIP HARD_SIGMOID")
ElementWiseOperation = enum.Enum("ElementWiseOperation", "SUM PROD MAX MIN SUB DIV POW")
PoolingType = enum.Enum("PoolingType", "MAX AVERAGE")
ReduceOperation = enum.Enum("ReduceOperation", "SUM PROD MAX MIN AVG")
MatrixOperation = enum.Enum("MatrixOperation", "NONE TRANSPOSE")
InterpolationMode = enum.Enum("InterpolationMode", "NEAREST LINEAR")
ResizeCoordinateTransformation = enum.Enum("ResizeCoordinateTransformation", "ALIGN_CORNERS ASYMMETRIC HALF_PIXEL")
ResizeRoundMode = enum.Enum("ResizeRoundMode", "HALF_UP HALF_DOWN FLOOR CEIL")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    """Flags of `Builder.create_network`; networks here are always strongly typed."""

    STRONGLY_TYPED = 0


class MemoryPoolType(enum.Enum):
    """Memory pools of a build; accepted and without meaning here."""

    WORKSPACE = "workspace"


class Weights:
    """A constant array given to a layer; `Weights(dtype)` is empty, for kernels that `set_input(1, ...)` brings."""

    def __init__(self, array: npt.NDArray[Any] | DataType = float32) -> None:
        if isinstance(array, DataType):
            array = np.zeros(0, array.value)
            self.is_absent = True
        elif not isinstance(array, np.ndarray):
            raise NetworkError(f"weights must be a NumPy array, not {type(array).__name__}")
        else:
            self.is_absent = False
        if not array.flags.c_contiguous:
            raise NetworkError("weights must be contiguous: pass numpy.ascontiguousarray(...)")
        self.array = array
        self.dtype = DataType.of(array.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.array.size)


class Tensor:
    """A value in the network (TensorRT's ITensor): an input, a constant or a layer's output."""

    def __init__(self, name: str, source: Layer | None, shape: Shape = (), dtype: DataType = float32) -> None:
        self.name = name
        self.source = source
        self._shape = shape
        self._dtype = dtype
        self.is_network_input = source is None
        self.is_network_output = False
        self.consumers: list[Layer] = []

    @property
    def shape(self) -> Shape:
        """Dimensions; -1 for dynamic ones. Raises NetworkError if the layer is wrong."""
        return self._shape if self.source is None else self.source.inferred()[0]

    def set_shape(self, shape: Shape) -> None:
        """Give a network input other dimensions."""
        self._shape = shape
        for layer in self.consumers:
            layer.forget()

    @property
    def dtype(self) -> DataType:
        """Element type. Raises NetworkError if the layer is wrong."""
        return self._dtype if self.source is None else self.source.inferred()[1]


class Layer:
    """A layer (TensorRT's ILayer): its inputs and attributes, and the rule for its output.

    Attributes are checked when the output's shape or type is first asked for, since they are set after the layer was
    added; setting one later checks anew.
    """

    kind = ""
    _is_added = False
    _cached: tuple[Shape, DataType] | None = None

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.name = f"(Unnamed Layer) [{self.kind}]"
        self.inputs = list(inputs)
        self.output = Tensor("", self)
        self.metadata = ""

    def __setattr__(self, key: str, value: Any) -> None:
        if self._is_added and not hasattr(self, key):
            raise self.error(f"has no attribute {key}")
        object.__setattr__(self, key, value)
        if key != "_cached":
            self.forget()

    @property
    def num_inputs(self) -> int:
        """Number of input tensors."""
        return len(self.inputs)

    def get_input(self, index: int) -> Tensor:
        """Input tensor `index`."""
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor | None:
        """The layer's only output for index 0, else None."""
        return self.output if index == 0 else None

    def set_input(self, index: int, tensor: Tensor) -> None:
        """Replace input `index`, or append one."""
        self.require(index <= len(self.inputs), f"has no input {index}")
        self.require(tensor.source is None or not tensor.source.depends_on(self), "it would read its own output")
        self.inputs[index:] = [tensor, *self.inputs[index + 1 :]]
        tensor.consumers.append(self)
        self.forget()

    def sources(self) -> list[Layer]:
        """The layers that it reads."""
        return [tensor.source for tensor in self.inputs if tensor.source is not None]

    def depends_on(self, other: Layer) -> bool:
        """Whether it is `other` or reads it, be it through further layers."""
        seen: set[Layer] = set()
        layers = [self]
        while layers:
            layer = layers.pop()
            if layer not in seen:
                seen.add(layer)
                layers.extend(layer.sources())
        return other in seen

    def forget(self) -> None:
        """Check this layer and those that depend on it anew when their shape or type is asked for next."""
        layers = [self]
        while layers:
            layer = layers.pop()
            if layer._cached is not None:  # else no dependent layer is cached either
                layer._cached = None
                layers.extend(layer.output.consumers)

    def inferred(self) -> tuple[Shape, DataType]:
        """Shape and type of the output, by this layer's rule."""
        if self._cached is None:
            shape, dtype = self.infer()
            self._cached = (tuple(int(size) for size in shape), dtype)
        return self._cached

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Check inputs and attributes; return the output's shape and type."""
        raise NotImplementedError

    def error(self, problem: str) -> NetworkError:
        """An error that names this layer."""
        return NetworkError(f"{self.kind} layer {self.name}: {problem}")

    def require(self, condition: bool, problem: str) -> None:
        """Raise `error(problem)` unless the condition holds."""
        if not condition:
            raise self.error(problem)

    def broadcast(self, a: Sequence[int], b: Sequence[int], problem: str) -> Shape:
        """The common shape of two that agree or are 1 in each dimension; raises `error(problem)` if they do not."""
        self.require(
            len(a) == len(b) and all(m == n or 1 in (m, n) or DYNAMIC in (m, n) for m, n in zip(a, b, strict=True)),
            problem,
        )
        return tuple(m if n == 1 else n if m == 1 else max(m, n) for m, n in zip(a, b, strict=True))

    def require_pair(self, name: str, low: int) -> tuple[int, int]:
        """The attribute `name`, which must be two whole numbers of at least `low`."""
        value = tuple(getattr(self, name))
        self.require(
            len(value) == 2 and all(isinstance(v, int | np.integer) and v >= low for v in value),
            f"{name} is {value}: expected two whole numbers of at least {low}",
        )
        return value


AnyLayer = TypeVar("AnyLayer", bound=Layer)


class ConstantLayer(Layer):
    """A constant tensor."""

    kind = "Constant"

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__([])
        self.shape = tuple(shape)
        self.weights = weights

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The given shape, which must have as many elements as the weights."""
        self.require(
            len(self.shape) <= MAX_RANK and all(size >= 1 for size in self.shape),
            f"shape {self.shape} is not of at most {MAX_RANK} positive sizes",
        )
        self.require(
            math.prod(self.shape) == self.weights.size,
            f"{self.weights.size} values for a constant of shape {self.shape}",
        )
        return self.shape, self.weights.dtype


class ConvolutionLayer(Layer):
    """2-D convolution, or its transpose."""

    kind = "Convolution"

    def __init__(
        self,
        x: Tensor,
        num_output_maps: int,
        kernel_shape: Sequence[int],
        kernel: Weights,
        bias: Weights | None,
        transposed: bool,
    ) -> None:
        super().__init__([x])
        self.kind = "Deconvolution" if transposed else "Convolution"
        self.transposed = transposed
        self.num_output_maps = num_output_maps
        self.kernel_size_nd = tuple(kernel_shape)
        self.kernel = kernel
        self.bias = bias
        self.stride_nd: Sequence[int] = (1, 1)
        self.pre_padding: Sequence[int] = (0, 0)
        self.post_padding: Sequence[int] = (0, 0)
        self.dilation_nd: Sequence[int] = (1, 1)
        self.num_groups = 1

    @property
    def padding_nd(self) -> Sequence[int]:
        """Padding before the first row and column, and, once it is set, after the last."""
        return self.pre_padding

    @padding_nd.setter
    def padding_nd(self, padding: Sequence[int]) -> None:
        self.pre_padding = self.post_padding = padding

    def kernel_shape(self) -> Shape:
        """Shape of the kernel: (out, in / groups, height, width); transposed (in, out / groups, height, width)."""
        c_in, c_out = self.inputs[0].shape[1], self.num_output_maps
        first, second = (c_in, c_out) if self.transposed else (c_out, c_in)
        return (first, second // self.num_groups, *self.kernel_size_nd)

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Check channels, groups, kernel, bias and types; return (batch, out, height, width)."""
        x = self.inputs[0]
        self.require(len(x.shape) == 4, f"the input has {len(x.shape)} dimensions: expected 4")
        self.require(x.shape[1] != DYNAMIC, "the input's channels are dynamic: their number must be known")
        self.require(x.dtype in _FLOATS, f"the input is {x.dtype.name}: expected FLOAT or HALF")
        self.require(self.num_output_maps >= 1, f"{self.num_output_maps} output channels")
        kernel_size = self.require_pair("kernel_size_nd", 1)
        stride, dilation = self.require_pair("stride_nd", 1), self.require_pair("dilation_nd", 1)
        before, after = self.require_pair("pre_padding", 0), self.require_pair("post_padding", 0)
        self._check_groups(x.shape[1])
        self._check_weights(x.dtype)
        size_rule = _transposed_size if self.transposed else _window_size
        padding = [sum(ends) for ends in zip(before, after, strict=True)]
        sizes = [size_rule(*values) for values in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)]
        self.require(
            all(size > 0 or size == DYNAMIC for size in sizes), f"kernel {kernel_size} is larger than the padded input"
        )
        return (x.shape[0], self.num_output_maps, *sizes), x.dtype

    def _check_groups(self, channels: int) -> None:
        groups = self.num_groups
        self.require(
            groups >= 1 and channels % groups == 0 and self.num_output_maps % groups == 0,
            f"{channels} input and {self.num_output_maps} output channels cannot be split into {groups} groups",
        )

    def _check_weights(self, dtype: DataType) -> None:
        shape = self.kernel_shape()
        if len(self.inputs) > 1:
            brought = self.inputs[1]
            self.require(brought.shape == shape, f"kernel of shape {brought.shape}: expected {shape}")
            self.require(brought.dtype == dtype, f"kernel is {brought.dtype.name}, the input {dtype.name}")
        else:
            self.require(
                self.kernel.size == math.prod(shape),
                f"kernel has {self.kernel.size} values: {math.prod(shape)} are needed for shape {shape}",
            )
            self.require(self.kernel.dtype == dtype, f"kernel is {self.kernel.dtype.name}, the input {dtype.name}")
        if self.bias is not None and not self.bias.is_absent:
            self.require(
                self.bias.size == self.num_output_maps,
                f"bias has {self.bias.size} values for {self.num_output_maps} output channels",
            )
            self.require(self.bias.dtype == dtype, f"bias is {self.bias.dtype.name}, the input {dtype.name}")


_FLOAT32_MAX = float(np.finfo(np.float32).max)

_ACTIVATION_DEFAULTS = {
    ActivationType.LEAKY_RELU: (0.01, 0.0),
    ActivationType.ELU: (1.0, 0.0),
    ActivationType.SOFTPLUS: (1.0, 1.0),
    ActivationType.HARD_SIGMOID: (0.2, 0.5),
    ActivationType.CLIP: (-_FLOAT32_MAX, _FLOAT32_MAX),
}
"""TensorRT's alpha and beta where none are set."""


class ActivationLayer(Layer):
    """An elementwise function of one input."""

    kind = "Activation"

    def __init__(self, x: Tensor, function: Any) -> None:
        super().__init__([x])
        self.type = function
        self.alpha, self.beta = _ACTIVATION_DEFAULTS.get(function, (0.0, 0.0))

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Shape and type of the input."""
        x = self.inputs[0]
        self.require(x.dtype in _FLOATS, f"the input is {x.dtype.name}: expected FLOAT or HALF")
        return x.shape, x.dtype


class ElementWiseLayer(Layer):
    """An elementwise operation on two inputs, whose dimensions agree or are 1."""

    kind = "ElementWise"

    def __init__(self, a: Tensor, b: Tensor, operation: Any) -> None:
        super().__init__([a, b])
        self.op = operation

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The broadcast shape."""
        a, b = self.inputs
        self.require(a.dtype == b.dtype, f"the inputs are {a.dtype.name} and {b.dtype.name}: cast one")
        self.require(a.dtype != int8, "the inputs are INT8: dequantize them")
        return self.broadcast(a.shape, b.shape, f"the inputs have shapes {a.shape} and {b.shape}"), a.dtype


class PoolingLayer(Layer):
    """2-D pooling."""

    kind = "Pooling"

    def __init__(self, x: Tensor, pooling: Any, window: Sequence[int]) -> None:
        super().__init__([x])
        self.type = pooling
        self.window_size_nd = tuple(window)
        self.stride_nd: Sequence[int] = (1, 1)
        self.padding_nd: Sequence[int] = (0, 0)
        self.average_count_excludes_padding = True

    def infer(self) -> tuple[Sequence[int], DataType]:
        """(batch, channels, height, width) of the pooled input."""
        x = self.inputs[0]
        known = (*_FLOATS, int8) if self.type == PoolingType.MAX else _FLOATS
        self.require(x.dtype in known, f"the input is {x.dtype.name}: expected {' or '.join(t.name for t in known)}")
        self.require(len(x.shape) == 4, f"the input has {len(x.shape)} dimensions: expected 4")
        window, stride = self.require_pair("window_size_nd", 1), self.require_pair("stride_nd", 1)
        padding = self.require_pair("padding_nd", 0)
        self.require(
            all(p < w for p, w in zip(padding, window, strict=True)), f"padding {padding} is not below window {window}"
        )
        sizes = [
            _window_size(size, w, s, 2 * p, 1)
            for size, w, s, p in zip(x.shape[2:], window, stride, padding, strict=True)
        ]
        self.require(
            all(size > 0 or size == DYNAMIC for size in sizes), f"window {window} is larger than the padded input"
        )
        return (*x.shape[:2], *sizes), x.dtype


class ConcatenationLayer(Layer):
    """Tensors joined along one axis."""

    kind = "Concatenation"

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__(inputs)
        self.axis = max(len(inputs[0].shape) - 3, 0)  # TensorRT's default: the channels

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The inputs' shape with their sizes along the axis summed."""
        first = self.inputs[0]
        rank = len(first.shape)
        self.require(0 <= self.axis < rank, f"axis {self.axis} is outside 0..{rank - 1}")
        for other in self.inputs[1:]:
            self.require(other.dtype == first.dtype, f"the inputs are {first.dtype.name} and {other.dtype.name}")
            agree = len(other.shape) == rank and all(
                axis == self.axis or m == n or DYNAMIC in (m, n)
                for axis, (m, n) in enumerate(zip(first.shape, other.shape, strict=True))
            )
            self.require(agree, f"shapes {first.shape} and {other.shape} differ besides axis {self.axis}")
        shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in self.inputs), strict=True)]
        sizes = [tensor.shape[self.axis] for tensor in self.inputs]
        shape[self.axis] = DYNAMIC if DYNAMIC in sizes else sum(sizes)
        return shape, first.dtype


class ResizeLayer(Layer):
    """Resampling by a factor a dimension."""

    kind = "Resize"

    def __init__(self, x: Tensor) -> None:
        super().__init__([x])
        self.scales: Sequence[float] = ()
        self.resize_mode = InterpolationMode.NEAREST
        self.coordinate_transformation = ResizeCoordinateTransformation.ASYMMETRIC
        self.nearest_rounding = ResizeRoundMode.FLOOR

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Each size times its scale, rounded down."""
        x, scales = self.inputs[0], tuple(self.scales)
        is_nearest = self.resize_mode == InterpolationMode.NEAREST
        known = (*_FLOATS, int8) if is_nearest else _FLOATS
        self.require(x.dtype in known, f"the input is {x.dtype.name}: expected {' or '.join(t.name for t in known)}")
        self.require(
            len(scales) == len(x.shape) and bool(scales), f"{len(scales)} scales for {len(x.shape)} dimensions"
        )
        self.require(all(scale > 0 for scale in scales), f"scales {scales}: expected positive numbers")
        self.require(
            is_nearest or all(scale == 1 for scale in scales[:-2]), f"scales {scales}: linear takes the last two"
        )
        sizes = [size if size == DYNAMIC else math.floor(size * s) for size, s in zip(x.shape, scales, strict=True)]
        self.require(0 not in sizes, f"scales {scales} leave nothing of shape {x.shape}")
        return sizes, x.dtype


class SliceLayer(Layer):
    """A regular part of a tensor: `shape` elements from `start` in steps of `stride`."""

    kind = "Slice"

    def __init__(self, x: Tensor, start: Sequence[int], shape: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__([x])
        self.start, self.shape, self.stride = tuple(start), tuple(shape), tuple(stride)

    def infer(self) -> tuple[Sequence[int], DataType]:
        """`shape`, all of whose elements must lie inside the input."""
        x = self.inputs[0]
        lengths = {len(self.start), len(self.shape), len(self.stride)}
        self.require(lengths == {len(x.shape)}, f"start, shape and stride must have {len(x.shape)} values")
        for size, start, count, stride in zip(x.shape, self.start, self.shape, self.stride, strict=True):
            last = start + (count - 1) * stride
            end = math.inf if size == DYNAMIC else size  # checked with the profile's sizes before the build
            self.require(
                count >= 1 and stride != 0 and 0 <= start < end and 0 <= last < end,
                f"{count} elements from {start} in steps of {stride} leave a dimension of {size}",
            )
        return self.shape, x.dtype


class ShuffleLayer(Layer):
    """Transpose, reshape, transpose; each optional."""

    kind = "Shuffle"

    def __init__(self, x: Tensor) -> None:
        super().__init__([x])
        self.first_transpose: Sequence[int] | None = None
        self.reshape_dims: Sequence[int] | None = None
        self.second_transpose: Sequence[int] | None = None

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Permute, reshape (0 copies a dimension, one -1 is inferred), permute."""
        x = self.inputs[0]
        shape = self._permuted(x.shape, self.first_transpose, "first_transpose")
        shape = self._reshaped(shape)
        return self._permuted(shape, self.second_transpose, "second_transpose"), x.dtype

    def _permuted(self, shape: Shape, order: Sequence[int] | None, name: str) -> Shape:
        if order is None:
            return shape
        order = tuple(order)
        self.require(sorted(order) == list(range(len(shape))), f"{name} {order} is no permutation of {len(shape)} axes")
        return tuple(shape[axis] for axis in order)

    def _reshaped(self, shape: Shape) -> Shape:
        if self.reshape_dims is None:
            return shape
        wanted = tuple(self.reshape_dims)
        problem = f"shape {shape} cannot be reshaped to {wanted}"
        self.require(
            len(wanted) <= MAX_RANK and all(size >= DYNAMIC for size in wanted) and wanted.count(DYNAMIC) <= 1, problem
        )
        self.require(all(size != 0 or axis < len(shape) for axis, size in enumerate(wanted)), problem)
        # What is left of the input after the copied dimensions must fill the given ones and the inferred one.
        left = [size for axis, size in enumerate(shape) if axis >= len(wanted) or wanted[axis] != 0]
        given = math.prod(size for size in wanted if size > 0)
        if DYNAMIC in left:
            self.require(DYNAMIC in wanted, problem)
            inferred = DYNAMIC
        else:
            inferred, rest = divmod(math.prod(left), given)
            self.require(rest == 0 and (DYNAMIC in wanted or inferred == 1), problem)
        return tuple(
            shape[axis] if size == 0 else inferred if size == DYNAMIC else size for axis, size in enumerate(wanted)
        )


class ReduceLayer(Layer):
    """A reduction over the axes of a bit mask."""

    kind = "Reduce"

    def __init__(self, x: Tensor, operation: Any, axes: int, keep_dims: bool) -> None:
        super().__init__([x])
        self.op, self.axes, self.keep_dims = operation, axes, keep_dims

    def axis_list(self) -> list[int]:
        """The axes of the bit mask."""
        return [axis for axis in range(MAX_RANK) if self.axes >> axis & 1]

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The input's shape with the axes of size 1 or gone."""
        x = self.inputs[0]
        axes = self.axis_list()
        self.require(
            0 < self.axes < 1 << len(x.shape),
            f"axes mask {self.axes} does not fit a tensor of {len(x.shape)} dimensions",
        )
        self.require(
            x.dtype != int8 or self.op in (ReduceOperation.MAX, ReduceOperation.MIN),
            "the input is INT8: dequantize it",
        )
        kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        return (kept if self.keep_dims else [size for a, size in enumerate(x.shape) if a not in axes]), x.dtype


class SoftMaxLayer(Layer):
    """Softmax over one axis, given as a bit mask."""

    kind = "SoftMax"

    def __init__(self, x: Tensor) -> None:
        super().__init__([x])
        self.axes = 1 << max(len(x.shape) - 3, 0)  # TensorRT's default: the channels

    def infer(self) -> tuple[Sequence[int], DataType]:
        """Shape and type of the input."""
        x = self.inputs[0]
        self.require(x.dtype in _FLOATS, f"the input is {x.dtype.name}: expected FLOAT or HALF")
        self.require(len(x.shape) >= 2, f"the input has {len(x.shape)} dimensions: expected 2 or more")
        one_axis = self.axes > 0 and self.axes & (self.axes - 1) == 0 and self.axes < 1 << len(x.shape)
        self.require(one_axis, f"axes mask {self.axes} does not name one of {len(x.shape)} axes")
        return x.shape, x.dtype


class MatrixMultiplyLayer(Layer):
    """Product of two stacks of matrices."""

    kind = "MatrixMultiply"

    def __init__(self, a: Tensor, op_a: Any, b: Tensor, op_b: Any) -> None:
        super().__init__([a, b])
        self.op0, self.op1 = op_a, op_b

    def infer(self) -> tuple[Sequence[int], DataType]:
        """(..., rows of a, columns of b)."""
        a, b = self.inputs
        problem = f"shapes {a.shape} and {b.shape} cannot be multiplied"
        self.require(
            a.dtype == b.dtype and a.dtype in _FLOATS,
            f"the inputs are {a.dtype.name} and {b.dtype.name}: expected FLOAT twice or HALF twice",
        )
        self.require(len(a.shape) == len(b.shape) >= 2, problem)
        *stack_a, rows, inner_a = _matrix_shape(a.shape, self.op0)
        *stack_b, inner_b, columns = _matrix_shape(b.shape, self.op1)
        self.require(inner_a == inner_b or DYNAMIC in (inner_a, inner_b), problem)
        return (*self.broadcast(stack_a, stack_b, problem), rows, columns), a.dtype


class CastLayer(Layer):
    """Conversion of the element type."""

    kind = "Cast"

    def __init__(self, x: Tensor, to_type: DataType) -> None:
        super().__init__([x])
        self.to_type = to_type

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The input's shape in the new type."""
        return self.inputs[0].shape, self.to_type


class QuantizeLayer(Layer):
    """Real values to INT8 or back, with one scale, or one a channel along `axis`.

    Attributes:
        zero_point: The integer that stands for 0. TensorRT's layers know no other than 0, ONNX's do.
    """

    def __init__(self, x: Tensor, scale: Tensor, to_type: DataType, dequantize: bool) -> None:
        self.kind = "Dequantize" if dequantize else "Quantize"
        super().__init__([x, scale])
        self.dequantize = dequantize
        self.to_type = to_type
        self.axis = -1
        self.zero_point = 0

    def infer(self) -> tuple[Sequence[int], DataType]:
        """The input's shape in the new type."""
        x, scale = self.inputs
        wanted = (int8,) if self.dequantize else _FLOATS
        self.require(x.dtype in wanted, f"the input is {x.dtype.name}: expected {' or '.join(t.name for t in wanted)}")
        self.require(
            self.to_type in (_FLOATS if self.dequantize else (int8,)), f"the output cannot be {self.to_type.name}"
        )
        self._check_scale(x, scale, self.to_type if self.dequantize else x.dtype)
        return x.shape, self.to_type

    def _check_scale(self, x: Tensor, scale: Tensor, real: DataType) -> None:
        self.require(
            scale.dtype in (float32, real), f"the scale is {scale.dtype.name}, the real values {real.name}: use FLOAT"
        )
        self.require(isinstance(scale.source, ConstantLayer), "the scale is no constant")
        self.require(len(scale.shape) <= 1, f"the scale has shape {scale.shape}: expected one value or one a channel")
        per_tensor = self.axis == -1 and not scale.shape
        self.require(per_tensor or 0 <= self.axis < len(x.shape), f"axis {self.axis} is outside 0..{len(x.shape) - 1}")
        if scale.shape:
            channels = x.shape[self.axis]
            self.require(scale.shape[0] == channels, f"{scale.shape[0]} scales for {channels} channels")
        values = scale.source.weights.array if isinstance(scale.source, ConstantLayer) else np.zeros(1)
        self.require(bool(np.all(values > 0) and np.all(np.isfinite(values))), "a scale is not positive")


class Network:
    """Records a network (TensorRT's INetworkDefinition, strongly typed)."""

    def __init__(self) -> None:
        self.name = ""
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Layer] = []

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def num_inputs(self) -> int:
        """Number of inputs."""
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return len(self.outputs)

    def sorted_layers(self) -> list[Layer]:
        """All layers, each after those that it reads: `Layer.set_input` may have named one that was added later."""
        return list(graphlib.TopologicalSorter({layer: layer.sources() for layer in self.layers}).static_order())

    def get_layer(self, index: int) -> Layer:
        """Layer `index`, in the order of the calls."""
        return self.layers[index]

    def get_input(self, index: int) -> Tensor:
        """Input `index`."""
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        """Output `index`."""
        return self.outputs[index]

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> Tensor:
        """Add a network input; a dimension of -1 is dynamic."""
        if any(tensor.name == name for tensor in self.inputs):
            raise NetworkError(f"input {name}: the name is taken")
        if len(shape) > MAX_RANK or any(size < 1 and size != DYNAMIC for size in shape):
            raise NetworkError(f"input {name}: shape {tuple(shape)} is not of at most {MAX_RANK} sizes, positive or -1")
        self.inputs.append(Tensor(name, None, tuple(shape), dtype))
        return self.inputs[-1]

    def mark_output(self, tensor: Tensor) -> None:
        """Make `tensor` a network output."""
        if tensor.is_network_input:
            raise NetworkError(f"output {tensor.name}: it is an input")
        if tensor.is_network_output:
            raise NetworkError(f"output {tensor.name}: it is an output already")
        tensor.is_network_output = True
        self.outputs.append(tensor)

    def add_constant(self, shape: Sequence[int], weights: Weights) -> ConstantLayer:
        """Add a constant."""
        return self._add(ConstantLayer(tuple(shape), weights))

    def add_convolution_nd(
        self, x: Tensor, maps: int, kernel_shape: Sequence[int], kernel: Weights, bias: Weights | None = None
    ) -> ConvolutionLayer:
        """Add a 2-D convolution."""
        return self._add(ConvolutionLayer(x, maps, kernel_shape, kernel, bias, transposed=False))

    def add_deconvolution_nd(
        self, x: Tensor, maps: int, kernel_shape: Sequence[int], kernel: Weights, bias: Weights | None = None
    ) -> ConvolutionLayer:
        """Add a transposed 2-D convolution."""
        return self._add(ConvolutionLayer(x, maps, kernel_shape, kernel, bias, transposed=True))

    def add_activation(self, x: Tensor, function: Any) -> ActivationLayer:
        """Add an activation."""
        return self._add(ActivationLayer(x, function))

    def add_elementwise(self, a: Tensor, b: Tensor, operation: Any) -> ElementWiseLayer:
        """Add an elementwise operation."""
        return self._add(ElementWiseLayer(a, b, operation))

    def add_pooling_nd(self, x: Tensor, pooling: Any, window: Sequence[int]) -> PoolingLayer:
        """Add a 2-D pooling."""
        return self._add(PoolingLayer(x, pooling, window))

    def add_concatenation(self, inputs: Sequence[Tensor]) -> ConcatenationLayer:
        """Add a concatenation."""
        if not inputs:
            raise NetworkError("Concatenation layer: no inputs")
        return self._add(ConcatenationLayer(inputs))

    def add_resize(self, x: Tensor) -> ResizeLayer:
        """Add a resize."""
        return self._add(ResizeLayer(x))

    def add_slice(self, x: Tensor, start: Sequence[int], shape: Sequence[int], stride: Sequence[int]) -> SliceLayer:
        """Add a slice."""
        return self._add(SliceLayer(x, start, shape, stride))

    def add_shuffle(self, x: Tensor) -> ShuffleLayer:
        """Add a shuffle."""
        return self._add(ShuffleLayer(x))

    def add_reduce(self, x: Tensor, operation: Any, axes: int, keep_dims: bool) -> ReduceLayer:
        """Add a reduction."""
        return self._add(ReduceLayer(x, operation, axes, keep_dims))

    def add_softmax(self, x: Tensor) -> SoftMaxLayer:
        """Add a softmax."""
        return self._add(SoftMaxLayer(x))

    def add_matrix_multiply(self, a: Tensor, op_a: Any, b: Tensor, op_b: Any) -> MatrixMultiplyLayer:
        """Add a matrix product."""
        return self._add(MatrixMultiplyLayer(a, op_a, b, op_b))

    def add_cast(self, x: Tensor, to_type: DataType) -> CastLayer:
        """Add a conversion."""
        return self._add(CastLayer(x, to_type))

    def add_quantize(self, x: Tensor, scale: Tensor, to_type: DataType) -> QuantizeLayer:
        """Add a quantization to INT8."""
        return self._add(QuantizeLayer(x, scale, to_type, dequantize=False))

    def add_dequantize(self, x: Tensor, scale: Tensor, to_type: DataType) -> QuantizeLayer:
        """Add a dequantization from INT8."""
        return self._add(QuantizeLayer(x, scale, to_type, dequantize=True))

    def _add(self, layer: AnyLayer) -> AnyLayer:
        """Record a layer; its inputs must be sound."""
        for tensor in layer.inputs:
            if not isinstance(tensor, Tensor):
                raise layer.error(f"an input is {type(tensor).__name__}, not a tensor")
            if tensor.source is not None:
                tensor.source.inferred()
        layer.name = f"(Unnamed Layer* {len(self.layers)}) [{layer.kind}]"
        layer.output.name = f"{layer.name}_output"
        layer._is_added = True
        for tensor in layer.inputs:
            tensor.consumers.append(layer)
        self.layers.append(layer)
        return layer


@dataclass(frozen=True)
class _Range:
    """Smallest, usual and largest shape of an input."""

    min: Shape
    opt: Shape
    max: Shape


class OptimizationProfile:
    """Shapes that dynamic inputs can take (TensorRT's IOptimizationProfile)."""

    def __init__(self) -> None:
        self.ranges: dict[str, _Range] = {}

    def set_shape(self, name: str, smallest: Sequence[int], usual: Sequence[int], largest: Sequence[int]) -> None:
        """Set the shapes of input `name`: each dimension min <= opt <= max."""
        shapes = _Range(tuple(smallest), tuple(usual), tuple(largest))
        ordered = len(shapes.min) == len(shapes.opt) == len(shapes.max) and all(
            1 <= low <= middle <= high for low, middle, high in zip(shapes.min, shapes.opt, shapes.max, strict=True)
        )
        if not ordered:
            raise NetworkError(f"profile of input {name}: {shapes.min}, {shapes.opt}, {shapes.max} are not in order")
        self.ranges[name] = shapes

    def __bool__(self) -> bool:
        return bool(self.ranges)


class BuilderConfig:
    """Options of a build (TensorRT's IBuilderConfig)."""

    def __init__(self) -> None:
        self.profiles: list[OptimizationProfile] = []

    @property
    def num_optimization_profiles(self) -> int:
        """Number of profiles."""
        return len(self.profiles)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        """Add a profile; returns its index, or -1 if it has no shapes."""
        if not profile:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        """Accepted: ONNX Runtime allocates what it needs."""


class Builder:
    """Creates and serializes networks (TensorRT's IBuilder)."""

    def __init__(self, logger: Any = None) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> Network:
        """An empty network; it is always strongly typed."""
        if flags & ~(1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)):
            raise NetworkError(f"network creation flags {flags} are not known")
        return Network()

    def create_builder_config(self) -> BuilderConfig:
        """Default options."""
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        """An empty profile."""
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes:
        """Check the whole network and serialize it as an ONNX model.

        Raises:
            NetworkError: if it has no output, a wrong layer, or a dynamic input without a fitting profile.
        """
        from yolotrt.network.onnx_writer import write_onnx

        check_network(network, config)
        return write_onnx(network)


def check_network(network: Network, config: BuilderConfig) -> None:
    """Raise NetworkError if TensorRT would not build this network."""
    if not network.outputs:
        raise NetworkError("the network has no output")
    _infer_all(network)
    _check_names("tensor", [tensor.name for tensor in (*network.inputs, *(layer.output for layer in network.layers))])
    _check_names("layer", [layer.name for layer in network.layers])
    dynamic = [tensor for tensor in network.inputs if DYNAMIC in tensor.shape]
    if dynamic and not config.profiles:
        raise NetworkError(f"input {dynamic[0].name} is dynamic: the build needs an optimization profile")
    for profile in config.profiles:
        _check_profile(profile, network.inputs)
        for sizes in ("min", "opt", "max"):
            _check_with_sizes(network, {name: getattr(shapes, sizes) for name, shapes in profile.ranges.items()})


def _check_names(kind: str, names: Sequence[str]) -> None:
    """Names of tensors must be unique, and so must those of layers."""
    for name, count in Counter(names).items():
        if not name:
            raise NetworkError(f"a {kind} has an empty name")
        if count > 1:
            raise NetworkError(f"{kind} {name}: the name is taken")


def _check_with_sizes(network: Network, shapes: Mapping[str, Shape]) -> None:
    """Check all layers again with known sizes: a dynamic dimension can hide that two shapes disagree."""
    saved = {tensor: tensor.shape for tensor in network.inputs}
    try:
        for tensor in network.inputs:
            tensor.set_shape(shapes.get(tensor.name, tensor.shape))
        _infer_all(network)
    finally:
        for tensor, shape in saved.items():
            tensor.set_shape(shape)
    _infer_all(network)


def _infer_all(network: Network) -> None:
    """Check every layer. In this order each finds its inputs checked: no recursion as deep as the network."""
    for layer in network.sorted_layers():
        layer.inferred()


def _check_profile(profile: OptimizationProfile, inputs: Sequence[Tensor]) -> None:
    """A profile must name every dynamic input, no other, and agree with static dimensions."""
    by_name = {tensor.name: tensor for tensor in inputs}
    for name, shapes in profile.ranges.items():
        if name not in by_name:
            raise NetworkError(f"profile of input {name}: the network has no such input")
        for shape in (shapes.min, shapes.opt, shapes.max):
            own = by_name[name].shape
            if len(shape) != len(own) or any(o not in (DYNAMIC, s) for o, s in zip(own, shape, strict=True)):
                raise NetworkError(f"profile of input {name}: shape {shape} does not fit {own}")
    for tensor in inputs:
        if DYNAMIC in tensor.shape and tensor.name not in profile.ranges:
            raise NetworkError(f"input {tensor.name} is dynamic: the optimization profile does not name it")


def _window_size(size: int, window: int, stride: int, padding: int, dilation: int) -> int:
    """Output size of a convolution or pooling, rounded down; `padding` is that of both ends together."""
    return DYNAMIC if size == DYNAMIC else (size + padding - dilation * (window - 1) - 1) // stride + 1


def _transposed_size(size: int, window: int, stride: int, padding: int, dilation: int) -> int:
    """Output size of a transposed convolution; `padding` is that of both ends together."""
    return DYNAMIC if size == DYNAMIC else (size - 1) * stride - padding + dilation * (window - 1) + 1


def _matrix_shape(shape: Shape, operation: Any) -> Shape:
    """The shape that a matrix has in a product."""
    return (*shape[:-2], shape[-1], shape[-2]) if operation == MatrixOperation.TRANSPOSE else shape
