"""YoloLayer as a TensorRT plugin whose device code becomes part of the engine.

TensorRT (10.9 and later) takes PTX, launch geometry and integer arguments from Python while it builds, and needs none
of it to run the engine (TensorRT documentation, "Quickly Deployable Plugins", ahead-of-time implementation). All heads
enter one layer. Anchors, strides and the number of classes are constants of kernels/yololayer.cu; the batch may be
dynamic.

A plugin has a fixed number of inputs, so there is one for each number of levels: ``yolotrt::yololayer3`` takes the
heads of strides 8, 16 and 32.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from yolotrt.cuda.compile import PORTABLE_ARCHITECTURE, compile_kernel
from yolotrt.cuda.kernels import (
    BEST_VALUES,
    KEEP_ALL_ROWS,
    YOLOLAYER_BLOCK,
    YOLOLAYER_ROWS,
    Variant,
    bits_of,
    yololayer_defines,
)
from yolotrt.errors import BackendUnavailableError, InputError, NetworkError
from yolotrt.network.ops import Tensor
from yolotrt.postprocess import BOX_VALUES
from yolotrt.weights.model import Anchors

NAMESPACE = "yolotrt"
NAME = "yololayer"
"""The plugin's name in TensorRT; the number of levels follows it."""

FIRST_VERSION = (10, 9)
BROKEN_VERSIONS = ((10, 14),)
"""Torch-TensorRT turns these plugins off for TensorRT 10.14, whose implementation is broken."""

# TensorRT serves one registry to all threads of a process.
_registering = threading.Lock()


def plugin_unavailable_reason(trt: Any) -> str:
    """Why the plugin cannot be added to networks of this library, in half a sentence; empty if it can.

    Args:
        trt: The module `tensorrt`, or one that stands in for it.
    """
    label = f"{trt.__name__} {getattr(trt, '__version__', '')}".strip()
    if not hasattr(trt, "INetworkDefinition") or not hasattr(trt.INetworkDefinition, "add_plugin"):
        return f"{label} takes no plugins from Python"
    version = tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])
    if version < FIRST_VERSION or not hasattr(trt, "QuickPluginCreationRequest"):
        return f"{label} has no ahead-of-time plugins, which came with TensorRT {_dotted(FIRST_VERSION)}"
    if version in BROKEN_VERSIONS:
        return f"the ahead-of-time plugins of {label} are broken"
    if not _keeps_attributes(trt):
        return f"{label} misreads the arrays of NumPy {np.__version__}"
    try:
        _plugin_module(trt)
    except (ImportError, OSError) as problem:
        return f"the plugin module of {label} cannot be imported ({problem})"
    return ""


def add_yololayer(
    network: Any,
    trt: Any,
    heads: Sequence[Tensor],
    anchors: Anchors,
    strides: Sequence[int],
    class_count: int,
    variant: Variant,
    *,
    name: str = NAME,
) -> Tensor:
    """Add YoloLayer to a network.

    Args:
        network: An `INetworkDefinition` of TensorRT.
        trt: The module that it comes from.
        heads: Per level the raw head (batch, anchors x (5 + classes), height, width), all float32 or all float16. The
            batch may be dynamic (-1).
        anchors: Per level, per anchor: width and height in network-input pixels.
        strides: Network-input pixels per cell, by level.
        class_count: Number of classes.
        variant: Form of the rows, as of `yolotrt.postprocess.YoloLayer.best` and `full`.
        name: Name of the layer and of its output.

    Returns:
        float32 (batch, rows of all levels, 6) for ``best`` and (batch, rows of all levels, 5 + classes) for ``full``.

    Raises:
        BackendUnavailableError: if this TensorRT cannot host the plugin (see `plugin_unavailable_reason`), or NVRTC is
            missing.
        InputError: if anchors, strides, classes or variant do not fit each other.
        NetworkError: if the heads do not fit them, or TensorRT refuses the layer.
        BuildError: if the kernel does not compile.
    """
    if reason := plugin_unavailable_reason(trt):
        raise BackendUnavailableError(f"{reason}: build with YoloLayer outside the engine")
    _check_parameters(anchors, strides, class_count, variant)
    _check_heads(trt, heads, anchors, class_count)
    attributes = _Parameters(anchors, tuple(strides), class_count, variant).attributes()
    for half in (False, True):  # here, since errors in TensorRT's callbacks only reach standard error
        _device_code(_Parameters.from_attributes(**attributes), half=half)
    # `attributes` must live until the layer is there: TensorRT reads them by pointer
    try:
        layer = network.add_plugin(_registered(trt, len(heads))(*heads, **attributes), aot=True)
    except Exception as problem:  # the bindings raise anything, from ValueError to RuntimeError
        raise NetworkError(
            f"{name}: the plugin was refused ({problem}): build with YoloLayer outside the engine"
        ) from problem
    if layer is None:
        raise NetworkError(f"{name}: the plugin was refused: build with YoloLayer outside the engine")
    layer.name = name
    output = layer.get_output(0)
    output.name = name
    return output


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _keeps_attributes(trt: Any) -> bool:
    """Whether arrays come back from TensorRT as they went in.

    TensorRT up to 10.15 gives them a stride of zero with NumPy 2 and later: every element is the first.
    """
    sent = np.array([1, 2], np.int32)
    field = trt.PluginField("sent", sent, trt.PluginFieldType.INT32)
    return bool(np.array_equal(field.data, sent))


