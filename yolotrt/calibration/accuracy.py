"""mAP50-95 of INT8 variants of a model before any of them is built, where labels are given."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from yolotrt.engines.base import BuildOptions, CompleteOptions
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.file import EngineFile
from yolotrt.errors import InputError
from yolotrt.evaluation.run import Data, evaluate_engine, require_packages
from yolotrt.network import recorder
from yolotrt.network.quantize import Placement, Quantization
from yolotrt.shell import print_beside_progress
from yolotrt.weights import Weights

_log = logging.getLogger(__name__)

MAX_LOSS = 0.005
"""``auto`` keeps rows in high precision until INT8 loses no more of mAP50-95 than this."""

MAX_TRIED_ROWS, MAX_KEPT_ROWS = 5, 3
"""``auto`` tries so many rows, each of which costs an evaluation, and keeps so many of them."""


class Accuracy:
    """Evaluates by YOLOv5's protocol with ONNX Runtime on the CPU, whatever library the roundings are placed for.

    A network that was evaluated is not evaluated again. What is wrong with the data is said once.
    """

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
        self._found: dict[str, float] = {}
        self._float = build_engine(
            weights, backend="onnxruntime", options=BuildOptions(precision="fp32", imgsz=imgsz, max_batch=1)
        )

    def of_float(self) -> float:
        """MAP50-95 of the float network, 0..1.

        Raises:
            InputError: if the data cannot be used, or no label is left of them.
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
        key = engine.header.plan_sha256
        if key not in self._found:
            evaluation = evaluate_engine(engine, self._data)
            if not self._found:  # the data are the same each time
                for line in evaluation.dataset.problems.lines():
                    print_beside_progress(f"note: {line}")
            if evaluation.metrics.map is None:
                raise InputError(f"dataset {self._data.path} has no label in a picture that can be read: check it")
            self._found[key] = evaluation.metrics.map
        return self._found[key]


def keep_until_accurate(
    accuracy: Accuracy, rows: Iterator[str], scales: Mapping[str, float], keep: tuple[str, ...], placement: Placement
) -> tuple[str, ...]:
    """Keep rows in high precision until INT8 loses at most `MAX_LOSS`.

    Args:
        accuracy: Measures the loss.
        rows: Rows of the yaml, such as ``model.17``, the most promising first; only asked for if needed.
        scales: Of the tensors, by name.
        keep: Layers that are kept anyway.
        placement: The library's.

    Returns:
        `keep` and the rows that are kept as well.

    Raises:
        InputError: if the data cannot be used.
    """
    aim = accuracy.of_float() - MAX_LOSS
    best = accuracy.of_int8(Quantization(scales, keep), placement)
    if best >= aim:
        return keep
    candidates = list(islice(rows, MAX_TRIED_ROWS))
    for _ in range(MAX_KEPT_ROWS):
        found = {}
        for row in candidates:
            found[row] = accuracy.of_int8(Quantization(scales, (*keep, row)), placement)
            if found[row] >= aim:
                return (*keep, row)
        better = [row for row in candidates if found[row] > best]
        if not better:
            break
        row = max(better, key=lambda row: found[row])
        keep, best = (*keep, row), found[row]
        candidates.remove(row)
    _log.warning(
        "INT8 loses %.4f of mAP50-95 with %d layers or rows kept in high precision, more than the %.4f aimed at: "
        "take calibration pictures that look like those of later use, or --precision fp16",
        aim + MAX_LOSS - best,
        len(keep),
        MAX_LOSS,
    )
    return keep
