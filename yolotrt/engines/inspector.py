"""Which precision TensorRT gave each convolution, read from what its engine inspector says of a built engine.

The inspector's JSON has one object a layer of the engine. Its form differs (TensorRT documentation, "Engine Inspector";
sample files of NVIDIA's trt-engine-explorer; the migration guide from 10 to 11):

- ``Weights: {"Type": "Half", ...}`` stands beside ``ParameterType: "Convolution"`` where TensorRT took one of its own
  convolution kernels; other layers have no such entry.
- A tensor's type is in ``Format/Datatype`` up to TensorRT 10, as ``Half`` or as ``Channel major FP16 format where
  channel % 8 == 0``; in 11 in ``Datatype``, apart from ``Format``. With dynamic shapes it is ``N/A`` until an execution
  context has shapes.
- A layer's name joins those of the network's layers that it does the work of (``a + b``, ``a || b``); where TensorRT's
  compiler made it, only ``Metadata`` has them.
- ``TacticName`` is the kernel's name, which says for itself whether it computes in TF32.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNKNOWN = "unknown"

_TYPES = (
    ("bf16", r"bfloat16|bf16"),
    ("fp8", r"fp8|float8"),
    ("int8", r"int8"),
    ("fp16", r"half|fp16|float16"),
    ("fp32", r"float|fp32"),
)
"""Our names of types and what the inspector calls them, the more special ones first."""

_TACTIC_TYPES = (
    ("int8", r"i8i8|_int8|imma|i8816"),
    ("fp16", r"f16f16|h16816|h884|h1688|hcudnn|fp16|_half"),
    ("fp32", r"tf32f32|f32f32|scudnn|sgemm|_float"),
)
"""Parts of kernels' names; what stands for what is CUTLASS's and cuDNN's convention."""

_NO_COMPUTATION = ("reformat", "noop", "constant", "shuffle", "signal", "wait", "shape_call", "cast", "move")
_IS_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_IS_PRODUCT = re.compile(r"conv|fprop|gemm|xmma|cutlass|cudnn|winograd", re.IGNORECASE)


def engine_information(trt: Any, engine: Any, context: Any = None) -> str:
    """The JSON of TensorRT's engine inspector, which tells types of dynamic shapes for those of a context alone."""
    engine_inspector = engine.create_engine_inspector()
    if context is not None:
        engine_inspector.execution_context = context
    return str(engine_inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layers(information: str) -> list[dict[str, Any]]:
    """The engine's layers, of which an engine without details has names alone; none if the text is not what we know."""
    try:
        # not strict: TensorRT separates the entries of Metadata by control characters
        document = json.loads(information, strict=False)
    except ValueError:
        return []
    found = document.get("Layers", []) if isinstance(document, dict) else []
    return [layer if isinstance(layer, dict) else {"Name": layer} for layer in found] if isinstance(found, list) else []


def convolution_precisions(information: str, names: Iterable[str]) -> dict[str, str]:
    """The precision of each convolution.

    Args:
        information: What `EngineInspector.get_engine_information` gives as JSON, of an engine that was built with the
            profiling verbosity DETAILED.
        names: The convolutions, as the network's layers are called.

    Returns:
        By name: ``fp32``, ``tf32``, ``fp16``, ``int8``, ...; ``unknown`` where the inspector does not tell.
    """
    found = layers(information)
    return {name: next((p for layer in _of(name, found) if (p := _precision(layer))), UNKNOWN) for name in names}


def count_precisions(precisions: Mapping[str, str]) -> dict[str, int]:
    """How many convolutions have each precision, the most frequent first."""
    return dict(Counter(precisions.values()).most_common())


def _of(name: str, layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The engine's layers that compute a layer of the network, the likeliest first."""
    whole_name = re.compile(rf"(?<!\w)(?<!\w\.){re.escape(name)}(?!\.?\w)")
    candidates = [
        layer
        for layer in layers
        if whole_name.search(f"{layer.get('Name', '')}\n{layer.get('Metadata', '')}") and not _only_moves_data(layer)
    ]
    return sorted(candidates, key=_rank)


def _only_moves_data(layer: Mapping[str, Any]) -> bool:
    return str(layer.get("LayerType", "")).lower() in _NO_COMPUTATION


def _rank(layer: Mapping[str, Any]) -> int:
    """0 for a layer that calls itself a convolution, 1 for one whose kernel does, 2 for others."""
    if _IS_CONVOLUTION.search(f"{layer.get('ParameterType', '')} {layer.get('LayerType', '')}"):
        return 0
    return 1 if _IS_PRODUCT.search(str(layer.get("TacticName", ""))) else 2


def _precision(layer: Mapping[str, Any]) -> str:
    """The precision that an engine's layer computes in; empty if it does not say."""
    tactic = str(layer.get("TacticName", ""))
    weights = layer.get("Weights")
    written = weights.get("Type", "") if isinstance(weights, dict) else ""
    found = _named(_TYPES, str(written)) or _input_type(layer) or _named(_TACTIC_TYPES, tactic)
    return "tf32" if found == "fp32" and "tf32" in tactic.lower() else found


def _input_type(layer: Mapping[str, Any]) -> str:
    """The type of the first input that has one."""
    inputs = layer.get("Inputs")
    for tensor in inputs if isinstance(inputs, list) else ():
        if isinstance(tensor, dict):
            parts = (str(tensor.get(key, "")) for key in ("Datatype", "DataType", "Format/Datatype", "Format"))
            found = next((kind for part in parts if (kind := _named(_TYPES, part))), "")
            if found:
                return found
    return ""


def _named(types: Sequence[tuple[str, str]], text: str) -> str:
    """The first type whose pattern the text has."""
    return next((name for name, pattern in types if re.search(pattern, text, re.IGNORECASE)), "")
