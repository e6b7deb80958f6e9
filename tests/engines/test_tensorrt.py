"""TensorRT 8.6, 10 and 11 as fake_tensorrt.py shows them: what they are told, and what becomes of failures."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.fake_gpu import GIB, install_gpu, install_no_gpu, install_session
from tests.engines.fake_tensorrt import MYELIN_REFUSAL, install_tensorrt
from tests.reference import all_weights, tiny_metadata
from yolotrt.calibration.activations import record
from yolotrt.engines.base import BuildOptions, CompleteOptions
from yolotrt.engines.build import build_engine, find_backend, open_session
from yolotrt.engines.file import EngineFile, TensorInfo
from yolotrt.engines.gpu import find_gpu
from yolotrt.engines.tensorrt import TensorRtBackend
from yolotrt.engines.timing_cache import TimingCache
from yolotrt.errors import (
    BackendUnavailableError,
    BuildError,
    EngineFileError,
    GraphError,
    InputError,
    NetworkError,
    YolotrtError,
)
from yolotrt.network import recorder
from yolotrt.network.ops import Tensor
from yolotrt.network.quantize import Quantization, scale_groups
from yolotrt.plugin import yololayer
from yolotrt.weights import Weights, load_weights

VERSIONS = ("8.6.0", "10.13.0.35", "11.4.0.106")
SIZE = (32, 48)


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return all_weights(tiny_metadata())


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path) -> Any:
    """A machine with a GPU and an empty cache folder."""
    monkeypatch.setenv("YOLOTRT_CACHE_DIR", str(tmp_path / "cache"))
    return install_gpu(monkeypatch)


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch) -> Any:
    return install_tensorrt(monkeypatch, request.param)


@pytest.fixture
def trt8(monkeypatch) -> Any:
    return install_tensorrt(monkeypatch, "8.6.0")


@pytest.fixture
def trt10(monkeypatch) -> Any:
    return install_tensorrt(monkeypatch, "10.13.0.35")


def build(weights: Weights, **options: Any) -> EngineFile:
    return build_engine(weights, backend="tensorrt", options=BuildOptions(**options))


def records(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


# --- what is built ---


@pytest.mark.parametrize(
    ("precision", "dtype", "counts"),
    [
        (None, "float16", {"fp16": 14}),
        ("fp16", "float16", {"fp16": 14}),
        ("fp32", "float32", {"fp32": 14}),
        ("tf32", "float32", {"tf32": 14}),
    ],
)
def test_the_header_says_what_was_built(trt, tiny, machine, caplog, precision, dtype, counts):
    caplog.set_level(logging.INFO, logger="yolotrt")
    header = build(tiny, precision=precision).header
    assert (header.backend, header.backend_version) == ("tensorrt", trt.__version__)
    assert header.precision == (precision or "fp16")
    assert header.inputs == (TensorInfo("images", dtype, (1, 3, *SIZE)),)
    assert header.outputs == (
        TensorInfo("head0", dtype, (1, 14, 8, 12)),
        TensorInfo("head1", dtype, (1, 14, 4, 6)),
    )
    assert (header.device_name, header.compute_capability) == (machine.name, "9.0")
    assert header.yololayer == "kernel"
    assert header.build_options == {
        "workspace_mib": None,
        "optimization_level": None,
        "hardware_compatible": False,
        "version_compatible": False,
        "convolutions": counts,
        "scratch_bytes": 3 << 20,
    }
    assert f"14 of 14 convolutions {header.precision}" in records(caplog, logging.INFO)
    assert records(caplog) == []


@pytest.mark.parametrize(("precision", "has_tf32"), [("fp32", False), ("tf32", True), ("fp16", True)])
def test_tf32_is_off_for_fp32(trt, tiny, precision, has_tf32):
    build(tiny, precision=precision)
    (config,) = trt.behaviour.configs
    assert ("TF32" in config.flag_names()) == has_tf32


def test_a_weakly_typed_network_is_constrained_to_fp16_in_every_layer(trt8, tiny):
    build(tiny, precision="fp16")
    (network,), (config,) = trt8.behaviour.networks, trt8.behaviour.configs
    assert {"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= config.flag_names()
    assert {layer.precision for layer in network.layers} == {recorder.float16}
    assert all(layer.types == {0: recorder.float16} for layer in network.layers)
    assert [tensor.dtype for tensor in (*network.inputs, *network.outputs)] == [recorder.float16] * 3
    assert not any(isinstance(layer, recorder.CastLayer) for layer in network.layers)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_weakly_typed_network_in_single_precision_has_no_constraints(trt8, tiny, precision):
    build(tiny, precision=precision)
    (network,), (config,) = trt8.behaviour.networks, trt8.behaviour.configs
    assert not {"FP16", "OBEY_PRECISION_CONSTRAINTS"} & config.flag_names()
    assert {layer.precision for layer in network.layers} == {None}


def int8_options(weights: Weights, keep: tuple[str, ...] = ()) -> CompleteOptions:
    scales = {name: 0.05 for group in scale_groups(record(weights, SIZE)) for name in group}
    return CompleteOptions("int8", SIZE, (1, 1, 1), quantization=Quantization(scales, keep))


def test_all_convolutions_but_the_first_and_heads_are_int8_and_the_engine_is_asked(trt, tiny, caplog):
    plan = TensorRtBackend().build(tiny, int8_options(tiny))
    assert plan.findings["convolutions"]["int8"] == 11
    assert sum(plan.findings["convolutions"].values()) == 14
    assert records(caplog) == []
    kept = TensorRtBackend().build(tiny, int8_options(tiny, ("model.1", "model.2.cv1")))
    assert kept.findings["convolutions"]["int8"] == 9
    assert records(caplog) == []  # what is to be in high precision is none to warn of


def test_a_weakly_typed_int8_network_prefers_halves_where_it_is_not_int8(trt8, tiny):
    plan = TensorRtBackend().build(tiny, int8_options(tiny, ("model.3",)))
    (network,), (config,) = trt8.behaviour.networks, trt8.behaviour.configs
    assert {"INT8", "FP16", "PREFER_PRECISION_CONSTRAINTS"} <= config.flag_names()
    preferred = {layer.name for layer in network.layers if layer.precision is not None}
    assert preferred == {"model.0.conv", "model.3.conv", "model.7.m.0", "model.7.m.1"}
    activations = {layer.name for layer in network.layers if layer.kind == "Activation"}
    assert {"model.0.act.tanh", "model.1.act.sigmoid", "model.3.act.sigmoid"} <= activations  # not fused into the first
    assert {layer.precision for layer in network.layers} == {None, recorder.float16}
    assert {tensor.dtype for tensor in (*plan.inputs, *plan.outputs)} == {"float16"}
    assert plan.findings["convolutions"] == {"int8": 10, "fp16": 4}


@pytest.mark.parametrize(
    ("checkpoint", "floats", "split"),
    [
        ("yolov5n", 1 + 3, True),  # the first convolution, the heads
        ("derived_p6_random_nc80", 1 + 4, True),
        ("derived_seg_nc80", 1 + 3 + 3, True),  # and the prototypes'
        ("derived_v50_focus_spp_nc80", 1 + 3, True),  # Focus is a part of its convolution
        ("derived_v31_csp_hswish_nc3", 1 + 3, False),
        ("derived_v20_leaky_nc2_legacy", 1 + 3, False),
    ],
)
@pytest.mark.parametrize("batch_range", [(1, 1, 1), (1, 2, 4)], ids=["static", "dynamic"])
def test_int8_networks_of_all_kinds_of_models(trt8, golden, caplog, checkpoint, floats, split, batch_range):
    weights = load_weights(golden / "weights" / f"{checkpoint}.pt")
    size = (128, 128)
    scales = {name: 0.05 for group in scale_groups(record(weights, size)) for name in group}
    options = CompleteOptions("int8", size, batch_range, quantization=Quantization(scales))
    plan = TensorRtBackend().build(weights, options)
    (network,) = trt8.behaviour.networks
    assert plan.findings["convolutions"]["fp16"] == floats
    assert sum(layer.precision is not None for layer in network.layers) == floats
    assert {tensor.dtype for tensor in (*plan.inputs, *plan.outputs)} == {"float16"}
    assert sum(layer.name.endswith(".tanh") for layer in network.layers) == split
    assert records(caplog) == []


def test_an_int8_network_for_a_gpu_with_slow_halves_is_float32(trt8, tiny):
    trt8.behaviour.fast_fp16 = False
    plan = TensorRtBackend().build(tiny, int8_options(tiny))
    (network,) = trt8.behaviour.networks
    assert {layer.precision for layer in network.layers} == {None}
    assert {tensor.dtype for tensor in (*plan.inputs, *plan.outputs)} == {"float32"}


def test_a_strongly_typed_int8_network_is_fp16_where_it_is_not_int8(trt10, tiny):
    plan = TensorRtBackend().build(tiny, int8_options(tiny))
    (network,), (config,) = trt10.behaviour.networks, trt10.behaviour.configs
    assert not {"INT8", "FP16"} & config.flag_names()
    heads = [layer for layer in network.layers if layer.name.startswith("model.7.m.") and "." not in layer.name[10:]]
    assert {layer.kernel.dtype for layer in heads} == {recorder.float16}
    assert {tensor.dtype for tensor in (*plan.inputs, *plan.outputs)} == {"float16"}


def test_int8_convolutions_that_tensorrt_computes_otherwise_are_named(trt, tiny, caplog):
    trt.behaviour.type_of = lambda name: "Half" if name == "model.1.conv" else None
    TensorRtBackend().build(tiny, int8_options(tiny))
    assert "1 of 11 convolutions are not int8: model.1.conv (fp16)" in records(caplog)


def test_a_gpu_without_fast_int8_is_refused(trt10, tiny):
    trt10.behaviour.fast_int8 = False
    with pytest.raises(BackendUnavailableError, match=r"no fast int8 .*: build with --precision fp16"):
        TensorRtBackend().build(tiny, int8_options(tiny))


def test_other_scales_take_the_same_timing_cache_and_other_kept_layers_another(trt, tiny):
    def key(options: CompleteOptions) -> str:
        return TimingCache.of(tiny, options, find_gpu(), trt.__version__).key

    options = replace(int8_options(tiny), yololayer="kernel")
    other = replace(options, quantization=Quantization({"images": 0.1}))
    assert key(other) == key(options) != key(replace(options, quantization=Quantization({}, ("model.1",))))


def test_a_strongly_typed_network_has_halves_from_end_to_end(trt10, tiny):
    build(tiny)
    (network,), (config,) = trt10.behaviour.networks, trt10.behaviour.configs
    assert {layer.get_output(0).dtype for layer in network.layers} == {recorder.float16}
    assert config.flag_names() == {"TF32"}


def test_every_layer_carries_its_name_for_the_inspector(trt, tiny):
    build(tiny)
    (network,) = trt.behaviour.networks
    assert all(layer.metadata == layer.name for layer in network.layers)


@pytest.mark.parametrize(
    ("options", "batch", "profile"),
    [
        ({}, 1, None),
        ({"min_batch": 4, "max_batch": 4}, 4, None),
        ({"max_batch": 8, "opt_batch": 2}, -1, (1, 2, 8)),
    ],
)
def test_the_batch_is_static_or_has_a_profile(trt, tiny, options, batch, profile):
    header = build(tiny, **options).header
    assert [tensor.shape[0] for tensor in (*header.inputs, *header.outputs)] == [batch] * 3
    (config,) = trt.behaviour.configs
    ranges = [given.ranges["images"] for given in config.profiles]
    assert [(r.min[0], r.opt[0], r.max[0]) for r in ranges] == ([profile] if profile else [])
    # the inspector tells types of a dynamic engine only for known shapes
    assert trt.behaviour.inspected_shapes == ([(profile[1], 3, *SIZE)] if profile else [])
    assert header.build_options["convolutions"] == {"fp16": 14}


def test_options_reach_the_library_and_the_header(trt, tiny):
    options = {"workspace_mib": 64, "optimization_level": 1, "hardware_compatible": True, "version_compatible": True}
    header = build(tiny, **options).header
    (config,) = trt.behaviour.configs
    assert config.limits == {"WORKSPACE": 64 << 20}
    assert config.builder_optimization_level == 1
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert "VERSION_COMPATIBLE" in config.flag_names()
    assert trt.behaviour.host_code_allowed == [True]
    assert options.items() <= header.build_options.items()


def test_without_options_the_library_decides(trt, tiny):
    build(tiny)
    (config,) = trt.behaviour.configs
    assert config.limits == {}
    assert config.builder_optimization_level is None
    assert config.hardware_compatibility_level is None
    assert "VERSION_COMPATIBLE" not in config.flag_names()
    assert trt.behaviour.host_code_allowed == [False]


def test_external_libraries_are_off_and_profiles_are_shared(trt, tiny):
    build(tiny)
    (config,) = trt.behaviour.configs
    assert config.source_names() == {"EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"}
    assert config.preview == ({"PROFILE_SHARING_0806": True} if trt.__version__.startswith("8") else {})
    assert config.profiling_verbosity.name == "DETAILED"


def test_the_backend_opens_its_engines(trt, tiny, monkeypatch):
    opened: list[Any] = []
    install_session(monkeypatch, opened)
    engine = build(tiny)
    assert open_session(engine) == "session"
    assert opened == [(trt, engine)]


# --- the precision is verified ---


def types(**names: str) -> Any:
    """What the fake gives to convolutions: a type by the part of a name before the first dot, or ``all``."""
    return lambda name: next((kind for part, kind in names.items() if part == "all" or part in name), None)


@pytest.mark.parametrize(
    ("precision", "type_of", "message"),
    [
        ("fp16", types(all="Float"), r'built no convolution in fp16 \(\{"fp32": 14\}\): choose another --precision'),
        ("fp32", types(all="TF32"), r'built no convolution in fp32 \(\{"tf32": 14\}\): choose another --precision'),
        ("fp32", types(all="Half"), r'built no convolution in fp32 \(\{"fp16": 14\}\): choose another --precision'),
    ],
)
def test_an_engine_of_another_precision_is_refused(trt, tiny, precision, type_of, message):
    trt.behaviour.type_of = type_of
    with pytest.raises(BuildError, match=message):
        build(tiny, precision=precision)


def test_single_convolutions_of_another_precision_are_named(trt, tiny, caplog):
    trt.behaviour.type_of = types(cv1="Float")
    header = build(tiny).header
    (warning,) = records(caplog)
    counts = header.build_options["convolutions"]
    assert set(counts) == {"fp16", "fp32"}
    assert warning.startswith(f"{counts['fp32']} of 14 convolutions are not fp16: model.2.cv1.conv (fp32), ")


def test_tf32_convolutions_may_be_fp32(trt, tiny, caplog):
    trt.behaviour.type_of = types(cv1="Float")
    assert set(build(tiny, precision="tf32").header.build_options["convolutions"]) == {"tf32", "fp32"}
    assert records(caplog) == []


def test_an_inspector_that_tells_nothing_is_a_warning(trt, tiny, caplog):
    trt.behaviour.type_of = types(all="")
    assert build(tiny).header.build_options["convolutions"] == {"unknown": 14}
    assert records(caplog) == [f"TensorRT {trt.__version__} does not tell in which precision its convolutions are"]


def test_an_engine_that_cannot_be_loaded_is_refused(trt, tiny):
    trt.behaviour.loads = False
    with pytest.raises(BuildError, match="magic tag does not match"):
        build(tiny)


# --- YoloLayer ---


@pytest.fixture
def plugin(monkeypatch) -> dict[str, Any]:
    """A TensorRT that hosts the plugin: a layer that gives rows."""
    calls: dict[str, Any] = {"added": [], "problem": None}

    def add(network: Any, trt: Any, heads: Any, anchors: Any, strides: Any, classes: int, variant: str) -> Tensor:
        calls["added"].append((len(heads), anchors, strides, classes, variant))
        if calls["problem"] is not None:
            raise calls["problem"]
        rows = network.add_cast(heads[0], recorder.float32).get_output(0)
        rows.set_shape = None
        layer = network.layers[-1]
        object.__setattr__(layer, "infer", lambda: ((heads[0].shape[0], 240, 6), recorder.float32))
        layer.name = "yololayer"
        return rows

    monkeypatch.setattr(yololayer, "plugin_unavailable_reason", lambda _: "")
    monkeypatch.setattr(yololayer, "add_yololayer", add)
    return calls


@pytest.mark.parametrize("wanted", ["auto", "plugin"])
def test_yololayer_is_a_part_of_the_engine_where_the_library_hosts_it(trt10, tiny, plugin, monkeypatch, wanted):
    install_session(monkeypatch, [])
    engine = build(tiny, yololayer=wanted, max_batch=4)
    header = engine.header
    assert header.yololayer == "plugin"
    assert header.outputs == (TensorInfo("rows", "float32", (-1, 240, 6)),)
    assert header.inputs[0].dtype == "float16"
    model = tiny.metadata
    assert plugin["added"] == [(2, model.anchors, model.strides, 2, "best")]
    assert header.build_options["convolutions"] == {"fp16": 14}
    assert open_session(engine) == "session"
    wrong = replace(header, outputs=(TensorInfo("rows", "float32", (-1, 240, 7)),))
    with pytest.raises(EngineFileError, match="gives something else"):
        open_session(replace(engine, header=wrong))


def test_yololayer_follows_the_engine_on_request(trt10, tiny, plugin):
    assert build(tiny, yololayer="kernel").header.yololayer == "kernel"
    assert plugin["added"] == []


@pytest.mark.parametrize(
    ("problem", "failures", "message"),
    [
        (NetworkError("yololayer: the plugin was refused"), [], "the plugin was refused"),
        (BackendUnavailableError("NVRTC was not found"), [], "NVRTC was not found"),
        (None, [["Error Code 4: the plugin has no implementation"]], "the plugin has no implementation"),
    ],
)
def test_a_refused_plugin_is_said_and_does_without(trt10, tiny, plugin, caplog, problem, failures, message):
    plugin["problem"], trt10.behaviour.failures = problem, failures
    header = build(tiny).header
    assert header.yololayer == "kernel"
    assert [tensor.name for tensor in header.outputs] == ["head0", "head1"]
    (warning,) = records(caplog)
    assert warning.startswith("YoloLayer will follow the engine rather than be a part of it: ")
    assert message in warning


def test_a_plugin_that_was_asked_for_and_is_refused_is_an_error(trt10, tiny, plugin):
    plugin["problem"] = NetworkError("yololayer: the plugin was refused: build with YoloLayer outside the engine")
    with pytest.raises(BuildError, match="the plugin was refused"):
        build(tiny, yololayer="plugin")


def test_a_plugin_that_cannot_be_is_an_error_only_if_it_was_asked_for(trt, tiny, caplog):
    caplog.set_level(logging.INFO, logger="yolotrt")
    assert build(tiny).header.yololayer == "kernel"
    reason = f"tensorrt {trt.__version__} takes no plugins from Python"
    assert f"YoloLayer follows the engine: {reason}" in records(caplog, logging.INFO)
    with pytest.raises(BackendUnavailableError, match=f"^{reason}: build with --yololayer kernel$"):
        build(tiny, yololayer="plugin")


def test_the_plugin_is_not_for_gpus_that_are_older_than_its_code(trt10, tiny, plugin, machine):
    machine.capability = (7, 5)
    assert build(tiny).header.yololayer == "kernel"
    with pytest.raises(BackendUnavailableError, match=r"compute capability 8\.0 and later \(NVIDIA Test, compute cap"):
        build(tiny, yololayer="plugin")


def test_a_lack_of_memory_is_not_tried_again_without_the_plugin(trt10, tiny, plugin):
    trt10.behaviour.failures = [["out of memory"]]
    with pytest.raises(BuildError, match="ran out of GPU memory"):
        build(tiny)
    assert len(trt10.behaviour.configs) == 1


# --- the timing cache ---


def caches(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "timing").glob("*"))


def loaded(trt: Any) -> list[bytes]:
    """What each build's cache began with."""
    return [config.cache.data for config in trt.behaviour.configs]


