"""Without CuPy or a GPU there is one clear line, and importing loads neither."""

from __future__ import annotations

import subprocess
import sys

import pytest

from yolotrt.cuda.device import CupyDevice
from yolotrt.errors import BackendUnavailableError


def test_importing_loads_no_gpu_library():
    code = "import sys, yolotrt.cuda.device, yolotrt.cuda.kernels; print({'cupy', 'cuda', 'pycuda'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_missing_cupy_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailableError, match=r"CuPy is not installed .*: install yolotrtx\[gpu\]") as caught:
        CupyDevice()
    assert "\n" not in str(caught.value)
