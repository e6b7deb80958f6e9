"""TensorRT for RTX: builds plans with or without a GPU at hand."""

from __future__ import annotations

import functools
import logging
from typing import Any

from yolotrt.engines.base import Backend, CompleteOptions, Plan, Session
from yolotrt.engines.definition import build_plan
from yolotrt.engines.file import EngineFile
from yolotrt.errors import BackendUnavailableError
from yolotrt.weights import Weights

_log = logging.getLogger(__name__)

NO_DRIVER_MESSAGE = "catchCudaError"
"""In the text of the warning that a machine without an NVIDIA driver gives on each build."""


class TensorRtRtxBackend(Backend):
    """Builds plans for RTX GPUs (compute capability 8.0, 8.6, 8.9, 12.x)."""

    name = "tensorrt-rtx"
    default_precision = "fp16"

    def version(self) -> str:
        """Version of TensorRT-RTX."""
        return str(_tensorrt_rtx().__version__)

    def build(self, weights: Weights, options: CompleteOptions) -> Plan:
        """Build a plan; fp32 is true fp32, without TF32."""
        trt = _tensorrt_rtx()
        logger = shared_logger(trt)
        logger.errors.clear()

        def configure(config: Any) -> None:
            if options.precision == "fp32":
                config.clear_flag(trt.BuilderFlag.TF32)

        return build_plan(
            trt, weights, options, logger=logger, explain=lambda: str(logger.last_error), configure=configure
        )

    def open(self, engine: EngineFile, *, threads: int | None = None) -> Session:  # noqa: ARG002
        """Running these plans is not possible in this version."""
        raise BackendUnavailableError(
            f"engine {engine.label} is a TensorRT-RTX plan, which this version builds but cannot run: "
            "build with --backend onnxruntime to run on this machine"
        )


def _tensorrt_rtx() -> Any:
    """The module tensorrt_rtx."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as problem:
        raise BackendUnavailableError(
            f'TensorRT-RTX is not installed ({problem}): run pip install "yolotrtx[rtx]"'
        ) from problem
    return tensorrt_rtx


@functools.cache
def shared_logger(trt: Any) -> Any:
    """The one logger of a library in this process: TensorRT complains about a second one."""
    return make_logger(trt)


def make_logger(trt: Any) -> Any:
    """A logger of the library that passes its messages to `logging` and remembers errors.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.

    Returns:
        An `ILogger` with the attributes `last_error` (str) and `errors` (list of all error messages).
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else ""

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if NO_DRIVER_MESSAGE in message:
                level = logging.DEBUG
            elif level == logging.ERROR:
                self.errors.append(message.strip())
                level = logging.DEBUG  # it reaches the user in the exception's text
            _log.log(level, "%s: %s", trt.__name__, message.strip())

    return Logger()
