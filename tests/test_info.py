from __future__ import annotations

import dataclasses
import re

import pytest

from yolotrt import BuildOptions, build_engine, load_weights
from yolotrt.errors import InputError
from yolotrt.info import describe, printable
from yolotrt.weights import Weights, save_weights


def rows(text: str) -> dict[str, list[str]]:
    """Values by key, as a reader of the columns sees them."""
    _, *lines = text.split("\n\n", maxsplit=1)[0].split("\n")
    found: dict[str, list[str]] = {}
    for line in lines:
        key, value = re.fullmatch(r"  (.*?\S) {2,}(\S.*)", line).groups()
        found.setdefault(key, []).append(value)
    return found


def test_an_engine_is_described(tmp_path, tiny_engine):
    path = tiny_engine.save(tmp_path / "a.engine").path
    text = describe(path)
    header = tiny_engine.header
    assert text.split("\n")[0] == str(path)
    assert rows(text) == {
        "engine": [f"onnxruntime {header.backend_version}, fp32"],
        "device": ["any CPU"],
        "input size": ["64 x 64 (height x width)"],
        "batch": ["1"],
        "input": ["images float32 (1, 3, 64, 64)"],
        "output": ["head0 float32 (1, 24, 8, 8)", "head1 float32 (1, 24, 4, 4)", "head2 float32 (1, 24, 2, 2)"],
        "YoloLayer": ["on the CPU, after the engine"],
        "plan": [f"{header.plan_size:,} bytes, sha256 {header.plan_sha256}"],
        "weights": [f"sha256 {header.weights_sha256}"],
        "built": [f"{header.created} by yolotrt {header.yolotrt_version}"],
        "task": ["detect, YOLOv5 v6.2+"],
        "classes": ["3: cat, dog, bird"],
        "made for": ["64 x 64"],
        "strides": ["8, 16, 32"],
        "anchors": ["4x5 8x6 10x12 | 16x12 14x24 24x20 | 32x24 28x40 48x44"],
        "multiples": ["depth 1.0, width 1.0"],
        "activation": ["SiLU"],
        "source": [f"sha256 {'5' * 64}"],
    }


TINY_TABLE = """
       from  n  parameters  GFLOPs  module  output                arguments
  0      -1  1         880    0.00  Conv    8x32x32               8, 6, 2, 2
  1       0  1         592    0.00  Conv    8x16x16               8, 3, 2
  2       1  1         592    0.00  Conv    8x8x8                 8, 3, 2
  3       2  1       1,184    0.00  Conv    16x4x4                16, 3, 2
  4       3  1       2,336    0.00  Conv    16x2x2                16, 3, 2
  5 2, 3, 4  1       1,032    0.00  Detect  24x8x8 24x4x4 24x2x2  3, ...
  6 layers, 6,616 parameters, 0.0 GFLOPs at 64 x 64
"""


def test_the_layers_are_listed_alike_for_every_file(tmp_path, tiny_weights, tiny_engine):
    tables = set()
    for name in ("a.wts", "a.safetensors"):
        save_weights(tiny_weights, tmp_path / name)
        tables.add(describe(tmp_path / name).split("\n\n")[1])
    tables.add(describe(tiny_engine.save(tmp_path / "a.engine").path).split("\n\n")[1])
    (table,) = tables
    assert [line.split() for line in table.split("\n")] == [line.split() for line in TINY_TABLE.split("\n")[1:-1]]


def test_an_engines_layers_have_the_engines_size(tmp_path, tiny_weights):
    build_engine(tiny_weights, tmp_path / "a.engine", backend="onnxruntime", options=BuildOptions(imgsz=(64, 96)))
    table = describe(tmp_path / "a.engine").split("\n\n")[1]
    assert "24x8x12 24x4x6 24x2x3" in table
    assert table.endswith("GFLOPs at 64 x 96")


def test_a_model_that_cannot_be_built_is_described_all_the_same(tmp_path, tiny_weights):
    yaml = {**tiny_weights.metadata.yaml, "backbone": [[-1, 1, "MetaAconC", [8]]] * 5}
    save_weights(
        Weights(tiny_weights.tensors, dataclasses.replace(tiny_weights.metadata, yaml=yaml)), tmp_path / "a.wts"
    )
    text = describe(tmp_path / "a.wts")
    assert rows(text)["classes"] == ["3: cat, dog, bird"]
    assert "no layer table: layer 0 (MetaAconC) is a block that this version does not know" in text.split("\n\n")[1]


def test_a_dynamic_batch_and_a_rectangle_are_said(tmp_path, tiny_weights):
    options = BuildOptions(imgsz=(64, 96), max_batch=4, opt_batch=2)
    build_engine(tiny_weights, tmp_path / "a.engine", backend="onnxruntime", options=options)
    found = rows(describe(tmp_path / "a.engine"))
    assert found["batch"] == ["1 to 4, fastest at 2"]
    assert found["input size"] == ["64 x 96 (height x width)"]
    assert found["input"] == ["images float32 (batch, 3, 64, 96)"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"convolutions": {"fp16": 60}}, "60 of 60 convolutions fp16"),
        ({"convolutions": {"fp32": 2, "fp16": 57, "unknown": 1}}, "57 of 60 convolutions fp16, 2 fp32, 1 unknown"),
        ({"convolutions": {}}, None),
        ({"convolutions": {"fp16": "many"}}, None),
        ({"convolutions": 3}, None),
        ({"optimization_level": 0, "workspace_mib": None}, "optimization level 0"),
        ({}, None),
    ],
)
def test_what_the_build_found_out_is_said(tmp_path, tiny_engine, found, words):
    header = dataclasses.replace(tiny_engine.header, build_options=found)
    dataclasses.replace(tiny_engine, header=header).save(tmp_path / "a.engine")
    assert rows(describe(tmp_path / "a.engine")).get("build") == (None if words is None else [words])


