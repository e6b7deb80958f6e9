"""The analysis finds the layer that INT8 hurts, and keeps it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt import BuildOptions, build_engine
from yolotrt.calibration import sensitivity
from yolotrt.calibration.calibrate import find_table
from yolotrt.calibration.options import Int8Options
from yolotrt.calibration.sensitivity import TARGET_DB, analyse
from yolotrt.calibration.table import ScaleTable
from yolotrt.errors import OutputError
from yolotrt.network.quantize import ONNX_RUNTIME, TENSORRT, Placement
from yolotrt.weights import Weights

SIZE = (64, 64)
FLOAT_TENSORRT = replace(TENSORRT, high_precision="fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options(tmp_path) -> Int8Options:
    folder = tmp_path / "calib"
    folder.mkdir()
    random = np.random.default_rng(3)
    for index in range(16):
        coarse = random.integers(0, 256, (4, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{index:02}.png"), cv2.resize(coarse, (60, 40)))
    return Int8Options(calib=folder, method="mse", keep=("auto",))


@pytest.fixture
def table(tiny_weights, options) -> ScaleTable:
    return find_table(tiny_weights, "1" * 64, SIZE, options).table


def spoiled(table: ScaleTable, tensor: str) -> ScaleTable:
    """Scales of which one is ten times too large."""
    groups = tuple((10 * scale if tensor in names else scale, names) for scale, names in table.groups)
    return replace(table, groups=groups)


@pytest.mark.parametrize("placement", [FLOAT_TENSORRT, ONNX_RUNTIME], ids=["tensorrt", "onnxruntime"])
def test_the_layer_with_a_bad_scale_is_found_and_kept(tiny_weights, table, options, placement: Placement):
    bad = spoiled(table, "model.2.act")  # what the fourth convolution reads
    analysis = analyse(tiny_weights, SIZE, bad, options, placement)
    assert analysis.layers[0].name == "model.3.conv"
    assert analysis.layers[0].snr_db < min(layer.snr_db for layer in analysis.layers[1:]) - 5
    assert "model.3.conv" in analysis.keep
    before, after = analysis.snr_db
    assert after > before


def test_all_convolutions_but_heads_are_measured(tiny_weights, table, options):
    for placement, names in ((FLOAT_TENSORRT, range(5)), (ONNX_RUNTIME, range(1, 5))):
        bad = spoiled(table, "model.2.act")
        analysis = analyse(tiny_weights, SIZE, bad, options, placement)
        assert {layer.name for layer in analysis.layers} == {f"model.{index}.conv" for index in names}


def test_a_network_that_is_good_enough_keeps_nothing_and_costs_one_measurement(
    tiny_weights, table, options, monkeypatch
):
    monkeypatch.setattr(sensitivity, "TARGET_DB", 5.0)
    monkeypatch.setattr(sensitivity, "_measure_layers", lambda *_: pytest.fail("measured layers"))
    assert analyse(tiny_weights, SIZE, table, options, ONNX_RUNTIME).keep == ()


def test_the_choice_is_remembered_for_the_same_scales_alone(tiny_weights, table, options, monkeypatch):
    bad = spoiled(table, "model.2.act")
    first = analyse(tiny_weights, SIZE, bad, options, ONNX_RUNTIME)

    def fail(*_: object) -> None:
        raise RuntimeError("measured")

    monkeypatch.setattr(sensitivity, "Heads", fail)
    assert analyse(tiny_weights, SIZE, bad, options, ONNX_RUNTIME).keep == first.keep
    for other, placement in ((table, ONNX_RUNTIME), (bad, FLOAT_TENSORRT)):
        with pytest.raises(RuntimeError, match="measured"):
            analyse(tiny_weights, SIZE, other, options, placement)


def test_the_report_has_a_table_and_a_plot(tiny_weights, table, options, tmp_path):
    folder = tmp_path / "new" / "report"
    analysis = analyse(tiny_weights, SIZE, table, replace(options, keep=("model.1",), report=folder), ONNX_RUNTIME)
    with (folder / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [layer.name for layer in analysis.layers]
    assert [row["layer"] for row in rows if row["kept"] == "1"] == ["model.1.conv"]
    text = (folder / "report.md").read_text()
    assert f"- whole network in INT8: {analysis.snr_db[0]:.1f} dB" in text
    assert "- kept: model.1" in text
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot = cv2.imread(str(folder / "layers.png"))
    assert plot is not None
    assert plot.std() > 10  # something is drawn


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tiny_weights, table, options, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write the report into"):
        analyse(tiny_weights, SIZE, table, replace(options, report=tmp_path / "file"), ONNX_RUNTIME)


def test_an_int8_engine_says_how_it_was_made(tiny_weights, options, tmp_path):
    int8 = replace(options, keep=("model.1",), table=tmp_path / "scales.json")
    build = BuildOptions(precision="int8", int8=int8)
    engine = build_engine(tiny_weights, tmp_path / "a.engine", backend="onnxruntime", options=build)
    notes = engine.header.build_options["int8"]
    assert engine.header.precision == "int8"
    assert engine.header.build_options["convolutions"] == {"int8": 3, "fp32": 5}
    assert (notes["method"], notes["pictures"], list(notes["keep"])) == ("mse", 16, ["model.1"])
    assert notes["scales_key"] == json.loads((tmp_path / "scales.json").read_text())["key"]


def test_scales_of_the_users_own_need_no_pictures(tiny_weights, options, tmp_path):
    path = tmp_path / "scales.json"
    find_table(tiny_weights, _checksum(tiny_weights), SIZE, replace(options, table=path))
    build = BuildOptions(precision="int8", int8=Int8Options(calib=tmp_path / "none", table=path))
    notes = build_engine(tiny_weights, backend="onnxruntime", options=build).header.build_options["int8"]
    assert (notes["scales"], list(notes["keep"])) == (f"read from {path}", [])


def _checksum(weights: Weights) -> str:
    return build_engine(weights, backend="onnxruntime").header.weights_sha256


def test_the_target_is_a_thousandth_of_the_power():
    assert pytest.approx(1e-3) == 10 ** (-TARGET_DB / 10)
