"""Fixtures that several test modules share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.reference import all_weights
from yolotrt import BuildOptions, build_engine, load_weights
from yolotrt.engines.file import EngineFile
from yolotrt.weights import Metadata, Weights

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"

TINY_CLASSES = ("cat", "dog", "bird")
TINY_SIZE = 64
TINY_ANCHORS = (
    ((4.0, 5.0), (8.0, 6.0), (10.0, 12.0)),
    ((16.0, 12.0), (14.0, 24.0), (24.0, 20.0)),
    ((32.0, 24.0), (28.0, 40.0), (48.0, 44.0)),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU where there is none."""
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference checkpoints, pictures and outputs of the official YOLOv5 code."""
    if not GOLDEN.is_dir():
        pytest.skip("the reference data (../shared/golden) are not on this machine")
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_weights() -> Weights:
    """A detector for three classes and 64 x 64 pixels with random weights, which builds in milliseconds."""
    rows = [
        [-1, 1, "Conv", [8, 6, 2, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],  # stride 8
        [-1, 1, "Conv", [16, 3, 2]],  # stride 16
        [-1, 1, "Conv", [16, 3, 2]],  # stride 32
        [[2, 3, 4], 1, "Detect", ["nc", "anchors"]],
    ]
    metadata = Metadata(
        yaml={"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "backbone": rows[:5], "head": rows[5:]},
        names=TINY_CLASSES,
        strides=(8, 16, 32),
        anchors=TINY_ANCHORS,
        imgsz=(TINY_SIZE, TINY_SIZE),
        version="v6.2+",
        source_sha256="5" * 64,
    )
    return Weights(dict(_tiny_tensors()), metadata)


def _tiny_tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Random arrays of a scale that keeps the values of a picture from vanishing, so that there are detections."""
    random = np.random.RandomState(5)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    for index, (c1, c2, k) in enumerate([(3, 8, 6), (8, 8, 3), (8, 8, 3), (8, 16, 3), (16, 16, 3)]):
        yield f"model.{index}.conv.weight", normal(c2, c1, k, k) * np.float32(2 / np.sqrt(c1 * k * k))
        yield f"model.{index}.bn.weight", np.ones(c2, np.float32)
        yield f"model.{index}.bn.bias", normal(c2) / 10
        yield f"model.{index}.bn.running_mean", normal(c2) / 10
        yield f"model.{index}.bn.running_var", np.ones(c2, np.float32)
    for level, c1 in enumerate((8, 16, 16)):
        yield f"model.5.m.{level}.weight", normal(24, c1, 1, 1)
        yield f"model.5.m.{level}.bias", normal(24)


@pytest.fixture(scope="session")
def tiny_engine(tiny_weights: Weights) -> EngineFile:
    """An engine of `tiny_weights` for one picture, in memory."""
    return build_engine(tiny_weights, backend="onnxruntime")


@pytest.fixture(scope="session")
def tiny_dynamic_engine(tiny_weights: Weights) -> EngineFile:
    """An engine of `tiny_weights` for one to four pictures, in memory."""
    return build_engine(tiny_weights, backend="onnxruntime", options=BuildOptions(max_batch=4))


@pytest.fixture(scope="session")
def tiny_segment_engine() -> EngineFile:
    """An engine for segmentation with random weights, for one or two pictures of 64 x 64 pixels."""
    rows = [
        [-1, 1, "Conv", [8, 6, 2, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],  # stride 8
        [-1, 1, "Conv", [16, 3, 2]],  # stride 16
        [[2, 3], 1, "Segment", ["nc", "anchors", 4, 8]],
    ]
    metadata = Metadata(
        yaml={"nc": 3, "backbone": rows[:4], "head": rows[4:]},
        names=TINY_CLASSES,
        strides=(8, 16),
        anchors=TINY_ANCHORS[:2],
        task="segment",
        imgsz=(TINY_SIZE, TINY_SIZE),
    )
    return build_engine(all_weights(metadata), backend="onnxruntime", options=BuildOptions(max_batch=2))


@pytest.fixture(scope="session")
def tiny_classifier_engine() -> EngineFile:
    """A classifier's engine with random weights, for one or two pictures of 32 x 32 pixels."""
    rows = [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Classify", ["nc"]]]
    names = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
    yaml = {"nc": len(names), "backbone": rows, "head": []}
    metadata = Metadata(yaml=yaml, names=names, task="classify", imgsz=(32, 32))
    return build_engine(all_weights(metadata), backend="onnxruntime", options=BuildOptions(max_batch=2))


@pytest.fixture(scope="session")
def yolov5n_engine(golden: Path) -> EngineFile:
    """An engine of the official yolov5n, 640 x 640, in memory."""
    return build_engine(load_weights(golden / "weights" / "yolov5n.pt"), backend="onnxruntime")