@pytest.mark.parametrize(
    ("bytes_needed", "line"),
    [(3 << 20, "3.0 MiB of the GPU for each batch under way, besides plan, inputs and outputs"), ("much", None)],
)
def test_the_gpus_memory_is_said_where_it_is_known(tmp_path, tiny_engine, bytes_needed, line):
    header = dataclasses.replace(tiny_engine.header, build_options={"scratch_bytes": bytes_needed})
    dataclasses.replace(tiny_engine, header=header).save(tmp_path / "a.engine")
    assert rows(describe(tmp_path / "a.engine")).get("memory") == (None if line is None else [line])


SCALES = {"method": "mse", "pictures": 64, "scales": "calibrated now"}


@pytest.mark.parametrize(
    ("notes", "lines"),
    [
        ({**SCALES, "keep": []}, ["scales: mse of 64 pictures, calibrated now"]),
        (
            {**SCALES, "keep": ["model.9"], "map50_95": {"labels": "a.json", "float": 0.5, "int8": 0.49}},
            [
                "kept in high precision: model.9",
                "scales: mse of 64 pictures, calibrated now",
                "mAP50-95 on a.json: 0.4900, in floating point 0.5000",
            ],
        ),
        (SCALES, None),
        ([], None),
    ],
)
def test_what_int8_means_for_an_engine_is_said(tmp_path, tiny_engine, notes, lines):
    header = dataclasses.replace(tiny_engine.header, build_options={"int8": notes})
    dataclasses.replace(tiny_engine, header=header).save(tmp_path / "a.engine")
    assert rows(describe(tmp_path / "a.engine")).get("int8") == lines


@pytest.mark.parametrize("suffix", [".wts", ".safetensors"])
def test_weights_are_described(tmp_path, tiny_weights, suffix):
    path = tmp_path / f"a{suffix}"
    save_weights(tiny_weights, path)
    found = rows(describe(path))
    assert found["tensors"] == [f"{len(tiny_weights.tensors)} with {tiny_weights.parameter_count:,} values"]
    assert found["classes"] == ["3: cat, dog, bird"]
    assert "engine" not in found and "inferred" not in found


def test_what_was_inferred_is_said(tmp_path, golden):
    save_weights(load_weights(golden / "weights" / "pv_nc5_v70.pt"), tmp_path / "a.wts")
    lines = (tmp_path / "a.wts").read_text().splitlines()
    (tmp_path / "bare.wts").write_text("\n".join(line for line in lines if not line.startswith("#")) + "\n")
    found = rows(describe(tmp_path / "bare.wts"))
    assert found["inferred"]
    assert found["classes"][0].startswith("5: ")


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("yolov5n", "80: person, bicycle, car"),
        ("yolov5n_v60", "80: person, bicycle, car"),
        ("pv_nc5_v70", "5: black_core, crack, finger, horizontal_dislocation, thick_line"),
        ("derived_p6_random_nc80", "80: person"),
        ("derived_seg_nc80", "80: person"),
        ("derived_v20_leaky_nc2_legacy", "2: a, b"),
        ("derived_v31_csp_hswish_nc3", "3: person, bus, tie"),
        ("derived_v50_focus_spp_nc80", "80: person"),
    ],
)
def test_every_checkpoint_is_described(golden, tag, expected):
    found = rows(describe(golden / "weights" / f"{tag}.pt"))
    assert found["classes"][0].startswith(expected)
    assert found["task"][0].startswith("segment" if "seg" in tag else "detect")
    assert re.fullmatch(r"sha256 [0-9a-f]{64}", found["source"][0])


def test_many_classes_are_shortened(tmp_path, tiny_weights):
    names = tuple(f"c{index}" for index in range(80))
    metadata = dataclasses.replace(tiny_weights.metadata, names=names, yaml={**tiny_weights.metadata.yaml, "nc": 80})
    save_weights(Weights(tiny_weights.tensors, metadata), tmp_path / "a.safetensors")
    classes = rows(describe(tmp_path / "a.safetensors"))["classes"][0]
    assert classes == "80: " + ", ".join(names[:12]) + " and 68 more"


def test_names_cannot_steer_the_terminal(tmp_path, tiny_weights):
    metadata = dataclasses.replace(tiny_weights.metadata, names=("a\x1b[2Jb", "c\nd", "größe"))
    save_weights(Weights(tiny_weights.tensors, metadata), tmp_path / "a.safetensors")
    assert rows(describe(tmp_path / "a.safetensors"))["classes"] == ["3: a?[2Jb, c?d, größe"]


@pytest.mark.parametrize(("text", "shown"), [("", ""), ("a b-ü人", "a b-ü人"), ("\x00\t\r\n\x7f\u202e\ud800", "?" * 7)])
def test_only_printable_characters_are_printed(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing", None, "file .*missing does not exist: check the path"),
        (".", None, "is a directory: name a file"),
        ("a.engine", b"", "file .* is empty"),
        ("a.txt", b"hello\n", "it seems to be a text file: pass a .pt checkpoint"),
        ("a.bin", bytes(100), "holds no weights"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "it seems to be a picture"),
        ("a.pt", b"PK\x03\x04" + bytes(50), r"checkpoint .*a\.pt"),
        ("a.engine", b"\x05\x00\x00\x00{}", "ends inside its header"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        describe(tmp_path / name)
    assert "\n" not in str(caught.value)
