"""The benchmark of the way of a frame on a GPU runs, on a GPU that is none; its figures mean nothing here."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from types import ModuleType

import cv2
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.engines.conftest import device, kernels  # noqa: F401  # fixtures
from tests.engines.host_gpu import FakeTensorRt, gpu_engine
from yolotrt.cuda import device as device_module
from yolotrt.cuda.kernels import NmsLayout
from yolotrt.engines import gpu_session
from yolotrt.engines.gpu_session import GpuSession


@pytest.fixture
def benchmark(monkeypatch, device) -> ModuleType:  # noqa: F811
    """benchmarks/gpu_pipeline.py, which finds that GPU and repeats little."""
    spec = importlib.util.spec_from_file_location("gpu_pipeline", ROOT / "benchmarks" / "gpu_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(device_module, "DEVICES", {"host": lambda _: device})
    monkeypatch.setattr(device_module, "_open", {})
    monkeypatch.delenv(device_module.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(device))
    # the selecting block of nms.cu gets fewer threads, which the CPU runs one after the other
    monkeypatch.setattr(gpu_session, "NmsLayout", functools.partial(NmsLayout, threads=128))
    monkeypatch.setattr(module, "FRAME", (180, 320))
    monkeypatch.setattr(GpuSession, "profile", functools.partialmethod(GpuSession.profile, repeats=2))
    monkeypatch.setattr(module, "median_us", functools.partial(module.median_us, runs=2))
    return module


def test_every_figure_is_there(benchmark, tiny_engine, tiny_dynamic_engine, tmp_path, monkeypatch, capsys):
    picture, figures = tmp_path / "picture.png", tmp_path / "figures.json"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8))
    paths = [tmp_path / "b1.engine", tmp_path / "b4.engine"]
    for path, engine in zip(paths, (tiny_engine, tiny_dynamic_engine), strict=True):
        gpu_engine(engine).save(path)
    options = ["--picture", str(picture), "--seconds", "0.01", "--json", str(figures), "--soak", "30"]
    monkeypatch.setattr(sys, "argv", ["gpu_pipeline.py", *map(str, paths), *options])
    benchmark.main()
    printed = capsys.readouterr().out
    single, batch, soak = json.loads(figures.read_text())["results"]
    for result, size in ((single, 1), (batch, 4)):
        assert result["batch"] == size
        assert list(result["stages_us"]) == ["upload", "letterbox", "engine", "yololayer", "nms", "whole"]
        assert sorted(result["pipelined_by_lanes"]) == ["1", "2", "3", "4", "5"]
        assert result["pipelined"] == result["pipelined_by_lanes"][str(gpu_session.LANES)]
        assert all(case["fps"] > 0 and case["thread_us"] > 0 for case in result["pipelined_by_lanes"].values())
    assert single["plain"]["fps"] > 0
    assert batch["plain"] is None
    assert soak["soak"][-1][0] >= 30
    for line in ("| pipelined, 5 under way |", "| latency, ordinary memory |", "| plain script |", "30 frames: host"):
        assert line in printed
