"""TensorRT for RTX: builds plans with or without a GPU at hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from yolotrt.engines.base import KERNEL, PLUGIN, PRECISIONS, Backend, CompleteOptions, Plan, Session
from yolotrt.engines.definition import build_plan
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu import find_gpu, label
from yolotrt.engines.trt_adapter import TrtHooks
from yolotrt.engines.trt_log import make_logger
from yolotrt.errors import BackendUnavailableError
from yolotrt.weights import Weights

__all__ = ["TensorRtRtxBackend", "make_logger", "runs_on", "tensorrt_rtx_module"]

CAPABILITIES = ((8, 0), (8, 6), (8, 9))
BLACKWELL_RTX = 12
"""Compute capabilities 8.0, 8.6, 8.9 and 12.x: TensorRT-RTX documentation, "CPU-Only AOT and TensorRT-RTX Engines"."""


class TensorRtRtxBackend(Backend):
    """Builds plans for RTX GPUs (compute capability 8.0, 8.6, 8.9, 12.x)."""

    name = "tensorrt-rtx"
    default_precision = "fp16"
    precisions = PRECISIONS
    gpu_options = frozenset({"workspace_mib", "optimization_level", "yololayer"})

    def version(self) -> str:
        """Version of TensorRT-RTX."""
        return str(tensorrt_rtx_module().__version__)

    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Build a plan; fp32 is true fp32, without TF32. YoloLayer follows the engine: RTX hosts no plugins."""
        if options.yololayer == PLUGIN:
            raise BackendUnavailableError("TensorRT-RTX takes no plugins: build with --yololayer kernel")
        trt = tensorrt_rtx_module()
        hooks = _RtxHooks(trt, options)
        plan = build_plan(trt, weights, options, hooks)
        hooks.warn_of_survived_errors()
        return replace(plan, yololayer=KERNEL)

    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:  # noqa: ARG002
        """Open a session on a GPU that TensorRT-RTX supports."""
        trt = tensorrt_rtx_module()
        gpu = find_gpu()
        if not runs_on(gpu.capability):
            raise BackendUnavailableError(
                f"engine {engine.label} is for TensorRT-RTX, which runs on compute capability 8.0, 8.6, 8.9 and 12.x "
                f"({label(gpu)}): build with --backend tensorrt or onnxruntime"
            )
        from yolotrt.engines.gpu_session import open_gpu_session

        return open_gpu_session(trt, engine)


class _RtxHooks(TrtHooks):
    """Lets a CUDA graph be captured, and looks at what TensorRT-RTX made of an INT8 network."""

    def configure(self, config: Any) -> None:
        """See `BuildHooks.configure`; all memory is ours, as a capture stands no allocation."""
        super().configure(config)
        flag = getattr(self._trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)  # TensorRT-RTX 1.2
        if flag is not None:
            config.set_flag(flag)

    def int8_convolutions(self, plan: bytes) -> int | None:
        return count_int8_convolutions(plan)


def count_int8_convolutions(plan: bytes) -> int:
    """Convolutions of a plan that read INT8 activations and INT8 kernels.

    The plan's text is undocumented; this holds for TensorRT-RTX 1.7.
    """
    text = plan.decode("latin1")
    types = dict(_PLAN_TENSOR.findall(text))
    operands = (_QUOTED.findall(inputs)[:2] for inputs in _PLAN_CONVOLUTION.findall(text))
    return sum([types.get(name) for name in names] == ["int8", "int8"] for names in operands)


_PLAN_TENSOR = re.compile(r'tensor=\{[^\n]*?name="([^"]+)"[^\n]*?type=(\w+) \}')
_PLAN_CONVOLUTION = re.compile(r'corrltn=\{ name="[^"]*" output=\{[^}]*\} input=\{([^}]*)\}')
_QUOTED = re.compile(r'"([^"]+)"')


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether TensorRT-RTX engines, as they are built here, run on a GPU of this compute capability."""
    return capability in CAPABILITIES or capability[0] == BLACKWELL_RTX


def tensorrt_rtx_module() -> Any:
    """The module tensorrt_rtx.

    Raises:
        BackendUnavailableError: if it is not installed.
    """
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as problem:
        raise BackendUnavailableError(
            f'TensorRT-RTX is not installed ({problem}): run pip install "yolotrtx[rtx]"'
        ) from problem
    return tensorrt_rtx