def _plugin_module(trt: Any) -> Any:
    """The module `tensorrt.plugin`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its docstrings have invalid escapes
        return importlib.import_module(f"{trt.__name__}.plugin")


# --- the parameters and their form as attributes ---------------------------------------------------------------------


def _check_parameters(anchors: Anchors, strides: Sequence[int], class_count: int, variant: str) -> None:
    if variant not in get_args(Variant):
        raise InputError(f"YoloLayer variant {variant!r} is not known: choose one of {', '.join(get_args(Variant))}")
    if class_count < 1:
        raise InputError(f"YoloLayer for {class_count} classes: give at least one")
    yololayer_defines(anchors, strides, class_count, "best", half=False)  # checks the levels
    if len({len(level) for level in anchors}) != 1:
        counts = ", ".join(str(len(level)) for level in anchors)
        raise InputError(f"the levels have {counts} anchors: give each level the same number")


def _check_heads(trt: Any, heads: Sequence[Tensor], anchors: Anchors, class_count: int) -> None:
    if len(heads) != len(anchors):
        raise NetworkError(f"YoloLayer got {len(heads)} heads and {len(anchors)} levels of anchors: give one a head")
    channels = len(anchors[0]) * (BOX_VALUES + class_count)
    for level, head in enumerate(heads):
        shape = tuple(int(size) for size in head.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise NetworkError(
                f"the head of level {level} has shape {shape}: YoloLayer needs (batch, {channels}, height, width)"
            )
    types = {head.dtype for head in heads}
    if len(types) != 1 or not types <= {trt.float32, trt.float16}:
        names = ", ".join(sorted(dtype.name for dtype in types))
        raise NetworkError(f"the heads are of type {names}: YoloLayer needs all float32 or all float16")


_ATTRIBUTES = {
    "anchors": npt.NDArray[np.float32],  # flat
    "strides": npt.NDArray[np.int32],
    "class_count": npt.NDArray[np.int32],  # one element, as the next
    "full_rows": npt.NDArray[np.int32],
}
"""The plugin's attributes: arrays, because TensorRT 10.9 to 11.1 reject scalars with NumPy 2.4 and later."""


@dataclass(frozen=True)
class _Parameters:
    """What the kernel is compiled for."""

    anchors: Anchors
    strides: tuple[int, ...]
    class_count: int
    variant: Variant

    @classmethod
    def from_attributes(
        cls,
        anchors: npt.NDArray[np.float32],
        strides: npt.NDArray[np.int32],
        class_count: npt.NDArray[np.int32],
        full_rows: npt.NDArray[np.int32],
    ) -> _Parameters:
        levels = anchors.reshape(len(strides), -1, 2).tolist()  # (levels, anchors, width and height)
        return cls(
            tuple(tuple((width, height) for width, height in level) for level in levels),
            tuple(strides.tolist()),
            int(class_count[0]),
            "full" if full_rows[0] else "best",
        )

    def attributes(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "anchors": np.array(self.anchors, np.float32).ravel(),
            "strides": np.array(self.strides, np.int32),
            "class_count": np.array([self.class_count], np.int32),
            "full_rows": np.array([self.variant == "full"], np.int32),
        }

    @property
    def row_values(self) -> int:
        return BOX_VALUES + self.class_count if self.variant == "full" else BEST_VALUES


