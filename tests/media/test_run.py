from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.media.test_video_writer import facts, top_boxes
from tests.media.videos import make_video, number_of, numbered
from yolotrt import Detector
from yolotrt.cli import main
from yolotrt.errors import InferenceError, OutputError
from yolotrt.media.frames import Span, host_memory
from yolotrt.media.images import write_image
from yolotrt.media.run import Outputs, Run
from yolotrt.media.sources import expand_sources
from yolotrt.media.video import read_video

av = pytest.importorskip("av")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The current folder; no thread may be left at the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("yolotrt-")] == []


@pytest.fixture
def detector(tiny_engine) -> Iterator[Detector]:
    with Detector(tiny_engine, confidence=0.5, threads=1) as detector:
        yield detector


def run(detector: Detector, *sources: str, span: Span | None = None, **outputs) -> int:
    return Run(detector, expand_sources(list(sources)), Outputs(Path("out"), **outputs), span=span).execute()


def records(path: str) -> list[dict]:
    text = Path(path).read_text()
    return [json.loads(line) for line in text.splitlines()] if path.endswith("jsonl") else json.loads(text)


def files(folder: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


# --- what comes out ---


@pytest.mark.parametrize(("count", "is_warmed"), [(1, False), (2, True)])
def test_the_engine_is_warm_before_many_pictures_are_timed(detector, monkeypatch, count, is_warmed):
    calls = []
    monkeypatch.setattr(detector, "warm_up", lambda *, batches: calls.append(batches))
    for index in range(count):
        write_image(Path(f"pictures/{index}.png"), np.zeros((40, 60, 3), np.uint8))
    assert run(detector, "pictures", save_media=False, json=Path("a.json")) == 0
    assert calls == [detector.batches_in_flight] * is_warmed
    make_video(Path("clip.mp4"), 2)
    assert run(detector, "clip.mp4", save_media=False, json=Path("b.json")) == 0
    assert calls == [detector.batches_in_flight] * (is_warmed + 1)


def test_an_engine_that_cannot_be_warmed_leaves_no_folder_and_closes_the_views(detector, monkeypatch):
    def fail(*, batches: int) -> None:
        raise InferenceError("the device failed")

    monkeypatch.setattr(detector, "warm_up", fail)
    make_video(Path("clip.mp4"), 2)
    started = Run(detector, expand_sources(["clip.mp4"]), Outputs(Path("out")))
    view = SimpleNamespace(closed=0)
    view.close = lambda: setattr(view, "closed", view.closed + 1)
    started.add_view(view)
    with pytest.raises(InferenceError, match="the device failed"):
        started.execute()
    assert view.closed == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_dynamic_engine"])
def test_a_videos_detections_are_those_of_its_frames_as_pictures(request, engine):
    make_video(Path("clip.mp4"), 45, size=(60, 100))
    with Detector(request.getfixturevalue(engine), confidence=0.5) as detector:
        assert run(detector, "clip.mp4", json=Path("video.json")) == 0
        for frame in read_video(Path("clip.mp4"), host_memory):
            write_image(Path(f"frames/{frame.index}.png"), frame.image)
        assert run(detector, "frames", save_media=False, json=Path("pictures.json")) == 0
    video, pictures = records("video.json"), records("pictures.json")
    assert [record["frame"] for record in video] == list(range(45))
    assert sum(len(record["detections"]) for record in video) > 100
    assert [record["detections"] for record in video] == [record["detections"] for record in pictures]
    assert (facts(Path("out/clip.mp4"))["count"], facts(Path("out/clip.mp4"))["size"]) == (45, (60, 100))


def test_the_golden_videos_frames_are_found_as_pictures_are(golden, yolov5n_engine):
    path = golden / "video" / "car-detection.mp4"
    with Detector(yolov5n_engine, threads=2) as detector:
        span = Span(stride=40)
        expected = {frame.index: detector(frame.image) for frame in read_video(path, host_memory, span)}
        run(detector, str(path), span=span, jsonl=Path("r.jsonl"), save_media=False)
    found = {record["frame"]: record["detections"] for record in records("r.jsonl")}
    assert sorted(found) == sorted(expected) == list(range(0, 377, 40))
    assert sum(map(len, expected.values())) > 3
    for index, detections in expected.items():
        assert [item["name"] for item in found[index]] == detections.names
        np.testing.assert_allclose(
            [item["xyxy"] for item in found[index]] or np.zeros((0, 4)), detections.xyxy, atol=0.006
        )


def test_all_outputs_combine_and_agree(detector):
    make_video(Path("clip.mp4"), 10)
    write_image(Path("a.png"), numbered(7))
    outputs = {
        "save_txt": True,
        "save_crops": True,
        "json": Path("r.json"),
        "jsonl": Path("r.jsonl"),
        "csv": Path("r.csv"),
    }
    assert run(detector, "a.png", "clip.mp4", **outputs) == 0
    assert records("r.json") == records("r.jsonl")
    boxes = [len(record["detections"]) for record in records("r.json")]
    assert len(Path("r.csv").read_text().splitlines()) == 1 + sum(boxes)
    names = files("out")
    assert {"a.png", "clip.mp4", "labels/a.txt", "labels/clip_0.txt", "labels/clip_9.txt"} <= names
    for stem, count in zip(["a", *(f"clip_{index}" for index in range(10))], boxes, strict=True):
        assert len(Path(f"out/labels/{stem}.txt").read_text().splitlines()) == count
    assert 0 < len([name for name in names if name.startswith("crops/")]) <= sum(boxes)


def test_several_videos_and_pictures_keep_their_order(detector):
    for name, count in (("a.mp4", 5), ("c.mkv", 7)):
        make_video(Path(name), count)
    write_image(Path("b.png"), numbered(3))
    assert run(detector, "a.mp4", "b.png", "c.mkv", json=Path("r.json")) == 0
    assert [record["image"] for record in records("r.json")] == ["a.mp4"] * 5 + ["b.png"] + ["c.mkv"] * 7
    assert files("out") == {"a.mp4", "b.png", "c.mp4"}
    assert facts(Path("out/c.mp4"))["count"] == 7


def test_several_cameras_are_recorded_beside_each_other(detector, capsys):
    for name in ("a.mp4", "b.mp4"):
        make_video(Path(name), 20, rate=Fraction(40))
    cameras = [str(Path(name).resolve()) for name in ("a.mp4", "b.mp4")]
    assert Run(detector, cameras, Outputs(Path("out"), jsonl=Path("r.jsonl"))).execute() == 0
    taken = [Path(record["image"]).name for record in records("r.jsonl")]
    assert files("out") == {"a.mp4", "b.mp4"}
    for name in ("a.mp4", "b.mp4"):
        assert facts(Path("out", name))["count"] == taken.count(name) > 5
    assert re.search(r"a\.mp4: 20 frames came in, \d+ dropped", capsys.readouterr().out)


def test_a_file_played_as_a_camera_is_shown_and_can_be_ended(detector):
    class Viewer:
        def __init__(self) -> None:
            self.shown: list[int] = []
            self.is_closed = False

        def show(self, found) -> bool:
            self.shown.append(number_of(found.frame.pixels))
            return len(self.shown) < 5

        def idle(self) -> bool:
            return True

        def close(self) -> None:
            self.is_closed = True

    make_video(Path("clip.mp4"), 200)
    viewer = Viewer()
    run_ = Run(detector, [str(Path("clip.mp4").resolve())], Outputs(Path("out"), save_media=False))
    run_.add_view(viewer)
    assert run_.execute() == 0
    assert len(viewer.shown) == 5
    assert viewer.shown == sorted(viewer.shown)
    assert viewer.is_closed
    assert not Path("out").exists()


def test_the_summary_names_the_bottleneck(detector, capsys):
    make_video(Path("clip.mp4"), 10)
    run(detector, "clip.mp4", span=Span(stride=3))
    lines = capsys.readouterr().out.splitlines()
    assert re.match("4 frames of 1 video: ", lines[0])
    stages = ", ".join(rf"{name} [\d.]+ ms" for name in ("decode", "detect", "draw", "encode"))
    assert re.fullmatch(rf"stages, at the same time: {stages}; \w+ sets the pace", lines[2])
    assert lines[3] == "results: out"


# --- faults ---


def broken(name: str, golden: Path) -> None:
    data = (golden / "video" / "car-detection.mp4").read_bytes()
    contents = {"cut.mp4": data[: len(data) // 8], "empty.mp4": b"", "codec.mp4": data.replace(b"avc1", b"zzzz")}
    Path(name).write_bytes(contents[name])


@pytest.mark.parametrize(
    ("name", "alone", "message"),
    [
        ("cut.mp4", 1, r"video cut\.mp4 is cut off, it ends at [\d.]+ of 30\.2 s: copy it again"),
        ("empty.mp4", 2, r"video empty\.mp4 is empty: make or download it again"),
        ("codec.mp4", 2, r"video codec\.mp4 is in a codec that this FFmpeg has no decoder for: convert it"),
    ],
)
@pytest.mark.parametrize("among_others", [False, True])
def test_a_bad_video_is_named_and_the_others_are_done(detector, golden, capsys, name, alone, message, among_others):
    broken(name, golden)
    make_video(Path("good.mp4"), 10)
    status = run(detector, name, *(["good.mp4"] if among_others else []))
    assert status == (1 if among_others else alone)
    (error, *rest) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"yolotrt: error: {message}.*", error)
    assert all("Traceback" not in line for line in rest)
    if among_others:
        assert facts(Path("out/good.mp4"))["count"] == 10
    if name == "cut.mp4":
        assert facts(Path("out/cut.mp4"))["count"] > 30
        assert top_boxes(Path("out/cut.mp4").read_bytes())[-1] == "mdat"


def test_a_full_disk_ends_the_run_with_whole_files(detector, small_disk):
    make_noisy_video(Path("clip.mp4"))
    outputs = Outputs(small_disk / "out", jsonl=Path("r.jsonl"))
    with pytest.raises(OutputError, match=r"cannot write .*out/clip\.mp4: No space left on device: choose a writable"):
        Run(detector, [Path("clip.mp4")], outputs).execute()
    written = small_disk / "out" / "clip.mp4"
    assert top_boxes(written.read_bytes())[-1] == "mdat"
    assert facts(written)["count"] > 20
    assert [record["frame"] for record in records("r.jsonl")] == list(range(len(records("r.jsonl"))))


def make_noisy_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20"}
        for index in range(60):
            noise = np.random.RandomState(index).randint(0, 256, (480, 640, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="bgr24")))
        container.mux(stream.encode(None))


def test_a_read_only_disk_is_told_before_anything_is_done(detector, read_only_disk):
    make_video(Path("clip.mp4"))
    with pytest.raises(
        OutputError, match=r"cannot make the output folder .*Read-only file system.*: choose a writable"
    ):
        Run(detector, [Path("clip.mp4")], Outputs(read_only_disk / "out")).execute()
    with pytest.raises(OutputError, match=r"cannot write .*r\.json: Read-only file system: choose a writable place"):
        Run(detector, [Path("clip.mp4")], Outputs(Path("out"), json=read_only_disk / "r.json")).execute()
    assert not Path("out").exists()


def test_the_source_video_is_never_replaced(detector):
    make_video(Path("clip.mp4"))
    before = Path("clip.mp4").read_bytes()
    with pytest.raises(OutputError, match=r"cannot write clip\.mp4: it is the source video: choose another output"):
        Run(detector, [Path("clip.mp4")], Outputs(Path(), exist_ok=True)).execute()
    assert Path("clip.mp4").read_bytes() == before


def test_a_failing_device_stops_the_run_and_what_was_found_is_whole(detector, monkeypatch):
    make_video(Path("clip.mp4"), 100)
    submit, calls = detector.submit, []

    def fails(images):
        calls.append(1)
        if len(calls) == 60:
            raise InferenceError("the GPU is gone: plug it in")
        return submit(images)

    monkeypatch.setattr(detector, "submit", fails)
    with pytest.raises(InferenceError, match="the GPU is gone"):
        run(detector, "clip.mp4", json=Path("r.json"), csv=Path("r.csv"))
    assert len(records("r.json")) == facts(Path("out/clip.mp4"))["count"] > 30
    assert top_boxes(Path("out/clip.mp4").read_bytes())[-1] == "mdat"


# --- Ctrl-C in each phase, as a process ---


@pytest.fixture
def engine_file(tiny_engine) -> str:
    tiny_engine.save("tiny.engine")
    return "tiny.engine"


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory) -> Path:
    """Two minutes."""
    return make_video(tmp_path_factory.mktemp("long") / "clip.mp4", 3000)


