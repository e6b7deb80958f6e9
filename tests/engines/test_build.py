from __future__ import annotations

import dataclasses
import datetime
import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest

import yolotrt
from tests.engines.fake_gpu import install_no_gpu
from yolotrt import BuildOptions, build_engine
from yolotrt.engines.build import BACKENDS, find_backend, open_session
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.errors import (
    BackendUnavailableError,
    EngineFileError,
    GraphError,
    InputError,
    OutputError,
    WeightsError,
)
from yolotrt.preprocess import LETTERBOX_RULE
from yolotrt.weights import Weights, save_weights


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- choosing a backend ---


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_is_found_by_its_name(name):
    assert find_backend(name).name == name


def test_auto_is_a_backend_that_runs_here(tiny_weights):
    engine = build_engine(tiny_weights, backend="auto")
    with open_session(engine) as session:
        assert len(session.run(np.zeros((1, 3, 64, 64), np.float32))) == 3


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"backend 'cuda' is not known: choose one of auto, tensorrt, tensorrt-rtx"):
        find_backend("cuda")


def test_a_missing_library_is_named_with_the_command_that_installs_it(tiny_weights, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r'ONNX Runtime is not installed .*pip install "yolotrtx\[cpu\]"'):
        build_engine(tiny_weights, tmp_path / "a.engine", backend="onnxruntime")
    assert files(tmp_path) == []


# --- what an engine says of itself ---


def test_the_header_describes_the_engine(tiny_weights, tiny_engine):
    header = tiny_engine.header
    assert header.model == tiny_weights.metadata
    assert (header.backend, header.precision) == ("onnxruntime", "fp32")
    assert header.backend_version == __import__("onnxruntime").__version__
    assert header.yolotrt_version == yolotrt.__version__
    assert (header.imgsz, header.batch_range) == ((64, 64), (1, 1, 1))
    assert header.inputs == (TensorInfo("images", "float32", (1, 3, 64, 64)),)
    assert header.outputs == (
        TensorInfo("head0", "float32", (1, 24, 8, 8)),
        TensorInfo("head1", "float32", (1, 24, 4, 4)),
        TensorInfo("head2", "float32", (1, 24, 2, 2)),
    )
    assert header.plan_size == len(tiny_engine.plan)
    assert header.plan_sha256 == hashlib.sha256(tiny_engine.plan).hexdigest()
    assert header.letterbox == LETTERBOX_RULE
    assert (header.device_name, header.compute_capability) == ("", "")
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(header.created)
    assert datetime.timedelta(-1) < age < datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("options", "imgsz", "batch_range", "precision", "batch"),
    [
        (BuildOptions(), (64, 64), (1, 1, 1), "fp32", 1),
        (BuildOptions(imgsz=(64, 96)), (64, 96), (1, 1, 1), "fp32", 1),
        (BuildOptions(imgsz=(32, 32), precision="fp16"), (32, 32), (1, 1, 1), "fp16", 1),
        (BuildOptions(min_batch=4, opt_batch=4, max_batch=4), (64, 64), (4, 4, 4), "fp32", 4),
        (BuildOptions(imgsz=32), (32, 32), (1, 1, 1), "fp32", 1),
        (BuildOptions(max_batch=8), (64, 64), (1, 8, 8), "fp32", -1),
        (BuildOptions(min_batch=2, opt_batch=3, max_batch=8), (64, 64), (2, 3, 8), "fp32", -1),
    ],
)
def test_options_are_followed_and_written_down(tiny_weights, options, imgsz, batch_range, precision, batch):
    header = build_engine(tiny_weights, backend="onnxruntime", options=options).header
    assert (header.imgsz, header.batch_range, header.precision) == (imgsz, batch_range, precision)
    assert header.inputs[0].shape == (batch, 3, *imgsz)
    assert [tensor.shape[0] for tensor in header.outputs] == [batch] * 3


def test_half_precision_halves_the_plan_and_keeps_the_heads(tiny_weights, tiny_engine):
    half = build_engine(tiny_weights, backend="onnxruntime", options=BuildOptions(precision="fp16"))
    assert len(half.plan) < 0.75 * len(tiny_engine.plan)
    images = np.random.RandomState(0).rand(1, 3, 64, 64).astype(np.float32)
    with open_session(half) as session, open_session(tiny_engine) as reference:
        for head, expected in zip(session.run(images), reference.run(images), strict=True):
            assert head.dtype == np.float32
            # heads of up to some 10; half precision has 11 bits in each of seven layers
            np.testing.assert_allclose(head, expected, rtol=0.02, atol=0.05)


