from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.engines.fake_gpu import install_gpu, install_no_gpu
from tests.engines.fake_tensorrt import install_tensorrt
from yolotrt import BuildOptions, Detector, build_engine, load_weights
from yolotrt.cli import main
from yolotrt.engines.file import EngineFile
from yolotrt.errors import InputError
from yolotrt.media.images import read_image
from yolotrt.weights import Weights, save_weights

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Result:
    """What a command gave back."""

    status: int
    out: str
    err: str

    def assert_fails(self, status: int, message: str) -> None:
        """One line on stderr says why; there is no traceback."""
        assert self.status == status, self.err
        errors = [line for line in self.err.splitlines() if line.startswith("yolotrt: error: ")]
        assert len(errors) == 1, self.err
        assert re.search(message, errors[0]), errors[0]
        assert "Traceback" not in self.err + self.out

    def assert_succeeds(self) -> Result:
        """Nothing on stderr, which is no terminal here."""
        assert (self.status, self.err) == (0, "")
        return self


@pytest.fixture
def run(capsys):
    """Runs the command line in this process."""

    def run_main(*argv: str | Path) -> Result:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run_main


def noise(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.RandomState(height + width).randint(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype)
    return values if channels > 1 else values[..., 0]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_engine) -> Path:
    """The current folder: an engine under its default name and two pictures."""
    here = tmp_path / "here"
    (here / "pictures").mkdir(parents=True)
    monkeypatch.chdir(here)
    tiny_engine.save("yolotrt.engine")
    for name, size in (("a", (50, 90)), ("b", (64, 40))):
        cv2.imwrite(f"pictures/{name}.png", noise(*size))
    return here


