"""GpuSession on a GPU that is none: its boxes are those of the CPU's session, whatever the frames and their order."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.engines.host_gpu import FREED, FakeTensorRt, HostGpuDevice, HostGpuError, bytes_at, gpu_engine
from tests.kernels.comparisons import crops_error
from tests.reference import all_weights
from yolotrt import BuildOptions, build_engine
from yolotrt.cuda.kernels import LetterboxKernel, MaskLayout, NmsLayout, needed_lines
from yolotrt.engines import gpu_engine as gpu_engine_module
from yolotrt.engines import gpu_session
from yolotrt.engines.base import Session
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_session import GpuSession
from yolotrt.engines.host import HostDecoder
from yolotrt.engines.onnx import OnnxRuntimeSession
from yolotrt.engines.trt_engine import TrtEngine
from yolotrt.errors import ImageError, InferenceError, InputError
from yolotrt.media.images import read_image
from yolotrt.postprocess import Boxes, NmsOptions
from yolotrt.weights import Weights

OPTIONS = NmsOptions(confidence=0.3)
SIZES = ((64, 64), (48, 80), (130, 200), (300, 210), (33, 21), (7, 90), (1, 1), (192, 192))
"""Of frames: a copy, odd ones, of which all rows are needed and of which not."""


@pytest.fixture(autouse=True)
def few_threads(monkeypatch) -> None:
    """The selecting block of nms.cu gets fewer threads, which the CPU runs one after the other."""
    monkeypatch.setattr(gpu_session, "NmsLayout", functools.partial(NmsLayout, threads=128))


@pytest.fixture(scope="module")
def static_engine(tiny_weights: Weights) -> EngineFile:
    """For four pictures, no more and no fewer."""
    return build_engine(tiny_weights, backend="onnxruntime", options=BuildOptions(min_batch=4, max_batch=4))


def frame(seed: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """Noise of low frequency, in which the random network finds something."""
    rng = np.random.default_rng(seed)
    height, width = size or SIZES[seed % len(SIZES)]
    coarse = rng.integers(0, 256, (-(-height // 5), -(-width // 5), 3), np.uint8)
    return np.ascontiguousarray(coarse.repeat(5, 0).repeat(5, 1)[:height, :width])


def borrowed(session: Session, pixels: np.ndarray) -> np.ndarray:
    """The frame in memory of the session."""
    buffer = session.frame_buffer(*pixels.shape[:2])
    buffer[:] = pixels
    return buffer


class RoundingSession(OnnxRuntimeSession):
    """The CPU's session with the types of the GPU's engine."""

    def __init__(self, engine: EngineFile, *, half_input: bool = False, half_heads: bool = False) -> None:
        super().__init__(engine, threads=1)
        self._input_type = np.float16 if half_input else np.float32
        self._head_type = np.float16 if half_heads else np.float32

    def compute(self, images: np.ndarray, outputs: Sequence[np.ndarray], *, is_alone: bool) -> None:
        super().compute(images.astype(self._input_type).astype(np.float32), outputs, is_alone=is_alone)
        for output in outputs:
            output[:] = output.astype(self._head_type).astype(np.float32)


def expected(engine: EngineFile, frames: Sequence[np.ndarray], options: NmsOptions = OPTIONS) -> list[Boxes]:
    """The boxes of each frame alone, or first of a batch that is filled up."""
    with open_session(engine, threads=1) as session:
        return [session.detect([pixels], options)[0] for pixels in frames]


def assert_same(actual: Sequence[Boxes], wanted: Sequence[Boxes], *, pixels: float = 1e-3) -> None:
    """Same boxes but for the last places of expf and of another batch's sums."""
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(one.class_id, other.class_id)
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=pixels)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=pixels / 100)


@pytest.mark.parametrize("version", ["8.6.0", "10.13.0.35", "11.4.0.106"])
@pytest.mark.parametrize(
    "types_",
    [
        {},
        {"half_input": True},
        {"half_heads": True},
        {"half_input": True, "half_heads": True},
        {"plugin": True},
        {"plugin": True, "half_input": True},
    ],
    ids=lambda types_: "+".join(types_) or "fp32",
)
def test_boxes_are_those_of_the_cpu(tiny_engine, device, version, types_):
    trt = FakeTensorRt(device, version)
    engine = gpu_engine(tiny_engine, version=version, **types_)
    reference = RoundingSession(tiny_engine, **{name: types_[name] for name in types_ if name != "plugin"})
    frames = [frame(seed) for seed in range(4)]
    with reference, GpuSession.open(trt, engine, device) as session:
        wanted = [reference.detect([pixels], OPTIONS)[0] for pixels in frames]
        assert sum(map(len, wanted)) > 20
        assert_same([session.detect([pixels], OPTIONS)[0] for pixels in frames], wanted)
    assert not trt.violations


@pytest.mark.parametrize("as_views", [False, True], ids=["arrays", "views"])
def test_every_kind_of_frame_gives_the_same(tiny_dynamic_engine, trt, device, as_views):
    device.as_views = as_views
    frames = [frame(seed, size) for seed, size in enumerate([(192, 192), (64, 64), (100, 75), (30, 41)])]
    wanted = expected(tiny_dynamic_engine, frames)
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        on_device = [OnDevice(device, pixels, padding=padding) for padding, pixels in enumerate(frames)]
        kinds = {
            "ordinary": frames,
            "borrowed": [borrowed(session, pixels) for pixels in frames],
            "on the device": on_device,
            "mirrored views": [np.ascontiguousarray(pixels[:, ::-1])[:, ::-1] for pixels in frames],
            "parts": [np.pad(pixels, ((3, 2), (5, 1), (0, 0)))[3:-2, 5:-1] for pixels in frames],
            "parts of borrowed": [
                borrowed(session, np.pad(pixels, ((0, 2), (0, 1), (0, 0))))[:-2, :-1] for pixels in frames
            ],
            "first rows of borrowed": [
                borrowed(session, np.pad(pixels, ((0, 2), (0, 0), (0, 0))))[:-2] for pixels in frames
            ],
            "last rows of borrowed": [
                borrowed(session, np.pad(pixels, ((2, 0), (0, 0), (0, 0))))[2:] for pixels in frames
            ],
            "read-only": [frozen(pixels) for pixels in frames],
        }
        for kind, batch in kinds.items():
            for _ in range(2):  # enqueued, and as a graph
                assert_same(session.detect(batch, OPTIONS), wanted), kind
        mixed = [list(kinds.values())[index][index] for index in range(4)]
        assert_same(session.detect(mixed, OPTIONS), wanted)


