"""What a measurement ran on: processor, clocks, GPU, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import yolotrt

LIBRARIES = (
    "numpy", "opencv-python", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "cupy-cuda13x", "faster-coco-eval",
)  # fmt: skip
"""Distributions whose version a figure depends on."""

_GPU_FIELDS = {
    "name": "",
    "driver_version": "driver ",
    "clocks.sm": "SM ",
    "clocks.max.sm": "SM at most ",
    "clocks.mem": "memory ",
    "power.limit": "power limit ",
    "temperature.gpu": "degrees Celsius ",
}
"""What nvidia-smi is asked for, and the word before the answer."""


def describe_machine() -> dict[str, str]:
    """The machine, the clocks at this moment and the versions, as words for the header of a report."""
    described = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "yolotrt": yolotrt.__version__,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": _processor(),
        "load": _load(),
    }
    gpu = _gpu()
    if gpu:
        described["GPU"] = gpu
    described["libraries"] = ", ".join(_versions())
    return described


def _processor() -> str:
    """Model, cores that this process may use, and their clocks."""
    words = _cpuinfo("model name")
    model = words[0] if words else platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    clocks = [float(word) for word in _cpuinfo("cpu MHz")]
    at = f", at {min(clocks):.0f} to {max(clocks):.0f} MHz" if clocks else ""
    return f"{model}, {usable} cores usable{at}"


def _cpuinfo(key: str) -> list[str]:
    """The values of one key of /proc/cpuinfo; none where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def _load() -> str:
    """How busy the machine is: processes that want to run, mean of the last minute."""
    return f"{os.getloadavg()[0]:.1f} in the last minute" if hasattr(os, "getloadavg") else "unknown"


def _gpu() -> str:
    """The first GPU and its clocks, as nvidia-smi says; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    first = (answer.splitlines() or [""])[0].split(",")
    return ", ".join(f"{word}{value.strip()}" for word, value in zip(_GPU_FIELDS.values(), first, strict=False))


def _versions() -> list[str]:
    """Name and version of the libraries that are installed."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
