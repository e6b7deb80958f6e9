"""The window of --show and --webcam."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from yolotrt.detector import Detector
from yolotrt.errors import OutputError
from yolotrt.media.frames import Found, Image
from yolotrt.media.images import write_image

NO_DISPLAY = "--show needs a display: leave it out and look at the files in the results folder, or use --serve PORT"
NO_DISPLAY_FOR_WEBCAM = "there is no display for the camera's window: use --serve 8000 and open the page that it names"

QUIT_KEYS = (ord("q"), 27)
"""q and Escape."""
_CONFIDENCE_KEYS = {ord("+"): 1, ord("="): 1, ord("-"): -1, ord("_"): -1}
_CONFIDENCE_STEP = 0.05
_PAUSE_MS = 50
_RATE_WINDOW_S = 2.0
_TEXT = cv2.FONT_HERSHEY_SIMPLEX


def has_display() -> bool:
    """Whether there is a display; without one OpenCV's window system ends the whole process."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class FrameRate:
    """Frames a second over the last two seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def tick(self, now: float | None = None) -> float:
        """Count a frame; returns the rate, 0 for the first one."""
        now = time.monotonic() if now is None else now
        self._times.append(now)
        while now - self._times[0] > _RATE_WINDOW_S:
            self._times.popleft()
        span = now - self._times[0]
        return (len(self._times) - 1) / span if span > 0 else 0.0


class Window:
    """Shows results. Pictures wait for a key each, videos and cameras run on.

    Keys: q or Escape quits, s writes a snapshot, space pauses, + and - change the confidence.

    Args:
        detector: Whose confidence the keys change.
        snapshots: The folder of snapshots.
        no_display: The message where OpenCV cannot open a window.
    """

    def __init__(self, detector: Detector, snapshots: Path, *, no_display: str = NO_DISPLAY) -> None:
        self._detector = detector
        self._snapshots = snapshots
        self._no_display = no_display
        self._rate = FrameRate()
        self._shown: Image | None = None
        self._runs_on = False

    def show(self, found: Found) -> bool:
        """Show a result; returns whether to go on.

        Raises:
            OutputError: if this OpenCV or this machine cannot show windows.
        """
        drawn = found.frame.pixels if found.drawn is None else found.drawn
        self._shown = drawn
        self._runs_on = found.frame.clip is not None
        try:
            if found.frame.clip is None:
                return self._show_picture(str(found.frame.path), drawn)
            rate = self._rate.tick()
            cv2.imshow(found.frame.clip.source, self._with_status(drawn, rate))
            return self._handle(cv2.waitKey(1))
        except cv2.error as problem:
            raise OutputError(self._no_display) from problem

    def idle(self) -> bool:
        """React to keys while no frame comes; returns whether to go on."""
        return not self._runs_on or self._handle(cv2.waitKey(1))

    def close(self) -> None:
        """Close all windows."""
        with contextlib.suppress(cv2.error):
            cv2.destroyAllWindows()

    def _show_picture(self, title: str, drawn: Image) -> bool:
        cv2.imshow(title, drawn)
        key = cv2.waitKey(0)
        cv2.destroyWindow(title)
        return key not in QUIT_KEYS

    def _handle(self, key: int) -> bool:
        """React to a key; returns whether to go on."""
        if key == ord(" "):
            key = self._wait_while_paused()
        if key in _CONFIDENCE_KEYS:
            self._change_confidence(_CONFIDENCE_KEYS[key] * _CONFIDENCE_STEP)
        if key == ord("s"):
            self._snapshot()
        return key not in QUIT_KEYS

    def _wait_while_paused(self) -> int:
        """Wait for space or a key that quits; the other keys work meanwhile. Returns the key."""
        while True:
            key = cv2.waitKey(_PAUSE_MS)
            if key == ord(" ") or key in QUIT_KEYS:
                return key if key in QUIT_KEYS else -1
            self._handle(key)

    def _change_confidence(self, change: float) -> None:
        """Frames from now on need another confidence, 0.05 to 0.95."""
        options = self._detector.options
        confidence = min(max(round(options.confidence + change, 2), _CONFIDENCE_STEP), 1 - _CONFIDENCE_STEP)
        self._detector.options = replace(options, confidence=confidence)

    def _snapshot(self) -> None:
        if self._shown is not None:
            now = time.time()
            stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
            path = self._snapshots / f"snapshot-{stamp}-{int(now * 1e3) % 1000:03d}.png"
            write_image(path, self._shown)
            print(f"snapshot: {path}", file=sys.stderr)

    def _with_status(self, drawn: Image, rate: float) -> Image:
        """The picture with rate and confidence in its corner, outlined so that it can be read on any ground."""
        shown = np.array(drawn)
        text = f"{rate:.0f} fps   confidence {self._detector.options.confidence:.2f}"
        cv2.putText(shown, text, (10, 24), _TEXT, 0.6, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(shown, text, (10, 24), _TEXT, 0.6, (255, 255, 255), 1, cv2.LINE_AA)
        return shown
