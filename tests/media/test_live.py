from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.media.videos import make_video, number_of, numbered
from yolotrt.errors import VideoError
from yolotrt.media import live
from yolotrt.media.frames import Frame, Span, host_memory
from yolotrt.media.live import ENDED, LIVE, LiveSources, Reader, public_name, result_stem

SERVER = Path(__file__).with_name("rtsp_server.py")


class FakeCamera(Reader):
    """Gives numbered frames at a pace; fails after some."""

    rate = Fraction(50)

    def __init__(self, pace_s: float, fails_after: int = 10**9) -> None:
        self._pace_s = pace_s
        self._fails_after = fails_after
        self.is_closed = False

    def frames(self):
        for index in range(self._fails_after):
            time.sleep(self._pace_s)
            yield lambda _allocate, index=index: numbered(index % 256)
        raise VideoError("camera was lost: check its cable")

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(autouse=True)
def no_reader_is_left():
    yield
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        if not [t for t in threading.enumerate() if t.name.startswith("yolotrt-")]:
            return
        time.sleep(0.02)
    pytest.fail("a reading thread did not end")


@pytest.fixture
def cameras(monkeypatch):
    """Sources by name: factories of readers, or errors."""
    table: dict = {}

    def opened(source: str) -> Reader:
        made = table[source]()
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(live, "open_reader", opened)
    monkeypatch.setattr(live, "_FIRST_DELAY_S", 0.02)
    return table


def read(
    sources: LiveSources, *, span: Span | None = None, limit_s: float = 10, take: int = 10**9, slow_s: float = 0
) -> tuple[list[Frame], list[str]]:
    errors: list[VideoError] = []
    frames = []
    deadline = time.monotonic() + limit_s
    for frame in sources.read(
        host_memory, span or Span(), lambda: time.monotonic() > deadline or len(frames) >= take, errors.append
    ):
        frames.append(frame)
        time.sleep(slow_s)
    return frames, [str(error) for error in errors]


def test_the_newest_frame_wins_and_the_others_are_counted(cameras):
    cameras["0"] = lambda: FakeCamera(0.005, 100)
    sources = LiveSources(["0"], reconnect_s=0)
    frames, errors = read(sources, slow_s=0.05)
    assert 5 <= len(frames) <= 25
    assert [number_of(frame.image) for frame in frames] == [frame.index for frame in frames]
    (status,) = sources.statuses()
    assert (status.state, status.received) == (ENDED, 100)
    assert status.dropped == 100 - len(frames)
    assert all(later.index - earlier.index >= 4 for earlier, later in pairwise(frames[1:-1]))  # never an old one
    assert errors == ["camera was lost: check its cable"]


def test_who_is_fast_enough_gets_every_frame_at_its_time(cameras):
    cameras["0"] = lambda: FakeCamera(0.02, 20)
    sources = LiveSources(["0"], reconnect_s=0)
    frames, _ = read(sources)
    assert [frame.index for frame in frames] == list(range(20))
    assert sources.statuses()[0].dropped == 0
    times = [frame.time_s for frame in frames]
    assert times[0] == 0
    assert times == sorted(set(times))
    assert 0.3 < times[-1] < 1
    assert frames[0].clip.is_live
    assert frames[0].clip.rate == 50


def test_a_burst_still_has_growing_times(cameras):
    cameras["0"] = lambda: FakeCamera(0, 300)
    frames, _ = read(LiveSources(["0"], reconnect_s=0))
    pts = [frame.pts for frame in frames]
    assert pts == sorted(set(pts))


def test_a_lost_source_is_opened_again_with_growing_delays(cameras, caplog):
    opened = []

    def camera():
        opened.append(time.monotonic())
        return FakeCamera(0.001, 3) if len(opened) != 3 else VideoError("camera cannot be opened: plug it in")

    cameras["0"] = camera
    frames, errors = read(LiveSources(["0"], reconnect_s=10), take=12)
    assert len(opened) >= 4
    assert errors == []
    assert opened[2] - opened[1] < 0.1  # the first delay again after frames came
    assert opened[3] - opened[2] > 0.035  # twice as long after a failure
    assert "camera was lost: check its cable; trying again in 0.02 s" in caplog.text
    assert frames[0].clip is frames[-1].clip  # one recording


def test_a_source_that_stays_lost_is_given_up(cameras):
    openings = count()
    cameras["0"] = lambda: FakeCamera(0.001, 3) if next(openings) == 0 else VideoError("it is gone: plug it in")
    sources = LiveSources(["0"], reconnect_s=0.2)
    began = time.monotonic()
    _, errors = read(sources)
    assert errors == ["it is gone: plug it in"]
    assert 0.1 < time.monotonic() - began < 2
    assert sources.statuses()[0].state == ENDED


def test_a_source_that_was_never_there_fails_at_once(cameras):
    cameras["0"] = lambda: VideoError("camera 0 cannot be opened: plug it in")
    began = time.monotonic()
    assert read(LiveSources(["0"], reconnect_s=100)) == ([], ["camera 0 cannot be opened: plug it in"])
    assert time.monotonic() - began < 1


