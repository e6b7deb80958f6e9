from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.media.videos import make_video, number_of, numbered
from yolotrt.errors import BackendUnavailableError, InputError, VideoError
from yolotrt.media.frames import Frame, Span, host_memory
from yolotrt.media.video import count_frames, has_pyav, load_pyav, read_video, sensible_rate

av = pytest.importorskip("av")


def read(path: Path, span: Span | None = None) -> list[Frame]:
    return list(read_video(path, host_memory, span))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """30 frames, 25 a second."""
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.fixture
def no_pyav(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert not has_pyav()


# --- frames ---


def test_every_frame_comes_once_at_its_time(clip):
    frames = read(clip)
    assert [number_of(frame.image) for frame in frames] == list(range(30))
    assert [frame.index for frame in frames] == list(range(30))
    assert [frame.time_s for frame in frames] == pytest.approx([index / 25 for index in range(30)])
    described = frames[0].clip
    assert (described.height, described.width, described.rate, described.source) == (48, 64, 25, str(clip))
    assert all(frame.clip is described for frame in frames)
    assert described.audio is None


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov", "avi", "webm", "ts"])
def test_common_containers_are_read(tmp_path, container):
    path = make_video(tmp_path / f"a.{container}", codec="libvpx" if container == "webm" else "libx264")
    frames = read(path)
    assert [number_of(frame.image) for frame in frames] == list(range(30))
    assert [frame.time_s for frame in frames] == pytest.approx([index / 25 for index in range(30)], abs=1e-3)
    assert frames[0].clip.rate == 25


def test_pixels_are_those_of_opencv(clip, golden):
    for path in (clip, golden / "video" / "car-detection.mp4"):
        capture = cv2.VideoCapture(str(path))
        for frame, _ in zip(read_video(path, host_memory), range(40), strict=False):
            np.testing.assert_array_equal(frame.image, capture.read()[1])
        capture.release()


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_a_video_is_turned_upright(tmp_path, rotation):
    path = make_video(tmp_path / "a.mp4", 2, rotation=rotation)
    frame = read(path)[0]
    np.testing.assert_allclose(
        frame.image.astype(int),
        np.rot90(numbered(0), rotation // 90).astype(int),
        atol=12,  # lossy
    )
    assert (frame.clip.height, frame.clip.width) == frame.image.shape[:2]
    np.testing.assert_array_equal(frame.image, cv2.VideoCapture(str(path)).read()[1])  # which turns it too


def test_a_variable_rate_keeps_its_times(tmp_path):
    times = [0, 40, 200, 210, 500, 1000, 1033, 1900]
    frames = read(make_video(tmp_path / "a.mp4", len(times), times=times))
    assert [frame.time_s for frame in frames] == pytest.approx([time / 1000 for time in times])


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        (Span(stride=7), [0, 7, 14, 21, 28]),
        (Span(stride=100), [0]),
        (Span(start_s=0.4), list(range(10, 30))),
        (Span(start_s=0.39, end_s=0.41), [10]),
        (Span(end_s=0.2), [0, 1, 2, 3, 4]),
        (Span(stride=4, start_s=0.4, end_s=0.8), [10, 14, 18]),
        (Span(start_s=0.0001, end_s=0.05), [1]),
        (Span(start_s=1.1601), []),
        (Span(start_s=50), []),
        (Span(end_s=50), list(range(30))),
    ],
)
@pytest.mark.parametrize("library", ["pyav", "opencv"])
def test_a_span_takes_some_frames(clip, span, expected, library, request):
    if library == "opencv":
        request.getfixturevalue("no_pyav")
    frames = read(clip, span)
    assert [number_of(frame.image) for frame in frames] == expected
    assert [frame.index for frame in frames] == expected
    if library == "pyav":
        assert count_frames(clip, span) == pytest.approx(len(expected), abs=1)
    if frames:
        assert frames[0].clip.rate == Fraction(25, span.stride)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stride": 0}, "--stride 0 is out of range: choose at least 1"),
        ({"start_s": 2, "end_s": 2}, "--end 2 s is not after --start 2 s: choose a later end"),
    ],
)
def test_an_empty_span_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Span(**values)


