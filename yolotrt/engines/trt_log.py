"""What TensorRT says: its messages in `logging`, and its failures in one line that says what to do."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from yolotrt.errors import BackendUnavailableError, BuildError, YolotrtError

_log = logging.getLogger(__name__)

NO_DRIVER_MESSAGE = "catchCudaError"
"""In the text of the warning that TensorRT-RTX gives on each build on a machine without an NVIDIA driver."""

_OF_NO_USE = (NO_DRIVER_MESSAGE, "lazy loading is not enabled")
"""Parts of warnings that a user can do nothing about, or need not."""

_KEPT_MESSAGES = 100
"""Errors and warnings that are remembered: a build that fails may repeat itself thousands of times."""

NO_GPU_REMEDY = "use --backend onnxruntime"


class OutOfMemoryError(BuildError):
    """TensorRT ran out of memory while it built: to try the same again is of no use."""


@functools.cache
def shared_logger(trt: Any) -> Any:
    """The one logger of a library in this process: TensorRT complains about a second one.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
    """
    return make_logger(trt)


def make_logger(trt: Any) -> Any:
    """A logger of the library that passes its messages to `logging` and remembers the last ones.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.

    Returns:
        An `ILogger` with the attributes `last_error` (str), `errors` and `warnings` (lists of messages).
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
            self.warnings: list[str] = []

        @property
        def last_error(self) -> str:
            return self.errors[-1] if self.errors else ""

        def clear(self) -> None:
            """Forget all messages, for a new build."""
            self.errors.clear()
            self.warnings.clear()

        def log(self, severity: Any, message: str) -> None:
            message = message.strip()
            level = levels.get(severity, logging.DEBUG)
            if any(part in message for part in _OF_NO_USE):
                level = logging.DEBUG
            elif level == logging.ERROR:
                _remember(self.errors, message)
                level = logging.DEBUG  # it reaches the user in the exception's text
            elif level == logging.WARNING:
                _remember(self.warnings, message)
            _log.log(level, "%s: %s", trt.__name__, message)

    return Logger()


def warn_of_survived_errors(library: str, errors: Sequence[str]) -> None:
    """Say that the library went on after errors, as it does after some mistakes."""
    if errors:
        more = f" (and {len(errors) - 1} more: see --debug)" if len(errors) > 1 else ""
        _log.warning("%s built the engine in spite of an error: %s%s", library, errors[0], more)


def build_failure(library: str, messages: Sequence[str], workspace_mib: int | None) -> YolotrtError:
    """The error for a build that failed.

    Args:
        library: Name of the library, for the message.
        messages: What it logged: its errors, or its warnings if there are none.
        workspace_mib: The limit of its scratch memory, or None.
    """
    for pattern, make in _CAUSES:
        found = next((message for message in messages if re.search(pattern, message, re.IGNORECASE)), None)
        if found is not None:
            return make(library, _in_one_line(found), workspace_mib)
    return _other(library, _in_one_line(messages[0]) if messages else "it gave no reason", None)


def _remember(messages: list[str], message: str) -> None:
    if len(messages) < _KEPT_MESSAGES:
        messages.append(message)


def _in_one_line(message: str) -> str:
    """The message without line breaks and without an end that is doubled in ours."""
    return " ".join(message.split()).rstrip(" .:")[:300]


def _other(library: str, message: str, _: int | None) -> YolotrtError:
    return BuildError(f"{library} could not build the engine ({message}): run it again with --debug for its whole log")


def _no_gpu(library: str, message: str, _: int | None) -> YolotrtError:
    return BackendUnavailableError(f"no NVIDIA GPU is usable here ({library}: {message}): {NO_GPU_REMEDY}")


def _no_implementation(library: str, message: str, workspace_mib: int | None) -> YolotrtError:
    limit = "the GPU's free memory" if workspace_mib is None else f"--workspace {workspace_mib}"
    remedy = "free memory on the GPU" if workspace_mib is None else "raise --workspace or leave it out"
    return OutOfMemoryError(
        f"{library} found no kernel that fits into {limit} ({message}): {remedy}, or use a smaller --batch or --imgsz"
    )


def _no_memory(library: str, message: str, workspace_mib: int | None) -> YolotrtError:
    remedy = "limit it with --workspace" if workspace_mib is None else f"use a lower --workspace than {workspace_mib}"
    return OutOfMemoryError(
        f"{library} ran out of GPU memory ({message}): use a smaller --batch or --imgsz, {remedy}, "
        "or end other programs on the GPU"
    )


def _no_lean_runtime(library: str, message: str, _: int | None) -> YolotrtError:
    return BackendUnavailableError(
        f"{library} lacks the lean runtime that --version-compatible puts into the engine ({message}): "
        "install libnvinfer_lean, or leave the option out"
    )


_CAUSES = (
    (r"CUDA initialization failure|no CUDA-capable device|driver version is insufficient", _no_gpu),
    (r"libnvinfer_lean", _no_lean_runtime),
    # before the last one: that an allocation failed is logged for every kernel that is skipped, which harms nothing
    (r"could not find any implementation", _no_implementation),
    (r"unknown graph|timing ?cache", _other),
    (r"out ?of ?memory|insufficient memory|could not be allocated", _no_memory),
)
"""What to look for in the library's messages, and the error that it means. The first that is found counts."""
