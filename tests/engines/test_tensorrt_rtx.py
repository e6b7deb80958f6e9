"""The same builder makes plans with TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.engines.fake_gpu import install_gpu, install_session
from tests.reference import TINY_YAML, MadeUpWeights, all_weights, made_up_weights, official_metadata, tiny_metadata
from yolotrt.calibration.activations import record
from yolotrt.engines.base import BuildOptions, CompleteOptions, Plan
from yolotrt.engines.build import build_engine, find_backend, open_session
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.engines.tensorrt_rtx import TensorRtRtxBackend
from yolotrt.engines.trt_adapter import TrtHooks
from yolotrt.engines.trt_log import NO_DRIVER_MESSAGE, make_logger, shared_logger
from yolotrt.errors import BackendUnavailableError, NetworkError, WeightsError
from yolotrt.network.ops import Ops
from yolotrt.network.quantize import Quantization, scale_groups
from yolotrt.weights import Weights


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture(autouse=True)
def one_logger(caplog) -> Iterator[None]:
    """The library ignores a new logger as long as a builder is alive, be it in the traceback of an earlier test."""
    gc.collect()
    yield
    assert "new logger is ignored" not in caplog.text


@lru_cache(maxsize=1)  # the largest model has 87 million parameters: one at a time
def official_weights(size: str) -> MadeUpWeights:
    return made_up_weights(official_metadata(size))


def build(rtx: ModuleType, weights: Weights, precision: str, batch_range: tuple[int, int, int] = (1, 1, 1)) -> Plan:
    """A plan from a build that logged no error: TensorRT logs some mistakes and goes on."""
    plan = TensorRtRtxBackend().build(weights, CompleteOptions(precision, weights.metadata.imgsz, batch_range))
    assert shared_logger(rtx).errors == []
    return plan


# Parameters of the official models without BatchNorm's running statistics, as YOLOv5 prints them.
PARAMETERS = {"n": 1_872_157, "s": 7_235_389, "m": 21_190_557, "l": 46_563_709, "x": 86_749_405}


@pytest.mark.parametrize(("size", "precision"), list(itertools.product("nsmlx", ("fp32", "fp16"))))
def test_every_official_size_gives_a_plan(rtx, size, precision):
    weights = official_weights(size)
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    for batch, batch_range in ((1, (1, 1, 1)), (-1, (1, 4, 8))):
        plan = build(rtx, weights, precision, batch_range)
        assert plan.inputs == (TensorInfo("images", dtype, (batch, 3, 640, 640)),)
        assert plan.outputs == (
            TensorInfo("head0", dtype, (batch, 255, 80, 80)),
            TensorInfo("head1", dtype, (batch, 255, 40, 40)),
            TensorInfo("head2", dtype, (batch, 255, 20, 20)),
        )
        assert plan.yololayer == "kernel"
        assert sum(array.size for name, array in weights.made.items() if ".running_" not in name) == PARAMETERS[size]
        # a plan holds every weight once, in the precision, and some megabytes of code
        weight_bytes = PARAMETERS[size] * {"fp32": 4, "fp16": 2}[precision]
        assert weight_bytes < len(plan.data) < 1.1 * weight_bytes + 6e6


CONVOLUTIONS = {"n": 60, "s": 60, "m": 82, "l": 104, "x": 126}


@pytest.mark.parametrize("size", "nsmlx")
def test_all_convolutions_but_the_first_and_the_heads_are_int8_in_every_official_size(rtx, size):
    weights = official_weights(size)
    for batch_range in ((1, 1, 1), (1, 4, 8)) if size == "n" else ((1, 4, 8),):
        plan = build_int8(rtx, weights, batch_range=batch_range)
        total = CONVOLUTIONS[size]
        assert plan.findings == {"convolutions": {"int8": total - 4, "fp16": 4}}
    assert len(plan.data) < 1.1 * PARAMETERS[size] + 8e6


def test_kept_layers_are_not_int8(rtx):
    plan = build_int8(rtx, official_weights("n"), keep=("model.2", "model.9.cv1"))
    assert plan.findings == {"convolutions": {"int8": 50, "fp16": 10}}


def test_convolutions_that_the_library_leaves_in_float_are_noticed(rtx, monkeypatch, caplog):
    """Scales of shape (1,) in place of () are accepted and give float convolutions, without a message."""

    def with_shape_1(ops: Ops, array: np.ndarray, name: str) -> Any:
        return original(ops, np.atleast_1d(array) if ".kernel" not in name else array, name)

    original = Ops._constant_tensor
    monkeypatch.setattr(Ops, "_constant_tensor", with_shape_1)
    plan = TensorRtRtxBackend().build(all_weights(tiny_metadata()), int8_options(all_weights(tiny_metadata())))
    assert "int8" not in plan.findings["convolutions"]
    assert "the library computes the others in floating point" in caplog.text


def build_int8(rtx: ModuleType, weights: Weights, keep: tuple[str, ...] = (), **options: Any) -> Plan:
    plan = TensorRtRtxBackend().build(weights, int8_options(weights, keep, **options))
    assert shared_logger(rtx).errors == []
    return plan


def int8_options(weights: Weights, keep: tuple[str, ...] = (), batch_range=(1, 1, 1)) -> CompleteOptions:
    imgsz = weights.metadata.imgsz
    scales = {name: 0.05 for group in scale_groups(record(weights, imgsz)) for name in group}
    return CompleteOptions("int8", imgsz, batch_range, quantization=Quantization(scales, keep))


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return all_weights(tiny_metadata())


def test_engines_leave_all_memory_to_the_session_so_that_they_can_be_captured(rtx, tiny, monkeypatch):
    flags: list[bool] = []
    serialize = TrtHooks.serialize

    def spy(hooks: TrtHooks, definition: Any, builder: Any, config: Any) -> bytes | None:
        flags.append(config.get_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION))
        return serialize(hooks, definition, builder, config)

    monkeypatch.setattr(TrtHooks, "serialize", spy)
    for batch_range in ((1, 1, 1), (1, 2, 4)):
        build(rtx, tiny, "fp16", batch_range)
    assert flags == [True, True]


def plan_tensors(plan: Plan) -> dict[str, tuple[str, str]]:
    """Dimensions and type of the tensors that the plan's text speaks of, by name."""
    text = plan.data.decode("latin1")
    pattern = r"tensor=\{[^\n]*?dims=\{ ([^}]*) \}[^\n]*?name=\"([^\"]+)\"[^\n]*?type=(\w+) \}"
    return {match[2]: (match[1], match[3]) for match in re.finditer(pattern, text)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_plan_itself_has_the_types_and_shapes(rtx, tiny, precision):
    if not rtx.__version__.startswith("1.7."):
        pytest.skip(f"the text inside plans is undocumented and was read from version 1.7, not {rtx.__version__}")
    tensors = plan_tensors(build(rtx, tiny, precision))
    kind = {"fp32": "float", "fp16": "half"}[precision]
    assert tensors["images.1"] == ("1 3 32 48", kind)
    assert tensors["head0.1"] == ("1 14 8 12", kind)
    assert tensors["head1.1"] == ("1 14 4 6", kind)
    kinds = [other for _, other in tensors.values()]
    assert ("half" in kinds) == (precision == "fp16")
    if precision == "fp16":
        assert kinds.count("half") > kinds.count("float")


def test_equal_networks_give_equal_plans(rtx, tiny):
    first, again = (build(rtx, tiny, "fp16") for _ in range(2))
    assert first.data == again.data
    other = with_changed_bias(tiny, 1.0)
    assert build(rtx, other, "fp16").data != first.data


def with_changed_bias(weights: Weights, value: float) -> Weights:
    name = "model.7.m.0.bias"
    return replace(weights, tensors={**weights.tensors, name: np.full_like(weights.tensors[name], value)})


def test_the_plan_holds_the_weights(rtx, tiny):
    """Arrays that die before the build leave garbage in the plan; these are temporaries of the builder."""
    bias = np.arange(14, dtype=np.float32) + np.float32(0.125)
    weights = replace(tiny, tensors={**tiny.tensors, "model.7.m.0.bias": bias})
    assert bias.tobytes() in build(rtx, weights, "fp32").data


# --- the engine file ---


def test_an_engine_file_says_what_it_holds(rtx, tiny, tmp_path):
    options = BuildOptions(imgsz=(64, 96), min_batch=1, opt_batch=2, max_batch=4)
    path = tmp_path / "tiny.engine"
    build_engine(tiny, path, backend="tensorrt-rtx", options=options)
    engine = EngineFile.load(path)
    header = engine.header
    assert (header.backend, header.backend_version) == ("tensorrt-rtx", rtx.__version__)
    assert header.precision == "fp16"
    assert (header.imgsz, header.batch_range) == ((64, 96), (1, 2, 4))
    assert header.inputs == (TensorInfo("images", "float16", (-1, 3, 64, 96)),)
    assert header.yololayer == "kernel"
    assert [tensor.name for tensor in header.outputs] == ["head0", "head1"]
    assert (header.device_name, header.compute_capability) == ("", "")
    assert header.model == replace(tiny.metadata, yaml=header.model.yaml)
    assert b"head1" in engine.plan


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
def test_an_engine_opens_on_a_gpu_that_it_is_for(rtx, tiny, monkeypatch, capability):
    opened = with_gpu(monkeypatch, capability)
    engine = build_engine(tiny, backend="tensorrt-rtx")
    assert open_session(engine) == "session"
    assert opened == [(rtx, engine)]


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (9, 0), (10, 0)])
def test_an_engine_is_refused_on_another_gpu(rtx, tiny, monkeypatch, capability):
    opened = with_gpu(monkeypatch, capability)
    with pytest.raises(BackendUnavailableError) as problem:
        open_session(build_engine(tiny, backend="tensorrt-rtx"))
    assert str(problem.value) == (
        "engine (in memory) is for TensorRT-RTX, which runs on compute capability 8.0, 8.6, 8.9 and 12.x "
        f"(NVIDIA Test, compute capability {capability[0]}.{capability[1]}): "
        "build with --backend tensorrt or onnxruntime"
    )
    assert opened == []


