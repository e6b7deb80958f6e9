from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.media.videos import make_video, number_of, numbered
from yolotrt.errors import BackendUnavailableError, OutputError
from yolotrt.media.frames import Clip, Frame, Span, host_memory
from yolotrt.media.video import read_video
from yolotrt.media.video_writer import VideoWriter, WholeFragments

av = pytest.importorskip("av")

ROOT = Path(__file__).resolve().parents[2]


def rewrite(source: Path, target: Path, span: Span | None = None) -> None:
    """Copy a video through the reader and the writer."""
    writer = None
    for frame in read_video(source, host_memory, span):
        writer = writer or VideoWriter(target, frame.clip)
        writer.write(frame, frame.image)
    writer.close()


def facts(path: Path) -> dict:
    """What a player sees."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(stream)]
        return {
            "count": len(times),
            "times": times,
            "rate": stream.average_rate,
            "size": (stream.height, stream.width),
            "codec": (stream.codec_context.name, stream.codec_context.pix_fmt),
        }


def top_boxes(data: bytes) -> list[str]:
    """Kinds of the file's boxes; ``cut`` at the end if the last one is not whole."""
    kinds, position = [], 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        whole = size >= 8 and position + size <= len(data)
        kinds.append(data[position + 4 : position + 8].decode() if whole else "cut")
        position = position + size if whole else len(data)
    return kinds


@pytest.mark.parametrize(
    ("how", "size"),
    [
        ({"rate": Fraction(25)}, (48, 64)),
        ({"rate": Fraction(30000, 1001)}, (48, 64)),
        ({"rate": Fraction(179, 6)}, (48, 64)),
        ({"rotation": 90}, (64, 48)),
        ({"times": [index * 40 + index % 3 * 7 for index in range(60)]}, (48, 64)),
        ({"codec": "mpeg4"}, (48, 64)),
    ],
    ids=["25", "29.97", "29.83", "rotated", "variable rate", "MPEG-4 part 2"],
)
def test_the_result_has_the_frames_times_rate_and_size_of_its_source(tmp_path, how, size):
    source, target = make_video(tmp_path / "a.mp4", 60, **how), tmp_path / "out.mp4"
    rewrite(source, target)
    expected, got = facts(source), facts(target)
    assert got["codec"] == ("h264", "yuv420p")
    assert got["size"] == size
    assert (got["count"], got["times"]) == (expected["count"], expected["times"])
    if "times" not in how:
        assert got["rate"] == expected["rate"]
    upright = [frame.image for frame in read_video(source, host_memory)]
    for before, after in zip(upright, read_video(target, host_memory), strict=True):
        assert np.abs(before.astype(int) - after.image).mean() < 4  # coded twice with loss


def test_a_real_video_keeps_frames_rate_size_and_sound(tmp_path, golden):
    source, target = golden / "video" / "car-detection.mp4", tmp_path / "out.mp4"
    rewrite(source, target)
    expected, got = facts(source), facts(target)
    assert got == expected
    with av.open(str(source)) as before, av.open(str(target)) as after:
        assert after.duration == pytest.approx(before.duration, abs=50_000)
        sounds = [[bytes(p) for p in c.demux(audio=0) if p.dts is not None] for c in (before, after)]
        assert sounds[0] == sounds[1]  # copied, not coded again


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (1, 1)])
def test_an_odd_size_is_filled_up_by_its_last_row_and_column(tmp_path, size):
    clip = Clip("x", *size, Fraction(25), Fraction(1, 25))
    picture = np.full((*size, 3), 120, np.uint8)
    writer = VideoWriter(tmp_path / "a.mp4", clip)
    for index in range(3):
        writer.write(Frame(Path("x"), picture, clip, index, index), picture)
    writer.close()
    (frame, *_) = read_video(tmp_path / "a.mp4", host_memory)
    assert frame.image.shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(frame.image.astype(int) - 120).max() <= 5


def test_a_span_keeps_its_speed_and_its_part_of_the_sound(tmp_path):
    source = make_video(tmp_path / "a.mp4", 100, audio="aac")
    rewrite(source, tmp_path / "b.mp4", Span(stride=5, start_s=1.0, end_s=3.0))
    got = facts(tmp_path / "b.mp4")
    assert got["times"] == [Fraction(index, 5) for index in range(10)]
    assert got["rate"] == 5
    assert [number_of(f.image) for f in read_video(tmp_path / "b.mp4", host_memory)] == list(range(25, 75, 5))
    with av.open(str(tmp_path / "b.mp4")) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.dts is not None]
        times = [float(packet.pts * packet.time_base) for packet in packets]
    assert 0 <= times[0] < 0.07
    assert 1.9 < times[-1] < 2.0


def test_sound_and_pictures_stay_together_where_both_begin_late(tmp_path):
    source = make_video(tmp_path / "a.ts", 50, audio="aac")  # MPEG-TS begins at 1.4 s
    rewrite(source, tmp_path / "b.mp4")
    with av.open(str(source)) as before, av.open(str(tmp_path / "b.mp4")) as after:
        offsets = []
        for container in (before, after):
            first = {p.stream.type: p.pts * p.time_base for p in reversed([*container.demux()]) if p.pts is not None}
            offsets.append(float(first["audio"] - first["video"]))
    assert offsets[1] == pytest.approx(offsets[0], abs=0.065)  # one packet of AAC at 16 kHz


