from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from yolotrt import Detector
from yolotrt.engines.file import FORMAT_VERSION, EngineFile, EngineHeader, TensorInfo, is_engine_file
from yolotrt.errors import EngineFileError, OutputError
from yolotrt.preprocess import LETTERBOX_RULE
from yolotrt.weights import Metadata

PLAN = bytes(range(256)) * 2


def make_engine(plan: bytes = PLAN, names: tuple[str, ...] = ("cat", "dog"), **changes: Any) -> EngineFile:
    """A small engine file; its plan is no real one."""
    model = Metadata(
        yaml={"nc": len(names)}, names=names, strides=(8, 16), anchors=(((1.5, 2.0),), ((3.0, 4.0),)), imgsz=(64, 96)
    )
    header = EngineHeader(
        model=model,
        backend="onnxruntime",
        backend_version="1.2.3",
        precision="fp32",
        imgsz=(64, 96),
        batch_range=(1, 2, 4),
        inputs=(TensorInfo("images", "float32", (-1, 3, 64, 96)),),
        outputs=(TensorInfo("head0", "float32", (-1, 7, 8, 12)), TensorInfo("head1", "float32", (-1, 7, 4, 6))),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_size=len(plan),
        weights_sha256="ab" * 32,
        letterbox=LETTERBOX_RULE,
        build_options={"precision": "fp32", "workspace_mib": None},
        created="2025-01-01T00:00:00+00:00",
        yolotrt_version="0.1.0",
    )
    return EngineFile(dataclasses.replace(header, **changes), plan)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and plan, read as Ultralytics reads its own files."""
    length = int.from_bytes(data[:4], byteorder="little")
    return json.loads(data[4 : 4 + length].decode("utf-8")), data[4 + length :]


def framed(text: bytes, plan: bytes = PLAN) -> bytes:
    return struct.pack("<I", len(text)) + text + plan


@pytest.fixture
def saved(tmp_path) -> Path:
    return make_engine().save(tmp_path / "a.engine").path


def load_bytes(path: Path, data: bytes) -> EngineFile:
    path.write_bytes(data)
    return EngineFile.load(path)


# --- round trip ---


@pytest.mark.parametrize(
    "engine",
    [
        make_engine(),
        make_engine(plan=b""),
        make_engine(names=("größe", "人", 'a "b"\n', "😀", "\ud800")),  # the last is half a character
        make_engine(batch_range=(1, 1, 1), device_name="NVIDIA H200", compute_capability="9.0", yololayer="plugin"),
    ],
    ids=["plain", "no plan", "odd names", "gpu"],
)
def test_what_is_saved_is_loaded(tmp_path, engine):
    path = tmp_path / "deep" / "a.engine"
    saved = engine.save(path)
    assert saved == dataclasses.replace(engine, path=path)
    loaded = EngineFile.load(str(path))
    assert loaded == saved
    assert [type(getattr(loaded.header, item.name)) for item in dataclasses.fields(EngineHeader)] == [
        type(getattr(engine.header, item.name)) for item in dataclasses.fields(EngineHeader)
    ]


@given(
    st.lists(st.text(), min_size=1, max_size=5),
    st.binary(max_size=100),
    st.text(),
    st.tuples(st.integers(1, 32_768), st.integers(1, 32_768)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example overwrites the file
def test_any_names_and_plan_survive(tmp_path, names, plan, device, imgsz):
    engine = make_engine(plan, tuple(names), device_name=device, imgsz=imgsz).save(tmp_path / "a.engine")
    assert EngineFile.load(tmp_path / "a.engine") == engine


def test_ultralytics_can_read_the_header_and_skip_it(saved):
    header, plan = parts(saved.read_bytes())
    assert header["names"] == {"0": "cat", "1": "dog"}
    assert (header["stride"], header["task"], header["batch"], header["imgsz"]) == (16, "detect", 4, [64, 96])
    assert plan == PLAN


def test_the_header_says_everything_that_detection_needs(saved):
    header, _ = parts(saved.read_bytes())
    assert header["anchors"] == [[[1.5, 2.0]], [[3.0, 4.0]]]
    assert header["strides"] == [8, 16]
    assert header["format_version"] == FORMAT_VERSION
    assert header["plan_sha256"] == hashlib.sha256(PLAN).hexdigest()
    assert header["letterbox"] == LETTERBOX_RULE
    assert header["inputs"] == [{"name": "images", "dtype": "float32", "shape": [-1, 3, 64, 96]}]
    for key in ("backend", "backend_version", "precision", "weights_sha256", "build_options", "created"):
        assert header[key]


def test_properties_follow_from_the_header():
    header = make_engine().header
    assert (header.max_batch, header.is_dynamic) == (4, True)
    assert not make_engine(batch_range=(4, 4, 4)).header.is_dynamic
    assert make_engine().label == "(in memory)"
    assert dataclasses.replace(make_engine(), path=Path("a.engine")).label == "a.engine"


def test_saving_replaces_an_older_file_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "a.engine"
    make_engine().save(path)
    make_engine(plan=b"new").save(path)
    assert EngineFile.load(path).plan == b"new"

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        make_engine(plan=b"newer").save(path)
    assert EngineFile.load(path).plan == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.engine"]


def test_an_engine_file_is_recognised_by_its_start(tmp_path, saved):
    assert is_engine_file(saved)
    for data in (b"", b"{", b"\x01\x00\x00\x00", b"PK\x03\x04....", b"#!/bin/sh", b"12\nmodel.0 1 0"):
        (tmp_path / "other").write_bytes(data)
        assert not is_engine_file(tmp_path / "other")


# --- what is refused ---

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(100)
ULTRALYTICS = json.dumps(
    {"description": "Ultralytics YOLO", "stride": 32, "task": "detect", "batch": 1, "imgsz": [640, 640], "names": {}}
).encode()


def changed_header(**changes: Any) -> bytes:
    """A file whose header was edited by hand, so that its checksum is wrong."""
    header, plan = parts(framed(make_engine().header.to_json().encode()))
    return framed(json.dumps({**header, **changes}).encode(), plan)


GOOD = framed(make_engine().header.to_json().encode())
REBUILD = "build it again with python -m yolotrt -s"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: make or download it again"),
        (b"\x01", "is no engine file of yolotrt: build one"),
        (bytes(10), "is no engine file of yolotrt: build one"),
        (b"just a text file\n" * 50, "is no engine file of yolotrt: build one"),
        (b"{}", "is no engine file of yolotrt: build one"),
        (PNG, "is no engine file of yolotrt: build one"),
        (b"PK\x03\x04" + bytes(500), "seems to be a PyTorch checkpoint: convert it with gen_wts.py"),
        (b"\x80\x02}q\x00." + bytes(500), "seems to be a PyTorch checkpoint"),
        (b"ftrt" + bytes(500), "a bare TensorRT plan without our header: build from the weights"),
        (framed(ULTRALYTICS), "was made by Ultralytics: build one from the checkpoint"),
        (framed(b'{"a": 1}'), "was made by another program: build one from the checkpoint"),
        (framed(b"{}"), "was made by another program"),
        (framed(b"[1, 2]"), "is no engine file of yolotrt"),
        (framed(b"{not json}"), f"has a damaged header: {REBUILD}"),
        (framed(b'{"\xff": 1}'), f"has a damaged header: {REBUILD}"),
        (framed(b'{"a":' * 100_000), f"has a damaged header: {REBUILD}"),
        (b"\xff\xff\xff\xff{" + bytes(100), "is no engine file of yolotrt"),
        (GOOD[:4], "is no engine file of yolotrt"),
        (GOOD[:5], f"ends inside its header: copy it again or {REBUILD}"),
        (GOOD[:200], f"ends inside its header: copy it again or {REBUILD}"),
        (GOOD[: -len(PLAN)], f"holds 0 of 512 bytes of its plan: copy it again or {REBUILD}"),
        (GOOD[:-1], "holds 511 of 512 bytes of its plan"),
        (GOOD + b"\0", "holds 513 of 512 bytes of its plan"),
        (GOOD[:-1] + b"\0", "is damaged (its checksum differs): copy it again or"),
        (changed_header(format_version=2), f"has format 2, this version reads 1: {REBUILD} or update yolotrt"),
        (changed_header(format_version="9" * 1000), "has format '9999999999999999999, this version reads 1"),
        (changed_header(format="other"), "was made by Ultralytics"),
        (changed_header(precision="fp16"), f"has a damaged header: {REBUILD}"),
        (changed_header(new=1), f"has a damaged header: {REBUILD}"),
        (changed_header(header_sha256=None), f"has a damaged header: {REBUILD}"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_in_one_line(tmp_path, data, message):
    path = tmp_path / "a.engine"
    with pytest.raises(EngineFileError) as caught:
        load_bytes(path, data)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_missing_file_or_a_directory_is_refused(tmp_path):
    with pytest.raises(EngineFileError, match=r"engine .*nope does not exist: check the path"):
        EngineFile.load(tmp_path / "nope")
    with pytest.raises(EngineFileError, match=r"engine .* is a directory: name a file"):
        EngineFile.load(tmp_path)
    with pytest.raises(EngineFileError, match=r"engine /dev/zero is not a regular file"):
        EngineFile.load("/dev/zero")


def test_a_checkpoint_or_picture_is_refused(golden):
    with pytest.raises(EngineFileError, match="seems to be a PyTorch checkpoint: convert"):
        EngineFile.load(golden / "weights" / "yolov5n.pt")
    with pytest.raises(EngineFileError, match="is no engine file of yolotrt"):
        EngineFile.load(golden / "images" / "bus.jpg")


def test_an_unknown_backend_is_named_when_it_is_opened(tmp_path):
    path = make_engine(backend="tpu").save(tmp_path / "a.engine").path
    assert EngineFile.load(path).header.backend == "tpu"
    with pytest.raises(EngineFileError, match="is for the backend 'tpu', which this version does not know: update"):
        Detector(path)


def test_a_plan_that_the_library_cannot_load_is_an_error_of_the_file(tmp_path):
    path = make_engine().save(tmp_path / "a.engine").path
    with pytest.raises(EngineFileError, match=rf"a\.engine cannot be loaded by ONNX Runtime \(.*\): {REBUILD}"):
        Detector(path)


@pytest.mark.parametrize("end", [*range(1, 40), *range(40, len(GOOD), 31), len(GOOD) - 1])
def test_a_file_cut_anywhere_is_refused(tmp_path, end):
    with pytest.raises(EngineFileError):
        load_bytes(tmp_path / "a.engine", GOOD[:end])


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_a_changed_byte_is_found_or_harmless(tmp_path, flip):
    """Every seventh byte with each of four changes, and all of the start, of the end and of the plan's first bytes."""
    path = tmp_path / "a.engine"
    expected = load_bytes(path, GOOD)
    border = len(GOOD) - len(PLAN)
    positions = {*range(0, len(GOOD), 7), *range(40), *range(border - 80, border + 5), len(GOOD) - 1}
    harmless = 0
    for position in sorted(positions):
        data = bytearray(GOOD)
        data[position] ^= flip
        try:
            assert load_bytes(path, bytes(data)) == expected  # such as a line feed for a space between JSON values
            harmless += 1
        except EngineFileError as error:
            assert "\n" not in str(error)
    assert harmless < 5