def frozen(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.copy()
    pixels.flags.writeable = False
    return pixels


class OnDevice:
    """A frame in device memory, as another library gives it."""

    def __init__(
        self,
        device: HostGpuDevice,
        pixels: np.ndarray,
        *,
        padding: int = 0,
        version: int = 3,
        stream: int | None = None,
    ) -> None:
        height, width, _ = self.shape = pixels.shape
        pitch = 3 * width + padding
        with device.current():
            self.memory = device.allocate(height * pitch)
            lane = device.stream()
            rows = np.zeros((height, pitch), np.uint8)
            rows[:, : 3 * width] = pixels.reshape(height, -1)
            device.upload(self.memory.address, rows, lane)
            device.synchronize(lane)
        self.__cuda_array_interface__ = {
            "data": (self.memory.address, False),
            "shape": pixels.shape,
            "typestr": "|u1",
            "strides": (pitch, 3, 1) if padding else None,
            "version": version,
            "stream": stream,
        }


def test_kernels_compute_the_boxes_of_the_golden_pictures(golden, yolov5n_engine, trt, device):
    pictures = [read_image(golden / "images" / f"{name}.jpg") for name in ("bus", "zidane")]
    wanted = expected(yolov5n_engine, pictures, NmsOptions())
    assert list(map(len, wanted)) == [4, 3]
    with GpuSession.open(trt, gpu_engine(yolov5n_engine), device) as session:
        assert_same([session.detect([pixels], NmsOptions())[0] for pixels in pictures], wanted)


# --- masks -----------------------------------------------------------------------------------------------------------

MASK_TOLERANCE = 1e-4
"""Of values in 0..1, besides expf and the order of sums: half prototypes of another batch size round otherwise."""


def assert_same_masks(actual: Sequence[Boxes], wanted: Sequence[Boxes], tolerance: float = MASK_TOLERANCE) -> None:
    """Same boxes and masks, which lie where the others do to the cell."""
    assert_same(actual, wanted)
    assert sum(map(len, wanted)) > 0
    for one, other in zip(actual, wanted, strict=True):
        assert one.coefficients is None
        assert crops_error(one.masks, other.masks) <= tolerance


@pytest.mark.parametrize("version", ["8.6.0", "11.4.0.106"])
@pytest.mark.parametrize("types_", [{}, {"half_input": True, "half_heads": True}], ids=["fp32", "fp16"])
def test_masks_are_those_of_the_cpu(tiny_segment_engine, device, version, types_):
    trt = FakeTensorRt(device, version)
    frames = [frame(seed) for seed in range(len(SIZES))]
    reference = RoundingSession(tiny_segment_engine, **types_)
    with (
        reference,
        GpuSession.open(trt, gpu_engine(tiny_segment_engine, version=version, **types_), device) as session,
    ):
        wanted = [reference.detect([pixels], OPTIONS)[0] for pixels in frames]
        assert_same_masks([session.detect([pixels], OPTIONS)[0] for pixels in frames], wanted)
        for seed in (0, 2, 4):  # enqueued, and as a graph
            assert_same_masks(session.detect(frames[seed : seed + 2], OPTIONS), wanted[seed : seed + 2])
    assert not trt.violations


def test_a_static_batch_of_masks_is_filled_up(tiny_segment_engine, trt, device):
    weights = all_weights(tiny_segment_engine.header.model)
    engine = build_engine(weights, backend="onnxruntime", options=BuildOptions(min_batch=3, max_batch=3))
    wanted = expected(engine, [frame(seed) for seed in range(5)])
    with GpuSession.open(trt, gpu_engine(engine), device) as session:
        for chosen in ((0, 1, 2), (3,), (4, 0)):
            assert_same_masks(session.detect([frame(i) for i in chosen], OPTIONS), [wanted[i] for i in chosen])


def test_masks_follow_the_options(tiny_segment_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        for options in (
            OPTIONS,
            NmsOptions(confidence=0.3, max_detections=3),
            NmsOptions(confidence=0.3, classes=(1,)),
            NmsOptions(confidence=0.2, agnostic=True, max_detections=500),
            NmsOptions(confidence=0.3, multi_label=True),
            OPTIONS,
        ):
            wanted = expected(tiny_segment_engine, [frame(0)], options)
            for _ in range(2):
                assert_same_masks(session.detect([frame(0)], options), wanted)
        assert not session.detect([frame(0)], NmsOptions(confidence=1.0))[0].masks


def test_masks_of_several_batches_under_way_are_their_own(tiny_segment_engine, trt, device):
    wanted = expected(tiny_segment_engine, [frame(seed) for seed in range(6)])
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        for _ in range(2):
            pending = [session.submit([frame(seed)], OPTIONS) for seed in range(6)]
            results = [one.result()[0] for one in reversed(pending)]
            assert_same_masks(results, wanted[::-1])
            session.detect([frame(7)], OPTIONS)  # what was given stays as it is
            assert_same_masks(results, wanted[::-1])
        assert len(session._lanes) == gpu_session.LANES


def test_masks_that_have_no_room_are_computed_by_the_host(tiny_segment_engine, trt, device, monkeypatch):
    monkeypatch.setattr(gpu_session, "MaskLayout", functools.partial(MaskLayout, whole_grids=1))
    decoded = []
    monkeypatch.setattr(HostDecoder, "boxes", noting(decoded, HostDecoder.boxes))
    few, frames = NmsOptions(confidence=0.3, max_detections=1), [frame(0), frame(1)]
    wanted = {options: expected(tiny_segment_engine, frames, options) for options in (OPTIONS, few)}
    decoded.clear()
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        assert_same_masks(session.detect(frames, few), wanted[few])
        assert not decoded
        for _ in range(2):
            assert_same_masks(session.detect(frames, OPTIONS), wanted[OPTIONS])
        assert len(decoded) == 2


def noting(calls: list[object], method: Callable[..., object]) -> Callable[..., object]:
    """The method, which notes each call."""

    def noted(*arguments: object) -> object:
        calls.append(arguments)
        return method(*arguments)

    return noted


def test_masks_need_no_copy_command_of_the_driver(tiny_segment_engine, trt, device):
    wanted = expected(tiny_segment_engine, [frame(0), frame(1)])
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        session.detect([frame(2)], OPTIONS)  # tells the GPU once where the heads are
        device.failing["upload"] = device.failing["download"] = HostGpuError("a copy command")
        for _ in range(3):
            assert_same_masks(session.detect([frame(0), frame(1)], OPTIONS), wanted)
        assert device.calls["capture"] == 2


def test_masks_that_need_too_much_memory_leave_the_options_before_usable(tiny_segment_engine, trt, device):
    wanted = expected(tiny_segment_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        for _ in range(2):
            assert_same_masks(session.detect([frame(0)], OPTIONS), wanted)
        for method in ("allocate", "page_locked"):
            device.failing[method] = HostGpuError("Out of memory")
            with pytest.raises(InferenceError, match="the GPU's memory does not suffice"):
                session.detect([frame(0)], NmsOptions(max_detections=1000))
            gc.collect()
            assert_same_masks(session.detect([frame(0)], OPTIONS), wanted)
            del device.failing[method]


def test_raw_outputs_of_segmentation_are_those_of_the_cpu(tiny_segment_engine, trt, device):
    images = np.random.default_rng(0).random((2, 3, 64, 64), np.float32)
    with (
        open_session(tiny_segment_engine) as reference,
        GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session,
    ):
        for one, other in zip(session.run(images), reference.run(images), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_masks_are_a_stage_of_their_own(tiny_segment_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_segment_engine), device) as session:
        times = session.profile([frame(0)], OPTIONS, repeats=2)
    assert list(times) == ["upload", "letterbox", "engine", "yololayer", "nms", "masks", "whole"]


def test_kernels_compute_the_masks_of_a_golden_picture(golden, trt, device):
    engine = build_engine(golden / "weights" / "derived_seg_nc80.pt", backend="onnxruntime")
    pixels = read_image(golden / "images" / "zidane.jpg")
    wanted = expected(engine, [pixels], NmsOptions())
    assert len(wanted[0]) == 5
    with GpuSession.open(trt, gpu_engine(engine), device) as session:
        assert_same_masks(session.detect([pixels], NmsOptions()), wanted)


# --- batches and frames ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [False, True], ids=["kernel", "plugin"])
def test_any_number_of_frames_of_any_sizes(tiny_engine, tiny_dynamic_engine, trt, device, plugin):
    rng = np.random.default_rng(0)
    wanted = expected(tiny_engine, [frame(seed) for seed in range(len(SIZES))])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine, plugin=plugin), device) as session:
        for _ in range(25):
            chosen = [int(seed) for seed in rng.integers(len(SIZES), size=rng.integers(1, 5))]
            frames = [frame(seed) if rng.random() < 0.5 else borrowed(session, frame(seed)) for seed in chosen]
            assert_same(session.detect(frames, OPTIONS), [wanted[seed] for seed in chosen])
            assert trt.executed_batches[-1] == len(chosen)


def test_a_static_batch_is_filled_up_without_stale_pictures(tiny_engine, static_engine, trt, device):
    wanted = expected(tiny_engine, [frame(seed) for seed in range(8)])
    with GpuSession.open(trt, gpu_engine(static_engine), device) as session:
        for chosen in ((0, 1, 2, 3), (4,), (5, 6), (7, 0, 1, 2), (3, 4, 5)):
            boxes = session.detect([frame(seed) for seed in chosen], OPTIONS)
            assert_same(boxes, [wanted[seed] for seed in chosen])
            images = input_of(session, device)
            for slot in range(len(chosen), 4):
                np.testing.assert_array_equal(images[slot], np.float32(114 / 255))
    assert set(trt.executed_batches) == {4}


def input_of(session: GpuSession, device: HostGpuDevice) -> np.ndarray:
    """What the network of the first lane has read."""
    info = session.header.inputs[0]
    memory = session._lanes[0].run.tensors[info.name]
    return bytes_at(memory.address, memory.size).view(info.dtype).reshape(-1, *info.shape[1:])


def test_no_pixels_of_an_earlier_frame_are_left(tiny_engine, trt, device):
    sizes = [(192, 192), (64, 64), (130, 200), (1, 1), (192, 192), (30, 41), (300, 210), (64, 64)]
    frames = [frame(seed, size) for seed, size in enumerate(sizes)]
    wanted = expected(tiny_engine, frames)
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for pixels, boxes in zip(frames, wanted, strict=True):
            for given in (pixels, borrowed(session, pixels), OnDevice(device, pixels)):
                assert_same(session.detect([given], OPTIONS), [boxes])


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "the engine takes 1 to 4 pictures a batch, not 0"), (5, "the engine takes 1 to 4 pictures a batch, not 5")],
)
def test_a_wrong_number_of_frames_is_refused(tiny_dynamic_engine, trt, device, count, message):
    engine = gpu_engine(tiny_dynamic_engine)
    with GpuSession.open(trt, engine, device) as session, pytest.raises(InputError, match=message):
        session.submit([frame(0)] * count, OPTIONS)


