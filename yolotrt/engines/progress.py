"""A build that takes minutes: how far it is, and Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from yolotrt.shell import print_beside_progress

_log = logging.getLogger(__name__)


class Interruption:
    """Whether the user wants the build to end.

    Attributes:
        is_asked_for: Set by the first Ctrl-C.
    """

    def __init__(self) -> None:
        self.is_asked_for = False


@contextlib.contextmanager
def interruptible(*, can_cancel: bool) -> Iterator[Interruption]:
    """Let Ctrl-C end a build cleanly: it is noted, and KeyboardInterrupt raised when the build has returned.

    While TensorRT builds, Python's own handler can only run in one of TensorRT's callbacks, which swallow exceptions:
    Ctrl-C would be lost. A second Ctrl-C ends the process at once; nothing is written before a build has ended.

    Args:
        can_cancel: Whether the build looks at the `Interruption`; otherwise the user is told that it does not.

    Raises:
        KeyboardInterrupt: if Ctrl-C was pressed, when the block ends.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield interruption
        return

    def note(_number: int, _frame: Any) -> None:
        interruption.is_asked_for = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not can_cancel:
            announce("this TensorRT cannot be interrupted while it builds: press Ctrl-C again to end the process")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if interruption.is_asked_for:
        raise KeyboardInterrupt


def announce(text: str) -> None:
    """Tell a user who waits at a terminal; elsewhere it is a line of the log."""
    if sys.stderr is not None and sys.stderr.isatty():
        print_beside_progress(f"yolotrt: {text}")
    else:
        _log.info(text)


def make_monitor(trt: Any, interruption: Interruption) -> Any:
    """A progress bar on standard error, if that is a terminal, which also ends an interrupted build.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        interruption: What to look at.

    Returns:
        An `IProgressMonitor` with the method `close`, or None if the library has no such thing (TensorRT 8).
    """
    base: Any = getattr(trt, "IProgressMonitor", None)
    if base is None:
        return None

    class Monitor(base):  # type: ignore[misc, valid-type, unused-ignore]
        def __init__(self) -> None:
            base.__init__(self)  # type: ignore[misc, unused-ignore]
            self._bar = ProgressBar()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._bar.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._bar.complete(phase_name, step)
            return not interruption.is_asked_for

        def phase_finish(self, phase_name: str) -> None:
            self._bar.finish(phase_name)

        def close(self) -> None:
            self._bar.close()

    return Monitor()


@dataclass
class _Phase:
    """A part of the build.

    Attributes:
        parent: Name of the phase that it is a step of; None for the whole build.
        steps: Number of its steps.
        done: Steps that are complete.
    """

    parent: str | None
    steps: int
    done: int = 0


class ProgressBar:
    """One bar for TensorRT's nested phases: a phase within a step counts as its part of that step.

    Attributes:
        fraction: How much is done, 0 to 1; it never falls.
    """

    def __init__(self) -> None:
        from tqdm import tqdm

        self.fraction = 0.0
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()  # TensorRT reports from several threads
        self._bar = tqdm(
            total=100.0,
            desc="building",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}",
            disable=None,
            file=sys.stderr,
            leave=False,
        )

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._show()

    def complete(self, name: str, step: int) -> None:
        """Step `step`, counted from 0, of a phase is complete."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            self._show()

    def finish(self, name: str) -> None:
        """A phase ends, or was cancelled."""
        with self._lock:
            self._phases.pop(name, None)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _show(self) -> None:
        known = self._phases
        roots = [name for name, phase in known.items() if phase.parent not in known]
        fraction = max((self._part(name) for name in roots), default=0.0)
        self.fraction = max(self.fraction, fraction)
        self._bar.update(100 * self.fraction - self._bar.n)

    def _part(self, name: str) -> float:
        """How much of a phase is done, 0 to 1."""
        phase = self._phases[name]
        inner = max((self._part(child) for child, other in self._phases.items() if other.parent == name), default=0.0)
        return min((phase.done + inner) / phase.steps, 1.0)
