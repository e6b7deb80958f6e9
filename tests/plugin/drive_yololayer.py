"""Adds YoloLayer to networks as the request says and reports what TensorRT would have got; see test_yololayer.py."""

from __future__ import annotations

import json
import sys
from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp

from tests.plugin import qdp
from yolotrt.cuda.compile import compile_kernel
from yolotrt.errors import BackendUnavailableError, YolotrtError
from yolotrt.plugin import yololayer

SOURCES: dict[bytes, dict[str, Any]] = {}
"""From what each PTX was compiled."""


def main() -> None:
    request = json.load(sys.stdin)
    on_import = hasattr(trtp.op, yololayer.NAMESPACE)
    report = {
        "reason": yololayer.plugin_unavailable_reason(trt),
        "on_import": on_import,
        "cases": [run(case) for case in request["cases"]],
        "registered": qdp.registered(),
    }
    json.dump(report, sys.stdout)


def compile_and_remember(name: str, defines: Any, architecture: str) -> bytes:
    code = compile_kernel(name, defines, architecture)
    SOURCES[code] = {"name": name, "defines": dict(defines), "architecture": architecture}
    return code


def compile_without_compiler(name: str, defines: Any, architecture: str) -> bytes:
    raise BackendUnavailableError("NVRTC was not found: install it")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Add the layer that `case` describes, and drive it."""
    yololayer.compile_kernel = compile_without_compiler if case.get("no_compiler") else compile_and_remember
    network = qdp.Network(refuse=case.get("refuse", False))
    heads = [qdp.Tensor.make(sizes, getattr(trt, dtype)) for sizes, dtype in case["heads"]]
    arguments = (case["anchors"], case["strides"], case["class_count"], case["variant"])
    try:
        output = yololayer.add_yololayer(network, trt, heads, *arguments, name="rows")
    except YolotrtError as problem:
        return {"error": type(problem).__name__, "message": str(problem)}
    result = qdp.drive(network, case["batches"])
    for launch in result["launches"]:
        launch["source"] = SOURCES[launch["ptx"].encode()]
    return {**result, "names": [network.layer.name, output.name], "inputs": len(network.inputs)}


if __name__ == "__main__":
    main()
