"""The Ray cluster: finding it, and saying in one line what went wrong in it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

from yolotrt.errors import BackendUnavailableError, InferenceError, InputError, YolotrtError

LOCAL = "local"
AUTO = "auto"
INSTALL_RAY = 'run pip install "yolotrtx[ray]"'

_ADDRESS = re.compile(r"(?P<host>[\w.-]+):(?P<port>\d{1,5})")
_CONNECT_S = 5.0
_SHOWN_CHARACTERS = 300
_EXCEPTION_PREFIX = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception): ")


class WorkerLostError(YolotrtError):
    """A process or machine of the cluster ended while it worked; the same work may succeed elsewhere."""


def load_ray() -> Any:
    """The module ray, with ray.data.

    Raises:
        BackendUnavailableError: if it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # lines for Ray's developers, on the terminal
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise BackendUnavailableError(f"Ray Data cannot be loaded ({problem}): {INSTALL_RAY}") from problem
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster for a while, unless this program is connected already.

    Args:
        address: ``local`` starts one on this machine; ``auto`` takes the one that this machine belongs to;
            ``HOST:PORT`` names another's head.

    Yields:
        The module ray.

    Raises:
        InputError: if no cluster answers there, or it runs another version.
        BackendUnavailableError: if Ray is not installed.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield ray
        return
    _require_answer(address)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as problem:
        raise InputError(
            f"cannot join the Ray cluster at {address} ({_shortened(problem)}): start one with ray start --head, "
            "of the same versions of Ray and Python, or take --ray local"
        ) from problem
    try:
        yield ray
    finally:
        ray.shutdown()


def show_bars_on_a_terminal(ray: Any) -> None:
    """Ray's progress bars go to a terminal only, and its log lines not at all; errors come as themselves."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.raise_original_map_exception = True  # else ours would arrive as text inside one of Ray's
    context.print_on_execution_start = False
    for name in ("ray.data", "ray._private"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def one_line_errors(ray: Any) -> Iterator[None]:
    """Errors of workers as ours.

    Raises:
        WorkerLostError: if a process or machine was lost.
        YolotrtError: what a worker raised.
    """
    errors = ray.exceptions
    try:
        yield
    except errors.OutOfMemoryError as problem:
        raise WorkerLostError(_OUT_OF_MEMORY) from problem
    except errors.RayTaskError as problem:  # also derived from what the worker raised, with a traceback as its text
        raise _own_error(problem.cause, ray) from problem
    except (errors.RayError, ConnectionError) as problem:
        if "OutOfMemory" in str(problem) or "memory pressure" in str(problem):
            raise WorkerLostError(_OUT_OF_MEMORY) from problem
        raise WorkerLostError(f"a worker or machine was lost ({_shortened(problem)})") from problem


_OUT_OF_MEMORY = "a worker ran out of memory"


def _own_error(cause: BaseException | None, ray: Any) -> YolotrtError:
    """What a worker raised, as one of our errors."""
    while cause is not None and not isinstance(cause, YolotrtError | MemoryError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, YolotrtError):
        return cause
    if isinstance(cause, MemoryError):
        return WorkerLostError(_OUT_OF_MEMORY)
    if isinstance(cause, ray.exceptions.RayError):
        return WorkerLostError(f"a worker or machine was lost ({_shortened(cause)})")
    return InferenceError(f"a worker failed ({type(cause).__name__}: {_shortened(cause)}): report this")


def _require_answer(address: str) -> None:
    """Raise InputError for an address that Ray would try for minutes in vain."""
    if address in {LOCAL, AUTO}:
        return
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"--ray {address!r:.100} is no address of a cluster: give local, auto or HOST:PORT")
    try:
        socket.create_connection((match["host"], int(match["port"])), _CONNECT_S).close()
    except (OSError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise InputError(
            f"no Ray cluster answers at {address} ({reason}): start one there with ray start --head, "
            "or check host and port"
        ) from problem


def _shortened(problem: BaseException | None) -> str:
    """The telling line of a library's message: the first, or what stands after a remote traceback."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    line = lines[0] if lines else type(problem).__name__
    if "Traceback" in str(problem):
        line = lines[-1]
    return _EXCEPTION_PREFIX.sub("", line)[:_SHOWN_CHARACTERS].rstrip(".:")
