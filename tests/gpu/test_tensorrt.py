"""Engines of TensorRT on a GPU: right values, right boxes, whatever way a frame takes.

Building takes minutes; with the environment variable YOLOTRT_TEST_ENGINES the engines are kept in that folder.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.kernels.comparisons import crops_error
from tests.official_masks import iou, letterboxed, official_masks
from tests.reference import all_weights
from yolotrt import BuildOptions, Detector, build_engine
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.errors import BuildError, EngineFileError, InferenceError
from yolotrt.postprocess import NmsOptions

pytestmark = pytest.mark.gpu
pytest.importorskip("tensorrt", reason="TensorRT is not installed")

from yolotrt.cuda.device import DEVICES, find_device  # noqa: E402
from yolotrt.engines.gpu_session import GpuSession  # noqa: E402

FP32 = BuildOptions(precision="fp32", optimization_level=1)
ENGINES = {"yolov5n-fp32": FP32, "yolov5n-fp16-dynamic": replace(FP32, precision="fp16", max_batch=8)}
MASK_ENGINES = {
    "derived_seg_nc80-fp32": FP32,
    "derived_seg_nc80-fp16-dynamic": replace(FP32, precision="fp16", max_batch=2),
}


@pytest.fixture(scope="session")
def engine(golden, tmp_path_factory) -> Callable[[str], EngineFile]:
    """Engines of the reference checkpoints by name, built at first use."""
    folder = Path(os.environ.get("YOLOTRT_TEST_ENGINES") or tmp_path_factory.mktemp("engines"))

    def find(name: str) -> EngineFile:
        path = folder / f"{name}.engine"
        if not path.exists():
            weights, options = name.partition("-")[0], {**ENGINES, **MASK_ENGINES}[name]
            build_engine(golden / "weights" / f"{weights}.pt", path, backend="tensorrt", options=options)
        return EngineFile.load(path)

    return find


@pytest.fixture(scope="session")
def pictures(golden) -> dict[str, np.ndarray]:
    return {name: cv2.imread(str(golden / "images" / f"{name}.jpg")) for name in ("bus", "zidane")}


def boxes_of(detections) -> np.ndarray:
    return np.column_stack([detections.xyxy, detections.confidence, detections.class_id])


def test_fp32_heads_are_those_of_the_official_code(engine, golden):
    expected = np.load(golden / "expected" / "yolov5n_raw.npz")
    images = np.random.RandomState(0).rand(1, 3, 640, 640).astype(np.float32)
    with open_session(engine("yolov5n-fp32")) as session:
        heads = session.run(images)
        errors = [float(np.abs(head - expected[f"640x640_head{level}"]).max()) for level, head in enumerate(heads)]
    print("largest errors of the raw heads:", errors)
    assert max(errors) <= 1e-3  # fp32 sums in another order; TF32 would give some 1e-2


@pytest.mark.parametrize("name", ["bus", "zidane"])
@pytest.mark.parametrize("engine_name", ENGINES)
def test_detections_are_those_of_the_official_code(engine, golden, pictures, engine_name, name):
    expected = np.load(golden / "expected" / "yolov5n_det.npz")
    with Detector(engine(engine_name)) as detector:
        found = detector(pictures[name])
    assert found.class_id.tolist() == expected[f"{name}_square_cls"].tolist()
    corners = float(np.abs(found.xyxy - expected[f"{name}_square_xyxy"]).max())
    confidences = float(np.abs(found.confidence - expected[f"{name}_square_conf"]).max())
    print(f"{engine_name}, {name}: corners within {corners:.3f} px, confidences within {confidences:.5f}")
    assert corners <= 2 and confidences <= 0.02


@pytest.mark.parametrize("name", ["bus", "zidane"])
@pytest.mark.parametrize("engine_name", MASK_ENGINES)
def test_masks_are_those_of_the_official_code(engine, golden, engine_name, name):
    class_ids, masks = official_masks(golden, name)
    with Detector(engine(engine_name)) as detector:
        for _ in range(3):  # enqueued, captured, replayed
            found = detector(letterboxed(golden, name))
            assert found.class_id.tolist() == class_ids
            overlaps = [iou(mask, official) for mask, official in zip(found.mask, masks, strict=True)]
            assert min(overlaps) >= 0.98
    print(f"{engine_name}, {name}: overlaps of the masks from {min(overlaps):.4f}")


def test_masks_of_batches_and_of_the_host_are_the_same(engine, pictures):
    frames = list(pictures.values())
    with open_session(engine("derived_seg_nc80-fp16-dynamic")) as session:
        for options in (NmsOptions(), NmsOptions(max_detections=2), NmsOptions(0.1, 0.6)):
            pending = [session.submit(frames, options) for _ in range(4)]
            for boxes, on_cpu in zip(pending[0].result(), session._detect_on_host(frames, options), strict=True):
                assert boxes.class_id.tolist() == on_cpu.class_id.tolist()
                # the same heads and prototypes, so that exponentials and the order of sums are all that differs
                assert crops_error(boxes.masks, on_cpu.masks) <= 1e-4
            for other in pending[1:]:
                for one, again in zip(pending[0].result(), other.result(), strict=True):
                    assert crops_error(one.masks, again.masks) == 0


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="there is no ONNX Runtime to compare with")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp16", 5e-3)])
def test_a_classifier_gives_the_probabilities_of_the_cpu(tiny_classifier_engine, pictures, precision, tolerance):
    weights = all_weights(tiny_classifier_engine.header.model)
    options = BuildOptions(precision=precision, max_batch=2, optimization_level=1)
    built = build_engine(weights, backend="tensorrt", options=options)
    frames = list(pictures.values())
    with Detector(built) as on_gpu, Detector(tiny_classifier_engine) as on_cpu:
        for batch in (frames, frames[:1], frames, frames[1:]):
            for one, other in zip(on_gpu(batch), on_cpu(batch), strict=True):
                np.testing.assert_allclose(one.probabilities, other.probabilities, atol=tolerance)


def test_batches_of_one_dynamic_engine_agree(engine, pictures):
    frames = [pictures["bus"], pictures["zidane"]] * 4
    with Detector(engine("yolov5n-fp16-dynamic")) as detector:
        alone = [boxes_of(detector(frame)) for frame in frames]
        for size in (2, 4, 8, 3):
            together = [boxes_of(found) for found in detector.submit(frames[:size]).result()]
            for one, other in zip(alone, together, strict=False):
                assert one[:, 5].tolist() == other[:, 5].tolist()
                # other batch sizes may take other kernels, which round otherwise
                np.testing.assert_allclose(one[:, :4], other[:, :4], atol=1.0)
                np.testing.assert_allclose(one[:, 4], other[:, 4], atol=0.01)


def ways_of(session: GpuSession, frame: np.ndarray) -> dict[str, object]:
    borrowed = session.frame_buffer(*frame.shape[:2])
    borrowed[:] = frame
    wide = np.zeros((frame.shape[0], frame.shape[1] + 7, 3), np.uint8)
    wide[:, 3:-4] = frame
    ways: dict[str, object] = {"ordinary": frame, "borrowed": borrowed, "view": wide[:, 3:-4]}
    if session._device.library == "cupy":
        import cupy

        ways["cupy"] = cupy.asarray(frame)
        ways["cupy view"] = cupy.asarray(wide)[:, 3:-4]
        ways["dlpack"] = type(
            "Dlpack", (), {"__dlpack__": ways["cupy"].__dlpack__, "__dlpack_device__": ways["cupy"].__dlpack_device__}
        )()
    return ways


@pytest.mark.parametrize("library", DEVICES)
def test_every_way_of_a_frame_gives_the_same_boxes(engine, pictures, library):
    pytest.importorskip(library)
    import tensorrt

    device = find_device(library=library)
    with GpuSession.open(tensorrt, engine("yolov5n-fp16-dynamic"), device) as session:
        (expected,) = session.detect([pictures["bus"]], NmsOptions())
        assert len(expected) == 4
        for name, frame in ways_of(session, pictures["bus"]).items():
            for _ in range(3):  # enqueued, captured, replayed
                (found,) = session.detect([frame], NmsOptions())
                assert np.array_equal(found.xyxy, expected.xyxy), name
                assert np.array_equal(found.confidence, expected.confidence), name


def test_device_libraries_agree(engine, pictures):
    import tensorrt

    results = []
    for library in DEVICES:
        pytest.importorskip(library)
        device = find_device(library=library)
        with GpuSession.open(tensorrt, engine("yolov5n-fp16-dynamic"), device) as session:
            results.append(session.detect([pictures["zidane"]], NmsOptions())[0])
    assert np.array_equal(results[0].xyxy, results[1].xyxy)


def test_submitting_gives_every_batch_its_own_boxes(engine, pictures):
    frames = [pictures["bus"], pictures["zidane"], pictures["bus"][:, ::-1].copy()]
    with open_session(engine("yolov5n-fp16-dynamic")) as session:
        expected = [session.detect([frame], NmsOptions())[0] for frame in frames]
        order = np.random.default_rng(0).integers(0, 3, 60)
        pending = [session.submit([frames[index]], NmsOptions()) for index in order]
        for found in reversed(pending):
            found.result()
        for index, found in zip(order, pending, strict=True):
            assert np.array_equal(found.result()[0].xyxy, expected[index].xyxy)


def test_the_gpu_suppresses_as_the_cpu_does(engine, pictures):
    with open_session(engine("yolov5n-fp16-dynamic")) as session:
        for options in (
            NmsOptions(),
            NmsOptions(0.01, 0.6),
            NmsOptions(0.1, 0.3, 5, (0, 5)),
            NmsOptions(agnostic=True),
        ):
            (on_gpu,) = session.detect([pictures["bus"]], options)
            (on_cpu,) = session._detect_on_host([pictures["bus"]], options)
            assert on_gpu.class_id.tolist() == on_cpu.class_id.tolist()
            np.testing.assert_allclose(on_gpu.xyxy, on_cpu.xyxy, atol=1e-3)
            np.testing.assert_allclose(on_gpu.confidence, on_cpu.confidence, atol=1e-6)


def test_threads_with_a_session_each_share_the_engine(engine, pictures):
    file = engine("yolov5n-fp16-dynamic")
    with open_session(file) as session:
        (expected,) = session.detect([pictures["bus"]], NmsOptions())
    wrong: list[str] = []

    def work() -> None:
        with open_session(file) as session:
            for _ in range(200):
                (found,) = session.detect([pictures["bus"]], NmsOptions())
                if not np.array_equal(found.xyxy, expected.xyxy):
                    wrong.append("boxes differ")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_other_gpus_and_versions_are_refused_in_one_line(engine):
    file = engine("yolov5n-fp32")
    for changes, message in (
        ({"compute_capability": "7.5", "device_name": "Tesla T4"}, "was built for a GPU of compute capability 7.5"),
        ({"backend_version": "9.9.9"}, "was built with tensorrt 9.9.9"),
    ):
        with pytest.raises(EngineFileError, match=message) as caught:
            open_session(replace(file, header=replace(file.header, **changes)))
        assert "\n" not in str(caught.value)


def test_a_corrupted_plan_is_refused_in_one_line(engine):
    file = engine("yolov5n-fp32")
    for plan in (file.plan[: len(file.plan) // 2], b"ftrt" + bytes(5000), b""):
        changed = replace(file, plan=plan, header=replace(file.header, plan_sha256=str(len(plan))))
        with pytest.raises(EngineFileError, match=r"refused by TensorRT .*: build it again") as caught:
            open_session(changed)
        assert "\n" not in str(caught.value)


def test_too_large_a_batch_of_frames_is_one_clear_line(engine, pictures):
    with Detector(engine("yolov5n-fp32")) as detector, pytest.raises(Exception, match="takes 1 to 1 pictures"):
        detector.submit([pictures["bus"]] * 2)


@contextlib.contextmanager
def memory_taken_but_for(size: int) -> Iterator[None]:
    """The GPU has so many bytes left, and CuPy's pool none: what it kept of earlier sessions would serve new ones."""
    import cupy

    pool = cupy.get_default_memory_pool()
    gc.collect()
    pool.free_all_blocks()
    hog = cupy.cuda.alloc(cupy.cuda.runtime.memGetInfo()[0] - size)
    try:
        yield
    finally:
        del hog
        pool.free_all_blocks()


