"""The host build notices what would go wrong on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from yolotrt.cuda import compile as compiling

SKIPPED = 'extern "C" __global__ void kernel(int* values) { if (threadIdx.x < 3) __syncthreads(); }'
UNSYNCHRONIZED = """
extern "C" __global__ void kernel(int* values)
{
    __shared__ int shared[64];
    shared[threadIdx.x] = values[threadIdx.x];
    BARRIER
    values[threadIdx.x] = shared[63 - threadIdx.x];
}
"""


@pytest.fixture
def run(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_FOLDERS", (tmp_path,))

    def run(source, *arguments, descending=False):
        (tmp_path / "kernel.cu").write_text(source)
        machine.device.descending = descending
        try:
            machine.device.launch(machine.device.function("kernel", "kernel", {}), (1, 1, 1), (64, 1, 1), arguments)
        finally:
            machine.device.descending = False

    return run


def test_a_barrier_that_some_threads_skip_is_an_error(run):
    with pytest.raises(AssertionError, match="a barrier was skipped"):
        run(SKIPPED, np.uint64(0))


@pytest.mark.parametrize("arguments", [(), (np.int32(0),), (np.uint64(0), np.int32(0))])
def test_arguments_that_do_not_fit_are_an_error(run, arguments):
    with pytest.raises(AssertionError, match="do not fit"):
        run(UNSYNCHRONIZED.replace("BARRIER", ""), *arguments)


@pytest.mark.parametrize(("barrier", "reversed_everywhere"), [("", False), ("__syncthreads();", True)])
def test_a_missing_barrier_shows_in_the_result(run, barrier, reversed_everywhere):
    values = np.arange(64, dtype=np.int32)
    run(UNSYNCHRONIZED.replace("BARRIER", barrier), np.uint64(values.ctypes.data))
    assert np.array_equal(values, np.arange(64)[::-1]) == reversed_everywhere
