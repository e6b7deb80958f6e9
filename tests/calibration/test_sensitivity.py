"""The analysis finds the layer that INT8 hurts, and keeps it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt import BuildOptions, build_engine, load_weights
from yolotrt.calibration import sensitivity
from yolotrt.calibration.accuracy import Accuracy, keep_until_accurate
from yolotrt.calibration.calibrate import find_table
from yolotrt.calibration.options import AUTO_METHODS, Int8Options
from yolotrt.calibration.prepare import prepare
from yolotrt.calibration.sensitivity import NO_ERROR_DB, TARGET_DB, Heads, analyse
from yolotrt.calibration.table import ScaleTable
from yolotrt.engines.base import CompleteOptions
from yolotrt.errors import InputError, OutputError
from yolotrt.network.quantize import ONNX_RUNTIME, TENSORRT, Placement, Quantization
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
def test_the_layer_with_a_bad_scale_is_found_and_kept(tiny_weights, table, options, placement: Placement, capsys):
    bad = spoiled(table, "model.2.act")  # what the fourth convolution reads
    analysis = analyse(tiny_weights, SIZE, bad, options, placement)
    said = f"measuring how much INT8 hurts each of {len(analysis.layers)} layers"
    assert said in capsys.readouterr().err.splitlines()
    assert analysis.layers[0].name == "model.3.conv"
    assert analysis.layers[0].snr_db < min(layer.snr_db for layer in analysis.layers[1:]) - 5
    assert "model.3.conv" in analysis.keep
    before, after = analysis.snr_db
    assert after > before


def test_all_convolutions_but_the_first_and_heads_are_measured(tiny_weights, table, options):
    for placement in (FLOAT_TENSORRT, ONNX_RUNTIME):
        bad = spoiled(table, "model.2.act")
        analysis = analyse(tiny_weights, SIZE, bad, options, placement)
        assert {layer.name for layer in analysis.layers} == {f"model.{index}.conv" for index in range(1, 5)}


@pytest.mark.parametrize("placement", [FLOAT_TENSORRT, ONNX_RUNTIME], ids=["tensorrt", "onnxruntime"])
def test_convolutions_of_masks_belong_to_the_head(golden, options, placement):
    weights = load_weights(golden / "weights/derived_seg_nc80.pt")
    table = find_table(weights, "1" * 64, SIZE, options).table
    names = sensitivity._int8_names(weights, SIZE, table, placement)
    assert "model.0.conv" not in names and "model.1.conv" in names
    assert len(names) == 63 - 3 - 3 - 1  # heads, prototypes, the picture's
    assert not any(name.startswith("model.24") for name in names)


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


def test_errors_count_by_the_objectness_of_their_cell(tiny_weights, table, monkeypatch):
    picture = np.random.default_rng(2).random((1, 3, *SIZE), np.float32)
    heads = Heads(tiny_weights, SIZE, [picture])
    real, weight = heads._reference[0][0], heads._objectness[0][0]
    quantization = Quantization(table.scales)
    noise = []
    for cell in np.argmin(weight), np.argmax(weight):
        found = [[head.copy() for head in level] for level in heads._reference]
        found[0][0].flat[cell] += 1
        monkeypatch.setattr(heads, "_compute", lambda *_, found=found: found)
        noise.append(10 ** (-heads.snr_db(quantization, ONNX_RUNTIME) / 10))
    assert real.shape == weight.shape
    assert noise[0] / noise[1] == pytest.approx(weight.min() / weight.max(), rel=1e-3)  # float32 sums


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_layer_that_does_not_reach_the_heads_leaves_no_error(tiny_weights, table, monkeypatch):
    heads = Heads(tiny_weights, SIZE, [np.random.default_rng(2).random((1, 3, *SIZE), np.float32)])
    monkeypatch.setattr(heads, "_compute", lambda *_: heads._reference)
    assert heads.snr_db(Quantization(table.scales), ONNX_RUNTIME) == NO_ERROR_DB


def test_auto_takes_the_method_with_the_least_error(tiny_weights, options, monkeypatch, tmp_path):
    complete = CompleteOptions("int8", SIZE, (1, 1, 1))
    int8 = replace(options, method="auto", keep=("none",), table=tmp_path / "scales.json")
    good = {
        method: find_table(tiny_weights, "1" * 64, SIZE, replace(options, method=method)) for method in AUTO_METHODS
    }
    for bad, expected in (("mse", "objects"), ("objects", "mse")):
        tables = {**good, bad: replace(good[bad], table=spoiled(good[bad].table, "model.2.act"))}

        def find(*arguments, tables=tables, zero_points):
            assert zero_points  # ONNX Runtime has them
            return tables[arguments[3].method]

        monkeypatch.setattr("yolotrt.calibration.prepare.find_table", find)
        int8.table.unlink(missing_ok=True)
        notes = prepare(tiny_weights, "1" * 64, complete, int8, "onnxruntime").notes
        assert notes["method"] == ScaleTable.load(int8.table).source.method == expected
        assert notes["scales"].endswith(f"written to {int8.table}")


@pytest.fixture
def labels(tiny_weights, options, tmp_path) -> Path:
    """A box in each of the first two calibration pictures."""
    pictures = sorted(options.calib.iterdir())[:2]
    path = tmp_path / "labels.json"
    content = {
        "images": [
            {"id": index, "file_name": path.name, "width": 60, "height": 40} for index, path in enumerate(pictures)
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(tiny_weights.metadata.names)],
        "annotations": [
            {"id": 1 + index, "image_id": index, "category_id": 0, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
            for index in range(2)
        ],
    }
    path.write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(options.calib)
    return path


def test_labels_add_precisions_to_the_report(tiny_weights, table, options, labels, tmp_path, capsys):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    wanted = replace(options, keep=("model.1",), report=tmp_path / "report", labels=labels)
    analysis = analyse(tiny_weights, SIZE, table, wanted, ONNX_RUNTIME)
    worst = [f"{row.name} alone in INT8" for row in analysis.layers[:3]]
    whole = ["floating point", "whole network in INT8", "with the kept layers in high precision"]
    assert list(analysis.precisions) == [*whole, *worst]
    assert f"measuring mAP50-95 with {labels}" in capsys.readouterr().err.splitlines()
    text = (tmp_path / "report" / "report.md").read_text()
    for name, value in analysis.precisions.items():
        assert 0 <= value <= 1
        assert f"| {name} | {value:.4f} |" in text


def test_labels_without_a_report_say_what_int8_costs(tiny_weights, options, labels):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    for keep in ("none",), ("model.1",), ("auto",):
        build = BuildOptions(precision="int8", int8=replace(options, keep=keep, labels=labels))
        found = build_engine(tiny_weights, backend="onnxruntime", options=build).header.build_options["int8"]
        assert found["map50_95"].keys() == {"labels", "float", "int8"}
        assert found["map50_95"]["labels"] == str(labels)


class GivenAccuracy:
    """mAP50-95 from a table: what INT8 loses, less what each kept row gives back."""

    def __init__(self, loss: float, gains: dict[str, float]) -> None:
        self._loss, self._gains = loss, gains
        self.measured: list[tuple[str, ...]] = []

    def of_float(self) -> float:
        return 0.5

    def of_int8(self, quantization: Quantization, placement: Placement) -> float:
        self.measured.append(quantization.keep)
        return 0.5 - self._loss + sum(self._gains[row] for row in quantization.keep)


@pytest.mark.parametrize(
    ("loss", "gains", "kept", "is_enough"),
    [
        (0.004, {}, (), True),
        (0.007, {"a": 0.001, "b": 0.003, "c": 0.004}, ("b",), True),  # the first that suffices
        (0.010, {"a": 0.001, "b": 0.002, "c": 0.004}, ("c", "a"), True),  # the best, then the first that suffices
        (0.020, {"a": 0.001, "b": -0.002, "c": 0.004}, ("c", "a"), False),
        (0.020, dict.fromkeys("abcd", 0.001), ("a", "b", "c"), False),  # no more than three
        (0.007, {**dict.fromkeys("abcde", 0.0), "f": 0.01}, (), False),  # no more than five are tried
    ],
)
def test_rows_are_kept_until_little_accuracy_is_lost(caplog, loss, gains, kept, is_enough):
    accuracy = GivenAccuracy(loss, gains)
    assert keep_until_accurate(accuracy, iter(gains), {}, (), ONNX_RUNTIME) == kept
    assert ("INT8 loses" in caplog.text) == (not is_enough)
    assert len(accuracy.measured) == len(set(accuracy.measured))


def test_rows_are_ranked_only_if_accuracy_is_missing():
    def rank():
        yield pytest.fail("ranked")

    assert keep_until_accurate(GivenAccuracy(0.001, {}), rank(), {}, (), ONNX_RUNTIME) == ()


def test_labels_make_auto_keep_the_row_that_costs_accuracy(
    tiny_weights, table, options, labels, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    monkeypatch.setattr(sensitivity, "TARGET_DB", 0.0)  # so that noise keeps nothing
    precision = {(): 0.4, ("model.3",): 0.5}
    monkeypatch.setattr(Accuracy, "of_float", lambda _: 0.5)
    monkeypatch.setattr(Accuracy, "of_int8", lambda _, quantization, _placement: precision[quantization.keep])
    analysis = analyse(tiny_weights, SIZE, spoiled(table, "model.2.act"), replace(options, labels=labels), ONNX_RUNTIME)
    assert analysis.keep == ("model.3",)
    assert analysis.float_and_int8 == (0.5, 0.5)
    # the choice is not remembered for builds without labels
    assert analyse(tiny_weights, SIZE, spoiled(table, "model.2.act"), options, ONNX_RUNTIME).keep == ()


def test_pictures_with_labels_that_cannot_be_read_are_named_once(tiny_weights, options, labels, capsys):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    content = json.loads(labels.read_text())
    content["images"][0]["file_name"] = "gone.png"
    labels.write_text(json.dumps(content))
    build = BuildOptions(precision="int8", int8=replace(options, keep=("model.1",), labels=labels))
    build_engine(tiny_weights, backend="onnxruntime", options=build)
    printed = capsys.readouterr().err
    assert printed.count("note: 1 pictures that cannot be read, left out with their labels: ") == 1


def test_accuracy_needs_a_label_in_a_picture_that_can_be_read(tiny_weights, table, options, labels):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    content = json.loads(labels.read_text())
    content["annotations"] = content["annotations"][:1]
    content["images"][0]["file_name"] = "gone.png"
    labels.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"labels\.json has no label in a picture that can be read: check it"):
        analyse(tiny_weights, SIZE, table, replace(options, labels=labels), ONNX_RUNTIME)


def test_labels_that_are_no_data_are_refused_before_the_work(tiny_weights, table, options, tmp_path):
    wanted = replace(options, labels=tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"missing\.json"):
        analyse(tiny_weights, SIZE, table, wanted, ONNX_RUNTIME)
