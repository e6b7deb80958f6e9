"""GpuSession on a GPU that is none: its boxes are those of the CPU's session, whatever the frames and their order."""

from __future__ import annotations

import gc
import logging
import shutil
import threading
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.engines.host_gpu import FREED, FakeTensorRt, HostGpuDevice, HostGpuError, gpu_engine
from tests.kernels.host_device import COMPILER, HostDevice
from yolotrt import BuildOptions, build_engine
from yolotrt.engines.base import Session
from yolotrt.engines.build import open_session
from yolotrt.engines.file import EngineFile
from yolotrt.engines.gpu_session import GpuSession
from yolotrt.engines.onnx import OnnxRuntimeSession
from yolotrt.errors import ImageError, InferenceError, InputError
from yolotrt.media.images import read_image
from yolotrt.postprocess import Boxes, NmsOptions
from yolotrt.weights import Weights

OPTIONS = NmsOptions(confidence=0.3)
SIZES = ((64, 64), (48, 80), (130, 200), (300, 210), (33, 21), (7, 90), (1, 1), (192, 192))
"""Of frames: a copy, odd ones, of which all rows are needed and of which not."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[HostDevice]:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to build the kernels for the CPU")
    device = HostDevice()
    yield device
    device.close()


@pytest.fixture
def device(kernels) -> HostGpuDevice:
    return HostGpuDevice(kernels)


@pytest.fixture
def trt(device) -> FakeTensorRt:
    return FakeTensorRt(device)


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
        super().__init__(engine)
        self._input_type = np.float16 if half_input else np.float32
        self._head_type = np.float16 if half_heads else np.float32

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        heads = super().run(images.astype(self._input_type).astype(np.float32))
        return [head.astype(self._head_type).astype(np.float32) for head in heads]


def expected(engine: EngineFile, frames: Sequence[np.ndarray], options: NmsOptions = OPTIONS) -> list[Boxes]:
    """The boxes of each frame alone, or first of a batch that is filled up."""
    with open_session(engine) as session:
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
