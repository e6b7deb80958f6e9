"""mAP50-95 of INT8 variants of a model before any of them is built, where labels are given."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from yolotrt.engines.base import BuildOptions, CompleteOptions
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.file import EngineFile
from yolotrt.evaluation.run import Data, evaluate_engine, require_packages
from yolotrt.network import recorder
from yolotrt.network.quantize import Placement, Quantization
from yolotrt.weights import Weights


class Accuracy:
    """Evaluates by YOLOv5's protocol with ONNX Runtime on the CPU, whatever library the roundings are placed for."""

    def __init__(self, weights: Weights, imgsz: tuple[int, int], labels: Path) -> None:
        """Prepare evaluations.

        Args:
            weights: The model.
            imgsz: Network input height and width in pixels.
            labels: A YOLO data.yaml or a COCO json.

        Raises:
            BackendUnavailableError: if a package is missing.
        """
        from yolotrt.engines.build import build_engine

        require_packages()
        self._weights = weights
        self._data = Data(labels)
        self._float = build_engine(
            weights, backend="onnxruntime", options=BuildOptions(precision="fp32", imgsz=imgsz, max_batch=1)
        )

    def of_float(self) -> float:
        """MAP50-95 of the float network, 0..1.

        Raises:
            InputError: if the data cannot be used.
        """
        return self._measure(self._float)

    def of_int8(self, quantization: Quantization, placement: Placement) -> float:
        """MAP50-95 of an INT8 network, 0..1.

        Args:
            quantization: Scales and layers to keep.
            placement: The library's.

        Raises:
            InputError: if the data cannot be used.
        """
        header = self._float.header
        options = CompleteOptions("int8", header.imgsz, (1, 1, 1), quantization=quantization)
        plan = build_plan(recorder, self._weights, options, BuildHooks(placement)).data
        checksum = hashlib.sha256(plan).hexdigest()
        return self._measure(EngineFile(replace(header, plan_sha256=checksum, plan_size=len(plan)), plan))

    def _measure(self, engine: EngineFile) -> float:
        return evaluate_engine(engine, self._data).metrics.map or 0.0
