"""What the commands share: failures become one line on stderr and an exit status, output fits any terminal."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

from yolotrt.errors import YolotrtError

T = TypeVar("T")

THREAD_PREFIX = "yolotrt"
"""Begins the names of this program's threads."""
EXIT_INTERRUPTED = 130
"""What shells give for a program that Ctrl-C ended."""


def run_command(program: str, command: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command.

    Args:
        program: Its name, which begins each message.
        command: Does the work and returns the exit status.
        debug: Whether failures keep their traceback.

    Returns:
        The exit status: the command's own, or 2 for bad input, 1 for failures, 130 for Ctrl-C.
    """
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()  # a broken pipe must show here, not when the interpreter ends
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as problem:  # whatever it is, a user gets one line
        if debug:
            raise
        message, status = _explain(problem)
        print_beside_progress(f"{program}: error: {message}")
    return status


def end_process(status: int) -> NoReturn:
    """End the process with a status, also while a stream that does not answer holds a thread inside a library.

    Such a thread ends by its own time-out, but the interpreter cannot wait for it, and would crash it by finalising.
    """
    if any(thread.daemon and thread.name.startswith(f"{THREAD_PREFIX}-") for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
    sys.exit(status)


def make_output_robust() -> None:
    """Characters that the terminal's encoding lacks are printed as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_beside_progress(line: str) -> None:
    """Print one line to stderr, whatever it holds, without tearing a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(line), file=sys.stderr)


def progress(items: Iterable[T], unit: str) -> Iterable[T]:
    """The items, with a progress bar on stderr where that is a terminal."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, unit=unit, disable=None, file=sys.stderr, leave=False)
    return bar


def printable(text: str) -> str:
    """The text with ``?`` for control characters: a name in a file is not to steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _explain(problem: Exception) -> tuple[str, int]:
    """The message and the exit status of a failure."""
    if isinstance(problem, YolotrtError):
        return str(problem), problem.exit_status
    if isinstance(problem, ImportError) and (problem.name == "cv2" or "libGL" in str(problem)):
        return f"OpenCV cannot be loaded ({problem}): install libgl1, or opencv-python-headless in its place", 1
    if isinstance(problem, OSError):
        return f"the system refused it ({problem.strerror or problem}): check files, folders and free space", 1
    if isinstance(problem, MemoryError):
        return "out of memory: use a smaller --imgsz or --batch", 1
    return f"unexpected {type(problem).__name__} ({problem}): run it again with --debug and report what it prints", 1