def test_several_sources_take_turns_and_one_that_fails_does_not_stop_the_others(cameras):
    cameras["0"] = lambda: FakeCamera(0.01, 40)
    cameras["1"] = lambda: FakeCamera(0.01, 5)
    cameras["2"] = lambda: VideoError("camera 2 cannot be opened: plug it in")
    sources = LiveSources(["0", "1", "2"], reconnect_s=0)
    frames, errors = read(sources)
    names = [frame.path.name for frame in frames]
    assert names.count("camera0") == 40
    assert names.count("camera1") == 5
    assert set(names[:4]) == {"camera0", "camera1"}
    assert len(errors) == 3
    assert [status.state for status in sources.statuses()] == [ENDED] * 3


def test_a_span_limits_a_live_source(cameras):
    cameras["0"] = lambda: FakeCamera(0.01)
    frames, errors = read(LiveSources(["0"]), span=Span(stride=3, end_s=0.5))
    assert errors == []
    assert frames[-1].time_s < 0.5
    assert [frame.index % 3 for frame in frames[:5]] == [0] * 5


def test_ending_does_not_wait_for_a_source_that_is_silent(cameras):
    class Silent(FakeCamera):
        def frames(self):
            time.sleep(3)
            yield from ()

    cameras["0"] = lambda: Silent(0)
    began = time.monotonic()
    assert read(LiveSources(["0"]), limit_s=0.2) == ([], [])
    assert time.monotonic() - began < 1.6


def test_an_unexpected_failure_of_a_reader_is_told(cameras):
    cameras["0"] = lambda: ZeroDivisionError("division by zero")
    assert read(LiveSources(["0"]))[1] == ["0 cannot be read (division by zero): check it"]


def test_a_video_plays_as_a_camera_at_its_own_rate(tmp_path):
    path = make_video(tmp_path / "a.mp4", 25, rate=Fraction(50))
    sources = LiveSources([str(path)])
    began = time.monotonic()
    frames, errors = read(sources)
    assert 0.45 < time.monotonic() - began < 1.5
    assert errors == []
    assert [number_of(frame.image) for frame in frames] == [frame.index for frame in frames]
    assert sources.statuses()[0].received == 25


@pytest.mark.parametrize("source", ["99", "/dev/video99"])
def test_a_camera_that_is_not_there_is_named(source, capfd):
    _, errors = read(LiveSources([source]))
    assert len(errors) == 1
    assert errors[0].startswith(f"camera {source} cannot be opened: check that it is plugged in")
    assert capfd.readouterr().err == ""  # neither OpenCV nor FFmpeg adds a line of its own


@pytest.mark.parametrize(
    ("source", "name", "stem"),
    [
        ("0", "0", "camera0"),
        ("/dev/video2", "/dev/video2", "video2"),
        ("rtsp://user:se@cret@host:554/live/1?x=y", "rtsp://host:554/live/1?x=y", "host_live_1"),
        ("rtsp://user:secret@host/live", "rtsp://host/live", "host_live"),
        ("http://host/../../etc/passwd", "http://host/../../etc/passwd", "host_.._.._etc_passwd"),
        ("udp://@:1234", "udp://:1234", "stream"),
        ("/a/clip.mp4", "/a/clip.mp4", "clip"),
    ],
)
def test_names_of_live_sources_hold_no_password_and_no_folder(source, name, stem):
    assert public_name(source) == name
    assert result_stem(source) == stem
    assert "/" not in stem


# --- a real RTSP server on loopback ---


@contextmanager
def rtsp_server(port: int = 0) -> Iterator[tuple[subprocess.Popen, int]]:
    with subprocess.Popen([sys.executable, str(SERVER), str(port)], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server, int(server.stdout.readline())
        finally:
            server.kill()


def test_an_rtsp_stream_is_read_and_read_again_after_its_server_was_killed(monkeypatch, caplog):
    pytest.importorskip("av")
    monkeypatch.setattr(live, "_FIRST_DELAY_S", 0.1)
    with rtsp_server() as (server, port):
        sources = LiveSources([f"rtsp://user:secret@127.0.0.1:{port}/live"], reconnect_s=20)
        states, frames, started = [], [], []
        restart = threading.Timer(0.5, lambda: started.append(run_server(port)))
        stop = time.monotonic() + 40
        for frame in sources.read(host_memory, Span(), lambda: time.monotonic() > stop, pytest.fail):
            frames.append(frame)
            if len(frames) == 20:
                states.append(sources.statuses()[0].state)
                server.kill()
                server.wait()
                restart.start()
            if len(frames) == 40:
                break
        restart.join()
        for process in started:
            process.kill()
            process.wait()
    assert len(frames) == 40
    assert states == [LIVE]
    for frame in frames:
        assert frame.image.shape == (48, 64, 3)
        assert np.abs(frame.image.astype(int) - numbered(number_of(frame.image))).mean() < 6
    assert "trying again in" in caplog.text
    assert "secret" not in caplog.text


def run_server(port: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(SERVER), str(port)], stdout=subprocess.DEVNULL)


def test_an_rtsp_server_that_stays_away_is_given_up():
    pytest.importorskip("av")
    with rtsp_server() as (server, port):
        sources = LiveSources([f"rtsp://127.0.0.1:{port}/live"], reconnect_s=0.5)
        frames, errors = [], []
        stop = time.monotonic() + 30
        for frame in sources.read(host_memory, Span(), lambda: time.monotonic() > stop, errors.append):
            frames.append(frame)
            if len(frames) == 10:
                server.kill()
    assert 10 <= len(frames) < 20
    assert len(errors) == 1
    assert re.search("cannot be opened|was lost|has ended", str(errors[0]))