def files(folder: Path | str = ".") -> set[str]:
    """All files and folders, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


# --- -s ---


def test_without_options_the_demo_model_finds_the_sample_pictures_signs(run):
    Path("yolotrt.engine").unlink()
    built = run("-s").assert_succeeds()
    assert "the demo model" in built.out
    assert "12 classes, 640x640, batch 1, fp32" in built.out
    found = output_lines(run("-d", "--no-save", "--stride", "100"))
    assert re.fullmatch(r"no source given: taking the sample pictures \(.*samples\)", found[0])
    assert found[1].startswith("7 pictures and 3 frames of 1 video: ")
    assert " stop" in found[1]


@pytest.mark.parametrize("suffix", [".wts", ".safetensors"])
def test_an_engine_is_built_from_weights(run, tiny_weights, tiny_engine, suffix):
    save_weights(tiny_weights, f"tiny{suffix}")
    before = files()
    result = run("-s", "--weights", f"tiny{suffix}", "--engine", "deep/new.engine").assert_succeeds()
    assert re.fullmatch(
        r"deep/new\.engine: 3 classes, 64x64, batch 1, fp32, onnxruntime [\d.]+, 0\.0 MB, \d+\.\d s\n", result.out
    )
    assert EngineFile.load("deep/new.engine").plan == tiny_engine.plan
    assert files() - before == {"deep", "deep/new.engine"}


def test_the_engines_default_name_is_what_detection_runs(run, tiny_weights):
    Path("yolotrt.engine").unlink()
    save_weights(tiny_weights, "tiny.wts")
    run("-s", "--weights", "tiny.wts").assert_succeeds()
    run("-d", "pictures").assert_succeeds()


@pytest.mark.parametrize(
    ("options", "imgsz", "batch", "precision"),
    [
        (["--imgsz", "96"], (96, 96), (1, 1, 1), "fp32"),
        (["--imgsz", "64", "96"], (64, 96), (1, 1, 1), "fp32"),
        (["--batch", "4"], (64, 64), (4, 4, 4), "fp32"),
        (["--max-batch", "4"], (64, 64), (1, 4, 4), "fp32"),
        (["--min-batch", "2", "--opt-batch", "3", "--max-batch", "4"], (64, 64), (2, 3, 4), "fp32"),
        (["--precision", "fp16", "--backend", "onnxruntime"], (64, 64), (1, 1, 1), "fp16"),
        (["--backend", "auto"], (64, 64), (1, 1, 1), "fp32"),
    ],
)
def test_build_options_reach_the_engine(run, tiny_weights, options, imgsz, batch, precision):
    save_weights(tiny_weights, "tiny.wts")
    result = run("-s", "--weights", "tiny.wts", *options).assert_succeeds()
    header = EngineFile.load("yolotrt.engine").header
    assert (header.imgsz, header.batch_range, header.precision) == (imgsz, batch, precision)
    low, _, high = batch
    assert f"{imgsz[0]}x{imgsz[1]}, batch {low if low == high else f'{low} to {high}'}, {precision}" in result.out


def test_int8_is_calibrated_and_says_what_became_of_it(run, tiny_weights, monkeypatch):
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", "cache")
    save_weights(tiny_weights, "tiny.wts")
    Path("calib_images").mkdir()
    for index in range(16):
        picture = np.random.default_rng(index).integers(0, 256, (5, 7, 3), np.uint8)
        cv2.imwrite(f"calib_images/{index}.png", cv2.resize(picture, (70, 50)))
    command = ("-s", "--weights", "tiny.wts", "--precision", "int8", "--int8-keep", "model.1")
    built = run(*command, "--calib-table", "scales.json")
    assert (built.status, built.err.splitlines()) == (
        0,
        ["calibrating with 16 pictures (mse)", "calibrating with 16 pictures (objects)"],
    )
    first = built.out
    assert "5 of 8 convolutions fp32, 3 int8; kept in high precision: model.1\n" in first
    assert "scales: mse of 16 pictures, calibrated now, written to scales.json\n" in first
    again = run(*command, "--calib", "calib_images").assert_succeeds().out
    assert "scales: mse of 16 pictures, from an earlier calibration with the same pictures, cache/scales/" in again
    read = run(*command, "--calib-table", "scales.json").assert_succeeds().out
    assert "scales: mse of 16 pictures, read from scales.json\n" in read
    run("-d", "calib_images", "--no-save").assert_succeeds()
    unknown = run(*command[:-1], "model.77", "--calib-table", "scales.json")
    unknown.assert_fails(2, "--int8-keep model.77: the model has no layer of that name")


def test_a_very_large_batch_is_warned_of_before_the_build(run, tiny_weights, caplog):
    save_weights(tiny_weights, "tiny.wts")
    warning = "a batch of 1024 with 256x256 pixels is 0.8 GB in float32"
    for batch, expected in (("1", False), ("1024", True)):
        run("-s", "--weights", "tiny.wts", "--imgsz", "256", "--batch", batch)
        assert (warning in caplog.text) == expected


def test_the_raw_plan_is_the_engine_without_its_header(run, tiny_weights):
    onnx = pytest.importorskip("onnx", reason="the raw plan of ONNX Runtime is read with onnx")
    save_weights(tiny_weights, "tiny.wts")
    run("-s", "--weights", "tiny.wts", "--raw-plan", "plans/tiny.onnx").assert_succeeds()
    assert Path("plans/tiny.onnx").read_bytes() == EngineFile.load("yolotrt.engine").plan
    onnx.checker.check_model(onnx.load("plans/tiny.onnx"), full_check=True)


def test_a_raw_plan_replaces_an_older_one(run, tiny_weights):
    save_weights(tiny_weights, "tiny.wts")
    for _ in range(2):
        run("-s", "--weights", "tiny.wts", "--raw-plan", "tiny.onnx").assert_succeeds()
    Path("tiny.plan").write_bytes(b"ftrt" + bytes(20))
    run("-s", "--weights", "tiny.wts", "--raw-plan", "tiny.plan").assert_succeeds()
    assert Path("tiny.plan").read_bytes() == Path("tiny.onnx").read_bytes()


@pytest.mark.parametrize("name", ["pictures/a.png", "tiny.wts.bak", "yolotrt.engine"])
def test_a_raw_plan_never_replaces_a_file_of_another_kind(run, tiny_weights, name):
    save_weights(tiny_weights, "tiny.wts")
    save_weights(tiny_weights, "tiny.safetensors")
    Path("tiny.safetensors").rename("tiny.wts.bak")
    before = Path(name).read_bytes()
    result = run("-s", "--weights", "tiny.wts", "--engine", "new.engine", "--raw-plan", name)
    result.assert_fails(2, f"cannot write the plan {name}: a file of another kind is there: choose another name")
    assert Path(name).read_bytes() == before
    assert not Path("new.engine").exists()


GPU_OPTIONS = (
    "--backend tensorrt --precision tf32 --optimization-level 2 --workspace 99 --hardware-compatible "
    "--version-compatible --yololayer kernel --timing-cache own/tiny.timing"
)


def test_options_for_gpus_reach_tensorrt(run, tiny_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "cache"))
    install_gpu(monkeypatch)
    install_tensorrt(monkeypatch, "10.13.0.35")
    save_weights(tiny_weights, "tiny.wts")
    lines = output_lines(run("-s", "--weights", "tiny.wts", *GPU_OPTIONS.split()))
    assert re.search(
        r"tf32, tensorrt 10\.13\.0\.35, 8 of 8 convolutions tf32, YoloLayer as kernel, 0\.0 MB, ", lines[-1]
    )
    header = EngineFile.load("yolotrt.engine").header
    assert header.build_options == {
        "workspace_mib": 99,
        "optimization_level": 2,
        "hardware_compatible": True,
        "version_compatible": True,
        "convolutions": {"tf32": 8},
        "scratch_bytes": 3 << 20,
    }
    assert Path("own/tiny.timing").is_file()
    assert not (tmp_path / "cache").exists()
    described = run("--info", "yolotrt.engine").assert_succeeds().out
    assert re.search(
        r"build +8 of 8 convolutions tf32, optimization level 2, workspace 99 MiB, "
        r"for every GPU from compute capability 8\.0 on, for later versions of TensorRT\n",
        described,
    )
    assert re.search(r"YoloLayer +a kernel on the GPU, after the engine\n", described)
    assert re.search(r"device +NVIDIA Test \(9\.0\)\n", described)


def test_the_timing_cache_is_in_the_users_cache_folder_or_off(run, tiny_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "cache"))
    install_gpu(monkeypatch)
    install_tensorrt(monkeypatch, "8.6.0")
    save_weights(tiny_weights, "tiny.wts")
    run("-s", "--weights", "tiny.wts", "--backend", "tensorrt", "--no-timing-cache").assert_succeeds()
    assert not (tmp_path / "cache").exists()
    run("-s", "--weights", "tiny.wts", "--backend", "tensorrt").assert_succeeds()
    assert len(files(tmp_path / "cache" / "timing")) == 1


def test_a_checkpoint_is_built_and_what_was_inferred_is_said(run, golden):
    result = run("-s", "--weights", golden / "weights" / "pv_nc5_v70.pt").assert_succeeds()
    assert "yolotrt.engine (replaced): 5 classes, 640x640" in result.out
    save_weights(load_weights(golden / "weights" / "pv_nc5_v70.pt"), "full.wts")
    counted = [line for line in Path("full.wts").read_text().splitlines() if not line.startswith("#")]
    Path("bare.wts").write_text("\n".join(counted) + "\n")
    assert "bare.wts: inferred " in run("-s", "--weights", "bare.wts").assert_succeeds().out


def test_an_rtx_engine_is_built_but_not_run_without_a_gpu(run, tiny_weights, monkeypatch):
    install_no_gpu(monkeypatch)
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    save_weights(tiny_weights, "tiny.wts")
    built = run("-s", "--weights", "tiny.wts", "--backend", "tensorrt-rtx").assert_succeeds()
    assert ", fp16, tensorrt-rtx " in built.out
    before = files()
    run("-d", "pictures").assert_fails(1, r"no NVIDIA GPU is usable here \(no driver\): use --backend onnxruntime")
    assert files() == before
    assert "RTX GPUs" in run("--info", "yolotrt.engine").assert_succeeds().out


# --- -d ---


def output_lines(result: Result) -> list[str]:
    return result.assert_succeeds().out.splitlines()


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["pictures/a.png"], ["a.png"]),
        (["pictures"], ["a.png", "b.png"]),
        (["pictures/"], ["a.png", "b.png"]),
        (["pictures/*.png"], ["a.png", "b.png"]),
        (["pictures/b.png", "pictures/a.png"], ["b.png", "a.png"]),
        (["pictures/a.png", "pictures"], ["a.png", "b.png"]),
        (["list.txt"], ["b.png", "a.png"]),
    ],
    ids=["file", "folder", "folder with slash", "glob", "files", "file and folder", "list"],
)
def test_every_kind_of_source_is_detected(run, sources, expected):
    Path("list.txt").write_text("# two pictures\npictures/b.png\n\npictures/a.png\n")
    lines = output_lines(run("-d", *sources, "--save-json", "found.json"))
    assert [Path(record["image"]).name for record in json.loads(Path("found.json").read_text())] == expected
    assert lines[0].startswith(f"{len(expected)} picture{'s' if len(expected) > 1 else ''}: ")
    assert files("runs/detect") == set(expected)


def test_without_a_source_the_samples_are_detected(run):
    shutil.move("pictures", "samples")
    lines = output_lines(run("-d"))
    assert lines[0] == "no source given: taking the sample pictures (samples)"
    assert lines[1].startswith("2 pictures: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-d pictures --weights other.pt", "--weights belongs to -s and has no effect on -d: leave it out"),
        ("-d pictures --imgsz 320", "--imgsz belongs to -s"),
        ("-s --conf 0.9", "--conf belongs to -d and has no effect on -s"),
        ("-s --save-txt", "--save-txt belongs to -d"),
        ("--info yolotrt.engine --conf 0.9", "--conf belongs to -d and has no effect on --info"),
        ("-d pictures --classes cat lion", "class 'lion' does not exist: the model has classes 0 to 2: cat, dog, bird"),
        ("-d yolotrt.engine", r"source yolotrt\.engine is a model, not a picture: build with -s --weights"),
        ("-s --weights yolov5s.pt", r"weights yolov5s\.pt do not exist: python gen_wts\.py -w yolov5s\.pt downloads"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(run, argv, message):
    before = files()
    run(*argv.split()).assert_fails(2, message)
    assert files() == before


def test_sources_of_two_d_options_add_up(run):
    assert output_lines(run("-d", "pictures/a.png", "-d", "pictures/b.png", "--no-save"))[0].startswith("2 pictures")


def test_classes_may_be_named(run):
    for name in ("cat", "0"):
        run("-d", "pictures", "--classes", name, "--no-save", "--save-json", f"{name}.json").assert_succeeds()
    assert Path("cat.json").read_text() == Path("0.json").read_text()
    assert '"name": "cat"' in Path("cat.json").read_text()


@pytest.mark.parametrize(
    "argv",
    [
        ["-d", "--no-save", "pictures/a.png"],
        ["-d", "--conf", "0.5", "pictures/a.png", "--no-save"],
        ["--no-save", "--engine", "yolotrt.engine", "-d", "pictures/a.png"],
        ["-d", "--engine", "yolotrt.engine", "pictures/a.png", "--no-save"],
    ],
)
def test_sources_may_stand_anywhere(run, argv):
    assert output_lines(run(*argv))[0].startswith("1 picture: ")


def test_the_summary_counts_classes_and_says_how_long_it_took(run, tiny_engine):
    with Detector(tiny_engine, confidence=0.9) as detector:
        found = detector("pictures/a.png")
    counts = sorted(found.counts().items(), key=lambda item: -item[1])
    lines = output_lines(run("-d", "pictures/a.png", "--conf", "0.9"))
    assert lines[0] == "1 picture: " + ", ".join(f"{number} {name}" for name, number in counts)
    number = r"\d+\.\d"
    timing = rf"each: pre {number} ms, infer {number} ms, post {number} ms \({number} pictures/s with reading .*\)"
    assert re.fullmatch(timing, lines[1])
    assert lines[2:] == ["results: runs/detect"]


def test_nothing_found_is_said(run):
    lines = output_lines(run("-d", "pictures", "--conf", "1"))
    assert lines[0] == "2 pictures: nothing"
    assert files("runs/detect") == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["--conf", "0.6"], {"confidence": 0.6}),
        (["--iou", "0.2"], {"iou": 0.2}),
        (["--max-det", "9"], {"max_detections": 9}),
        (["--classes", "0", "2"], {"classes": [0, 2]}),
        (["--agnostic-nms"], {"agnostic": True}),
    ],
)
def test_detection_options_reach_the_detector(run, tiny_engine, argv, options):
    with Detector(tiny_engine) as usual, Detector(tiny_engine, **options) as detector:
        expected = detector("pictures/a.png")
        assert expected.names != usual("pictures/a.png").names  # the option matters in this picture
    run("-d", "pictures/a.png", *argv, "--threads", "1", "--no-save", "--save-json", "found.json").assert_succeeds()
    (record,) = json.loads(Path("found.json").read_text())
    assert [item["name"] for item in record["detections"]] == expected.names
    boxes = [item["xyxy"] for item in record["detections"]]
    np.testing.assert_allclose(boxes, expected.xyxy, rtol=0, atol=0.006)  # two decimals


def test_the_drawn_picture_differs_from_its_source_in_boxes_only(run):
    run("-d", "pictures/a.png", "--max-det", "1", "--conf", "0.5").assert_succeeds()
    source, drawn = read_image(Path("pictures/a.png")), read_image(Path("runs/detect/a.png"))
    changed = (source != drawn).any(-1).mean()
    assert 0 < changed < 0.9


def test_each_run_gets_a_folder_of_its_own(run):
    for expected in ("runs/detect", "runs/detect2", "runs/detect3"):
        assert output_lines(run("-d", "pictures/a.png"))[-1] == f"results: {expected}"
    for expected in ("mine", "mine2"):
        assert output_lines(run("-d", "pictures/a.png", "--out", "mine"))[-1] == f"results: {expected}"
    assert files("mine") == files("mine2") == {"a.png"}


def test_exist_ok_adds_to_an_older_folder(run):
    for name in ("a", "b"):
        lines = output_lines(run("-d", f"pictures/{name}.png", "--out", "mine", "--exist-ok"))
        assert lines[-1] == "results: mine"
    assert files("mine") == {"a.png", "b.png"}
    run("-d", "pictures/a.png", "--out", "mine", "--exist-ok", "--no-save", "--save-txt", "--conf", "1")
    assert files("mine") == {"a.png", "b.png"}


def test_labels_of_an_earlier_run_do_not_outlive_their_detections(run):
    argv = ("-d", "pictures/a.png", "--out", "mine", "--exist-ok", "--no-save", "--save-txt")
    run(*argv).assert_succeeds()
    assert files("mine") == {"labels", "labels/a.txt"}
    run(*argv, "--conf", "1").assert_succeeds()
    assert files("mine") == {"labels"}


def test_names_that_begin_with_a_dash_stand_after_two_dashes(run):
    Path("pictures/a.png").rename("-a.png")
    lines = output_lines(run("-d", "--no-save", "--", "-a.png"))
    assert lines[0].startswith("1 picture")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["-d", "pictures"], 1),
        (["--info", "yolotrt.engine"], 0),
        (["-s", "--engine", "b", "--backend", "onnxruntime"], 0),
    ],
)
def test_an_opencv_that_cannot_be_loaded_is_named_where_it_is_needed(argv, status):
    program = "import sys; sys.modules['cv2'] = None; from yolotrt.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status
    if status:
        assert re.fullmatch(r"yolotrt: error: OpenCV cannot be loaded .*: install libgl1, or .*\n", done.stderr)


def test_segmentation_gives_polygons_and_run_lengths(run, tiny_segment_engine):
    tiny_segment_engine.save("segment.engine")
    run("-d", "pictures", "--engine", "segment.engine", "--save-txt", "--save-json", "o.json").assert_succeeds()
    items = [item for record in json.loads(Path("o.json").read_text()) for item in record["detections"]]
    assert items and all(set(item["segmentation"]) == {"size", "counts"} for item in items)
    labels = [line for path in Path("runs/detect/labels").iterdir() for line in path.read_text().splitlines()]
    assert len(labels) == len(items)
    assert all(len(line.split()) >= 7 and len(line.split()) % 2 for line in labels)


def test_classification_gives_the_best_classes(run, tiny_classifier_engine):
    tiny_classifier_engine.save("classify.engine")
    outputs = ("--save-txt", "--save-json", "o.json", "--save-csv", "o.csv", "--save-jsonl", "o.jsonl")
    run("-d", "pictures", "--engine", "classify.engine", *outputs).assert_succeeds()
    assert all(line.endswith(",,,,") for line in Path("o.csv").read_text().splitlines()[1:])
    crops = run("-d", "pictures", "--engine", "classify.engine", "--save-crops")
    crops.assert_fails(2, "a classifier finds no boxes to cut out: leave out --save-crops")
    for record in json.loads(Path("o.json").read_text()):
        assert len(record["classes"]) == 5 and "detections" not in record
        text = Path("runs/detect/labels", Path(record["image"]).stem + ".txt").read_text()
        assert text.splitlines()[0].endswith(record["classes"][0]["name"])


def test_no_save_writes_nothing(run):
    before = files()
    lines = output_lines(run("-d", "pictures", "--no-save"))
    assert len(lines) == 2
    assert files() == before


@pytest.mark.parametrize(("options", "columns"), [(["--save-txt"], 5), (["--save-txt", "--save-conf"], 6)])
def test_labels_are_written(run, options, columns):
    run("-d", "pictures", "--no-save", *options, "--save-json", "found.json").assert_succeeds()
    assert files("runs/detect") == {"labels", "labels/a.txt", "labels/b.txt"}
    record = json.loads(Path("found.json").read_text())[0]
    rows = [line.split() for line in Path("runs/detect/labels/a.txt").read_text().splitlines()]
    assert {len(row) for row in rows} == {columns}
    assert [int(row[0]) for row in rows] == [item["class_id"] for item in record["detections"]]
    x, y, w, h = (np.array([float(row[index]) for row in rows]) for index in (1, 2, 3, 4))
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1) * (90, 50, 90, 50)
    # the JSON has two decimals, the labels six digits
    np.testing.assert_allclose(corners, [item["xyxy"] for item in record["detections"]], rtol=0, atol=0.006)


def test_labels_alone_leave_no_folder_if_nothing_is_found(run):
    before = files()
    lines = output_lines(run("-d", "pictures", "--no-save", "--save-txt", "--conf", "1"))
    assert len(lines) == 2
    assert files() - before <= {"runs"}


def test_the_json_has_the_documented_form(run):
    lines = output_lines(run("-d", "pictures/a.png", "--no-save", "--save-json", "deep/found.json"))
    assert lines[-1] == "results: deep/found.json"
    (record,) = json.loads(Path("deep/found.json").read_text())
    assert (record["image"], record["width"], record["height"]) == ("pictures/a.png", 90, 50)
    assert set(record) == {"image", "width", "height", "detections"}
    for item in record["detections"]:
        assert set(item) == {"class_id", "name", "confidence", "xyxy"}
        assert item["name"] == ("cat", "dog", "bird")[item["class_id"]]
        assert 0.25 < item["confidence"] <= 1
        assert len(item["xyxy"]) == 4


@pytest.mark.parametrize("batch", [BuildOptions(min_batch=4, opt_batch=4, max_batch=4), BuildOptions(max_batch=3)])
def test_a_batched_engine_finds_the_same(run, tiny_weights, batch):
    for index in range(5):
        cv2.imwrite(f"pictures/{index}.png", noise(40 + 7 * index, 60))
    run("-d", "pictures", "--no-save", "--conf", "0.5", "--save-json", "one.json").assert_succeeds()
    build_engine(tiny_weights, "batch.engine", backend="onnxruntime", options=batch)
    argv = ["--engine", "batch.engine", "--no-save", "--conf", "0.5", "--save-json", "batch.json"]
    assert output_lines(run("-d", "pictures", *argv))[0].startswith("7 pictures: ")
    one, batched = (json.loads(Path(name).read_text()) for name in ("one.json", "batch.json"))
    for first, second in zip(one, batched, strict=True):
        assert first["image"] == second["image"]
        boxes, others = ([item["xyxy"] for item in record["detections"]] for record in (first, second))
        np.testing.assert_allclose(others, boxes, rtol=0, atol=0.03)  # 0.01 px is the JSON's last decimal


ODD_PICTURES = {
    "one.png": noise(1, 1),
    "tall.png": noise(10_000, 50),
    "wide.png": noise(50, 10_000),
    "grey.png": noise(50, 60, 1),
    "grey16.png": noise(50, 60, 1, np.uint16),
    "color16.png": noise(50, 60, 3, np.uint16),
    "rgba.png": noise(50, 60, 4),
    "rgba16.png": noise(50, 60, 4, np.uint16),
    "a.bmp": noise(50, 60),
    "a.tiff": noise(50, 60, 3, np.uint16),
    "a.webp": noise(50, 60),
    "a b.jpg": noise(50, 60),
    "größe.ppm": noise(50, 60),
}


def test_pictures_of_every_kind_are_detected(run):
    Path("odd").mkdir()
    for name, pixels in ODD_PICTURES.items():
        encoded, data = cv2.imencode(Path(name).suffix, pixels)
        assert encoded
        Path("odd", name).write_bytes(data)
    lines = output_lines(run("-d", "odd", "--save-txt", "--save-json", "found.json", "--conf", "0.5"))
    assert lines[0].startswith(f"{len(ODD_PICTURES)} pictures: ")
    for record in json.loads(Path("found.json").read_text()):
        name = Path(record["image"]).name
        assert (record["height"], record["width"]) == ODD_PICTURES[name].shape[:2]
        assert record["detections"]
        boxes = np.array([item["xyxy"] for item in record["detections"]])
        assert boxes.min() >= 0
        assert (boxes <= (record["width"], record["height"]) * 2).all()
    drawn = {name for name in files("runs/detect") if not name.startswith("labels")}
    assert len(drawn) == len(ODD_PICTURES)  # three are called a: a.bmp, a_2.tiff, a_3.webp
    for name in drawn:
        assert read_image(Path("runs/detect", name)).size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("sn_african_elephants_bw.jpg", None),
        ("sn_african_elephants_cmyk.jpg", None),
        ("sn_african_elephants_with_exif_orientation.jpg", (2000, 1500)),
    ],
)
def test_odd_photos_show_their_elephants(run, golden, yolov5n_engine, name, size):
    yolov5n_engine.save("yolotrt.engine")
    run("-d", golden / "images" / name, "--no-save", "--save-json", "found.json").assert_succeeds()
    (record,) = json.loads(Path("found.json").read_text())
    assert [item["name"] for item in record["detections"]].count("elephant") >= 3
    pixels = read_image(golden / "images" / name)
    assert (record["height"], record["width"]) == pixels.shape[:2]
    if size is not None:  # turned upright
        assert pixels.shape[0] != cv2.imread(str(golden / "images" / name), cv2.IMREAD_IGNORE_ORIENTATION).shape[0]


def test_photos_give_the_official_detections(run, golden, yolov5n_engine):
    yolov5n_engine.save("yolotrt.engine")
    images = golden / "images"
    argv = ["--no-save", "--save-txt", "--save-conf", "--save-json", "found.json"]
    lines = output_lines(run("-d", images / "bus.jpg", images / "zidane.jpg", *argv))
    assert lines[0] == "2 pictures: 5 person, 1 bus, 1 tie"
    expected = np.load(golden / "expected" / "yolov5n_det.npz")
    for record, name in zip(json.loads(Path("found.json").read_text()), ("bus", "zidane"), strict=True):
        found = record["detections"]
        assert [item["class_id"] for item in found] == expected[f"{name}_square_cls"].tolist()
        # as in tests/test_detector.py
        np.testing.assert_allclose(
            [item["confidence"] for item in found], expected[f"{name}_square_conf"], rtol=0, atol=1e-3
        )
        np.testing.assert_allclose([item["xyxy"] for item in found], expected[f"{name}_square_xyxy"], rtol=0, atol=1)
        labels = np.loadtxt(f"runs/detect/labels/{name}.txt", ndmin=2)
        np.testing.assert_allclose(labels[:, 5], expected[f"{name}_square_conf"], rtol=0, atol=1e-3)


# --- pictures that cannot be read ---


def make_ten_pictures(broken: str, data: bytes) -> None:
    Path("ten").mkdir()
    for index in range(10):
        cv2.imwrite(f"ten/{index}.jpg", noise(50, 60 + index))
    Path("ten", broken).write_bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "cannot be decoded"),
        (cv2.imencode(".jpg", noise(50, 60))[1].tobytes()[:-300], "is truncated, its end is missing"),
    ],
    ids=["empty", "text", "truncated"],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_one_broken_picture_of_ten_is_named_and_the_others_are_done(run, tiny_weights, data, message, batch):
    make_ten_pictures("4.jpg", data)
    options = BuildOptions(max_batch=batch)
    build_engine(tiny_weights, "yolotrt.engine", backend="onnxruntime", options=options)
    result = run("-d", "ten", "--save-json", "found.json", "--conf", "0.5")
    result.assert_fails(1, rf"picture ten/4\.jpg {message}")
    assert result.err.splitlines()[-1] == "yolotrt: 1 of 10 pictures could not be read"
    assert result.out.startswith("9 of 10 pictures: ")
    assert files("runs/detect") == {f"{index}.jpg" for index in range(10)} - {"4.jpg"}
    assert [Path(record["image"]).stem for record in json.loads(Path("found.json").read_text())] == list("012356789")


def test_a_whole_batch_of_broken_pictures_is_passed_over(run, tiny_weights):
    build_engine(tiny_weights, "yolotrt.engine", backend="onnxruntime", options=BuildOptions(max_batch=2))
    make_ten_pictures("4.jpg", b"")
    Path("ten/5.jpg").write_bytes(b"x")
    result = run("-d", "ten", "--no-save")
    assert result.status == 1
    assert result.err.count("yolotrt: error: picture ten/") == 2
    assert result.err.splitlines()[-1] == "yolotrt: 2 of 10 pictures could not be read"
    assert result.out.startswith("8 of 10 pictures: ")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jpg", b"", r"picture a\.jpg is empty"),
        ("a.jpg", b"hello", r"picture a\.jpg cannot be decoded"),
        ("a.bin", b"\x05\x00\x00\x00{}", r"picture a\.bin cannot be decoded"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(20), r"picture a\.png is truncated"),
    ],
)
def test_no_readable_picture_at_all_is_bad_input(run, name, data, message):
    Path(name).write_bytes(data)
    before = files()
    result = run("-d", name)
    result.assert_fails(2, message)
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert files() - before <= {"runs"}


# --- bad input ---


@pytest.fixture
def bad_files(golden, monkeypatch) -> None:
    """Files that cannot be used, in the current folder; there is no display."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    Path("folder").mkdir()
    Path("folder.json").mkdir()
    Path("empty").touch()
    Path("text.txt").write_text("hello, this is a text\n")
    Path("empty.mp4").touch()
    shutil.copyfile("text.txt", "text.mp4")
    Path("cut.engine").write_bytes(Path("yolotrt.engine").read_bytes()[:-1000])
    Path("cut.pt").write_bytes((golden / "weights" / "yolov5n_v60.pt").read_bytes()[:100_000])
    # copies, not links: a fault in what is tested here must not reach the reference data through them
    shutil.copyfile(golden / "weights" / "yolov5n_v60.pt", "good.pt")
    cv2.imwrite("picture.jpg", noise(50, 60))


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("-s --weights nope.wts", r"weights nope\.wts does not exist: check the path"),
        ("-s --weights folder", "weights folder is a directory: name a file"),
        ("-s --weights empty", "weights empty is empty: make or download it again"),
        ("-s --weights text.txt", r"text\.txt holds no weights, it seems to be a text file: pass a \.pt"),
        ("-s --weights cut.pt", r"checkpoint cut\.pt.*: download or copy it again"),
        ("-s --weights picture.jpg", r"picture\.jpg holds no weights, it seems to be a picture"),
        ("-s --weights yolotrt.engine --engine b", r"yolotrt\.engine holds no weights, it seems to be an engine"),
        ("-s --weights good.pt --imgsz 100", "100x100 does not fit this model: .*: use --imgsz 128 128"),
        ("-s --weights good.pt --imgsz 64 0", r"image size \(64, 0\): choose a number of pixels"),
        ("-s --weights good.pt --imgsz 64 1", "64x1 does not fit this model: .*: use --imgsz 64 32"),
        ("-s --weights good.pt --imgsz 1 2 3", "--imgsz takes one or two numbers, not 3"),
        ("-s --weights good.pt --batch 0", "batch size 0 is out of range: choose 1 to 1024"),
        ("-s --weights good.pt --batch 2 --max-batch 4", "--batch makes a static batch: leave out --min-batch"),
        ("-s --weights good.pt --min-batch 0 --max-batch 4", "batch sizes 0, 4, 4 are not in order"),
        ("-s --weights good.pt --min-batch 4 --max-batch 2", "batch sizes 4, 2, 2 are not in order"),
        ("-s --weights good.pt --min-batch 2", "give --max-batch as well"),
        ("-s --weights good.pt --opt-batch 2", "give --max-batch as well"),
        ("-s --weights good.pt --workspace 0", "workspace of 0 MiB: choose at least 1"),
        ("-s --weights good.pt --precision int3", "argument --precision: invalid choice: 'int3'"),
        ("-s --weights good.pt --calib folder", "--calib has an effect on INT8 alone: add --precision int8"),
        ("-s --weights good.pt --precision int8", "no folder calib_images here: name yours with --calib"),
        ("-s --weights good.pt --precision int8 --calib nope", "--calib: source nope does not exist: check"),
        ("-s --weights good.pt --precision int8 --calib folder", "error: --calib: folder folder holds no picture"),
        (
            "-s --weights good.pt --precision int8 --calib picture.jpg",
            "^.*: 1 calibration picture can be read, at least",
        ),
        ("-s --weights good.pt --precision int8 --calib-table text.txt", r"scale table text\.txt is no JSON"),
        ("-s --weights good.pt --calib-method median", "argument --calib-method: invalid choice: 'median'"),
        ("-s --weights good.pt --backend cuda", "argument --backend: invalid choice: 'cuda'"),
        ("-s --weights good.pt --precision tf32 --backend onnxruntime", "onnxruntime does not build tf32: choose one"),
        ("-s --weights good.pt --optimization-level 6", "argument --optimization-level: invalid choice: 6"),
        ("-s --weights good.pt --yololayer host", "argument --yololayer: invalid choice: 'host'"),
        ("-s --weights good.pt --yololayer kernel --backend onnxruntime", "onnxruntime has no --yololayer: leave it"),
        ("-s --weights good.pt --timing-cache a --no-timing-cache", "timing cache a is named and turned off"),
        ("-s --weights good.pt --timing-cache good.pt", r"--timing-cache and --weights are the same file good\.pt"),
        ("-s --weights good.pt --timing-cache folder", "cannot write folder: it is a directory"),
        ("-s --weights good.pt --hardware-compatible --backend tensorrt-rtx", "tensorrt-rtx has no --hardware-comp"),
        ("-s --weights good.pt --engine good.pt", r"--engine and --weights are the same file good\.pt: choose another"),
        ("-s --weights good.pt --engine x --raw-plan ./x", "--raw-plan and --engine are the same file x: choose"),
        ("-s --weights good.pt --engine folder", "cannot write folder: it is a directory: name a file"),
        ("-s --weights good.pt --engine empty/a", r"cannot write empty/a: .*/empty is not a writable folder: choose"),
        ("-s --weights good.pt --raw-plan empty/a", "cannot write empty/a: .* is not a writable folder"),
        ("-s --weights good.pt --engine /proc/a.engine", r"cannot write /proc/a\.engine: .*: choose a writable place"),
        ("-d picture.jpg --engine nope.engine", r"engine nope\.engine does not exist: check the path"),
        ("-d picture.jpg --engine folder", "engine folder is a directory: name a file"),
        ("-d picture.jpg --engine empty", "engine empty is empty: make or download it again"),
        ("-d picture.jpg --engine text.txt", r"text\.txt is no engine file of yolotrt: build one"),
        ("-d picture.jpg --engine cut.engine", r"engine cut\.engine .*: copy it again or build it again"),
        ("-d picture.jpg --engine good.pt", r"good\.pt is no engine file .*: convert it with gen_wts\.py"),
        ("-d picture.jpg --engine picture.jpg", r"picture\.jpg is no engine file of yolotrt"),
        ("-d picture.jpg --engine /dev/zero", "engine /dev/zero is not a regular file"),
        ("-d nope.jpg", r"source nope\.jpg does not exist: check the path"),
        ("-d folder", "folder folder holds no picture or video: name one with files of"),
        ("-d folder/*.jpg", r"no picture or video matches folder/\*\.jpg"),
        ("-d text.txt", r"list text\.txt names files that do not exist, line 1 \(hello, this is a text\)"),
        ("-d clip.mp4", r"source clip\.mp4 does not exist: check the path"),
        ("-d empty.mp4", r"video empty\.mp4 is empty: make or download it again"),
        ("-d text.mp4", r"video text\.mp4 cannot be read \(.*\), it is damaged, cut off or no video: copy it again"),
        (
            "-d rtsp://user:secret@127.0.0.1:9/a",
            r"stream rtsp://127\.0\.0\.1:9/a cannot be opened \(.*refused\): check",
        ),
        ("-d 99", "camera 99 cannot be opened: check that it is plugged in"),
        ("-d 99 picture.jpg", r"picture\.jpg is a file and 99 a live source, which has no end: run them apart"),
        ("-d 99 --start 5", "--start has no effect on a camera or stream, which begins now: leave it out"),
        ("-d picture.jpg --stride 2", "--stride, --start and --end have no effect on pictures: leave them out"),
        ("-d picture.jpg --stride 0", "--stride 0 is out of range: choose at least 1"),
        ("-d picture.jpg --start 1:10 --end 50", "--end 50 s is not after --start 70 s: choose a later end"),
        ("-d picture.jpg --end 1:x", "argument --end: invalid time value: '1:x'"),
        ("-d picture.jpg --reconnect -1", "--reconnect -1 is out of range: choose at least 0"),
        ("-d picture.jpg --serve page", "--serve page is no address: give a port such as 8000, or HOST:PORT"),
        ("-d picture.jpg --serve 99999", "--serve 99999 is no address"),
        ("-d picture.jpg --save-jsonl a.json", r"--save-jsonl a\.json is no \.jsonl file: name one"),
        ("-d picture.jpg --save-csv empty/a.csv", "is not a writable folder: choose another place"),
        ("--webcam", "there is no display for the camera's window: use --serve 8000 and open the page"),
        ("--webcam --no-save", "--no-save belongs to -d and has no effect on --webcam"),
        ("-d picture.jpg --conf 2", "error: --conf 2 is out of range: choose a value from 0 to 1"),
        ("-d picture.jpg --conf high", "argument --conf: invalid float value: 'high'"),
        ("-d picture.jpg --iou nan", "error: --iou nan is out of range: choose a value from 0 to 1"),
        ("-d picture.jpg --max-det 0", "error: --max-det 0 is out of range: choose 1 to 30000"),
        ("--export-triton models --conf -1", "error: --conf -1 is out of range: choose a value from 0 to 1"),
        ("-d picture.jpg --classes 3", "class 3 does not exist: the model has classes 0 to 2"),
        ("-d picture.jpg --threads 0", "--threads 0 is out of range: choose at least 1"),
        ("-d picture.jpg --save-conf", "--save-conf adds to the files of --save-txt: give both"),
        ("-d picture.jpg --out text.txt", r"cannot write into text\.txt: it is no folder: choose another --out"),
        ("-d picture.jpg --out text.txt/a", r"cannot make the output folder text\.txt/a .*: choose a writable place"),
        ("-d picture.jpg --out /proc/a", r"cannot make the output folder /proc/a .*: choose a writable place"),
        ("-d picture.jpg --out /proc/a --exist-ok", r"cannot write /proc/a/picture\.jpg: .*: choose a writable place"),
        ("-d picture.jpg --out . --exist-ok", r"cannot write picture\.jpg: it is the source picture: choose another"),
        ("-d picture.jpg --save-json folder.json", r"cannot write folder\.json: it is a directory: name a file"),
        ("-d picture.jpg --save-json picture.jpg", r"--save-json picture\.jpg is no \.json file: name one"),
        ("-d picture.jpg --save-json empty/a.json", "is not a writable folder: choose another place"),
        ("-d picture.jpg --save-json /proc/a.json --no-save", r"cannot write /proc/a\.json: .*: choose a writable"),
        ("-d picture.jpg --save-json /dev/null --no-save", r"--save-json /dev/null is no \.json file"),
        ("--info nope", "file nope does not exist: check the path"),
        ("--info folder", "file folder is a directory: name a file"),
        ("--info empty", "file empty is empty: make or download it again"),
        ("--info text.txt", r"text\.txt holds no weights, it seems to be a text file"),
        ("--info cut.engine", r"engine cut\.engine .*: copy it again or build it again"),
        ("--info cut.pt", r"checkpoint cut\.pt"),
        ("--info picture.jpg", "it seems to be a picture"),
        (
            "",
            "one of the arguments -s/--serialize -d/--detect --webcam --eval --benchmark --export-triton --info "
            "is required",
        ),
        ("--info a -s", "not allowed with argument"),
        (
            "-s picture.jpg",
            r"unrecognized arguments: picture\.jpg \(a weight file is named with --weights\): see python",
        ),
        ("-d picture.jpg --nonsense", r"unrecognized arguments: --nonsense: see python -m yolotrt --help"),
        ("-d picture.jpg --cofn 0.3", r"unrecognized arguments: --cofn \(did you mean --conf\?\)"),
        ("-d picture.jpg --conf-thres 0.3", r"unrecognized arguments: --conf-thres \(did you mean --conf\?\)"),
        ("-s --weights good.pt --half", r"unrecognized arguments: --half \(did you mean --precision fp16\?\)"),
        ("-d picture.jpg --save-jsno=a.json", r"--save-jsno=a\.json \(did you mean --save-json\?\)"),
        ("-d picture.jpg --classes brid", "class 'brid' does not exist, but 'bird' does: the model has classes 0 to 2"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_no_file(run, argv, message):
    before = files()
    result = run(*argv.split())
    result.assert_fails(2, message)
    assert result.out == ""
    assert files() - before <= {"runs"}
    assert EngineFile.load("yolotrt.engine")  # the older engine is still whole


def test_an_engine_under_the_default_name_is_asked_for(run):
    Path("yolotrt.engine").unlink()
    run("-d", "pictures").assert_fails(2, r"there is no yolotrt\.engine here: build one with python -m yolotrt -s")
    assert "runs" not in files()


def test_a_failure_in_the_middle_keeps_what_was_found(run, monkeypatch):
    make_ten_pictures("x.txt", b"")
    monkeypatch.setattr("yolotrt.media.sinks.write_image", fails_at(4, OSError("the disk is on fire")))
    run("-d", "ten", "--save-json", "found.json").assert_fails(
        1, r"the system refused it \(the disk is on fire\): check files"
    )
    assert len(json.loads(Path("found.json").read_text())) == 4


def fails_at(number: int, problem: BaseException):
    """A function that raises the problem when it is called for the n-th time."""
    calls = []

    def function(*_args, **_options):
        calls.append(1)
        if len(calls) == number:
            raise problem

    return function


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (RuntimeError("two\nlines\x1b[2J"), r"unexpected RuntimeError \(two\?lines\?\[2J\): run it again with --debug"),
        (MemoryError(), "out of memory: use a smaller --imgsz or --batch"),
        (InputError("this: that"), "this: that"),
    ],
)
def test_any_failure_is_one_line_but_with_debug_a_traceback(run, monkeypatch, problem, message):
    monkeypatch.setattr(Detector, "submit", fails_at(1, problem))
    run("-d", "pictures").assert_fails(getattr(problem, "exit_status", 1), message)
    monkeypatch.setattr(Detector, "submit", fails_at(1, problem))
    with pytest.raises(type(problem)):
        run("-d", "pictures", "--debug")