def test_the_same_weights_give_the_same_plan(tiny_weights, tiny_engine):
    assert build_engine(tiny_weights, backend="onnxruntime").plan == tiny_engine.plan


def test_the_weights_checksum_is_that_of_the_values(tmp_path, tiny_weights, tiny_engine):
    expected = tiny_engine.header.weights_sha256
    for name in ("a.wts", "a.safetensors"):
        save_weights(tiny_weights, tmp_path / name)
        assert build_engine(tmp_path / name, backend="onnxruntime").header.weights_sha256 == expected
    changed = dict(tiny_weights.tensors)
    changed["model.5.m.0.bias"] = np.nextafter(changed["model.5.m.0.bias"], np.float32(np.inf))
    other = build_engine(Weights(changed, tiny_weights.metadata), backend="onnxruntime")
    assert other.header.weights_sha256 != expected


# --- from and to files ---


@pytest.mark.parametrize("suffix", [".wts", ".safetensors"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_weights_are_read_from_a_file_and_the_engine_is_written(tmp_path, tiny_weights, tiny_engine, suffix, kind):
    source, target = tmp_path / f"a{suffix}", tmp_path / "deep" / "a.engine"
    save_weights(tiny_weights, source)
    engine = build_engine(kind(source), kind(target), backend="onnxruntime")
    assert engine.path == target
    assert EngineFile.load(target) == engine
    assert engine.plan == tiny_engine.plan


def test_without_a_path_nothing_is_written(tmp_path, tiny_weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_engine(tiny_weights, backend="onnxruntime").path is None
    assert files(tmp_path) == []


def broken(weights: Weights, **changes) -> Weights:
    return Weights(weights.tensors, dataclasses.replace(weights.metadata, **changes))


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda w: w, BuildOptions(imgsz=(64, 100)), GraphError, "must be multiples of 32: use --imgsz 64 128"),
        (lambda w: w, BuildOptions(imgsz=(1, 64)), GraphError, "must be multiples of 32: use --imgsz 32 64"),
        (lambda w: broken(w, yaml={"nc": 3}), None, GraphError, "0 layers"),
        (lambda w: Weights({}, w.metadata), None, WeightsError, r"model\.0\.conv\.weight with shape \(8, 3, 6, 6\)"),
        (
            lambda w: Weights({**w.tensors, "model.9.weight": np.zeros(1, np.float32)}, w.metadata),
            None,
            WeightsError,
            r"model\.9\.weight .* is not used by the graph",
        ),
    ],
)
def test_a_build_that_fails_leaves_the_older_engine(tmp_path, tiny_weights, change, options, error, message):
    path = tmp_path / "a.engine"
    older = build_engine(tiny_weights, path, backend="onnxruntime").path.read_bytes()
    with pytest.raises(error, match=message) as caught:
        build_engine(change(tiny_weights), path, backend="onnxruntime", options=options)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == older
    assert files(tmp_path) == ["a.engine"]


@pytest.mark.parametrize("name", ["tiny.wts", "tiny.safetensors", "notes.txt"])
def test_an_engine_never_replaces_a_file_of_another_kind(tmp_path, tiny_weights, name):
    path = tmp_path / name
    if name == "notes.txt":
        path.write_text("mine")
    else:
        save_weights(tiny_weights, path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="a file of another kind is there: choose another name"):
        build_engine(tiny_weights, path, backend="onnxruntime")
    assert path.read_bytes() == before


def test_equal_weights_have_one_checksum_in_every_format(tmp_path, tiny_weights):
    checksums = set()
    for name in ("tiny.wts", "tiny.safetensors"):
        save_weights(tiny_weights, tmp_path / name)
        checksums.add(build_engine(tmp_path / name, backend="onnxruntime").header.weights_sha256)
    assert checksums == {build_engine(tiny_weights, backend="onnxruntime").header.weights_sha256}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imgsz": 0}, "image size 0: choose"),
        ({"imgsz": (64, 64.0)}, "image size"),
        ({"imgsz": (64, 64, 64)}, "image size"),
        ({"imgsz": 65_536}, "image size 65536: choose a number of pixels, or height and width, from 1 to 32768"),
        ({"min_batch": 2}, "batch sizes 2, 1, 1 are not in order"),
        ({"max_batch": 2.0}, "batch sizes"),
        ({"precision": "int4"}, "precision 'int4' is not known"),
        ({"workspace_mib": 0}, "workspace of 0 MiB"),
    ],
)
def test_options_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"yololayer": "plugin"}, "gives something else than the outputs of a YOLOv5 model"),
        ({"yololayer": "kernel"}, "gives something else than the outputs of a YOLOv5 model"),
        ({"yololayer": "elsewhere"}, "gives something else than the outputs of a YOLOv5 model"),
        ({"backend": "tensorrt"}, "gives something else than the outputs of a YOLOv5 model"),
        ({"letterbox": {"pad_value": 0}}, "wants its pictures prepared by another rule"),
    ],
)
def test_an_engine_that_this_version_would_decode_wrongly_is_refused(tiny_engine, change, message):
    engine = replace(tiny_engine, header=replace(tiny_engine.header, **change))
    with pytest.raises(EngineFileError, match=message):
        open_session(engine)