def test_a_build_leaves_its_measurements_for_the_next(trt, tiny, tmp_path, caplog):
    first = build(tiny)
    (path,) = caches(tmp_path)
    assert path.name.startswith(f"tensorrt-{trt.__version__}-NVIDIA_Test-9.0-fp16-")
    again = build(tiny)
    assert caches(tmp_path) == [path]
    assert loaded(trt) == [b"", b"measured"]
    assert first.plan == again.plan
    assert records(caplog) == []


def test_a_model_that_was_trained_again_takes_the_measurements(trt, tiny, tmp_path):
    build(tiny)
    trained = {name: array + 0.25 for name, array in tiny.tensors.items()}
    build(Weights(trained, replace(tiny.metadata, names=("horse", "cow"), source_sha256="a" * 64)))
    assert len(caches(tmp_path)) == 1
    assert loaded(trt) == [b"", b"measured"]


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp32"},
        {"precision": "tf32"},
        {"imgsz": (64, 48)},
        {"max_batch": 2},
        {"workspace_mib": 100},
        {"optimization_level": 2},
        {"hardware_compatible": True},
        {"version_compatible": True},
    ],
    ids=str,
)
def test_other_builds_have_other_files(trt10, tiny, tmp_path, options):
    build(tiny)
    build(tiny, **options)
    assert len(caches(tmp_path)) == 2
    assert loaded(trt10) == [b"", b""]