@functools.cache
def _device_code(parameters: _Parameters, *, half: bool) -> bytes:
    """PTX of the kernel for float16 or float32 heads."""
    anchors, strides = parameters.anchors, parameters.strides
    defines = yololayer_defines(anchors, strides, parameters.class_count, parameters.variant, half=half)
    return compile_kernel("yololayer", defines, PORTABLE_ARCHITECTURE)


# --- the plugin ------------------------------------------------------------------------------------------------------


def _registered(trt: Any, levels: int) -> Callable[..., Any]:
    """The plugin for that many levels, registered if it is not yet."""
    trtp = _plugin_module(trt)
    name = f"{NAME}{levels}"
    with _registering:
        plugin = getattr(getattr(trtp.op, NAMESPACE, None), name, None)
        if plugin is None:
            _Plugin(trt, trtp, levels).register(f"{NAMESPACE}::{name}")
            plugin = getattr(getattr(trtp.op, NAMESPACE), name)
    return plugin  # type: ignore[no-any-return]


class _Plugin:
    """TensorRT's callbacks for a fixed number of levels.

    TensorRT learns the number of inputs and the attributes' types from the callbacks' signatures, and wants types in
    them, not the strings that a module with postponed annotations has: `_with_signature` makes them.
    """

    def __init__(self, trt: Any, trtp: Any, levels: int) -> None:
        self._trt = trt
        self._trtp = trtp
        self._levels = levels

    def register(self, plugin_id: str) -> None:
        """Give TensorRT the callbacks under ``namespace::name``."""
        trtp: Any = self._trtp
        heads = {f"head{level}": trtp.TensorDesc for level in range(self._levels)}
        outputs = {"outputs": GenericAlias(tuple, (trtp.TensorDesc,))}
        rows = outputs["outputs"]
        combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
        kernel = GenericAlias(tuple, (str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs))
        implemented = {**heads, **_ATTRIBUTES, **outputs, "tactic": int}

        trtp.register(plugin_id)(_with_signature(self._describe, {**heads, **_ATTRIBUTES}, rows))
        trtp.autotune(plugin_id)(_with_signature(self._combinations, {**heads, **outputs}, combinations))
        trtp.aot_impl(plugin_id)(_with_signature(self._implement, implemented, kernel))

    def _describe(self, *heads: Any, **attributes: Any) -> tuple[Any]:
        """Shape and type of the output."""
        parameters = _Parameters.from_attributes(**attributes)
        shape = (heads[0].shape_expr[0], self._row_count(heads, parameters), parameters.row_values)
        return (self._trtp.from_shape_expr(shape, dtype=self._trt.float32),)

    def _combinations(self, *arguments: Any) -> list[Any]:  # noqa: ARG002
        """All heads float32 or all float16; rows are float32."""
        types = ", ".join(["FP32|FP16"] * self._levels + ["FP32"])
        return [self._trtp.AutoTuneCombination(types, "LINEAR")]

    def _implement(self, *arguments: Any) -> tuple[str, bytes, Any, Any]:
        """Kernel, PTX, launch geometry, and the integers that the kernel takes between heads and output."""
        trtp = self._trtp
        heads, attributes = arguments[: self._levels], arguments[self._levels : -2]
        parameters = _Parameters.from_attributes(*attributes)
        batch = heads[0].shape_expr[0]

        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(self._row_count(heads, parameters), YOLOLAYER_ROWS)
        launch.grid_y = batch
        launch.block_x, launch.block_y, launch.block_z = YOLOLAYER_BLOCK
        cells = [side for head in heads for side in tuple(head.shape_expr)[2:]]  # height and width, level by level
        values = (batch, *cells, bits_of(KEEP_ALL_ROWS))
        integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in values])
        half = heads[0].dtype == self._trt.float16
        return NAME, _device_code(parameters, half=half), launch, integers

    def _row_count(self, heads: Sequence[Any], parameters: _Parameters) -> Any:
        """Rows of one picture, as an expression; such expressions do not take a number on their left."""
        cells = (head.shape_expr[2] * head.shape_expr[3] for head in heads)
        return functools.reduce(operator.add, cells) * len(parameters.anchors[0])


def _with_signature(method: Callable[..., Any], parameters: dict[str, Any], result: Any) -> Callable[..., Any]:
    """A function that calls `method` and shows these parameters and types."""

    def function(*arguments: Any, **attributes: Any) -> Any:
        return method(*arguments, **attributes)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    shown = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(shown, return_annotation=result)  # type: ignore[attr-defined]
    return function