def process(*argv: str) -> subprocess.Popen:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.Popen(
        [sys.executable, "-m", "yolotrt", *argv, "--conf", "0.9"],  # few boxes to draw
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "PYTHONPATH": str(ROOT)},
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.01)


def has_lines(path: str, count: int) -> bool:
    return Path(path).exists() and Path(path).read_bytes().count(b"\n") >= count


def test_ctrl_c_while_a_video_is_worked_on_leaves_whole_files_that_agree(engine_file, long_clip):
    Path("clip.mp4").symlink_to(long_clip)
    child = process("-d", "clip.mp4", "--engine", engine_file, "--save-json", "r.json", "--save-jsonl", "r.jsonl")
    wait_until(lambda: has_lines("r.jsonl", 60))
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "yolotrt: interrupted\n")
    count = len(records("r.json"))
    assert 60 <= count < 3000
    assert records("r.json") == records("r.jsonl")
    assert facts(Path("runs/detect/clip.mp4"))["count"] == count
    assert not list(Path().rglob("*.part"))


def test_ctrl_c_while_a_camera_runs_ends_cleanly_and_tells_what_was_found(engine_file, long_clip):
    Path("clip.mp4").symlink_to(long_clip)
    source = str(long_clip)
    child = process("--webcam", source, "--serve", "0", "--engine", engine_file, "--save-jsonl", "r.jsonl")
    wait_until(lambda: has_lines("r.jsonl", 20))
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "yolotrt: interrupted\n")
    assert re.match(r"live picture: http://127\.0\.0\.1:\d+/ \(Ctrl-C ends\)\n\d+ frames of 1 source: ", out)


