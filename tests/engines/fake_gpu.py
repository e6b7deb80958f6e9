"""A GPU that is not there, and a runtime that notes what it is given."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from yolotrt.cuda import device
from yolotrt.errors import BackendUnavailableError

GIB = 1 << 30


@dataclass
class FakeGpu:
    """As `yolotrt.engines.gpu.Gpu`; an H200 unless a test wants another."""

    name: str = "NVIDIA Test"
    capability: tuple[int, int] = (9, 0)
    free: int = 139 * GIB
    total: int = 140 * GIB

    def memory_info(self) -> tuple[int, int]:
        return self.free, self.total


def install_gpu(monkeypatch: pytest.MonkeyPatch, **properties: Any) -> FakeGpu:
    """Put a GPU into this machine."""
    gpu = FakeGpu(**properties)
    monkeypatch.setattr(device, "find_device", lambda: gpu, raising=False)
    return gpu


def install_no_gpu(monkeypatch: pytest.MonkeyPatch, reason: str = "no driver") -> None:
    """Take all GPUs out of this machine."""

    def find_device() -> FakeGpu:
        raise BackendUnavailableError(reason)

    monkeypatch.setattr(device, "find_device", find_device, raising=False)


def install_session(monkeypatch: pytest.MonkeyPatch, opened: list[Any]) -> None:
    """Take a runtime that notes (library, engine) in `opened` and gives the word ``session``."""
    module: Any = ModuleType("yolotrt.engines.gpu_session")

    def open_gpu_session(library: Any, engine: Any) -> str:
        opened.append((library, engine))
        return "session"

    module.open_gpu_session = open_gpu_session
    monkeypatch.setitem(sys.modules, module.__name__, module)
