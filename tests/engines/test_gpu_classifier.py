"""GpuClassifier on a GPU that is none: its probabilities are those of the CPU's session."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest

from tests.engines.host_gpu import FakeTensorRt, HostGpuError, gpu_engine
from tests.reference import all_weights
from yolotrt import BuildOptions, build_engine
from yolotrt.engines import build as engines_build
from yolotrt.engines import tensorrt
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_classifier import GpuClassifier
from yolotrt.errors import InferenceError, InputError
from yolotrt.postprocess import NmsOptions


def frame(seed: int) -> np.ndarray:
    """Noise of a size of its own."""
    return np.random.default_rng(seed).integers(0, 256, (40 + 7 * seed, 60, 3), np.uint8)


def expected(engine: EngineFile, frames: Sequence[np.ndarray]) -> np.ndarray:
    """The CPU's probabilities."""
    with open_session(engine, threads=1) as session:
        return np.concatenate([session.classify([pixels]) for pixels in frames])


@pytest.mark.parametrize("version", ["8.6.0", "11.4.0.106"])
@pytest.mark.parametrize(
    ("types_", "tolerance"),
    [({}, 1e-6), ({"half_input": True, "half_heads": True}, 2e-3)],  # an fp16 score near 1 is right to 5e-4
    ids=["fp32", "fp16"],
)
def test_probabilities_are_those_of_the_cpu(tiny_classifier_engine, device, version, types_, tolerance):
    frames = [frame(seed) for seed in range(5)]
    wanted = expected(tiny_classifier_engine, frames)
    assert np.abs(np.diff(wanted, axis=0)).max() > 10 * tolerance  # pictures differ
    trt = FakeTensorRt(device, version)
    engine = gpu_engine(tiny_classifier_engine, version=version, **types_)
    with GpuClassifier.open(trt, engine, device) as session:
        for start, end in ((0, 1), (1, 3), (3, 5), (4, 5), (0, 2)):
            found = session.classify(frames[start:end])
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted[start:end], atol=tolerance)
        assert session.timing.pictures == 8
    assert not trt.violations


def test_a_static_batch_is_filled_up(tiny_classifier_engine, trt, device):
    weights = all_weights(tiny_classifier_engine.header.model)
    engine = build_engine(weights, backend="onnxruntime", options=BuildOptions(min_batch=3, max_batch=3))
    wanted = expected(engine, [frame(seed) for seed in range(3)])
    with GpuClassifier.open(trt, gpu_engine(engine), device) as session:
        for chosen in ([0, 1, 2], [2], [1, 0]):
            np.testing.assert_allclose(session.classify([frame(i) for i in chosen]), wanted[chosen], atol=1e-6)
    assert set(trt.executed_batches) == {3}


def test_each_batch_size_is_captured_once_and_kernels_do_everything(tiny_classifier_engine, trt, device):
    frames = [frame(seed) for seed in range(4)]
    wanted = expected(tiny_classifier_engine, frames)
    device.failing["upload"] = device.failing["download"] = HostGpuError("a copy command")
    with GpuClassifier.open(trt, gpu_engine(tiny_classifier_engine), device) as session:
        for seed in range(4):
            np.testing.assert_allclose(session.classify(frames[seed : seed + 1]), wanted[seed : seed + 1], atol=1e-6)
        assert (device.calls["capture"], device.calls["graph"]) == (1, 3)
        for _ in range(2):
            np.testing.assert_allclose(session.classify(frames[:2]), wanted[:2], atol=1e-6)
        assert (device.calls["capture"], device.calls["graph"]) == (2, 4)


def test_a_warm_session_has_the_graphs_of_its_smallest_and_largest_batch(tiny_classifier_engine, trt, device):
    low, _, high = tiny_classifier_engine.header.batch_range
    assert low < high
    with GpuClassifier.open(trt, gpu_engine(tiny_classifier_engine), device) as session:
        session.warm_up(NmsOptions())
        assert session.timing.pictures == 0
        for count in (low, high):
            session.classify([frame(0)] * count)
        assert device.calls["capture"] == 2


def test_results_are_the_callers(tiny_classifier_engine, trt, device):
    images = np.random.default_rng(0).random((2, 1, 3, 32, 32), np.float32)
    with GpuClassifier.open(trt, gpu_engine(tiny_classifier_engine), device) as session:
        (first,) = session.run(images[0])
        kept = first.copy()
        session.run(images[1])
        np.testing.assert_array_equal(first, kept)


def test_what_it_cannot_do_is_one_line(tiny_classifier_engine, trt, device):
    on_device = type("OnDevice", (), {"__cuda_array_interface__": {}})()
    with GpuClassifier.open(trt, gpu_engine(tiny_classifier_engine), device) as session:
        for call, message in (
            (lambda: session.submit([frame(0)], NmsOptions()), "a classifier's, which finds no boxes: classify the"),
            (lambda: session.classify([]), "the engine takes 1 to 2 pictures a batch, not 0"),
            (lambda: session.classify([frame(0)] * 3), "the engine takes 1 to 2 pictures a batch, not 3"),
            (lambda: session.classify([on_device]), "lies in device memory, .*: pass NumPy arrays"),
            (lambda: session.run(np.zeros((1, 3, 8, 8), np.float32)), "letterbox the pictures to the engine's size"),
        ):
            with pytest.raises(InputError, match=message):
                call()
    session.close()
    with pytest.raises(InputError, match="the session is closed: open a new one"):
        session.classify([frame(0)])


@pytest.mark.parametrize("method", ["launch", "record", "wait"])
def test_a_failing_gpu_is_one_line_and_leaves_no_memory(tiny_classifier_engine, trt, device, method):
    wanted = expected(tiny_classifier_engine, [frame(0)])
    with GpuClassifier.open(trt, gpu_engine(tiny_classifier_engine), device) as session:
        device.failing[method] = HostGpuError("CUDA_ERROR_LAUNCH_FAILED")
        with pytest.raises(InferenceError, match=r"the GPU failed \(CUDA_ERROR_LAUNCH_FAILED\): start the program"):
            session.classify([frame(1)])
        del device.failing[method]
        np.testing.assert_allclose(session.classify([frame(0)]), wanted, atol=1e-6)
    gc.collect()
    assert not device.device_memory
    assert not device.page_locked_memory
    assert device.freed_elsewhere == 0
    assert not trt.violations


def test_an_engine_file_of_each_task_gets_its_session(
    tiny_engine, tiny_segment_engine, tiny_classifier_engine, trt, device, monkeypatch
):
    monkeypatch.setattr(tensorrt, "tensorrt_module", lambda: trt)
    monkeypatch.setattr("yolotrt.engines.gpu_engine.find_device", lambda: device)
    kinds = []
    for engine in (tiny_engine, tiny_segment_engine, tiny_classifier_engine):
        with engines_build.open_session(gpu_engine(engine)) as session:
            kinds.append(type(session).__name__)
    assert kinds == ["GpuSession", "GpuSession", "GpuClassifier"]