@pytest.mark.parametrize("phase", ["connecting", "lost"])
def test_ctrl_c_while_a_stream_is_waited_for(engine_file, phase):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        port = silent.getsockname()[1]
        if phase == "lost":
            server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rtsp_server.py"))], stdout=subprocess.PIPE, text=True
            )
            port = int(server.stdout.readline())
        child = process("-d", f"rtsp://127.0.0.1:{port}/a", "--engine", engine_file, "--save-jsonl", "r.jsonl")
        wait_until(lambda: Path("r.jsonl").exists())
        if phase == "lost":
            wait_until(lambda: has_lines("r.jsonl", 30))
            server.kill()
            server.communicate()
        time.sleep(0.7)
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert child.returncode == 130
    assert err.splitlines()[-1] == "yolotrt: interrupted"
    assert "Traceback" not in err
    if phase == "lost":
        count = len(records("r.jsonl"))
        (video,) = Path("runs/detect").glob("*.mp4")
        assert facts(video)["count"] == count
    else:
        assert not Path("runs/detect").exists()  # nothing was written


def test_a_second_ctrl_c_does_not_wait(engine_file, detector, monkeypatch):
    make_video(Path("clip.mp4"), 50)
    submit = detector.submit

    def slow(images):
        time.sleep(0.3)
        return submit(images)

    monkeypatch.setattr(detector, "submit", slow)
    for delay in (0.5, 0.7):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(detector, "clip.mp4")
    assert time.monotonic() - began < 2.5  # the frames under way would take longer
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_kill_in_the_middle_leaves_what_was_finished(engine_file, long_clip):
    Path("clip.mp4").symlink_to(long_clip)
    child = process("-d", "clip.mp4", "--engine", engine_file, "--save-jsonl", "r.jsonl", "--save-csv", "r.csv")
    wait_until(lambda: has_lines("r.jsonl", 150))
    child.kill()
    child.communicate()
    assert [record["frame"] for record in records("r.jsonl")] == list(range(len(records("r.jsonl"))))
    video = Path("runs/detect/clip.mp4")
    assert top_boxes(video.read_bytes())[-1] == "mdat"
    numbers = [number_of(frame.image) for frame in read_video(video, host_memory)]
    assert len(numbers) >= 25