def with_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> list[Any]:
    """A GPU, and a runtime that notes what it opens."""
    opened: list[Any] = []
    install_gpu(monkeypatch, capability=capability)
    install_session(monkeypatch, opened)
    return opened


# --- refusals ---


def test_weights_beyond_the_range_of_half_precision_are_refused(rtx, tiny):
    weights = with_changed_bias(tiny, 7e4)
    backend = TensorRtRtxBackend()
    assert backend.build(weights, CompleteOptions("fp32", (32, 48), (1, 1, 1))).data
    with pytest.raises(WeightsError) as problem:
        backend.build(weights, CompleteOptions("fp16", (32, 48), (1, 1, 1)))
    assert str(problem.value) == (
        "layer 7 (Detect): model.7.m.0 has weights beyond the range of fp16: build with --precision fp32"
    )


def test_a_refused_layer_comes_with_the_librarys_reason(rtx):
    rows = [*TINY_YAML["backbone"], *TINY_YAML["head"]]
    rows[6] = [[5, 4], 1, "Concat", [1]]
    weights = made_up_weights(tiny_metadata(yaml={**TINY_YAML, "backbone": rows, "head": []}))
    with pytest.raises(NetworkError) as problem:
        TensorRtRtxBackend().build(weights, CompleteOptions("fp32", (32, 48), (1, 1, 1)))
    assert re.match(
        r"layer 6 \(Concat\): model\.6: the layer's output has no valid shape \(.*axis.*\)$", str(problem.value)
    )
    assert "\n" not in str(problem.value)


