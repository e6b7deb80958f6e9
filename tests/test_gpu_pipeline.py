"""The benchmarks of GPUs run, on a GPU that is none; their figures mean nothing here."""

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
from yolotrt.engines.trt_engine import TrtEngine


def load(name: str) -> ModuleType:
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tensorrt(monkeypatch, device) -> FakeTensorRt:  # noqa: F811
    """TensorRT and a GPU, which benchmarks find."""
    monkeypatch.setattr(device_module, "DEVICES", {"host": lambda _: device})
    monkeypatch.setattr(device_module, "_open", {})
    monkeypatch.delenv(device_module.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(device))
    return sys.modules["tensorrt"]


@pytest.fixture
def benchmark(monkeypatch, tensorrt) -> ModuleType:
    """benchmarks/gpu_pipeline.py, which repeats little."""
    module = load("gpu_pipeline")
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


def test_engines_are_timed_in_turn_and_layer_by_layer(
    tensorrt, tiny_engine, tiny_dynamic_engine, tmp_path, monkeypatch, capsys
):
    module = load("int8_gpu")

    class Profiler:
        def __init__(self) -> None:
            for name, milliseconds in (("a.conv", 0.25), ("b.conv", 0.5), ("a.conv", 0.75)):
                self.report_layer_time(name, milliseconds)

    tensorrt.IProfiler = Profiler
    convolution = {
        "Name": "a.conv",
        "LayerType": "CaskConvolution",
        "TacticName": "sm80_i8",
        "Inputs": [{"Dimensions": [1, 3, 8, 8], "Format/Datatype": "Int8"}],
        "Outputs": [],
    }
    monkeypatch.setattr(TrtEngine, "layers", lambda *_: [convolution, {"Name": "not profiled"}])
    paths, layers = [tmp_path / "one.engine", tmp_path / "four.engine"], tmp_path / "layers.json"
    for path, engine in zip(paths, (tiny_engine, tiny_dynamic_engine), strict=True):
        gpu_engine(engine).save(path)
    module.main([*map(str, paths), "--turns", "2", "--layers", str(layers)])
    printed = capsys.readouterr().out
    for line in ("| one | 1 | ", "| four | 4 | ", "## four: 2 layers, 1.000 ms", "| CaskConvolution | 1 | 0.500 |"):
        assert line in printed
    found = json.loads(layers.read_text())["one"]
    assert found[0] == {
        "name": "a.conv",
        "ms": 0.5,
        "type": "CaskConvolution",
        "kernel": "sm80_i8",
        "inputs": ["[1, 3, 8, 8] Int8"],
        "outputs": [],
    }
    assert (found[1]["name"], found[1]["ms"], found[1]["type"]) == ("b.conv", 0.5, "")
