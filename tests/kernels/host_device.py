"""A device for yolotrt.cuda.kernels that runs the kernels' own sources on the CPU, compiled as C++."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yolotrt.cuda.compile import Defines, kernel_source

COMPILER = os.environ.get("CXX", "g++")
HEADER = Path(__file__).with_name("host_cuda.h")
FAILURES = {
    1: "the arguments do not fit the kernel's parameters",
    2: "a barrier was skipped",
    3: "the block has too many threads",
}
WRAPPER = """
extern "C" int run_{0}(const int* grid, const int* block, int descending, int count, void** arguments, const int* sizes)
{{ return host_cuda::launch({0}, grid, block, descending, count, arguments, sizes); }}
"""


class HostDevice:
    """Runs kernels on the CPU; "device" pointers are addresses of NumPy arrays.

    Attributes:
        descending: Whether a block's threads run from the last to the first.
    """

    def __init__(self) -> None:
        self.descending = False
        self._folder = Path(tempfile.mkdtemp(prefix="host_kernels_"))

    def function(self, source: str, entry: str, defines: Defines):
        return getattr(self._library(kernel_source(source, defines)), f"run_{entry}")

    def launch(
        self,
        function,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[np.generic],
        stream: object = None,
        shared_bytes: int = 0,
    ) -> None:
        values = [np.array(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = (ctypes.c_int * len(values))(*(value.itemsize for value in values))
        status = function(
            (ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block), int(self.descending), len(values), addresses, sizes
        )
        if status:
            raise AssertionError(FAILURES[status])

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _library(self, code: str) -> ctypes.CDLL:
        name = hashlib.sha256(code.encode()).hexdigest()[:16]
        library, program = self._folder / f"{name}.so", self._folder / f"{name}.cpp"
        if not library.exists():
            entries = re.findall(r'extern "C" __global__ void\s+(?:__launch_bounds__\(\w+\)\s*)?(\w+)', code)
            program.write_text(f'#include "{HEADER}"\n{code}\n' + "".join(map(WRAPPER.format, entries)))
            # the coroutines' jumps between stacks are what fortified longjmp refuses; contraction as on the device
            options = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
            options += ["-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-w"]
            subprocess.run([COMPILER, *options, "-o", library, program], check=True)
        return ctypes.CDLL(str(library))


class HostMachine:
    """A `comparisons.Machine` on the CPU: uploading is copying."""

    def __init__(self) -> None:
        self.device = HostDevice()

    def upload(self, array: np.ndarray) -> np.ndarray:
        return np.array(array, order="C")

    page_lock = upload

    def address(self, buffer: np.ndarray) -> int:
        return buffer.ctypes.data

    def download(self, buffer: np.ndarray) -> np.ndarray:
        return buffer

    def close(self) -> None:
        self.device.close()