def test_frames_go_into_the_memory_that_is_given(clip):
    given = []

    def allocate(height: int, width: int) -> np.ndarray:
        given.append(host_memory(height, width))
        return given[-1]

    for frame, _ in zip(read_video(clip, allocate), range(5), strict=False):
        assert frame.image is given[-1]


def test_opencv_reads_where_pyav_is_missing(clip, no_pyav):
    frames = read(clip)
    assert [number_of(frame.image) for frame in frames] == list(range(30))
    assert [frame.time_s for frame in frames] == pytest.approx([index / 25 for index in range(30)])
    assert count_frames(clip, Span()) is None
    with pytest.raises(
        BackendUnavailableError, match=r'PyAV cannot be loaded .*: run pip install "yolotrtx\[video\]"$'
    ):
        load_pyav()


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(25.0, 25), (29.97002997, Fraction(30000, 1001)), (0.0, 30), (-1.0, 30), (math.nan, 30), (1e6, 30)],
)
def test_a_rate_that_no_camera_has_is_replaced(rate, expected):
    assert sensible_rate(rate) == expected


# --- faults ---


def damaged(path: Path, clip: Path, how: str) -> Path:
    data = clip.read_bytes()
    if how == "truncated before its index":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("no video\n" * 100)
    elif how == "codec":
        path.write_bytes(data.replace(b"avc1", b"zzzz"))
    elif how == "sound only":
        with av.open(str(path), "w") as container:
            container.add_stream("aac", rate=16000)
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), "s16", "mono")
            silence.sample_rate = 16000
            stream = container.streams.audio[0]
            container.mux(stream.encode(silence))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("library", ["pyav", "opencv"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"video a\.mp4 does not exist: check the path"),
        ("empty", r"video a\.mp4 is empty: make or download it again"),
        ("truncated before its index", r"video a\.mp4 cannot be read \(.*\), it is damaged, cut off or no video: copy"),
        ("text", r"video a\.mp4 cannot be read \(.*\), it is damaged"),
        ("codec", r"video a\.mp4 is in a codec that this FFmpeg has no decoder for: convert it, as with ffmpeg -i a"),
        ("sound only", r"video a\.mp4 holds no moving pictures: name another file"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, monkeypatch, clip, how, message, library, request):
    monkeypatch.chdir(tmp_path)
    if how == "truncated before its index":
        clip = make_video(tmp_path / "b.mp4", 60)
    damaged(Path("a.mp4"), clip, how)
    if library == "opencv":
        request.getfixturevalue("no_pyav")
        message = message if how in ("missing", "empty") else r"video a\.mp4 (cannot be read|holds no frame)"
    with pytest.raises(VideoError, match=message) as caught:
        read(Path("a.mp4"))
    assert "\n" not in str(caught.value)
    assert count_frames(Path("a.mp4"), Span()) is None


def test_a_video_that_is_cut_off_gives_its_frames_and_then_says_so(tmp_path, golden):
    data = (golden / "video" / "car-detection.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    got = 0
    with pytest.raises(VideoError, match=r"half\.mp4 is cut off, it ends at 13\.6 of 30\.2 s: copy it again"):
        for _ in read_video(tmp_path / "half.mp4", host_memory):
            got += 1
    assert got == 170
    # what is asked for is there
    assert len(read(tmp_path / "half.mp4", Span(end_s=10))) == 125


def test_damaged_packets_are_left_out_and_told(tmp_path, golden):
    data = bytearray((golden / "video" / "car-detection.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200_000] = b"\xff" * 200_000
    (tmp_path / "bad.mp4").write_bytes(data)
    got = 0
    with pytest.raises(VideoError, match=r"bad\.mp4 is damaged, \d+ of its packets were left out: copy it again"):
        for _ in read_video(tmp_path / "bad.mp4", host_memory):
            got += 1
    assert 300 < got < 377


def test_a_reader_that_stops_early_closes_the_file(clip):
    frames = read_video(clip, host_memory)
    next(frames)
    frames.close()
    with pytest.raises(StopIteration):
        next(frames)
