"""NVDEC needs a GPU; here a stand-in for PyNvVideoCodec decodes with PyAV, and NumPy stands in for CuPy."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.media.videos import make_video
from yolotrt.cli import main
from yolotrt.errors import BackendUnavailableError, VideoError
from yolotrt.media.frames import Span, host_memory
from yolotrt.media.nvdec import read_video_on_gpu, to_host
from yolotrt.media.video import read_video

av = pytest.importorskip("av")


class Decoder:
    """Like PyNvVideoCodec.SimpleDecoder: frames by number, RGB as stored, in memory that is used again."""

    def __init__(self, path: str, *, gpu_id: int, use_device_memory: bool, output_color_type: str) -> None:
        assert (gpu_id, use_device_memory, output_color_type) == (0, True, "RGB")
        with av.open(path) as container:
            if container.streams.video[0].codec_context.name == "mpeg4":
                raise RuntimeError("codec not supported")
            self._frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        self._memory = np.empty_like(self._frames[0])

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> np.ndarray:
        self._memory[:] = self._frames[index]
        return self._memory


@pytest.fixture
def gpu(monkeypatch):
    codec = ModuleType("PyNvVideoCodec")
    codec.SimpleDecoder, codec.OutputColorType = Decoder, SimpleNamespace(RGB="RGB")
    cupy = ModuleType("cupy")
    for name in ("from_dlpack", "ascontiguousarray", "rot90", "asarray"):
        setattr(cupy, name, getattr(np, name))
    cupy.asnumpy = np.array
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", codec)
    monkeypatch.setitem(sys.modules, "cupy", cupy)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("span", [Span(), Span(stride=3, start_s=0.2, end_s=0.9), Span(start_s=5)])
def test_frames_and_times_are_those_of_the_cpu(gpu, tmp_path, rotation, span):
    path = make_video(tmp_path / "a.mp4", rotation=rotation)
    expected = list(read_video(path, host_memory, span))
    got = list(read_video_on_gpu(path, host_memory, span))
    assert [(f.index, f.time_s) for f in got] == [(f.index, pytest.approx(f.time_s)) for f in expected]
    for device, host in zip(got, expected, strict=True):
        assert device.image.flags.c_contiguous
        np.testing.assert_array_equal(device.image, host.image)
        assert (device.clip.rate, device.clip.height) == (host.clip.rate, host.clip.height)


def test_frames_in_device_memory_come_to_the_host_to_be_drawn(gpu):
    class DeviceArray:
        def __array__(self, dtype=None, copy=None):
            return np.full((2, 2, 3), 7, np.uint8)

    np.testing.assert_array_equal(to_host(DeviceArray()), np.full((2, 2, 3), 7))


def test_a_codec_that_the_gpu_lacks_is_named(gpu, tmp_path):
    path = make_video(tmp_path / "a.mp4", codec="mpeg4")
    with pytest.raises(VideoError, match=r"cannot be decoded by this GPU \(codec not supported\): leave out --nv"):
        list(read_video_on_gpu(path, host_memory, Span()))


@pytest.mark.parametrize("missing", ["PyNvVideoCodec", "cupy"])
def test_a_missing_library_is_named(gpu, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BackendUnavailableError, match=rf'{missing} cannot be loaded .*: run .*"yolotrtx\[gpu,nvdec\]"'):
        list(read_video_on_gpu(Path("a.mp4"), host_memory, Span()))


def test_the_option_decodes_on_the_gpu(gpu, tmp_path, tiny_engine, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_engine.save("tiny.engine")
    make_video(Path("a.mp4"), 5)
    assert main(["-d", "a.mp4", "--engine", "tiny.engine", "--nvdec", "--save-json", "r.json"]) == 0
    assert capsys.readouterr().out.startswith("5 frames of 1 video: ")
