"""One small Ray cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolotrt.engines.file import EngineFile


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """The module ray, with two CPUs."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    memory = 200 * 1024 * 1024
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=memory)
    yield ray
    ray.shutdown()


@pytest.fixture
def engine_path(tmp_path: Path, tiny_dynamic_engine: EngineFile) -> Path:
    """An engine for up to four pictures."""
    return tiny_dynamic_engine.save(tmp_path / "tiny.engine").path


def noise(number: int) -> np.ndarray:
    """A picture of a size of its own."""
    return np.random.RandomState(number).randint(0, 256, (50 + number % 7, 60 + number % 5, 3), np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures without loss, and a broken one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(10):
        cv2.imwrite(str(folder / f"{number}.png"), noise(number))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    return folder
