"""Progress of a build, and Ctrl-C in it."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from yolotrt.engines import progress
from yolotrt.engines.progress import Interruption, ProgressBar, announce, interruptible, make_monitor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_nested_phases_are_parts_of_their_step():
    bar = ProgressBar()
    seen = []

    def look() -> None:
        seen.append(round(bar.fraction, 4))

    bar.start("Building engine", None, 4)
    look()
    bar.complete("Building engine", 0)  # 1 of 4
    look()
    bar.start("Tactics", "Building engine", 10)
    bar.complete("Tactics", 4)  # 5 of 10 of the second
    look()
    bar.start("Timing", "Tactics", 2)
    bar.complete("Timing", 0)  # and half a step of those
    look()
    bar.finish("Timing")
    bar.finish("Tactics")
    bar.complete("Building engine", 1)
    look()
    bar.complete("Building engine", 3)
    bar.finish("Building engine")
    look()
    assert seen == [0.0, 0.25, 0.375, 0.3875, 0.5, 1.0]


def test_progress_never_falls():
    bar = ProgressBar()
    bar.start("Building engine", None, 2)
    bar.start("a", "Building engine", 2)
    bar.complete("a", 1)
    bar.start("b", "Building engine", 4)  # a phase that was not announced before
    bar.finish("a")
    bar.complete("b", 0)
    assert bar.fraction == 0.5


def test_surprising_events_are_no_failure():
    bar = ProgressBar()
    bar.complete("unknown", 3)
    bar.finish("unknown")
    bar.start("empty", None, 0)
    bar.complete("empty", 7)
    assert bar.fraction == 1.0
    bar.close()


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch):
    for stream, is_shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = ProgressBar()
        bar.start("Building engine", None, 2)
        bar.complete("Building engine", 0)
        bar._bar.refresh()
        bar.close()
        assert ("building:  50%" in stream.getvalue()) == is_shown


def test_the_monitor_says_stop_when_it_is_asked_to():
    base = type("IProgressMonitor", (), {})
    interruption = Interruption()
    monitor = make_monitor(SimpleNamespace(IProgressMonitor=base), interruption)
    assert isinstance(monitor, base)
    monitor.phase_start("Building engine", None, 3)
    assert monitor.step_complete("Building engine", 0) is True
    interruption.is_asked_for = True
    assert monitor.step_complete("Building engine", 1) is False
    monitor.phase_finish("Building engine")
    monitor.close()


def test_an_old_library_has_no_monitor():
    assert make_monitor(SimpleNamespace(), Interruption()) is None


def test_the_real_library_takes_the_monitor():
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert isinstance(make_monitor(rtx, Interruption()), rtx.IProgressMonitor)


# --- Ctrl-C ---


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_noted_and_raised_at_the_end():
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), interruptible(can_cancel=True) as interruption:
        assert not interruption.is_asked_for
        press_ctrl_c()
        reached = interruption.is_asked_for
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "a second one would not end the process"
    assert reached
    assert signal.getsignal(signal.SIGINT) == before


def test_without_ctrl_c_nothing_is_raised_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible(can_cancel=False) as interruption:
        pass
    assert not interruption.is_asked_for
    assert signal.getsignal(signal.SIGINT) == before


def test_an_error_of_the_build_is_not_covered():
    with pytest.raises(RuntimeError, match="of the build"), interruptible(can_cancel=True):
        press_ctrl_c()
        raise RuntimeError("of the build")


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with interruptible(can_cancel=True) as interruption:
            seen.append((interruption.is_asked_for, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_a_second_ctrl_c_ends_the_process():
    program = (
        "import os, signal\n"
        "from yolotrt.engines.progress import interruptible\n"
        "with interruptible(can_cancel=False):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('not here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "still here\n"


# --- announcements ---


def test_an_announcement_is_for_terminals_and_the_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=progress.__name__)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    announce("it takes minutes")
    assert caplog.messages == ["it takes minutes"]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    announce("it takes minutes")
    assert terminal.getvalue() == "yolotrt: it takes minutes\n"
    assert caplog.messages == ["it takes minutes"]