def test_a_segmentation_engine_with_outputs_of_two_types_or_a_plugin_is_refused(tiny_segment_engine):
    old = tiny_segment_engine.header
    half = replace(old.outputs[-1], dtype="float16")
    rows = TensorInfo("rows", "float32", (-1, 240, 6))
    for changes in (
        {"yololayer": "kernel", "outputs": (*old.outputs[:-1], half)},
        {"yololayer": "plugin", "outputs": (rows,)},
    ):
        header = replace(old, backend="tensorrt", **changes)
        with pytest.raises(EngineFileError, match="gives something else than the outputs of a YOLOv5 model"):
            open_session(replace(tiny_segment_engine, header=header))


@pytest.mark.parametrize("threads", [0, -1, "2"])
def test_a_wrong_number_of_threads_is_refused(tiny_engine, threads):
    with pytest.raises(InputError, match="choose a whole number of at least 1"):
        open_session(tiny_engine, threads=threads)


def test_a_closed_session_says_so(tiny_engine):
    session = open_session(tiny_engine)
    session.close()
    session.close()
    with pytest.raises(InputError, match="the session is closed"):
        session.run(np.zeros((1, 3, 64, 64), np.float32))


def test_weights_that_are_not_finite_are_refused(tiny_weights):
    bias = np.full(24, np.nan, np.float32)
    weights = Weights({**tiny_weights.tensors, "model.5.m.0.bias": bias}, tiny_weights.metadata)
    with pytest.raises(WeightsError, match=r"model\.5\.m\.0 has weights that are NaN or infinite"):
        build_engine(weights, backend="onnxruntime")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"weights .*nope\.wts does not exist: check the path"):
        build_engine(tmp_path / "nope.wts", tmp_path / "a.engine")
    assert files(tmp_path) == []


def test_an_unwritable_target_is_an_output_error(tmp_path, tiny_weights):
    (tmp_path / "file").write_text("1")
    with pytest.raises(OutputError, match="cannot write"):
        build_engine(tiny_weights, tmp_path / "file" / "a.engine", backend="onnxruntime")
    assert files(tmp_path) == ["file"]


# --- opening ---


def test_an_engine_of_an_unknown_backend_is_refused(tiny_engine):
    engine = dataclasses.replace(tiny_engine, header=dataclasses.replace(tiny_engine.header, backend="tpu"))
    with pytest.raises(EngineFileError, match=r"engine \(in memory\) is for the backend 'tpu', which this version"):
        open_session(engine)


def test_a_session_gets_the_settings_of_its_backend(tiny_engine):
    images = np.random.RandomState(0).rand(1, 3, 64, 64).astype(np.float32)
    with open_session(tiny_engine, threads=1) as one, open_session(tiny_engine, threads=None) as usual:
        for head, expected in zip(one.run(images), usual.run(images), strict=True):
            np.testing.assert_allclose(head, expected, rtol=0, atol=1e-5)  # another order of sums


def test_an_rtx_engine_is_built_without_a_gpu_but_does_not_open_without_one(tmp_path, tiny_weights, monkeypatch):
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    install_no_gpu(monkeypatch)
    engine = build_engine(tiny_weights, tmp_path / "a.engine", backend="tensorrt-rtx")
    header = EngineFile.load(engine.path).header
    assert (header.backend, header.backend_version, header.precision) == ("tensorrt-rtx", rtx.__version__, "fp16")
    assert [tensor.shape for tensor in header.outputs] == [(1, 24, 8, 8), (1, 24, 4, 4), (1, 24, 2, 2)]
    with pytest.raises(BackendUnavailableError, match=r"^no NVIDIA GPU is usable here .*: use --backend onnxruntime$"):
        open_session(engine)