def test_ctrl_c_keeps_what_was_found_and_says_so(run, monkeypatch):
    make_ten_pictures("x.txt", b"")
    monkeypatch.setattr("yolotrt.media.sinks.write_image", fails_at(4, KeyboardInterrupt()))
    result = run("-d", "ten", "--save-json", "found.json")
    assert (result.status, result.err) == (130, "yolotrt: interrupted\n")
    assert [Path(record["image"]).stem for record in json.loads(Path("found.json").read_text())] == list("0123")


# --- --show ---


@pytest.fixture
def window(monkeypatch) -> list[str]:
    """Stands in for a display: the titles of the windows that were shown."""
    shown: list[str] = []
    keys = iter("xxq")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, _image: shown.append(title))
    monkeypatch.setattr(cv2, "waitKey", lambda _delay: ord(next(keys)))
    monkeypatch.setattr(cv2, "destroyWindow", lambda _title: None)
    return shown


def test_pictures_are_shown_until_q(run, window):
    make_ten_pictures("x.txt", b"")
    lines = output_lines(run("-d", "ten", "--show", "--no-save"))
    assert window == ["ten/0.jpg", "ten/1.jpg", "ten/2.jpg"]
    assert re.match(r"\d+( of 10)? pictures: ", lines[0])  # those under way are finished, so that all results agree