def test_memory_that_does_not_suffice_is_one_clear_line(engine):
    file = engine("yolov5n-fp16-dynamic")
    with memory_taken_but_for(40 << 20):  # its tensors alone are 54 MB
        with pytest.raises((InferenceError, EngineFileError)) as caught:
            open_session(file)
        assert "\n" not in str(caught.value)
        print(caught.value)


def test_a_build_without_memory_is_one_clear_line(golden, tmp_path):
    path, options = tmp_path / "x.engine", BuildOptions(optimization_level=0)
    with memory_taken_but_for(60 << 20):
        with pytest.raises(BuildError) as caught:
            build_engine(golden / "weights" / "yolov5n.pt", path, backend="tensorrt", options=options)
        assert "\n" not in str(caught.value)
        print(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_killed_build_leaves_nothing_and_keeps_the_old_engine(golden, tmp_path):
    path = tmp_path / "yolov5n.engine"
    path.write_bytes(b"\x04\x00\x00\x00{}  old")
    command = [sys.executable, "-m", "yolotrt", "-s", "--backend", "tensorrt", "--engine", str(path)]
    command += ["--weights", str(golden / "weights" / "yolov5n.pt"), "--no-timing-cache"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
    process.wait()
    assert path.read_bytes() == b"\x04\x00\x00\x00{}  old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
