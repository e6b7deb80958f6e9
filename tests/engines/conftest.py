"""A GPU that is none, for the tests of sessions and engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.engines.host_gpu import FakeTensorRt, HostGpuDevice
from tests.kernels.host_device import COMPILER, HostDevice


@pytest.fixture(scope="session")
def kernels() -> Iterator[HostDevice]:
    """The kernels' sources, compiled for the CPU."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to build the kernels for the CPU")
    device = HostDevice()
    yield device
    device.close()


@pytest.fixture
def device(kernels: HostDevice) -> HostGpuDevice:
    """A GPU on the CPU."""
    return HostGpuDevice(kernels)


@pytest.fixture
def trt(device: HostGpuDevice) -> FakeTensorRt:
    """TensorRT 10 on it."""
    return FakeTensorRt(device)