def test_show_without_a_display_is_one_line(run, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    before = files()
    run("-d", "pictures", "--show").assert_fails(2, "--show needs a display: leave it out and look at the files")
    assert files() == before


def test_an_opencv_without_windows_is_one_line(run, monkeypatch, window):
    monkeypatch.setattr(cv2, "imshow", fails_at(1, cv2.error("not implemented")))
    run("-d", "pictures", "--show").assert_fails(2, "--show needs a display")


# --- --info and --help ---


def test_files_of_every_kind_are_described(run, golden, tiny_weights):
    save_weights(tiny_weights, "tiny.wts")
    save_weights(tiny_weights, "tiny.safetensors")
    for path in ("tiny.wts", "tiny.safetensors", "yolotrt.engine", golden / "weights" / "yolov5n.pt"):
        lines = run("--info", path).assert_succeeds().out.splitlines()
        assert lines[0] == str(path)
        assert any(line.startswith("  classes") for line in lines)


def test_help_names_every_option_and_version_the_version(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run("--help").assert_succeeds().out
    options = set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", text))
    building = {"--weights", "--precision", "--imgsz", "--batch", "--min-batch", "--opt-batch", "--max-batch"}
    detecting = {"--conf", "--iou", "--max-det", "--classes", "--agnostic-nms", "--out", "--no-save", "--show"}
    evaluating = {"--eval", "--images", "--split", "--limit", "--compare", "--markdown", "--accuracy"}
    measuring = {"--benchmark", "--batches", "--precisions", "--backends", "--repeats"}
    assert options >= evaluating | measuring | {"-s", "-d", "--info", "--engine", "--debug", "--version"}
    assert options >= building | {"--backend", "--workspace", "--raw-plan", "--optimization-level", "--yololayer"}
    assert options >= {"--timing-cache", "--no-timing-cache", "--hardware-compatible", "--version-compatible"}
    assert options >= {"--calib", "--calib-method", "--calib-table", "--int8-keep", "--int8-report"}
    assert options >= detecting | {"--save-txt", "--save-conf", "--save-json"}
    assert all(len(line) <= 90 for line in text.splitlines())  # the examples are wider than the terminal
    assert re.fullmatch(r"yolotrt \d+\.\d+\.\d+\n", run("--version").assert_succeeds().out)


# --- as a process ---


def environment(**changes: str) -> dict[str, str]:
    """As a user has it: nothing but the package's place is set, and output is buffered."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def process(*argv: str | Path, **environ: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "yolotrt", *map(str, argv)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        timeout=60,
        env=environment(**environ),
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_the_whole_way_as_processes(tiny_weights):
    save_weights(tiny_weights, "tiny.wts")
    process("-s", "--weights", "tiny.wts", "--engine", "new.engine").assert_succeeds()
    lines = output_lines(process("-d", "pictures", "--engine", "new.engine", "--save-txt", "--save-json", "f.json"))
    assert lines[-1] == "results: runs/detect, f.json"
    assert files("runs/detect") == {"a.png", "b.png", "labels", "labels/a.txt", "labels/b.txt"}
    assert "classes" in process("--info", "new.engine").assert_succeeds().out
    process("--info", "nope").assert_fails(2, "file nope does not exist")


def test_verbose_logs_the_build_to_stderr(tiny_weights):
    save_weights(tiny_weights, "tiny.wts")
    result = process("-s", "--weights", "tiny.wts", "-v")
    assert result.status == 0
    choice, build, *_ = result.err.splitlines()
    assert choice.startswith("yolotrt: choosing the backend onnxruntime: ")
    assert build.startswith("yolotrt: building with onnxruntime ")


def test_debug_shows_the_traceback():
    result = process("--info", "nope", "--debug")
    assert result.status == 1
    assert "Traceback" in result.err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_any_name_is_printed_in_any_encoding(tiny_weights, encoding):
    """Names beyond the terminal's encoding, and a file name that is no text at all."""
    metadata = replace(tiny_weights.metadata, names=("größe", "人", "\ud800"))
    name = os.fsdecode(b"caf\xe9.wts")
    save_weights(Weights(tiny_weights.tensors, metadata), "a.wts")
    Path("a.wts").rename(name)
    for argv in (["-s", "--weights", name], ["--info", name], ["--info", "yolotrt.engine"], ["-d", "pictures"]):
        process(*argv, PYTHONIOENCODING=encoding).assert_succeeds()
    process("--info", "x" + name, PYTHONIOENCODING=encoding).assert_fails(2, "does not exist")


def test_a_reader_that_goes_away_is_no_error():
    for argv in (["--info", "yolotrt.engine"], ["-d", "pictures"]):
        command = [sys.executable, "-m", "yolotrt", *argv]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
        ) as child:
            child.stdout.close()  # long before the child prints
            assert child.stderr.read() == ""
        assert child.returncode == 0
    script = f"{sys.executable} -m yolotrt --info yolotrt.engine | head -1; echo ${{PIPESTATUS[0]}}"
    shell = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env=environment(PYTHONUNBUFFERED="1")
    )
    assert (shell.stdout.splitlines(), shell.stderr) == (["yolotrt.engine", "0"], "")


