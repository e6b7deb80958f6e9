"""The benchmark of the video pipeline runs, with its stand-in for a detector."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tests.media.videos import make_video

pytest.importorskip("av")


@pytest.fixture
def benchmark(monkeypatch) -> ModuleType:
    """benchmarks/pipeline.py, with a short clip."""
    spec = importlib.util.spec_from_file_location("pipeline", ROOT / "benchmarks" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CLIP_FRAMES", 10)
    return module


def call(benchmark: ModuleType, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *options])
    benchmark.main()


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_resident_memory_is_printed_on_the_way(benchmark, monkeypatch, capsys):
    call(benchmark, monkeypatch, "memory", "--frames", "20")
    printed = capsys.readouterr().out
    assert printed.count("MiB") == 10
    assert "20 frames of 1 video: " in printed


def test_each_stage_and_the_run_have_a_rate(benchmark, monkeypatch, capsys, tmp_path):
    clip: Path = tmp_path / "clip.mp4"
    make_video(clip, 6)
    call(benchmark, monkeypatch, "speed", str(clip), "--device-ms", "1", "--rounds", "1")
    rates = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith(" frames/s")]
    assert rates == ["decode", "detect", "draw", "encode", "run"]