def test_a_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendUnavailableError, match=r"^TensorRT-RTX is not installed \(.*\): run pip install"):
        find_backend("tensorrt-rtx").version()


# --- settings ---


@pytest.mark.parametrize(("precision", "keeps_tf32"), [("fp32", False), ("tf32", True), ("fp16", True)])
def test_fp32_is_true_fp32(rtx, monkeypatch, tiny, precision, keeps_tf32):
    seen = []
    configure = TrtHooks.configure

    def spy(hooks: TrtHooks, config: Any) -> None:
        assert config.get_flag(rtx.BuilderFlag.TF32), "TF32 is no longer the default"
        configure(hooks, config)
        seen.append(config.get_flag(rtx.BuilderFlag.TF32))

    monkeypatch.setattr(TrtHooks, "configure", spy)
    plan = TensorRtRtxBackend().build(tiny, CompleteOptions(precision, (32, 48), (1, 1, 1)))
    assert seen == [keeps_tf32]
    assert {tensor.dtype for tensor in plan.inputs} == {"float16" if precision == "fp16" else "float32"}


@pytest.mark.parametrize("level", [0, 5])
def test_the_optimization_level_reaches_the_library(rtx, monkeypatch, tiny, level):
    seen = []
    configure = TrtHooks.configure
    monkeypatch.setattr(
        TrtHooks,
        "configure",
        lambda hooks, config: (configure(hooks, config), seen.append(config.builder_optimization_level)),
    )
    TensorRtRtxBackend().build(tiny, CompleteOptions("fp16", (32, 48), (1, 1, 1), optimization_level=level))
    assert seen == [level]


def test_the_version_is_the_librarys(rtx):
    assert TensorRtRtxBackend().version() == rtx.__version__


def test_messages_of_the_library_go_to_logging(rtx, caplog):
    caplog.set_level(logging.DEBUG, logger="yolotrt")
    logger = make_logger(rtx)
    severity = rtx.ILogger.Severity
    assert logger.last_error == ""
    logger.log(severity.WARNING, "an unused input\n")
    logger.log(severity.INFO, "took a second")
    logger.log(severity.ERROR, "a wrong shape\n")
    logger.log(severity.INTERNAL_ERROR, "a bug")
    logger.log(severity.WARNING, f"{NO_DRIVER_MESSAGE}: no driver")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "tensorrt_rtx: an unused input"),
        ("DEBUG", "tensorrt_rtx: took a second"),
        ("DEBUG", "tensorrt_rtx: a wrong shape"),
        ("DEBUG", "tensorrt_rtx: a bug"),
        ("DEBUG", f"tensorrt_rtx: {NO_DRIVER_MESSAGE}: no driver"),
    ]
    assert logger.errors == ["a wrong shape", "a bug"]
    assert logger.warnings == ["an unused input"]
    assert logger.last_error == "a bug"
    for number in range(200):
        logger.log(severity.ERROR, f"mistake {number}")
    assert len(logger.errors) == 100
    logger.clear()
    assert (logger.errors, logger.warnings, logger.last_error) == ([], [], "")


def test_a_build_without_a_driver_warns_of_nothing(rtx, tiny, caplog):
    caplog.set_level(logging.INFO, logger="yolotrt")
    TensorRtRtxBackend().build(tiny, CompleteOptions("fp16", (32, 48), (1, 1, 1)))
    assert [record.getMessage() for record in caplog.records] == []
