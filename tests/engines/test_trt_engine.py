"""A plan that does not fit this machine is one clear line, before TensorRT says it less clearly."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.engines.host_gpu import FakeTensorRt, gpu_engine
from yolotrt.engines.file import TensorInfo
from yolotrt.engines.trt_engine import TrtEngine, require_fitting_machine, shared_engine
from yolotrt.engines.trt_log import shared_logger
from yolotrt.errors import EngineFileError, InferenceError


@pytest.mark.parametrize(
    ("header", "here", "message"),
    [
        (
            {"backend_version": "10.9.0.34"},
            "10.13.0.35",
            "engine (in memory) was built with tensorrt 10.9.0.34, and 10.13.0.35 is installed, which cannot run it: "
            "build it again with python -m yolotrt -s, or install tensorrt 10.9.0.34",
        ),
        ({"backend_version": "8.6.1"}, "8.6.0", "was built with tensorrt 8.6.1, and 8.6.0 is installed"),
        ({"backend_version": "11.4.0.106"}, "8.6.0", "was built with tensorrt 11.4.0.106, and 8.6.0 is installed"),
        ({"backend_version": ""}, "8.6.0", "and 8.6.0 is installed"),
        (
            {"backend_version": "10.13.0.35", "build_options": {"version_compatible": True}},
            "10.9.0.34",
            "was built with tensorrt 10.13.0.35, and 10.9.0.34 is installed: version-compatible engines run with the "
            "same or a later version, so build it again with python -m yolotrt -s, or install tensorrt 10.13.0.35 or "
            "later",
        ),
        (
            {"compute_capability": "8.6", "device_name": "RTX 3090"},
            "10.13.0.35",
            "engine (in memory) was built for a GPU of compute capability 8.6 (RTX 3090), and this Host GPU has 9.0: "
            "build it here with python -m yolotrt -s",
        ),
    ],
)
def test_a_plan_for_another_machine_is_refused(tiny_engine, device, header, here, message):
    with pytest.raises(EngineFileError) as caught:
        require_fitting_machine(gpu_engine(tiny_engine, **header), FakeTensorRt(device, here), device)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "header"),
    [
        ((9, 0), {}),
        ((9, 0), {"backend_version": "10.13.0"}),  # TensorRT gives three numbers in some places and four in others
        ((9, 0), {"compute_capability": "", "device_name": ""}),  # built without a GPU
        ((9, 0), {"backend_version": "10.9.0.34", "build_options": {"version_compatible": True}}),
        ((9, 0), {"backend_version": "8.6.1", "build_options": {"version_compatible": True}}),  # of an older major
        ((8, 9), {"compute_capability": "8.0", "build_options": {"hardware_compatible": True}}),
        ((8, 0), {"compute_capability": "9.0", "build_options": {"hardware_compatible": True}}),
    ],
)
def test_a_plan_that_fits_is_accepted_in_silence(tiny_engine, device, trt, caplog, capability, header):
    device.capability = capability
    require_fitting_machine(gpu_engine(tiny_engine, **header), trt, device)
    assert not caplog.messages


@pytest.mark.parametrize("here", [(7, 5), (6, 1)])
def test_hardware_compatible_plans_need_an_ampere(tiny_engine, device, trt, here):
    device.capability = here
    engine = gpu_engine(tiny_engine, compute_capability="8.6", build_options={"hardware_compatible": True})
    with pytest.raises(EngineFileError, match=r"compute capability 8.6 .* has \d\.\d: build it here"):
        require_fitting_machine(engine, trt, device)


def test_another_gpu_of_the_same_kind_is_a_warning(tiny_engine, device, trt, caplog):
    require_fitting_machine(gpu_engine(tiny_engine, device_name="H200"), trt, device)
    assert caplog.messages == [
        "engine (in memory) was built on a H200 and runs on a Host GPU: build it here to be as fast as can be"
    ]


@pytest.mark.parametrize(
    ("refused", "reason"),
    [("Serialization assertion magicTag failed", "Serialization assertion magicTag failed"), (" ", "no reason given")],
)
def test_a_plan_that_tensorrt_refuses_is_one_line(tiny_engine, device, trt, refused, reason):
    shared_logger(trt).log(trt.ILogger.Severity.ERROR, "of an earlier build")
    trt.refused = refused
    with pytest.raises(EngineFileError) as caught:
        TrtEngine(trt, gpu_engine(tiny_engine), device)
    assert str(caught.value) == (
        f"engine (in memory) was refused by TensorRT ({reason}): build it again with python -m yolotrt -s"
    )


@pytest.mark.parametrize("compatible", [False, True])
def test_a_version_compatible_plan_may_bring_its_runtime_along(tiny_engine, device, trt, compatible):
    engine = gpu_engine(tiny_engine, build_options={"version_compatible": compatible})
    loaded = TrtEngine(trt, engine, device)
    assert loaded._runtime.engine_host_code_allowed == compatible


OTHER_TENSORS = [
    lambda header: {"inputs": (replace(header.inputs[0], dtype="float16"),)},
    lambda header: {"inputs": (replace(header.inputs[0], name="pixels"),)},
    lambda header: {"inputs": (replace(header.inputs[0], shape=(2, 3, 64, 64)),)},
    lambda header: {"outputs": header.outputs[:2]},
    lambda header: {"outputs": (*header.outputs, TensorInfo("head3", "float32", (1, 24, 1, 1)))},
    lambda header: {"outputs": (*header.outputs[:2], replace(header.outputs[2], shape=(1, 24, 2, 3)))},
]


@pytest.mark.parametrize("other", OTHER_TENSORS, ids=range(len(OTHER_TENSORS)))
@pytest.mark.parametrize("version", ["8.6.0", "10.13.0.35"])
def test_a_header_of_other_tensors_is_refused_before_memory_is_taken(tiny_engine, device, version, other):
    engine = gpu_engine(tiny_engine, version=version)
    engine = replace(engine, header=replace(engine.header, **other(engine.header)))
    with pytest.raises(EngineFileError) as caught:
        TrtEngine(FakeTensorRt(device, version), engine, device)
    assert str(caught.value) == (
        "engine (in memory) has other inputs and outputs than its header says: build it again with python -m yolotrt -s"
    )
    assert not device.device_memory


@pytest.mark.parametrize("version", ["8.6.0", "10.13.0.35", "11.4.0.106"])
def test_scratch_memory_is_the_callers(tiny_engine, device, version):
    engine = TrtEngine(FakeTensorRt(device, version), gpu_engine(tiny_engine, version=version), device)
    with device.current():
        scratch = device.allocate(engine.scratch_bytes)
    context = engine.context(1, scratch)
    assert context._scratch == (scratch.address, engine.scratch_bytes)


def test_contexts_of_rtx_have_their_own_kernels_from_the_first_run_on(tiny_dynamic_engine, device):
    trt = FakeTensorRt(device, "1.7.1.116", is_rtx=True)
    header = {"backend": "tensorrt-rtx", "version": "1.7.1.116"}
    engine = TrtEngine(trt, gpu_engine(tiny_dynamic_engine, **header), device)
    with device.current():
        scratch = device.allocate(engine.scratch_bytes)
    assert engine.context(2, scratch)._scratch == (scratch.address, engine.scratch_bytes)


def test_a_batch_that_tensorrt_refuses_is_one_line(tiny_dynamic_engine, device, trt):
    engine = TrtEngine(trt, gpu_engine(tiny_dynamic_engine), device)
    with device.current():
        scratch = device.allocate(engine.scratch_bytes)
    with pytest.raises(InferenceError, match=r"TensorRT refused a batch of 5 \(no reason given\): build it again"):
        engine.context(5, scratch)


def test_no_execution_context_is_one_line(tiny_engine, device, trt):
    engine = TrtEngine(trt, gpu_engine(tiny_engine), device)
    engine._engine.create_execution_context = lambda _: None
    with device.current():
        scratch = device.allocate(engine.scratch_bytes)
    with pytest.raises(InferenceError, match=r"TensorRT gave no execution context \(no reason given\): free GPU"):
        engine.context(1, scratch)


@pytest.mark.parametrize("missing", ["device_memory_size_v2", "create_execution_context"])
def test_an_unknown_tensorrt_is_one_line(tiny_engine, device, missing):
    trt = FakeTensorRt(device)
    if missing == "create_execution_context":
        del trt.ExecutionContextAllocationStrategy
    else:
        trt.has_scratch_size = False
    with pytest.raises(InferenceError, match=r"(?i)tensorrt 10.13.0.35 is not known: update yolotrt"):
        engine = TrtEngine(trt, gpu_engine(tiny_engine), device)
        with device.current():
            engine.context(1, device.allocate(engine.scratch_bytes))


def test_a_plan_is_deserialized_once_as_long_as_somebody_holds_it(tiny_engine, tiny_dynamic_engine, device, trt):
    engine = gpu_engine(tiny_engine)
    one = shared_engine(trt, engine, device)
    assert shared_engine(trt, engine, device) is one
    assert shared_engine(trt, gpu_engine(tiny_dynamic_engine), device) is not one
    del one
    gc.collect()
    shared_engine(trt, engine, device)
    assert trt.deserialized == 3


def test_what_tensorrt_says_goes_to_logging(tiny_engine, device, trt, caplog):
    caplog.set_level(logging.WARNING)
    loaded = TrtEngine(trt, gpu_engine(tiny_engine), device)
    loaded._logger.log(trt.ILogger.Severity.WARNING, "lazy loading is off ")
    loaded._logger.log(trt.ILogger.Severity.INFO, "loaded")
    assert caplog.messages == ["tensorrt: lazy loading is off"]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ('{"Layers": [{"Name": "a", "LayerType": "Conv"}]}', [{"Name": "a", "LayerType": "Conv"}]),
        ('{"Layers": ["a", "b"]}', [{"Name": "a"}, {"Name": "b"}]),  # built without details
        ('{"Layers": [{"Name": "a\x1eb"}]}', [{"Name": "a\x1eb"}]),
    ],
)
def test_layers_are_the_inspectors(text, layers):
    engine = object.__new__(TrtEngine)
    engine.trt = SimpleNamespace(LayerInformationFormat=SimpleNamespace(JSON="json"))
    inspector = SimpleNamespace(get_engine_information=lambda form: text if form == "json" else "")
    engine._engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    assert engine.layers() == layers