def test_sound_that_browsers_do_not_play_in_mp4_becomes_aac(tmp_path):
    source = make_video(tmp_path / "a.avi", 50, audio="pcm_s16le")
    rewrite(source, tmp_path / "b.mp4")
    assert facts(tmp_path / "b.mp4")["count"] == 50
    with av.open(str(source)) as before, av.open(str(tmp_path / "b.mp4")) as after:
        assert after.streams.audio[0].codec_context.name == "aac"
        tones = [
            np.concatenate([f.to_ndarray().ravel() for f in c.decode(audio=0)]).astype(float) for c in (before, after)
        ]
    assert len(tones[1]) == pytest.approx(len(tones[0]), abs=3 * 1024)  # whole packets
    loudness = [np.sqrt((tone[4096:16384] ** 2).mean()) for tone in tones]
    assert loudness[1] * 32768 == pytest.approx(loudness[0], rel=0.1)


def test_sound_in_an_unknown_codec_is_left_out_with_a_warning(tmp_path, caplog):
    source = make_video(tmp_path / "a.mp4", audio="aac")
    source.write_bytes(source.read_bytes().replace(b"mp4a", b"zzzz").replace(b"esds", b"zzzz"))
    rewrite(source, tmp_path / "b.mp4")
    assert facts(tmp_path / "b.mp4")["count"] == 30
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert not container.streams.audio
    assert "its sound cannot be copied" in caplog.text


def test_the_index_stands_first_and_every_second_ends_a_fragment(tmp_path):
    rewrite(make_video(tmp_path / "a.mp4", 100), tmp_path / "b.mp4")
    kinds = top_boxes((tmp_path / "b.mp4").read_bytes())
    assert kinds[:2] == ["ftyp", "moov"]
    assert kinds.count("moof") == kinds.count("mdat") == 4
    assert "cut" not in kinds


def test_only_whole_boxes_reach_the_disk_whatever_the_pieces(tmp_path):
    rewrite(make_video(tmp_path / "a.mp4", 100), tmp_path / "b.mp4")
    data = (tmp_path / "b.mp4").read_bytes()
    for size in (1, 7, 1000, len(data)):
        target = tmp_path / f"{size}.mp4"
        file = WholeFragments(target)
        for start in range(0, min(len(data), 20_000 if size == 1 else len(data)), size):
            file.write(data[start : start + size])
            if target.exists() and size != 1:
                assert top_boxes(target.read_bytes())[-1] in ("moov", "mdat")
        file.finish()
        assert data.startswith(target.read_bytes())


def test_a_missing_encoder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    clip = Clip("x", 48, 64, Fraction(25), Fraction(1, 25))
    with pytest.raises(BackendUnavailableError, match=r"no H\.264 encoder: run pip install .* av, .*or use --no-save"):
        VideoWriter(tmp_path / "a.mp4", clip)
    assert not list(tmp_path.iterdir())


# --- faults ---

WRITE_FOREVER = """
import sys, time
from fractions import Fraction
from pathlib import Path
from tests.media.videos import numbered
from yolotrt.media.frames import Clip, Frame
from yolotrt.media.video_writer import VideoWriter

clip = Clip("x", 48, 64, Fraction(25), Fraction(1, 25))
writer = VideoWriter(Path(sys.argv[1]), clip)
for index in range(10**6):
    writer.write(Frame(Path("x"), numbered(index), clip, index, index), numbered(index))
"""


def test_a_kill_in_the_middle_leaves_a_file_that_plays(tmp_path):
    target = tmp_path / "a.mp4"
    with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, target], cwd=ROOT) as child:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (target.exists() and target.stat().st_size > 50_000):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert top_boxes(target.read_bytes())[-1] == "mdat"
    frames = list(read_video(target, host_memory))
    assert len(frames) > 25
    assert len(frames) % 25 == 0  # whole seconds
    assert [number_of(frame.image) for frame in frames] == [index % 256 for index in range(len(frames))]


def write_until_full(target: Path, *, at_most: int = 5000) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (at_most, 1, 1, 3), np.uint8)
    clip = Clip("x", 240, 320, Fraction(25), Fraction(1, 25))
    writer = VideoWriter(target, clip)
    try:
        for index in range(at_most):
            picture = np.kron(noise[index % 50 : index % 50 + 1, 0], np.ones((240, 320, 1), np.uint8))
            picture[::2, ::3] = np.random.RandomState(index).randint(0, 256, picture[::2, ::3].shape)
            writer.write(Frame(Path("x"), picture, clip, index, index), picture)
    finally:
        writer.close()


def assert_whole(target: Path) -> None:
    assert top_boxes(target.read_bytes())[-1] == "mdat"
    assert len(list(read_video(target, host_memory))) > 25


def test_a_disk_that_fills_up_is_named_and_what_was_written_is_whole(tmp_path):
    """With the process's limit of a file's size, which needs no disk of its own."""
    target = tmp_path / "a.mp4"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match=rf"cannot write .*a\.mp4: {os.strerror(errno.EFBIG)}: choose .*is whole"):
            write_until_full(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert_whole(target)


def test_a_small_disk_that_fills_up(small_disk):
    with pytest.raises(OutputError, match=rf"cannot write .*a\.mp4: {os.strerror(errno.ENOSPC)}: choose .*is whole"):
        write_until_full(small_disk / "a.mp4")
    assert_whole(small_disk / "a.mp4")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"cannot write .*file/a\.mp4: "):
        write_until_full(tmp_path / "file" / "a.mp4", at_most=100)


def test_a_read_only_disk_is_named(read_only_disk):
    with pytest.raises(OutputError, match=rf"cannot write .*a\.mp4: {os.strerror(errno.EROFS)}"):
        write_until_full(read_only_disk / "a.mp4", at_most=100)


def test_numbers_survive_the_coding():
    for index in range(256):
        assert number_of(numbered(index)) == index