# --- memory ---


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(detector, tmp_path):
    """All stages, reader and writer included, on 2000 frames; 50,000 are measured by benchmarks/pipeline.py."""
    make_video(Path("clip.mp4"), 1000, size=(96, 128))
    seen: list[float] = []

    class Memory:
        def show(self, _found) -> bool:
            seen.append(resident_mib())
            return True

        def idle(self) -> bool:
            return True

        def close(self) -> None:
            pass

    detector.options = replace(detector.options, confidence=0.9)
    for name in ("one.mp4", "two.mp4"):
        Path(name).symlink_to("clip.mp4")
    run_ = Run(
        detector, [Path("one.mp4"), Path("two.mp4")], Outputs(Path("out"), json=Path("r.json"), jsonl=Path("r.jsonl"))
    )
    run_.add_view(Memory())
    assert run_.execute() == 0
    assert len(seen) == 2000
    # 36 KiB a frame: holding on to one in six would show as 7 MiB
    assert max(seen[1500:]) - max(seen[300:600]) < 5


def test_the_command_line_reaches_the_run(engine_file, capsys):
    make_video(Path("clip.mp4"), 50)
    argv = "-d clip.mp4 --engine tiny.engine --stride 5 --start 0.4 --end 0:01.2 --no-save --save-csv r.csv --conf 0.9"
    assert main(argv.split()) == 0
    assert capsys.readouterr().out.startswith("4 frames of 1 video: ")


def test_a_start_after_the_end_of_the_video_is_an_error(engine_file, capsys):
    make_video(Path("clip.mp4"), 50)
    assert main(["-d", "clip.mp4", "--engine", "tiny.engine", "--start", "1:00", "--no-save"]) == 2
    assert "error: video clip.mp4 has no frame between --start and --end: choose an earlier" in capsys.readouterr().err


def test_a_video_on_the_web_that_cannot_be_reached_is_named_without_its_password(engine_file, capsys):
    pytest.importorskip("av")
    assert main(["-d", "http://user:secret@127.0.0.1:1/clip.mp4", "--engine", "tiny.engine", "--no-save"]) == 2
    error = capsys.readouterr().err
    assert "error: video http://127.0.0.1:1/clip.mp4 cannot be read (Connection refused): check the address" in error
    assert "secret" not in error
