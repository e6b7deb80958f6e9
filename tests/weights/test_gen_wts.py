from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yolotrt.errors import CheckpointError
from yolotrt.weights import checkpoint as checkpoint_module
from yolotrt.weights import gen_wts, load_weights, official
from yolotrt.weights.checkpoint import read_checkpoint
from yolotrt.weights.infer import network_tensors
from yolotrt.weights.model import Weights

SCRIPT = Path(__file__).resolve().parents[2] / "gen_wts.py"


@pytest.fixture
def yolov5n(golden):
    return golden / "weights" / "yolov5n.pt"


@pytest.mark.parametrize("name", ["out.wts", "out.safetensors", "new/folder/out.wts"])
def test_output_holds_what_the_checkpoint_holds(yolov5n, name, tmp_path, capsys):
    output = tmp_path / name
    assert gen_wts.main(["-w", str(yolov5n), "-o", str(output)]) == 0
    written, expected = load_weights(output), read_checkpoint(yolov5n)
    assert written.metadata == expected.metadata
    for key, array in network_tensors(expected.tensors).items():  # a .wts has the anchors in its metadata only
        np.testing.assert_array_equal(written.tensors[key].ravel(), array.ravel(), err_msg=key)
    out, err = capsys.readouterr()
    assert err == ""
    assert re.fullmatch(
        r"detect, 80 classes, 1,872,157 parameters, 640x640, 3 anchors on each of 3 levels -> "
        rf"{re.escape(str(output))} in \d+\.\d s\n",
        out,
    )


def test_output_is_by_default_in_the_current_folder(yolov5n, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gen_wts.main(["--weights", str(yolov5n)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["yolov5n.wts"]


def test_what_was_inferred_is_noted_on_stderr(yolov5n, tmp_path, monkeypatch, capsys):
    weights = read_checkpoint(yolov5n)
    told = Weights(weights.tensors, replace(weights.metadata, inferred=("class names unknown",)))
    monkeypatch.setattr(checkpoint_module, "read_checkpoint", lambda _: told)
    assert gen_wts.main(["-w", str(yolov5n), "-o", str(tmp_path / "out.safetensors")]) == 0
    assert capsys.readouterr().err == "yolotrt-gen-wts: note: class names unknown\n"


def test_half_precision_halves_the_file(yolov5n, tmp_path):
    sizes = []
    for half in ([], ["--half"]):
        output = tmp_path / f"{len(half)}.safetensors"
        assert gen_wts.main(["-w", str(yolov5n), "-o", str(output), *half]) == 0
        sizes.append(output.stat().st_size)
    assert 1.9 < sizes[0] / sizes[1] < 2.0  # the header stays as it is


@pytest.mark.parametrize(
    ("tag", "task", "status"),
    [
        ("yolov5n", "detect", 0),
        ("yolov5n", "seg", 2),
        ("yolov5n", "cls", 2),
        ("derived_seg_nc80", "seg", 0),
        ("derived_seg_nc80", "detect", 2),
    ],
)
def test_task_is_checked_against_the_checkpoint(golden, tag, task, status, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    assert gen_wts.main(["-w", str(golden / "weights" / f"{tag}.pt"), "-o", str(output), "-t", task]) == status
    assert output.exists() == (status == 0)
    if status:
        assert f"not {task}: leave out -t" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.onnx"], "output x.onnx has an unknown format: name a .wts or .safetensors file"),
        (["-o", "x"], "output x has an unknown format: name a .wts or .safetensors file"),
        (["-o", "x.wts", "--half"], "--half does not go with x.wts: .wts holds float32 only; name a .safetensors file"),
        (["--half"], "--half does not go with none.wts: .wts holds float32 only; name a .safetensors file"),
        ([], "checkpoint none.pt does not exist: check the path"),
    ],
)
def test_bad_input_is_one_line_on_stderr(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert gen_wts.main(["-w", "none.pt", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"yolotrt-gen-wts: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(CheckpointError):
        gen_wts.main(["-w", str(tmp_path / "none.pt"), "--debug"])


def test_official_checkpoint_that_is_not_there_is_fetched_to_its_path(yolov5n, tmp_path, monkeypatch):
    def fetch(name, folder):
        asked.append((name, folder))
        (folder / name).write_bytes(yolov5n.read_bytes())
        return folder / name

    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(official, "fetch_official", fetch)
    output = tmp_path / "out.safetensors"
    for _ in range(2):
        assert gen_wts.main(["-w", str(tmp_path / "yolov5n.pt"), "-o", str(output)]) == 0
    assert asked == [("yolov5n.pt", tmp_path)]
    assert output.exists()


def test_own_checkpoint_with_an_official_name_is_used(golden, tmp_path, capsys):
    own = tmp_path / "yolov5s.pt"
    own.write_bytes((golden / "weights" / "pv_nc5_v70.pt").read_bytes())
    assert gen_wts.main(["-w", str(own), "-o", str(tmp_path / "out.wts")]) == 0
    assert ", 5 classes," in capsys.readouterr().out


def test_script_runs_from_any_folder(yolov5n, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "-w", str(yolov5n)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "yolov5n.wts").exists()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "-w", "none.pt"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "yolotrt-gen-wts: error: checkpoint none.pt does not exist: check the path\n"
