from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt import BuildOptions, benchmark, build_engine
from yolotrt.benchmark import FILE_TO_BOXES, Plan, Row
from yolotrt.cli import main
from yolotrt.engines import host
from yolotrt.errors import InputError
from yolotrt.media.images import read_image
from yolotrt.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
HOST_STAGES = ["decode", "letterbox", "engine", "yololayer", "nms", "whole", FILE_TO_BOXES]


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> list[Path]:
    """Two pictures in the current folder."""
    monkeypatch.chdir(tmp_path)
    paths = [Path("pictures/a.png"), Path("pictures/b.png")]
    paths[0].parent.mkdir()
    for path in paths:
        cv2.imwrite(str(path), np.random.RandomState(1).randint(0, 256, (50, 80, 3), np.uint8))
    return paths


def test_every_engine_is_measured_with_every_batch_that_it_takes(tiny_engine, tiny_dynamic_engine, pictures):
    rows = benchmark.run(
        [tiny_engine, tiny_dynamic_engine], pictures, Plan((1, 3, 9), repeats=7, threads=1), [0.5, None]
    )
    assert [(row.batch, row.accuracy) for row in rows] == [(1, 0.5), (1, None), (3, None)]
    for row in rows:
        assert list(row.stages) == HOST_STAGES
        assert all(len(times) == 7 and min(times) > 0 for times in row.stages.values())


def test_masks_belong_to_the_whole(tiny_segment_engine, pictures):
    (row,) = benchmark.run([tiny_segment_engine], pictures, Plan((2,), repeats=5, threads=1))
    assert list(row.stages) == HOST_STAGES


def test_a_classifier_is_refused(tiny_classifier_engine, tiny_engine, pictures):
    with pytest.raises(InputError, match=r"is a classifier's and --benchmark times the way to boxes: choose an engine"):
        benchmark.run([tiny_engine, tiny_classifier_engine], pictures, Plan())


def test_a_stage_that_takes_longer_is_seen_where_it_is(tiny_engine, pictures, monkeypatch):
    right = host.HostDecoder.boxes

    def slow(self, *values):
        host.time.sleep(0.02)
        return right(self, *values)

    monkeypatch.setattr(host.HostDecoder, "boxes", slow)
    (row,) = benchmark.run([tiny_engine], pictures, Plan(repeats=5, threads=1))
    assert min(row.stages["whole"]) > 20
    assert min(row.stages[FILE_TO_BOXES]) > 20
    assert row.percentile("engine", 50) < 20


def test_a_session_on_a_gpu_times_its_own_stages(tiny_engine, pictures, monkeypatch):
    def profile(self, frames, options, repeats):
        names = ("upload", "letterbox", "engine", "yololayer", "nms", "whole")
        return {name: [float(place)] * repeats for place, name in enumerate(names, 1)}

    monkeypatch.setattr(host.HostSession, "profile", profile, raising=False)
    (row,) = benchmark.run([tiny_engine], pictures, Plan(repeats=5, threads=1))
    assert list(row.stages) == [*benchmark.STAGES, FILE_TO_BOXES]
    assert row.percentile("nms", 50) == 5
    assert row.percentile("whole", 50) != 6  # on the host's clock, which sees the launches too


def test_throughput_and_percentiles_are_of_all_batches():
    row = Row("a", "onnxruntime", "fp32", 4, {FILE_TO_BOXES: [10.0, 20.0, 30.0, 40.0]})
    assert row.pictures_per_second == pytest.approx(16 / 0.1)
    assert (row.latency_ms, row.percentile(FILE_TO_BOXES, 100)) == (25, 40)
    base = Row("b", "onnxruntime", "fp32", 1, {FILE_TO_BOXES: [5.0, 10.0, 900.0]})
    assert row.speed_against(base) == pytest.approx(10 / (25 / 4))


def test_videos_among_the_sources_are_left_out(pictures):
    Path("pictures/clip.mp4").write_bytes(b"video")
    assert benchmark.pictures_of(["pictures"]) == pictures
    with pytest.raises(InputError, match="no source is a picture"):
        benchmark.pictures_of(["pictures/clip.mp4"])


@pytest.mark.parametrize(
    ("values", "message"), [({"batches": (0,)}, "choose numbers of at least 1"), ({"repeats": 2}, "say nothing")]
)
def test_plans_that_say_nothing_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Plan(**values)


def test_no_engine_for_a_batch_is_said(tiny_engine, pictures):
    with pytest.raises(InputError, match=r"no engine takes a batch of \[8\], they take 1 to 1"):
        benchmark.run([tiny_engine], pictures, Plan((8,)))


def test_the_command_measures_engines_that_it_builds(tiny_weights, pictures, capsys):
    save_weights(tiny_weights, "tiny.wts")
    Path("notes.md").write_text("# Notes\n")
    options = ["--weights", "tiny.wts", "--batches", "1", "2", "--precisions", "fp32", "fp16", "--repeats", "5"]
    assert main(["--benchmark", "pictures", *options, "--markdown", "notes.md"]) == 0
    out = capsys.readouterr().out
    assert "| onnxruntime fp16 | 2 |" in out
    assert out.count("what it includes") == 4
    record = json.loads(Path("runs/benchmark/benchmark.json").read_text())
    assert [(row["precision"], row["batch"]) for row in record["rows"]] == [
        ("fp32", 1), ("fp32", 2), ("fp16", 1), ("fp16", 2),
    ]  # fmt: skip
    assert record["rows"][0]["ratio"] == 1
    assert {"processor", "libraries", "load"} <= record["machine"].keys()
    assert read_image(Path("runs/benchmark/benchmark.png")).shape[0] > 400
    notes = Path("notes.md").read_text()
    assert notes.startswith("# Notes\n\n<!-- begin benchmark -->")
    assert "| onnxruntime fp16 | 2 |" in notes


BAD_CALLS = [
    (("--batches", "0"), "batch sizes"),
    (("--repeats", "1"), "say nothing about percentiles"),
    (("--precisions", "fp32"), "give --weights, too"),
    (("--engine", "no.engine"), "engine no.engine does not exist"),
    (("--conf", "0.1"), "--conf belongs to -d"),
    (("--markdown", "pictures"), "it is a directory"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_calls_get_one_line(pictures, tiny_engine, capsys, options, message):
    tiny_engine.save("yolotrt.engine")
    assert main(["--benchmark", "pictures", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("yolotrt: error: ")
    assert message in err
    assert not Path("runs").exists()


def test_peers_take_turns_and_the_one_that_cannot_run_is_left_out(tiny_weights, pictures):
    build_engine(tiny_weights, "tiny.engine", backend="onnxruntime", options=BuildOptions(imgsz=64))
    Path("broken.onnx").write_bytes(b"no model")
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "tiny.engine", "pictures", "--threads", "1"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--onnx", "broken.onnx"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "opencv is left out" in done.stderr
    assert "| yolotrt | " in done.stdout
    assert done.stdout.count(" 1.00x |") == 2


def test_without_matplotlib_there_is_no_plot_and_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = Row("a", "onnxruntime", "fp32", 1, {FILE_TO_BOXES: [10.0, 20.0]})
    benchmark.write_results(tmp_path, [row], Plan(), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md"]
    assert "the benchmark has no plot: matplotlib is not installed" in caplog.text