def test_a_frame_that_is_refused_leaves_the_session_as_it_was(tiny_dynamic_engine, trt, device):
    wanted = expected(tiny_dynamic_engine, [frame(0), frame(1)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for _ in range(3):
            with pytest.raises(ImageError, match="a frame of type str is no array: pass NumPy or device arrays"):
                session.detect([frame(5), "frame"], OPTIONS)
            assert_same(session.detect([frame(0), frame(1)], OPTIONS), wanted)


@pytest.mark.parametrize(("version", "stream", "waited"), [(2, None, [1]), (3, None, []), (3, 77, [77]), (3, 2, [2])])
def test_the_stream_that_makes_a_frame_is_waited_for(tiny_engine, trt, device, version, stream, waited):
    given = OnDevice(device, frame(0), version=version, stream=stream)
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        session.detect([given], OPTIONS)
    assert device.foreign_streams == waited


def test_a_stream_is_waited_for_once_a_batch(tiny_dynamic_engine, trt, device):
    streams = (77, 77, None, 5)
    given = [OnDevice(device, frame(seed), stream=stream) for seed, stream in enumerate(streams)]
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for _ in range(3):  # enqueued, captured, replayed
            session.detect(given, OPTIONS)
    assert sorted(device.foreign_streams) == [5, 5, 5, 77, 77, 77]


def test_frames_on_the_device_may_differ_in_their_pitch(tiny_engine, trt, device):
    wanted = expected(tiny_engine, [frame(3)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for padding in (0, 7, 2):
            assert_same(session.detect([OnDevice(device, frame(3), padding=padding)], OPTIONS), wanted)


def test_frames_on_the_host_cost_the_bus_only_the_needed_rows(tiny_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        session.detect([borrowed(session, frame(0, (192, 192)))], OPTIONS)
        (slot,) = session._lanes[0]._slots
        assert slot._pixels.size == 64 * 192 * 3
        assert slot._staging.size == 0
        session.detect([frame(0, (192, 192))], OPTIONS)
        assert slot._staging.size == 64 * 192 * 3


@pytest.mark.parametrize("first", [1, 99], ids=["commands", "kernel"])
@pytest.mark.parametrize("kind", ["borrowed", "ordinary"])
def test_copy_commands_bring_what_the_kernel_brings(tiny_dynamic_engine, trt, device, monkeypatch, first, kind):
    monkeypatch.setattr(gpu_session, "COMMANDS_FROM", first)
    wanted = expected(tiny_dynamic_engine, [frame(seed) for seed in range(len(SIZES))])
    regular = 0
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for seeds in ([0, 1, 2], [7, 3], [2, 0, 4], [5, 6, 7], [7], [1, 7, 0]):
            frames = [frame(seed) for seed in seeds]
            if kind == "borrowed":
                frames = [borrowed(session, pixels) for pixels in frames]
            assert_same(session.detect(frames, OPTIONS), [wanted[seed] for seed in seeds])
            sizes = [pixels.shape[:2] for pixels in frames]
            regular += sum(kind == "ordinary" or needed_lines(size, (64, 64)) is not None for size in sizes)
    assert device.calls["upload_lines"] == (regular if first == 1 else 0)
    assert kind == "ordinary" or regular < 15  # some frames need the kernel even so


def test_a_single_frame_needs_no_copy_command(tiny_dynamic_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        session.detect([borrowed(session, frame(0))], OPTIONS)
        assert device.calls["upload_lines"] == 0
        session.detect([borrowed(session, frame(0))] * 2, OPTIONS)
        assert device.calls["upload_lines"] == 2


def test_a_batch_that_is_refused_leaves_no_copy_command_under_way(tiny_dynamic_engine, trt, device):
    wanted = expected(tiny_dynamic_engine, [frame(0), frame(1)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        pixels = borrowed(session, frame(0))
        with pytest.raises((InputError, ImageError)):
            session.submit([pixels, "no frame"], OPTIONS)
        assert device.calls["upload_lines"] == 1
        assert not any(stream.queue for stream in device.streams.values())  # the frame is the caller's again
        assert_same(session.detect([borrowed(session, frame(seed)) for seed in range(2)], OPTIONS), wanted)


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), MemoryError("no room")], ids=["ctrl-c", "memory"])
@pytest.mark.parametrize("kind", ["commands", "kernel", "device", "nothing"])
def test_an_interrupted_placement_leaves_no_plan_of_freed_memory(
    tiny_dynamic_engine, static_engine, trt, device, monkeypatch, kind, problem
):
    """A larger frame gives a slot more room, and frees the room that the plan names."""
    monkeypatch.setattr(gpu_session, "COMMANDS_FROM", 1 if kind == "commands" else 99)
    small, large = frame(0), frame(0, (192, 192))
    engine = static_engine if kind == "nothing" else tiny_dynamic_engine
    wanted = expected(engine, [small])

    def place(session: Session) -> list[Any]:
        return [OnDevice(device, small)] if kind == "device" else [borrowed(session, small)]

    with GpuSession.open(trt, gpu_engine(engine), device) as session:
        count = 4 if kind == "nothing" else 1
        assert_same(session.detect(place(session), OPTIONS), wanted)
        plans = "uploaded_plan" if kind == "commands" else "upload_plan"
        with monkeypatch.context() as patch, pytest.raises(type(problem)):
            patch.setattr(LetterboxKernel, plans, raising(problem))
            session.detect([borrowed(session, large)] * count, OPTIONS)
        for _ in range(2):
            assert_same(session.detect(place(session), OPTIONS), wanted)


def test_copy_commands_are_timed_with_the_upload(tiny_dynamic_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        frames = [borrowed(session, frame(0)), borrowed(session, frame(7))]
        times = session.profile(frames, OPTIONS, repeats=3)
        # placed once; then each graph twice a repeat, of the upload and of the whole
        assert device.calls["upload_lines"] == len(frames) * (1 + 2 * 2 * 3)
    assert len(times["upload"]) == len(times["whole"]) == 3


@pytest.mark.parametrize(("naps", "woken"), [(10_000, False), (0, True)], ids=["short", "long"])
def test_a_short_wait_needs_no_driver_to_wake(tiny_engine, trt, device, monkeypatch, naps, woken):
    monkeypatch.setattr(gpu_engine_module, "NAPS", naps)
    monkeypatch.setattr(gpu_engine_module, "NAP", 0)
    wanted = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        pending = session.submit([frame(0)], OPTIONS)
        device.failing["wait"] = HostGpuError("woken")
        if woken:
            with pytest.raises(InferenceError, match="woken"):
                pending.result()
            del device.failing["wait"]
        else:
            assert_same(pending.result(), wanted)
            del device.failing["wait"]


# --- several batches under way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["in order", "reversed", "the last alone", "shuffled"])
def test_results_may_be_fetched_in_any_order(tiny_engine, tiny_dynamic_engine, trt, device, order):
    batches = [[0, 1], [2], [3, 4, 5, 6], [7, 0], [1], [2, 3, 4]]
    wanted = expected(tiny_engine, [frame(seed) for seed in range(8)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for _ in range(2):  # enqueued, and as graphs
            pending = [session.submit([borrowed(session, frame(seed)) for seed in batch], OPTIONS) for batch in batches]
            indices = list(range(len(batches)))
            indices = {
                "in order": indices,
                "reversed": indices[::-1],
                "the last alone": indices[-1:],
                "shuffled": [3, 5, 0, 4, 1, 2],
            }[order]
            for index in indices:
                assert_same(pending[index].result(), [wanted[seed] for seed in batches[index]])
            for index in indices:  # a second call gives the same
                assert_same(pending[index].result(), [wanted[seed] for seed in batches[index]])
        assert len(session._lanes) == gpu_session.LANES


def test_ordinary_frames_may_change_once_they_are_submitted(tiny_engine, trt, device):
    pixels, batch = frame(0), [frame(0)]
    (wanted,) = expected(tiny_engine, [pixels])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        pending = session.submit(batch, OPTIONS)
        batch[0][:] = 0
        batch.clear()
        assert_same(pending.result(), [wanted])


@pytest.mark.parametrize("kind", ["borrowed", "on the device"])
def test_frames_live_until_the_gpu_has_read_them(tiny_engine, trt, device, kind):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for _ in range(3):
            batch = [borrowed(session, frame(0)) if kind == "borrowed" else OnDevice(device, frame(0))]
            pending = session.submit(batch, OPTIONS)
            batch.clear()  # the caller's list is theirs
            gc.collect()
            assert_same(pending.result(), [wanted])


def test_results_nobody_fetches_do_no_harm(tiny_engine, trt, device):
    wanted = expected(tiny_engine, [frame(seed) for seed in range(6)])
    session = GpuSession.open(trt, gpu_engine(tiny_engine), device)
    for seed in range(5):
        session.submit([frame(seed)], OPTIONS)
    assert_same(session.detect([frame(5)], OPTIONS), wanted[5:])
    session.submit([frame(0)], OPTIONS)
    session.close()
    assert not trt.violations


def test_results_can_be_fetched_after_the_session_is_closed(tiny_engine, trt, device):
    wanted = expected(tiny_engine, [frame(0), frame(1)])
    session = GpuSession.open(trt, gpu_engine(tiny_engine), device)
    pending = [session.submit([frame(seed)], OPTIONS) for seed in range(2)]
    session.close()
    assert_same([one.result()[0] for one in pending], wanted)


def test_two_threads_with_a_session_each(tiny_engine, trt, device):
    engine = gpu_engine(tiny_engine)
    wanted = expected(tiny_engine, [frame(seed) for seed in range(6)])
    problems: list[BaseException] = []

    def work(order: Sequence[int]) -> None:
        try:
            with GpuSession.open(trt, engine, device) as session:
                for seed in order:
                    assert_same(session.detect([frame(seed)], OPTIONS), [wanted[seed]])
        except BaseException as problem:  # noqa: BLE001  # a thread's failure must reach the test
            problems.append(problem)

    with GpuSession.open(trt, engine, device):
        threads = [threading.Thread(target=work, args=(order,)) for order in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not problems
    assert trt.deserialized == 1


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [False, True], ids=["kernel", "plugin"])
def test_options_may_change_from_call_to_call(tiny_dynamic_engine, trt, device, plugin):
    frames = [frame(0), frame(3), frame(4)]
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine, plugin=plugin), device) as session:
        for options in (
            OPTIONS,
            NmsOptions(confidence=0.6),
            NmsOptions(confidence=0.3, classes=(1,)),
            NmsOptions(confidence=0.3, max_detections=2),
            NmsOptions(confidence=0.3, iou=0.1),
            NmsOptions(confidence=0.3, agnostic=True),
            NmsOptions(confidence=0.3, classes=(0, 2), max_detections=5),
            NmsOptions(confidence=0.01, max_detections=1000),
            NmsOptions(confidence=0.3, classes=()),
            NmsOptions(max_detections=0),
            OPTIONS,
        ):
            wanted = expected(tiny_dynamic_engine, frames, options)
            for _ in range(2):
                assert_same(session.detect(frames, options), wanted)
            # each in flight with its own options
            pending = [session.submit([pixels], chosen) for pixels in frames for chosen in (options, OPTIONS)]
            for one, boxes in zip(pending[::2], wanted, strict=True):
                assert_same(one.result(), [boxes])


def test_no_box_at_all_may_be_asked_for_first(tiny_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        assert len(session.detect([frame(0)], NmsOptions(max_detections=0))[0]) == 0


def test_several_labels_a_box(tiny_dynamic_engine, trt, device):
    options = NmsOptions(confidence=0.2, multi_label=True)
    frames = [frame(0), frame(1)]
    wanted = expected(tiny_dynamic_engine, frames, options)
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        alone = session.submit([frame(2)], OPTIONS)  # under way meanwhile
        assert_same(session.detect(frames, options), wanted)
        assert_same(session.submit([borrowed(session, frames[1])], options).result(), wanted[1:])
        assert_same(alone.result(), expected(tiny_dynamic_engine, [frame(2)]))
        assert session.timing.pictures == 4


def test_options_out_of_range_are_refused_before_anything_is_under_way(tiny_engine, trt, device):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for _ in range(2):
            with pytest.raises(InputError, match=r"confidence 1.5 and iou 0.45 must be in 0..1: give them"):
                session.detect([borrowed(session, frame(1))], NmsOptions(confidence=1.5))
            assert not any(stream.queue for stream in device.streams.values())
            assert_same(session.detect([frame(0)], OPTIONS), [wanted])


# --- raw heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types_", [{}, {"half_input": True, "half_heads": True}], ids=["fp32", "fp16"])
def test_raw_heads_are_those_of_the_cpu(tiny_dynamic_engine, trt, device, types_):
    images = np.random.default_rng(0).random((4, 3, 64, 64), np.float32)
    reference = RoundingSession(tiny_dynamic_engine, **types_)
    with reference, GpuSession.open(trt, gpu_engine(tiny_dynamic_engine, **types_), device) as session:
        pending = session.submit([frame(0)], OPTIONS)
        for batch in (1, 4, 2):
            heads = session.run(images[:batch])
            for head, wanted in zip(heads, reference.run(images[:batch]), strict=True):
                assert head.dtype == np.float32
                np.testing.assert_allclose(head, wanted, atol=1e-2 if types_ else 1e-5)
        assert len(pending.result()) == 1
        with pytest.raises(InputError, match="the engine takes 1 to 4 pictures a batch, not 0"):
            session.run(images[:0])


def test_a_plugin_leaves_no_raw_heads(tiny_engine, trt, device):
    message = "this engine holds YoloLayer and gives no raw heads: build it with --yololayer kernel"
    with GpuSession.open(trt, gpu_engine(tiny_engine, plugin=True), device) as session:
        with pytest.raises(InputError, match=message):
            session.run(np.zeros((1, 3, 64, 64), np.float32))
        with pytest.raises(InputError, match=message):
            session.detect([frame(0)], NmsOptions(multi_label=True))


# --- graphs, memory and time -----------------------------------------------------------------------------------------


def test_each_batch_size_is_captured_once_a_lane(tiny_dynamic_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for seed in range(6):
            session.detect([frame(seed)], OPTIONS)
        assert (device.calls["capture"], device.calls["graph"]) == (1, 5)
        for seed in range(6):
            session.detect([frame(seed), frame(seed + 1)], OPTIONS)
        assert (device.calls["capture"], device.calls["graph"]) == (2, 10)
        for seed in range(3):
            for pending in [session.submit([frame(seed)], OPTIONS) for _ in range(2)]:
                pending.result()
        assert (device.calls["capture"], device.calls["graph"]) == (3, 15)
        session.detect([frame(0)], NmsOptions(confidence=0.5))
        assert (device.calls["capture"], device.calls["graph"]) == (4, 15)


@pytest.mark.parametrize("error", [HostGpuError("operation not permitted"), InferenceError("refused")])
def test_where_capture_is_refused_everything_is_enqueued_after_one_warning(
    tiny_dynamic_engine, trt, device, caplog, error
):
    device.failing["capture"] = error
    frames = [frame(0), frame(1)]
    wanted = expected(tiny_dynamic_engine, frames)
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for options in (OPTIONS, NmsOptions(confidence=0.5), OPTIONS):
            pending = [session.submit([pixels], options) for pixels in frames]
            for one in pending:
                one.result()
        assert_same(session.detect(frames, OPTIONS), wanted)
    (line,) = caplog.messages
    assert line.startswith("the engine cannot be captured as a CUDA graph and is enqueued each time (")
    assert device.calls["graph"] == 0


def test_a_capture_that_was_disturbed_is_tried_again(tiny_dynamic_engine, trt, device, caplog):
    (wanted,) = expected(tiny_dynamic_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for failing in (True, False, False):
            if failing:
                device.failing["capture"] = HostGpuError("another thread waited for the whole GPU")
            else:
                device.failing.clear()
            assert_same(session.detect([frame(0)], OPTIONS), [wanted])
    assert (device.calls["capture"], device.calls["graph"]) == (1, 1)
    assert not caplog.messages


@pytest.mark.parametrize(("created", "engines"), [("then", 1), ("later", 2)])
def test_no_session_of_the_gpu_is_opened_while_another_captures(
    tiny_engine, trt, device, monkeypatch, created, engines
):
    engine = gpu_engine(tiny_engine, created="then")
    capture = device.capture
    problems: list[BaseException] = []
    threads: list[threading.Thread] = []

    def other() -> None:
        try:
            with GpuSession.open(trt, gpu_engine(tiny_engine, created=created), device) as session:
                session.detect([frame(1)], OPTIONS)
        except BaseException as problem:  # noqa: BLE001  # a thread's failure must reach the test
            problems.append(problem)

    def slow_capture(stream, enqueue):
        def enqueue_slowly() -> None:
            if not threads:
                threads.append(threading.Thread(target=other))
                threads[0].start()
                threads[0].join(0.2)  # enough to come to where it must wait
            enqueue()

        return capture(stream, enqueue_slowly)

    monkeypatch.setattr(device, "capture", slow_capture)
    with GpuSession.open(trt, engine, device) as session:
        session.detect([frame(0)], OPTIONS)
        threads[0].join()
    assert not problems
    assert trt.deserialized == engines


def test_no_batch_waits_for_a_copy_command_of_the_driver(tiny_dynamic_engine, trt, device):
    frames = [frame(seed) for seed in range(3)]
    wanted = expected(tiny_dynamic_engine, frames)
    device.failing["upload"] = device.failing["download"] = HostGpuError("a copy command")
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for _ in range(3):  # enqueued, captured, replayed
            assert_same(session.detect([borrowed(session, pixels) for pixels in frames], OPTIONS), wanted)


def test_memory_stays_the_same_over_many_frames(tiny_dynamic_engine, trt, device):
    def step(session: Session) -> None:
        for seed in range(len(SIZES)):
            batch = [frame(seed), borrowed(session, frame(seed + 1)), OnDevice(device, frame(seed + 2))]
            session.submit(batch[: 1 + seed % 3], OPTIONS)
        session.detect([frame(0)] * 4, OPTIONS)
        gc.collect()

    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        for _ in range(3):
            step(session)
        before = dict(device.device_memory), len(device.page_locked_memory)
        for _ in range(3):
            step(session)
        assert (sum(device.device_memory.values()), len(device.page_locked_memory)) == (
            sum(before[0].values()),
            before[1],
        )


def test_borrowed_memory_is_given_back_and_used_again(tiny_engine, trt, device):
    wanted = expected(tiny_engine, [frame(0), frame(7)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        first = session.frame_buffer(64, 64)
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        assert first.flags.c_contiguous
        assert first.flags.writeable
        before = len(device.page_locked_memory)
        kept = first[8:]
        del first
        gc.collect()
        assert len(device.page_locked_memory) == before  # a view keeps it
        del kept
        gc.collect()
        assert len(device.page_locked_memory) == before - 1
        assert not session._lent
        for size in ((192, 192), (64, 64)):
            pixels = [frame(0), frame(7)] if size == (64, 64) else []
            for picture, boxes in zip(pixels, wanted, strict=False):
                assert_same(session.detect([borrowed(session, picture)], OPTIONS), [boxes])
        assert len(session._lent) <= 1


def test_an_ordinary_array_where_a_borrowed_one_was_is_copied(tiny_engine, trt, device):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        buffer = session.frame_buffer(64, 64)
        pixels = frame(0)
        small = buffer.ravel()[:1]
        session._lent._blocks[pixels.ctypes.data] = small
        assert_same(session.detect([pixels], OPTIONS), [wanted])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, for assigning a shape
def test_a_borrowed_array_that_was_given_another_shape_is_read_as_such(tiny_engine, trt, device):
    pixels = frame(4, (64, 64))
    wide, tall = pixels.reshape(32, 128, 3), pixels.reshape(128, 32, 3)
    wanted = expected(tiny_engine, [pixels, wide, tall])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        buffer = borrowed(session, pixels)
        for shape, boxes in zip([pixels.shape, wide.shape, tall.shape], wanted, strict=True):
            buffer.shape = shape
            assert_same(session.detect([buffer], OPTIONS), [boxes])
        assert not session._lanes[0]._slots[0]._staging.size  # none was copied


def test_a_new_array_is_not_taken_for_a_borrowed_one_that_is_gone(tiny_engine, trt, device):
    pixels = [frame(seed, (64, 64)) for seed in range(20)]
    wanted = expected(tiny_engine, pixels)
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for picture, boxes in zip(pixels, wanted, strict=True):
            assert_same(session.detect([borrowed(session, picture)], OPTIONS), [boxes])
            assert_same(session.detect([picture.copy()], OPTIONS), [boxes])  # often where that array was
        assert not session._lent._frames


def test_an_array_that_was_not_forgotten_in_time_is_no_longer_borrowed(tiny_engine, trt, device):
    pixels = frame(0, (64, 64))
    (wanted,) = expected(tiny_engine, [pixels])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        buffer = borrowed(session, frame(5, (64, 64)))
        entry = session._lent._frames[id(buffer)]
        del buffer
        session._lent._frames[id(pixels)] = entry  # as if Ctrl-C had come while it was being forgotten
        assert_same(session.detect([pixels], OPTIONS), [wanted])


def test_frames_that_are_made_when_they_are_asked_for(tiny_dynamic_engine, trt, device):
    class Decoded(Sequence):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> np.ndarray:
            return borrowed(session, [frame(0), frame(7)][index])

    wanted = expected(tiny_dynamic_engine, [frame(0), frame(7)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        pending = session.submit(Decoded(), OPTIONS)
        gc.collect()
        assert_same(pending.result(), wanted)


def test_borrowed_memory_outlives_an_array_that_does_not_own_it(tiny_engine, trt, device):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        buffer = borrowed(session, frame(0))
        pixels = bytes_at(buffer.ctypes.data, buffer.nbytes).reshape(buffer.shape)
        pending = session.submit([pixels], OPTIONS)
        del buffer
        gc.collect()
        assert_same(pending.result(), [wanted])


def test_a_frame_that_was_copied_is_not_kept(tiny_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        pixels = frame(0)
        lives = weakref.ref(pixels)
        pending = session.submit([pixels], OPTIONS)
        del pixels
        gc.collect()
        assert lives() is None
        pending.result()


def test_memory_of_another_session_is_an_ordinary_array(tiny_engine, trt, device):
    engine = gpu_engine(tiny_engine)
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, engine, device) as one, GpuSession.open(trt, engine, device) as other:
        assert_same(one.detect([borrowed(other, frame(0))], OPTIONS), [wanted])


@pytest.mark.parametrize("plugin", [False, True], ids=["kernel", "plugin"])
def test_stages_are_timed_in_order(tiny_engine, trt, device, plugin):
    with GpuSession.open(trt, gpu_engine(tiny_engine, plugin=plugin), device) as session:
        times = session.profile([frame(0)], OPTIONS, repeats=3)
        stages = ["upload", "letterbox", "engine", "yololayer", "nms", "whole"]
        assert list(times) == [stage for stage in stages if not (plugin and stage == "yololayer")]
        assert all(len(values) == 3 and min(values) > 0 for values in times.values())
        assert_same(session.detect([frame(1)], OPTIONS), expected(tiny_engine, [frame(1)]))


# --- failures and the end --------------------------------------------------------------------------------------------


FAILURES = [
    ("CUDA_ERROR_LAUNCH_FAILED", "the GPU failed (CUDA_ERROR_LAUNCH_FAILED): start the program again; report it"),
    ("an illegal memory access\nwas encountered", "the GPU failed (an illegal memory access): start"),
    ("Out of memory allocating 5 bytes", "the GPU's memory does not suffice (Out of memory allocating 5 bytes): use a"),
    ("", "the GPU failed (HostGpuError): start"),
]


@pytest.mark.parametrize(("text", "message"), FAILURES)
@pytest.mark.parametrize("method", ["current", "launch", "record", "wait"])
def test_a_failing_gpu_is_one_line_and_the_session_can_be_closed(tiny_engine, trt, device, method, text, message):
    session = GpuSession.open(trt, gpu_engine(tiny_engine), device)
    device.failing[method] = HostGpuError(text)
    with pytest.raises(InferenceError) as caught:
        session.detect([frame(0)], OPTIONS)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    device.failing["synchronize"] = HostGpuError(text)
    session.close()
    session.close()
    gc.collect()
    assert not trt.violations


@pytest.mark.parametrize("method", ["current", "allocate", "stream", "page_locked"])
def test_a_gpu_that_fails_at_once_is_one_line(tiny_engine, trt, device, method):
    device.failing[method] = HostGpuError("CUDA_ERROR_UNKNOWN")
    with pytest.raises(InferenceError, match=r"the GPU failed \(CUDA_ERROR_UNKNOWN\): start the program again"):
        GpuSession.open(trt, gpu_engine(tiny_engine), device)


def test_a_failure_belongs_to_its_batch(tiny_engine, trt, device):
    (wanted,) = expected(tiny_engine, [frame(5)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        lost = [session.submit([frame(seed)], OPTIONS) for seed in range(gpu_session.LANES)]
        device.failing["wait"] = HostGpuError("lost")
        kept = session.submit([frame(5)], OPTIONS)  # waits for the first, whose failure it is not
        del device.failing["wait"]
        assert_same(kept.result(), [wanted])
        for _ in range(2):
            with pytest.raises(InferenceError, match="the GPU failed"):
                lost[0].result()


@pytest.mark.parametrize("where", ["wait", "has_happened"])
def test_an_interrupted_wait_can_be_repeated(tiny_engine, trt, device, monkeypatch, where):
    monkeypatch.setattr(gpu_engine_module, "NAPS", 0 if where == "wait" else 3)  # a nap executes what is enqueued
    wanted = expected(tiny_engine, [frame(0), frame(5)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        pending = session.submit([borrowed(session, frame(0))], OPTIONS)
        device.failing[where] = KeyboardInterrupt()
        for call in (pending.result, lambda: session.run(np.zeros((1, 3, 64, 64), np.float32))):
            with pytest.raises(KeyboardInterrupt):
                call()
        gc.collect()  # the frame is still read
        del device.failing[where]
        others = [session.submit([frame(5)], OPTIONS) for _ in range(gpu_session.LANES + 1)]
        assert_same(pending.result(), wanted[:1])
        for other in others:
            assert_same(other.result(), wanted[1:])


def test_a_gpu_that_cannot_be_left_is_one_clear_line(tiny_engine, trt, device, monkeypatch):
    class Failing(contextlib.nullcontext):
        def __exit__(self, *_: object) -> None:
            super().__exit__(*_)
            entered.__exit__(None, None, None)
            raise HostGpuError("an illegal memory access was encountered")

    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        session.detect([frame(0)], OPTIONS)
        with monkeypatch.context() as patch:
            entered = device.current()
            entered.__enter__()
            patch.setattr(device, "current", Failing)
            with pytest.raises(InferenceError, match=r"the GPU failed \(an illegal memory access was encountered\)"):
                session.detect([frame(0)], OPTIONS)


def test_a_gpu_that_stays_current_is_not_made_so_again(tiny_engine, trt, device):
    device.stays_current = True
    wanted = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        before = device.calls["current"]
        assert_same(session.detect([frame(0)], OPTIONS), wanted)
        assert_same(session.submit([frame(0)], OPTIONS).result(), wanted)
        assert device.calls["current"] == before
        found = []
        thread = threading.Thread(target=lambda: found.extend(session.detect([frame(0)], OPTIONS)))
        thread.start()  # in which it has to be
        thread.join()
        assert_same(found, wanted)
        assert device.calls["current"] > before
        for method in ("has_happened", "record"):
            device.failing[method] = HostGpuError("lost")
            with pytest.raises(InferenceError, match=r"the GPU failed \(lost\)"):
                session.submit([frame(0)], OPTIONS).result()
            del device.failing[method]
        assert_same(session.detect([frame(0)], OPTIONS), wanted)


def test_ctrl_c_at_any_moment_leaves_no_batch_whose_frames_are_gone(tiny_engine, trt, device):
    wanted = expected(tiny_engine, [frame(0), frame(5)])
    moments = 0

    def trace(stack: Any, event: str, _: Any) -> Any:
        nonlocal moments
        if (
            stack.f_code.co_name not in {"_start", "start", "place", "__init__"}
            or "engines" not in stack.f_code.co_filename
        ):
            return None
        stack.f_trace_opcodes = True
        if event == "opcode":
            moments -= 1
            if not moments:
                raise KeyboardInterrupt
        return trace

    def interrupted(moment: int) -> bool:
        nonlocal moments
        moments, before = moment, sys.gettrace()
        frames = [borrowed(session, frame(5))]
        try:
            sys.settrace(trace)
            session.submit(frames, OPTIONS)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        assert_same(session.detect([frame(0)], OPTIONS), wanted[:1])
        for moment in itertools.count(1):
            was_interrupted = interrupted(moment)
            gc.collect(0)  # the frame goes, unless the batch keeps it
            with device.current():
                session._lanes[0].settle()  # which fails if the GPU reads memory that was given back
            assert_same(session.detect([borrowed(session, frame(0))], OPTIONS), wanted[:1])
            if not was_interrupted:
                break
        assert moment > 100


def test_any_failure_belongs_to_its_batch(tiny_engine, trt, device, monkeypatch):
    (wanted,) = expected(tiny_engine, [frame(5)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        lost = session.submit([frame(0)], OPTIONS)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_session, "boxes_of", raising(MemoryError("no memory for boxes")))
            kept = [session.submit([frame(5)], OPTIONS) for _ in range(gpu_session.LANES)]
        for one in kept:
            assert_same(one.result(), [wanted])
        with pytest.raises(MemoryError, match="no memory for boxes"):
            lost.result()


def raising(problem: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise problem

    return fail


@pytest.mark.parametrize(("batches", "lanes"), [(1, 1), (2, 2), (gpu_session.LANES + 1, gpu_session.LANES)])
def test_a_warm_session_has_contexts_and_graphs(tiny_dynamic_engine, trt, device, batches, lanes):
    low, _, high = tiny_dynamic_engine.header.batch_range
    sizes = (low, high)
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        session.warm_up(OPTIONS, batches=batches)
        assert session.timing.pictures == 0
        assert len(session._lanes) == lanes
        captures = device.calls["capture"]
        assert captures == lanes * len(sizes)
        for size in sizes:
            for pending in [session.submit([frame(0)] * size, OPTIONS) for _ in range(lanes)]:
                assert_same(pending.result(), expected(tiny_dynamic_engine, [frame(0)] * size))
        assert device.calls["capture"] == captures
    assert not trt.violations


@pytest.mark.parametrize("room", [10_000, 30_000, 200_000])
def test_too_little_memory_is_one_line(tiny_dynamic_engine, trt, device, room):
    engine = gpu_engine(tiny_dynamic_engine)
    device.memory_limit = room
    message = "the GPU's memory does not suffice (Out of memory allocating "
    with pytest.raises(InferenceError) as caught, GpuSession.open(trt, engine, device) as session:
        session.detect([frame(0)] * 4, OPTIONS)
    assert str(caught.value).startswith(message)
    del caught
    gc.collect()
    assert not device.device_memory
    assert not trt.violations


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])  # tensors, then options, then frames have no room
def test_where_memory_has_no_room_for_a_lane_the_others_do(tiny_engine, trt, device, caplog, share):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for _ in range(2):
            session.submit([frame(0)], OPTIONS)
        used = sum(device.device_memory.values())
        device.memory_limit = used + int(share * used / 2)
        for pending in [session.submit([frame(0)], OPTIONS) for _ in range(5)]:
            assert_same(pending.result(), [wanted])
        assert len(session._lanes) == session.batches_in_flight == 2
    (line,) = caplog.messages
    assert line.startswith("2 batches can be under way at once (the GPU's memory does not suffice (Out of memory alloc")


def test_where_tensorrt_gives_a_lane_no_context_the_others_do(tiny_engine, trt, device, caplog, monkeypatch):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        first = session.submit([frame(0)], OPTIONS)
        monkeypatch.setattr(TrtEngine, "_new_context", lambda *_: None)
        for pending in [first, *(session.submit([frame(0)], OPTIONS) for _ in range(3))]:
            assert_same(pending.result(), [wanted])
        assert len(session._lanes) == session.batches_in_flight == 1
    (line,) = caplog.messages
    assert line.startswith("1 batches can be under way at once (TensorRT gave no execution context")
    assert not trt.violations


def test_options_that_need_too_much_memory_leave_the_others_usable(tiny_engine, trt, device):
    few = NmsOptions(confidence=0.3, classes=(1,))
    (wanted,) = expected(tiny_engine, [frame(0)], few)
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for _ in range(2):
            session.detect([frame(0)], few)
        device.failing["page_locked"] = HostGpuError("Out of memory")
        for _ in range(2):
            with pytest.raises(InferenceError, match="the GPU's memory does not suffice"):
                session.detect([frame(0)], NmsOptions(max_detections=1000))
            assert_same(session.detect([frame(0)], few), [wanted])


def test_an_engine_that_tensorrt_fails_to_run_is_one_line(tiny_dynamic_engine, trt, device):
    (wanted,) = expected(tiny_dynamic_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_dynamic_engine), device) as session:
        trt.failed = "IExecutionContext::enqueueV3: out of luck"
        for count in (4, 1, 3):
            with pytest.raises(InferenceError, match=r"TensorRT failed .*out of luck.*: build the engine again"):
                session.detect([borrowed(session, frame(seed)) for seed in range(count)], OPTIONS)
        gc.collect()
        trt.failed = ""
        assert_same(session.detect([frame(0)], OPTIONS), [wanted])


def test_raw_heads_that_fail_leave_nothing_under_way(tiny_engine, trt, device):
    several = NmsOptions(confidence=0.2, multi_label=True)
    wanted = expected(tiny_engine, [frame(1)], several)
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        trt.failed = "out of luck"
        with pytest.raises(InferenceError, match="TensorRT failed"):
            session.detect([borrowed(session, frame(0))], several)
        assert not any(stream.queue for stream in device.streams.values())
        trt.failed = ""
        assert_same(session.detect([frame(1)], several), wanted)


def test_memory_that_tensorrt_refuses_is_one_line(tiny_engine, trt, device, monkeypatch):
    (wanted,) = expected(tiny_engine, [frame(0)])
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        with monkeypatch.context() as patch:
            patch.setattr("tests.engines.host_gpu._Context.set_tensor_address", lambda *_: False)
            for _ in range(2):
                with pytest.raises(InferenceError, match=r"TensorRT refused the memory of images .*: build it again"):
                    session.detect([frame(0)], OPTIONS)
        assert_same(session.detect([frame(0)], OPTIONS), [wanted])


def test_a_closed_session_says_so(tiny_engine, trt, device):
    session = GpuSession.open(trt, gpu_engine(tiny_engine), device)
    session.close()
    session.close()
    for call in (
        lambda: session.detect([frame(0)], OPTIONS),
        lambda: session.submit([frame(0)], OPTIONS),
        lambda: session.run(np.zeros((1, 3, 64, 64), np.float32)),
        lambda: session.frame_buffer(4, 4),
        lambda: session.profile([frame(0)], OPTIONS),
    ):
        with pytest.raises(InputError, match="the session is closed: open a new one"):
            call()


def test_sessions_share_an_engine_that_goes_with_the_last(tiny_engine, trt, device):
    engine = gpu_engine(tiny_engine)
    (wanted,) = expected(tiny_engine, [frame(0)])
    one, other = (GpuSession.open(trt, engine, device) for _ in range(2))
    assert trt.deserialized == 1
    one.detect([frame(0)], OPTIONS)
    one.close()
    assert_same(other.detect([frame(0)], OPTIONS), [wanted])
    other.close()
    gc.collect()
    assert len(trt.engines) == 0
    assert not device.device_memory
    assert not device.page_locked_memory
    with GpuSession.open(trt, engine, device):
        assert trt.deserialized == 2
    assert not trt.violations


def test_the_same_plan_with_another_header_is_another_engine(tiny_engine, trt, device):
    engine = gpu_engine(tiny_engine)
    renamed = replace(engine, header=replace(engine.header, model=replace(engine.header.model, names=("a", "b", "c"))))
    with GpuSession.open(trt, engine, device), GpuSession.open(trt, renamed, device) as session:
        assert session.header.model.names == ("a", "b", "c")


@pytest.mark.parametrize("fetched", [True, False], ids=["fetched", "pending"])
def test_a_forgotten_session_is_closed_by_the_collector(tiny_engine, trt, device, fetched):
    session = GpuSession.open(trt, gpu_engine(tiny_engine), device)
    pending = session.submit([frame(0)], OPTIONS)
    if fetched:
        pending.result()
    del session, pending
    gc.collect()
    assert len(trt.engines) == 0
    assert not device.device_memory
    assert not trt.violations


def test_a_closing_session_frees_its_memory_while_the_gpu_is_current(tiny_engine, trt, device):
    with GpuSession.open(trt, gpu_engine(tiny_engine), device) as session:
        for found in [session.submit([frame(seed)], OPTIONS) for seed in range(gpu_session.LANES)]:
            found.result()
        del found
    gc.collect()
    assert not device.device_memory
    assert device.freed_elsewhere == 0


def test_freed_memory_shows_in_these_tests(device):
    with device.current():
        memory = device.allocate(16)
        address = memory.address
        del memory
    np.testing.assert_array_equal(bytes_at(address, 16), FREED)