def test_another_network_gpu_or_version_has_another_file(trt10, tiny, tmp_path, machine, monkeypatch):
    build(tiny)
    build(all_weights(tiny_metadata(activation="ReLU")))
    build(all_weights(tiny_metadata(yaml={**tiny.metadata.yaml, "width_multiple": 1.0})))
    machine.name = "NVIDIA Other"
    build(tiny)
    install_tensorrt(monkeypatch, "10.14.1.48")
    build(tiny)
    assert len(caches(tmp_path)) == 5


def test_a_chosen_file_is_used(trt, tiny, tmp_path):
    chosen = tmp_path / "own" / "cache.timing"
    build(tiny, timing_cache=chosen)
    build(tiny, timing_cache=str(chosen))
    assert caches(tmp_path) == []
    assert loaded(trt) == [b"", b"measured"]


def test_there_need_not_be_a_cache(trt, tiny, tmp_path):
    build(tiny, use_timing_cache=False)
    assert caches(tmp_path) == []
    (config,) = trt.behaviour.configs
    assert config.cache is None


def test_a_file_of_another_kind_is_neither_read_nor_replaced(trt, tiny, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt is a file of another kind: choose another name"):
        build(tiny, timing_cache=notes)
    assert notes.read_text() == "mine"
    assert trt.behaviour.configs == []


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize("spoil", [damage, cut, lambda path: path.write_bytes(b"")], ids=["byte", "end", "empty"])
def test_a_damaged_cache_is_replaced_after_one_warning(trt, tiny, tmp_path, caplog, spoil):
    build(tiny)
    (path,) = caches(tmp_path)
    whole = path.read_bytes()
    spoil(path)
    build(tiny)
    assert loaded(trt) == [b"", b""]
    assert records(caplog) == [f"the timing cache {path} is damaged: building without it, then replacing it"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [{"imgsz": (64, 48)}, {"name": "NVIDIA Other"}, {"capability": (8, 9)}], ids=str)
def test_a_chosen_cache_of_another_build_is_replaced_after_one_warning(trt10, tiny, tmp_path, machine, caplog, change):
    chosen = tmp_path / "cache.timing"
    build(tiny, timing_cache=chosen)
    machine.name, machine.capability = change.get("name", machine.name), change.get("capability", machine.capability)
    build(tiny, timing_cache=chosen, imgsz=change.get("imgsz"))
    assert loaded(trt10) == [b"", b""]
    assert records(caplog) == [
        f"the timing cache {chosen} is of another network, GPU or TensorRT: building without it, then replacing it"
    ]


@pytest.mark.parametrize("refusal", ["create", "set"])
def test_a_cache_that_tensorrt_refuses_is_replaced_after_one_warning(trt, tiny, tmp_path, caplog, refusal):
    build(tiny)
    (path,) = caches(tmp_path)
    trt.behaviour.refuses_cache = refusal
    build(tiny)
    assert records(caplog) == [
        f"the timing cache {path} was refused by TensorRT: building without it, then replacing it"
    ]
    assert loaded(trt) == [b"", b""]


def test_a_cache_that_breaks_the_build_is_replaced_after_one_warning(trt, tiny, tmp_path, caplog):
    build(tiny)
    trt.behaviour.failures = [[MYELIN_REFUSAL, "Error Code 1: (out of memory)"]]
    build(tiny)
    assert loaded(trt) == [b"", b"measured", b""]
    (warning,) = records(caplog)
    assert "may have broken the build" in warning
    assert "Myelin error from unknown graph" in warning


def test_a_build_that_fails_anyway_keeps_the_cache(trt, tiny, tmp_path):
    build(tiny)
    (path,) = caches(tmp_path)
    before = path.read_bytes()
    trt.behaviour.failures = [["it broke"], ["it broke again"]]
    with pytest.raises(BuildError, match="it broke again"):
        build(tiny)
    assert path.read_bytes() == before


def test_a_cache_that_cannot_be_written_does_not_cost_the_engine(trt, tiny, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert build(tiny, timing_cache=tmp_path / "file" / "cache").plan
    (warning,) = records(caplog)
    assert warning.startswith("the timing cache is not kept: cannot write")


# --- failures ---


@pytest.mark.parametrize(
    ("errors", "options", "kind", "message"),
    [
        (
            ["Error Code 1: Cuda Runtime (out of memory)", "Error Code 2: Internal Error"],
            {},
            BuildError,
            "ran out of GPU memory (Error Code 1: Cuda Runtime (out of memory)): use a smaller --batch or --imgsz, "
            "limit it with --workspace, or end other programs on the GPU",
        ),
        (
            ["Requested amount of GPU memory (9 bytes) could not be allocated."],
            {"workspace_mib": 9000},
            BuildError,
            "use a lower --workspace than 9000",
        ),
        (
            ["(out of memory)", "Error Code 10: (Could not find any implementation for node model.0.conv.)"],
            {"workspace_mib": 4},
            BuildError,
            "found no kernel that fits into --workspace 4 (Error Code 10: (Could not find any implementation for node "
            "model.0.conv.)): raise --workspace or leave it out, or use a smaller --batch or --imgsz",
        ),
        (
            ["Could not find any implementation for node model.0.conv."],
            {},
            BuildError,
            "found no kernel that fits into the GPU's free memory",
        ),
        (
            ["Unable to load library: libnvinfer_lean.so.10"],
            {"version_compatible": True},
            BackendUnavailableError,
            "install libnvinfer_lean, or leave the option out",
        ),
        (
            ["it broke.\nBadly."],
            {},
            BuildError,
            "could not build the engine (it broke. Badly): run it again with --debug for its whole log",
        ),
    ],
)
def test_a_failed_build_is_one_clear_line(trt, tiny, tmp_path, errors, options, kind, message):
    trt.behaviour.failures = [errors]
    path = tmp_path / "a.engine"
    with pytest.raises(YolotrtError) as problem:
        build_engine(tiny, path, backend="tensorrt", options=BuildOptions(**options))
    assert isinstance(problem.value, kind)
    assert message in str(problem.value)
    assert str(problem.value).startswith(f"TensorRT {trt.__version__} ")
    assert "\n" not in str(problem.value)
    assert not path.exists()


def test_errors_that_the_library_survives_are_warned_of(trt, tiny, caplog):
    trt.behaviour.survived = ["a layer's name is taken", "and again"]
    build(tiny)
    assert records(caplog) == [
        f"TensorRT {trt.__version__} built the engine in spite of an error: a layer's name is taken "
        "(and 1 more: see --debug)"
    ]


def test_errors_of_an_earlier_build_are_forgotten(trt, tiny):
    trt.behaviour.failures = [["out of memory"], ["it broke"]]
    for message in ("out of memory", "it broke"):
        with pytest.raises(BuildError, match=message):
            build(tiny)


def test_a_missing_driver_is_one_clear_line(trt, tiny):
    trt.behaviour.no_cuda = True
    with pytest.raises(BackendUnavailableError) as problem:
        build(tiny)
    assert str(problem.value) == (
        f"no NVIDIA GPU is usable here (TensorRT {trt.__version__}: CUDA initialization failure with error: 35. "
        "Please check your CUDA installation): use --backend onnxruntime"
    )


def test_a_missing_gpu_is_one_clear_line(trt, tiny, monkeypatch):
    install_no_gpu(monkeypatch, "libcuda.so.1 is not there")
    with pytest.raises(BackendUnavailableError) as problem:
        build(tiny)
    assert str(problem.value) == ("no NVIDIA GPU is usable here (libcuda.so.1 is not there): use --backend onnxruntime")


def test_a_missing_library_is_one_clear_line(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=r'^TensorRT is not installed \(.*\): run pip install "yolotrtx'):
        build(tiny)


def test_a_library_without_its_shared_object_is_one_clear_line(tiny, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('Could not find: libnvinfer.so.8')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(
        BackendUnavailableError, match=r"^TensorRT is not installed \(Could not find: libnvinfer\.so\.8"
    ):
        build(tiny)


@pytest.mark.parametrize(
    ("version", "capability", "behaviour", "options", "message"),
    [
        ("10.13.0.35", (7, 0), {}, {}, r"^TensorRT 10\.13\.0\.35 needs compute capability 7\.5 \(NVIDIA Test, compute"),
        ("11.4.0.106", (6, 1), {}, {}, r"^TensorRT 11\.4\.0\.106 needs compute capability 7\.5"),
        (
            "8.6.0",
            (6, 1),
            {"fast_fp16": False},
            {},
            r"^this GPU has no fast fp16 \(.* 6\.1\): build with --precision fp32",
        ),
        (
            "8.6.0",
            (7, 5),
            {"tf32": False},
            {"precision": "tf32"},
            r"^this GPU has no TF32 \(.*\): build with --precision",
        ),
        ("11.4.0.106", (7, 5), {}, {"precision": "tf32"}, r"^this GPU has no TF32"),
        (
            "8.6.0",
            (7, 5),
            {},
            {"hardware_compatible": True},
            r"^--hardware-compatible needs compute capability 8\.0 \(",
        ),
    ],
)
def test_what_the_gpu_cannot_is_refused_before_the_build(
    tiny, monkeypatch, machine, version, capability, behaviour, options, message
):
    trt = install_tensorrt(monkeypatch, version, **behaviour)
    machine.capability = capability
    with pytest.raises(BackendUnavailableError, match=message):
        build(tiny, **options)
    assert trt.behaviour.configs == []


@pytest.mark.parametrize(("capability", "options"), [((7, 0), {}), ((6, 1), {"precision": "fp32"})])
def test_tensorrt_8_serves_older_gpus(trt8, tiny, machine, capability, options):
    machine.capability = capability
    assert build(tiny, **options).plan


def test_a_gpu_without_free_memory_is_refused(trt, tiny, machine):
    machine.free, machine.total = GIB // 4, 8 * GIB
    with pytest.raises(
        BuildError, match=r"^NVIDIA Test has 256 of 8192 MiB free, a build needs at least 512: end other"
    ):
        build(tiny)


def test_an_option_that_the_version_lacks_is_named(tiny, monkeypatch):
    trt = install_tensorrt(monkeypatch, "10.13.0.35")
    del trt.HardwareCompatibilityLevel
    with pytest.raises(
        BackendUnavailableError, match=r"^TensorRT 10\.13\.0\.35 has no --hardware-compatible: leave it"
    ):
        build(tiny, hardware_compatible=True)


def test_mistakes_in_the_model_are_not_tried_again(trt10, tiny, plugin):
    with pytest.raises(GraphError, match="must be multiples of 8"):
        build(tiny, imgsz=(33, 48))
    assert plugin["added"] == []


# --- Ctrl-C ---


def test_ctrl_c_cancels_the_build(trt10, tiny, tmp_path):
    trt10.behaviour.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny, tmp_path / "a.engine", backend="tensorrt")
    assert trt10.behaviour.cancelled == 1
    assert not list(tmp_path.rglob("*"))


def test_ctrl_c_is_not_lost_where_a_build_cannot_be_cancelled(trt8, tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="yolotrt")
    trt8.behaviour.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny, tmp_path / "a.engine", backend="tensorrt")
    assert not list(tmp_path.rglob("*"))
    messages = records(caplog, logging.INFO)
    assert "TensorRT 8.6.0 builds, which takes minutes; it cannot show how far it is" in messages
    assert "this TensorRT cannot be interrupted while it builds: press Ctrl-C again to end the process" in messages


# --- choosing it ---


def chosen(caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """The backend that ``auto`` takes, and why."""
    caplog.set_level(logging.INFO, logger="yolotrt")
    caplog.clear()
    name = find_backend("auto").name
    (message,) = records(caplog, logging.INFO)
    start = f"choosing the backend {name}: "
    assert message.startswith(start)
    return name, message.removeprefix(start)


def test_auto_takes_tensorrt_where_there_is_a_gpu(trt, caplog):
    assert chosen(caplog) == ("tensorrt", "NVIDIA Test, compute capability 9.0")


def test_auto_takes_rtx_where_tensorrt_is_missing_and_the_gpu_is_one_of_its(monkeypatch, machine, caplog):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    machine.capability = (8, 9)
    assert chosen(caplog) == ("tensorrt-rtx", "NVIDIA Test, compute capability 8.9")
    machine.capability = (9, 0)
    reason = "TensorRT-RTX does not run on this GPU (NVIDIA Test, compute capability 9.0)"
    assert chosen(caplog) == ("onnxruntime", reason)


def test_auto_takes_onnxruntime_without_a_gpu(trt, monkeypatch, caplog):
    install_no_gpu(monkeypatch, "no driver")
    reason = "no NVIDIA GPU is usable here (no driver)"
    assert chosen(caplog) == ("onnxruntime", reason)


def test_auto_does_not_look_for_a_gpu_without_a_library_for_it(monkeypatch, caplog):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("yolotrt.engines.build.find_gpu", lambda: pytest.fail("looked for a GPU"))
    assert chosen(caplog) == ("onnxruntime", "neither TensorRT nor TensorRT-RTX is installed")


# --- options of other backends ---


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"timing_cache": "a.timing"}, "--timing-cache"),
        ({"hardware_compatible": True}, "--hardware-compatible"),
        ({"version_compatible": True}, "--version-compatible"),
    ],
)
def test_options_without_effect_are_refused(tiny, backend, options, name):
    with pytest.raises(InputError, match=f"^{backend} has no {name}: leave it out, or choose another --backend$"):
        build_engine(tiny, backend=backend, options=BuildOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "tf32"}, "^onnxruntime does not build tf32: choose one of fp32, fp16, int8$"),
        ({"optimization_level": 0}, "^onnxruntime has no --optimization-level"),
        ({"workspace_mib": 64}, "^onnxruntime has no --workspace"),
        ({"yololayer": "kernel"}, "^onnxruntime has no --yololayer"),
    ],
)
def test_options_for_gpus_are_refused_on_a_cpu(tiny, options, message):
    with pytest.raises(InputError, match=message):
        build_engine(tiny, backend="onnxruntime", options=BuildOptions(**options))


def test_rtx_takes_no_plugin(tiny):
    with pytest.raises(BackendUnavailableError, match=r"^TensorRT-RTX takes no plugins: build with --yololayer"):
        build_engine(tiny, backend="tensorrt-rtx", options=BuildOptions(yololayer="plugin"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimization_level": 6}, "optimization level 6: choose 0"),
        ({"optimization_level": -1}, "optimization level -1: choose 0"),
        ({"optimization_level": True}, "optimization level True: choose 0"),
        ({"timing_cache": "a", "use_timing_cache": False}, "timing cache a is named and turned off: leave out one"),
        ({"yololayer": "host"}, "YoloLayer 'host' is not known: choose one of auto, plugin, kernel"),
    ],
)
def test_options_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**values)
