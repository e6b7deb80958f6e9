"""The CPU engine: models that ONNX Runtime loads, and sessions that refuse what they cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.reference import all_weights, tiny_metadata
from yolotrt.engines import onnx as onnx_backend
from yolotrt.engines.base import BuildOptions, CompleteOptions
from yolotrt.engines.build import build_engine, open_session
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.engines.onnx import OnnxRuntimeBackend
from yolotrt.errors import BackendUnavailableError, EngineFileError, InputError
from yolotrt.postprocess import NmsOptions
from yolotrt.weights import Weights

SHAPES = ((14, 8, 12), (14, 4, 6))
"""Of the heads of the tiny model at 32x48 pixels, without the batch."""


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return all_weights(tiny_metadata())


@pytest.fixture(scope="module")
def static(tiny) -> EngineFile:
    return build_engine(tiny, backend="onnxruntime")


@pytest.fixture(scope="module")
def dynamic(tiny) -> EngineFile:
    return build_engine(tiny, backend="onnxruntime", options=BuildOptions(min_batch=2, opt_batch=3, max_batch=4))


def pictures(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, 3, 32, 48), np.float32)


def run(engine: EngineFile, images: np.ndarray, **settings: Any) -> list[np.ndarray]:
    with open_session(engine, **settings) as session:
        return [head.copy() for head in session.run(images)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("sizes", "batch"), [((1, 1, 1), 1), ((3, 3, 3), 3), ((1, 2, 3), -1)])
def test_the_plan_is_a_sound_onnx_model(tiny, precision, sizes, batch):
    plan = OnnxRuntimeBackend().build(tiny, CompleteOptions(precision, (32, 48), sizes))
    onnx.checker.check_model(plan.data, full_check=True)
    assert plan.inputs == (TensorInfo("images", "float32", (batch, 3, 32, 48)),)
    assert plan.outputs == tuple(
        TensorInfo(f"head{level}", "float32", (batch, *shape)) for level, shape in enumerate(SHAPES)
    )
    weights = onnx.load_from_string(plan.data).graph.initializer
    half = [onnx.numpy_helper.to_array(array).dtype == np.float16 for array in weights if array.dims]
    assert (np.mean(half) > 0.9) == (precision == "fp16")


def test_a_session_gives_what_onnx_runtime_gives(static):
    images = pictures(1)
    expected = onnxruntime.InferenceSession(static.plan).run(None, {"images": images})
    heads = run(static, images, threads=1)
    for head, reference in zip(heads, expected, strict=True):
        assert head.dtype == np.float32
        # another number of threads may sum in another order
        np.testing.assert_allclose(head, reference, rtol=1e-5, atol=1e-5)


def test_the_batch_may_vary_from_call_to_call(dynamic):
    images = pictures(4)
    with open_session(dynamic) as session:
        all_four = [head.copy() for head in session.run(images)]
        for batch in (2, 4, 3):
            heads = session.run(images[:batch])
            assert [head.shape for head in heads] == [(batch, *shape) for shape in SHAPES]
            for head, reference in zip(heads, all_four, strict=True):
                np.testing.assert_allclose(head, reference[:batch], rtol=1e-5, atol=1e-5)


def test_heads_of_an_earlier_call_are_not_mixed_into_a_later_one(dynamic):
    first, second = pictures(2, seed=1), pictures(2, seed=2)
    with open_session(dynamic) as session:
        session.run(first)
        heads = [head.copy() for head in session.run(second)]
    for head, reference in zip(heads, run(dynamic, second), strict=True):
        np.testing.assert_array_equal(head, reference)


def test_sessions_do_not_share_their_outputs(static):
    with open_session(static) as one, open_session(static) as other:
        heads = one.run(pictures(1, seed=1))
        kept = [head.copy() for head in heads]
        other.run(pictures(1, seed=2))
        for head, reference in zip(heads, kept, strict=True):
            np.testing.assert_array_equal(head, reference)


def test_pictures_need_not_be_contiguous(static):
    images = np.ascontiguousarray(pictures(1).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not images.flags.c_contiguous
    for head, reference in zip(run(static, images), run(static, pictures(1)), strict=True):
        np.testing.assert_array_equal(head, reference)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pictures(1).astype(np.float64), "the engine takes float32 (batch, 3, 32, 48), not float64 (1, 3, 32, 48)"),
        ((255 * pictures(1)).astype(np.uint8), "not uint8 (1, 3, 32, 48): letterbox the pictures"),
        (pictures(1)[0], "not float32 (3, 32, 48)"),
        (pictures(1)[:, :2], "not float32 (1, 2, 32, 48)"),
        (pictures(1)[..., :40], "not float32 (1, 3, 32, 40)"),
        (pictures(1).transpose(0, 2, 3, 1), "not float32 (1, 32, 48, 3)"),
        (pictures(2), "the engine takes 1 to 1 pictures a batch, not 2"),
        (pictures(1)[:0], "the engine takes 1 to 1 pictures a batch, not 0"),
    ],
)
def test_other_inputs_are_refused(static, images, message):
    with open_session(static) as session, pytest.raises(InputError) as problem:
        session.run(images)
    assert message in str(problem.value)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_outside_the_range_is_refused(dynamic, batch):
    with (
        open_session(dynamic) as session,
        pytest.raises(InputError, match=f"takes 2 to 4 pictures a batch, not {batch}"),
    ):
        session.run(pictures(batch))


def test_closing_twice_is_harmless(static):
    session = open_session(static)
    session.close()
    session.close()


@pytest.mark.parametrize("plan", [b"", b"not a model", b"\x08\x08"], ids=["empty", "text", "no graph"])
def test_a_damaged_model_is_one_clear_line(static, plan):
    with pytest.raises(EngineFileError) as problem:
        open_session(replace(static, plan=plan))
    assert str(problem.value).startswith("engine (in memory) cannot be loaded by ONNX Runtime (")
    assert str(problem.value).endswith("build it again with python -m yolotrt -s")
    assert "\n" not in str(problem.value)


def test_a_missing_library_is_one_clear_line(monkeypatch, static):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for attempt in (OnnxRuntimeBackend().version, lambda: open_session(static)):
        with pytest.raises(BackendUnavailableError, match=r'^ONNX Runtime is not installed \(.*\): run pip install "'):
            attempt()


def test_the_version_is_the_librarys():
    assert OnnxRuntimeBackend().version() == onnxruntime.__version__


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_is_passed_on(monkeypatch, static, threads):
    used = []
    session_class = onnxruntime.InferenceSession

    def spy(model: bytes, options: Any, **settings: Any) -> Any:
        used.append(options.intra_op_num_threads)
        return session_class(model, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    run(static, pictures(1), threads=threads)
    assert used == [threads]


@pytest.mark.parametrize(
    ("cpu_info", "saturates"),
    [
        ("flags : fpu avx2 avx512f avx512_vnni", False),
        ("flags : fpu avx2 avx_vnni", False),
        ("flags : fpu avx2 fma", True),
        ("Features : fp asimd", False),  # ARM
        (None, False),  # not Linux
    ],
)
def test_exact_8_bit_kernels_are_asked_for_where_the_fast_ones_saturate(tmp_path, monkeypatch, cpu_info, saturates):
    path = tmp_path / "cpuinfo"
    if cpu_info is not None:
        path.write_text(cpu_info)
    monkeypatch.setattr(onnx_backend, "_CPU_INFO", path)
    onnx_backend._saturates_in_int8.cache_clear()
    try:
        assert onnx_backend._saturates_in_int8() == saturates
        options = onnx_backend._session_options(1)
        if saturates:
            assert options.get_session_config_entry("session.x64quantprecision") == "1"
    finally:
        onnx_backend._saturates_in_int8.cache_clear()


def test_more_threads_than_cpus_are_warned_of(static, monkeypatch, caplog):
    monkeypatch.setattr(onnx_backend.os, "cpu_count", lambda: 2)
    for threads, warnings in ((2, 0), (3, 1)):
        caplog.clear()
        open_session(static, threads=threads).close()
        assert caplog.text.count(f"{threads} threads on 2 CPUs wait for each other") == warnings


@pytest.mark.parametrize(
    ("engine", "batches", "sessions"), [("static", 1, 1), ("static", 2, 2), ("tiny_classifier_engine", 2, 1)]
)
def test_a_warm_up_loads_what_batches_side_by_side_need(request, monkeypatch, engine, batches, sessions):
    file = request.getfixturevalue(engine)
    monkeypatch.setattr(onnx_backend, "_core_count", lambda: 2)
    loaded = []
    load = onnx_backend.inference_session
    monkeypatch.setattr(onnx_backend, "inference_session", lambda *given: loaded.append(given) or load(*given))
    with open_session(file) as session:
        session.warm_up(NmsOptions(), batches=batches)
        assert len(loaded) == sessions


def test_onnx_runtime_reports_nothing_about_its_user(static, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    code = f"from yolotrt import Detector\nwith Detector({str(static.save(tmp_path / 'a.engine').path)!r}): pass"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert list(home.rglob("*")) == []  # its telemetry begins with an identifier in a file


def test_telemetry_that_the_user_asked_for_stays(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    OnnxRuntimeBackend().version()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
