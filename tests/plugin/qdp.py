"""What TensorRT's builder does to a Python plugin, done by itself: no builder, no GPU.

Runs in a process that has the bindings (see trt_bindings.py). The plugin's side is the real `tensorrt.plugin`; this
module stands in for the network, the registry and the arithmetic on symbolic sizes, which live in the library. It uses
private names of `tensorrt.plugin`, the same in the versions that are tested.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
from tensorrt_bindings.plugin import _tensor

Values = Mapping[str, int]
Size = int | str
"""A number, or the name of a size that is known when the engine runs."""

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "SUB": lambda a, b: a - b,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class Dimension:
    """Stands in for IDimensionExpr: a number, or a rule to compute it from named sizes."""

    def __init__(self, value: int | None = None, rule: Callable[[Values], int] | None = None) -> None:
        self._value = value
        self._rule = rule

    @classmethod
    def of(cls, size: Size) -> Dimension:
        return cls(rule=lambda values: values[size]) if isinstance(size, str) else cls(size)

    def is_constant(self) -> bool:
        return self._value is not None

    def get_constant_value(self) -> int | None:
        return self._value

    def is_size_tensor(self) -> bool:
        return False

    def evaluate(self, values: Values) -> int:
        return self._rule(values) if self._value is None else self._value


class ExpressionBuilder:
    """Stands in for IExprBuilder."""

    def constant(self, value: int) -> Dimension:
        return Dimension(int(value))

    def operation(self, kind: Any, a: Dimension, b: Dimension) -> Dimension:
        def rule(values: Values) -> int:
            return OPERATIONS[kind.name](a.evaluate(values), b.evaluate(values))

        return Dimension(rule({})) if a.is_constant() and b.is_constant() else Dimension(rule=rule)


class Dimensions(list):
    """Stands in for DimsExprs."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__([None] * rank)


class SymbolSetter(dict):
    """Stands in for what collects a kernel's integers."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name


class Registry:
    """Stands in for IPluginRegistry."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        if key in self.creators:
            return False
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


REGISTRY = Registry()

trt.IDimensionExpr, trt.DimsExprs = Dimension, Dimensions
trt.get_plugin_registry = lambda: REGISTRY
_tensor.SymInt32.__call__ = lambda self: types.SimpleNamespace(expr=self._expr)


class Tensor(trt.ITensor):
    """A tensor of no network: the bindings make none without a builder, hence `make`."""

    name = ""
    sizes: tuple[Size, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: Any = None

    @classmethod
    def make(cls, sizes: Sequence[Size], dtype: Any) -> Tensor:
        made = type("MadeTensor", (cls,), {"sizes": tuple(sizes), "dtype": dtype, "shape": _shape(sizes), "name": ""})
        return made.__new__(made)


class Network:
    """Stands in for INetworkDefinition."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.plugin: Any = None
        self.inputs: list[Tensor] = []
        self.layer = types.SimpleNamespace(name="", output=types.SimpleNamespace(name=""))
        self.layer.get_output = lambda index: [self.layer.output][index]
        self._refuse = refuse

    def add_plugin(self, function: Callable[[Any], Any], aot: bool) -> Any:
        assert aot
        self.inputs, shape_inputs, self.plugin = function(trt.QuickPluginCreationRequest.STRICT_AOT)
        assert not shape_inputs
        return None if self._refuse else self.layer


def drive(network: Network, batches: Sequence[int], *, tactic: int = 0) -> dict[str, Any]:
    """Call the plugin as a build does, and compute everything symbolic for each batch size.

    Returns:
        ``output_type``, ``output_shapes`` by batch, ``combinations`` of types and formats, and for each of these one of
        ``launches``: ``tactics``, ``grid`` and ``integers`` by batch, ``block``, ``shared_mem``, ``kernel``, ``ptx``.
    """
    plugin, inputs = network.plugin, network.inputs
    (output_type,) = plugin.get_output_data_types([head.dtype for head in inputs], [len(head.sizes) for head in inputs])
    dimensions = [_dimensions(head.sizes) for head in inputs]
    (output,) = plugin.get_output_shapes(dimensions, [], ExpressionBuilder())
    output_sizes = ["?" if not size.is_constant() else size.get_constant_value() for size in output]
    descriptions = [_description(head.sizes, head.dtype) for head in inputs]
    descriptions.append(_description(output_sizes, output_type))

    offered = plugin.get_supported_format_combinations(descriptions, len(inputs))
    count = len(descriptions)
    combinations = [offered[start : start + count] for start in range(0, len(offered), count)]
    return {
        "output_type": output_type.name,
        "output_shapes": [[size.evaluate({"batch": batch}) for size in output] for batch in batches],
        "combinations": [[(one.type.name, one.format.name) for one in each] for each in combinations],
        "launches": [
            _launch(plugin.clone(), dimensions, descriptions, combination, batches, tactic)
            for combination in combinations
        ],
    }


def _launch(
    plugin: Any,
    dimensions: list[Dimensions],
    descriptions: list[Any],
    combination: Sequence[Any],
    batches: Sequence[int],
    tactic: int,
) -> dict[str, Any]:
    """What the plugin wants to be launched for one combination of types and formats."""
    for description, chosen in zip(descriptions, combination, strict=True):
        changed = description.desc
        changed.type, changed.format = chosen.type, chosen.format
        description.desc = changed
    inputs = len(dimensions)
    plugin.configure_plugin(descriptions[:inputs], descriptions[inputs:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(tactic)
    parameters, setter = types.SimpleNamespace(), SymbolSetter()
    plugin.get_launch_params(dimensions, descriptions, inputs, parameters, setter, ExpressionBuilder())
    static = [description.desc for description in descriptions]
    kernel, ptx = plugin.get_kernel(static[:inputs], static[inputs:])

    def numbers(symbols: Sequence[Any]) -> list[list[int]]:
        return [[symbol.expr.evaluate({"batch": batch}) for symbol in symbols] for batch in batches]

    return {
        "tactics": tactics,
        "grid": numbers([parameters.grid_x, parameters.grid_y, parameters.grid_z]),
        "block": numbers([parameters.block_x, parameters.block_y, parameters.block_z])[0],
        "shared_mem": numbers([parameters.shared_mem])[0][0],
        "integers": numbers([setter[index] for index in range(setter.nbSymExprs)]),
        "kernel": kernel,
        "ptx": ptx.decode(),
    }


def registered() -> list[str]:
    """The plugins in the registry, and whether each has an implementation for ahead-of-time use."""
    names = (f"{namespace}::{name}" for name, _, namespace in REGISTRY.creators)
    return [name for name in names if _definition(name).aot_impl_func is not None]


def _definition(name: str) -> Any:
    namespace, _, plugin = name.partition("::")
    return getattr(getattr(trtp.op, namespace), plugin)


def _shape(sizes: Sequence[Size]) -> tuple[int, ...]:
    return tuple(-1 if isinstance(size, str) else size for size in sizes)


def _dimensions(sizes: Sequence[Size]) -> Dimensions:
    dimensions = Dimensions(len(sizes))
    dimensions[:] = [Dimension.of(size) for size in sizes]
    return dimensions


def _description(sizes: Sequence[Size], dtype: Any) -> Any:
    description = trt.DynamicPluginTensorDesc()
    inner = description.desc
    inner.dims, inner.type, inner.format = trt.Dims(_shape(sizes)), dtype, trt.TensorFormat.LINEAR
    description.desc = inner
    return description
