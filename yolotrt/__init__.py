"""YOLOv5 on TensorRT, in Python.

    from yolotrt import Detector, build_engine

    build_engine("yolov5s.pt", "yolov5s.engine")
    detections = Detector("yolov5s.engine")("bus.jpg")
    print(detections.names, detections.confidence, detections.xyxy)

Importing this package imports nothing heavy; each part is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolotrt.detections import Classification, Detections
    from yolotrt.detector import Detector
    from yolotrt.engines.base import BuildOptions
    from yolotrt.engines.build import build_engine
    from yolotrt.errors import YolotrtError
    from yolotrt.weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "BuildOptions",
    "Classification",
    "Detections",
    "Detector",
    "YolotrtError",
    "__version__",
    "build_engine",
    "load_weights",
]

_HOMES = {
    "BuildOptions": "yolotrt.engines.base",
    "Classification": "yolotrt.detections",
    "Detections": "yolotrt.detections",
    "Detector": "yolotrt.detector",
    "YolotrtError": "yolotrt.errors",
    "build_engine": "yolotrt.engines.build",
    "load_weights": "yolotrt.weights",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'yolotrt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