def test_a_real_ctrl_c_ends_the_run_cleanly():
    cv2.imwrite("big.png", noise(700, 700))
    Path("many").mkdir()
    for index in range(500):
        Path("many", f"{index}.png").symlink_to(Path("big.png").resolve())
    command = [sys.executable, "-m", "yolotrt", "-d", "many", "--save-json", "found.json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    ) as child:
        deadline = time.monotonic() + 30
        while not list(Path().glob("runs/detect/*.png")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err) == (130, "", "yolotrt: interrupted\n")
    records = json.loads(Path("found.json").read_text())
    assert 0 < len(records) < 500
    drawn = files("runs/detect")
    assert not [name for name in drawn if name.endswith(".part")]
    assert len(drawn) <= len(records)
    for name in drawn:
        assert read_image(Path("runs/detect", name)).shape == (700, 700, 3)


def test_a_terminal_gets_a_progress_bar():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a new one has no columns
    with subprocess.Popen(
        [sys.executable, "-m", "yolotrt", "-d", "pictures", "--no-save"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(TERM="xterm"),
    ) as child:
        out, _ = child.communicate(timeout=60)
    shown = os.read(ours, 100_000).decode() if select.select([ours], [], [], 5)[0] else ""
    for end in (ours, theirs):
        os.close(end)
    assert child.returncode == 0
    assert "2/2" in shown or "0/2" in shown
    assert out.decode().startswith("2 pictures: ")
