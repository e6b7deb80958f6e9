"""The kernels' sources, compiled for the CPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers below are shared with tests/gpu

from host_device import COMPILER, HostMachine


@pytest.fixture(scope="session")
def machine() -> Iterator[HostMachine]:
    """Runs kernels on the CPU."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER}) to build the kernels for the CPU")
    machine = HostMachine()
    yield machine
    machine.close()
