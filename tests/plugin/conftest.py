"""The bindings of TensorRT versions that have ahead-of-time plugins."""

from __future__ import annotations

import pytest

from tests.plugin.trt_bindings import Bindings, find_bindings


@pytest.fixture(scope="session", params=["10.13.0.35", "11.4.0.106"])
def bindings(request) -> Bindings:
    return find_bindings(request.param)