# --- headers with a right checksum and impossible values ---


def signed(header: dict[str, Any], plan: bytes = PLAN) -> bytes:
    """A file whose header checksum is right, whatever the header says."""
    values = {key: value for key, value in header.items() if key != "header_sha256"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["header_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    return framed(json.dumps(values).encode(), plan)


def test_an_unchanged_header_signed_again_is_accepted(tmp_path):
    assert load_bytes(tmp_path / "a.engine", signed(parts(GOOD)[0])).header == make_engine().header


def test_keys_that_this_version_does_not_know_are_ignored(tmp_path):
    assert load_bytes(tmp_path / "a.engine", signed({**parts(GOOD)[0], "new": [1]})).header == make_engine().header


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend", ["onnxruntime"]),
        ("backend", None),
        ("precision", 16),
        ("imgsz", [640]),
        ("imgsz", [0, 640]),
        ("imgsz", [640, 10**9]),
        ("imgsz", "64"),
        ("imgsz", [64.0, 64.0]),
        ("imgsz", [True, 64]),
        ("batch_range", ["1", "1", "1"]),
        ("imgsz", None),
        ("imgsz", [640, float("inf")]),
        ("batch_range", [1, 2]),
        ("batch_range", [2, 1, 4]),
        ("batch_range", [0, 0, 0]),
        ("batch_range", {}),
        ("inputs", []),
        ("outputs", []),
        ("inputs", [{"name": "images"}]),
        ("inputs", 5),
        ("inputs", [5]),
        ("outputs", [{"name": 1, "dtype": "float32", "shape": [1, 2]}]),
        ("outputs", [{"name": "a", "dtype": "float32", "shape": []}]),
        ("outputs", [{"name": "a", "dtype": "float32", "shape": [1, "2"]}]),
        ("outputs", [{"name": "a", "dtype": "float32", "shape": [1, -1]}]),
        ("outputs", [{"name": "a", "dtype": "float32", "shape": [1, 10**12]}]),
        ("plan_size", "512"),
        ("plan_size", None),
        ("plan_sha256", 5),
        ("model", None),
        ("model", {}),
        ("model", {"yaml": {}, "names": []}),
        ("created", 5),
    ],
)
def test_a_header_with_an_impossible_value_is_refused(tmp_path, key, value):
    with pytest.raises(EngineFileError) as caught:
        load_bytes(tmp_path / "a.engine", signed({**parts(GOOD)[0], key: value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "backend", "precision", "imgsz", "batch_range", "inputs", "plan_size"])
def test_a_header_that_lacks_a_value_is_refused(tmp_path, key):
    header = {name: value for name, value in parts(GOOD)[0].items() if name != key}
    with pytest.raises(EngineFileError):
        load_bytes(tmp_path / "a.engine", signed(header))


# --- fuzzing ---

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.sampled_from(sorted(parts(GOOD)[0])), JSON_VALUES)
def test_any_signed_header_loads_or_is_refused(tmp_path, key, value):
    expect_success_or_refusal(tmp_path, signed({**parts(GOOD)[0], key: value}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.integers(0, len(GOOD)), st.integers(0, 30), st.binary(max_size=30))
def test_any_mutation_loads_or_is_refused(tmp_path, start, removed, inserted):
    expect_success_or_refusal(tmp_path, GOOD[:start] + inserted + GOOD[start + removed :])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_refused(tmp_path, data, with_frame):
    expect_success_or_refusal(tmp_path, framed(b"{" + data) if with_frame else data)


def expect_success_or_refusal(folder: Path, data: bytes) -> None:
    try:
        engine = load_bytes(folder / "a.engine", data)
    except EngineFileError as error:
        assert "\n" not in str(error)
    else:
        assert engine.header.batch_range[0] >= 1
