"""One evaluation from engine and data to figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolotrt.engines.build import open_session, require_boxes
from yolotrt.engines.file import EngineFile
from yolotrt.errors import BackendUnavailableError, InputError
from yolotrt.evaluation.bootstrap import Comparison, compare
from yolotrt.evaluation.dataset import Dataset, read_dataset
from yolotrt.evaluation.matching import (
    ClassMatches,
    OperatingCurves,
    confusion_matrix,
    match,
    operating_curves,
)
from yolotrt.evaluation.metrics import Measurement, Metrics, measure
from yolotrt.evaluation.predict import Measured, Predictions, predict

_PACKAGES = {"faster_coco_eval": "faster-coco-eval", "matplotlib": "matplotlib", "yaml": "PyYAML"}


@dataclass(frozen=True)
class Data:
    """Which pictures to evaluate with; see `read_dataset`.

    Attributes:
        path: A YOLO data.yaml or a COCO json.
        images: The folder of a COCO json's pictures.
        split: Which pictures of a data.yaml.
        limit: Take at most so many pictures.
    """

    path: Path
    images: Path | None = None
    split: str = "val"
    limit: int | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known of an engine after its evaluation.

    Attributes:
        engine: The engine.
        dataset: The pictures and what is wrong with their labels.
        predictions: What it found.
        measurement: COCO's figures.
        matches: Which box found which label, by class.
        curves: Precision, recall and F1 against the confidence.
        confusion: Which class was taken for which.
    """

    engine: EngineFile
    dataset: Dataset
    predictions: Predictions
    measurement: Measurement
    matches: Sequence[ClassMatches]
    curves: OperatingCurves
    confusion: Any

    @property
    def pictures(self) -> Sequence[Measured]:
        """Every picture that could be read."""
        return self.predictions.pictures

    @property
    def metrics(self) -> Metrics:
        """COCO's figures."""
        return self.measurement.metrics


def require_packages() -> None:
    """Raise before the work if a package that the evaluation needs is missing.

    Raises:
        BackendUnavailableError: which names the packages.
    """
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendUnavailableError(f'evaluation needs {", ".join(missing)}: run pip install "yolotrtx[eval]"')


def evaluate_engine(engine: EngineFile, data: Data, *, threads: int | None = None) -> Evaluation:
    """Evaluate an engine by YOLOv5's protocol; see `yolotrt.evaluation.predict.PROTOCOL`.

    Args:
        engine: The engine.
        data: Labelled pictures.
        threads: CPU threads of ONNX Runtime; None takes one a physical core.

    Raises:
        InputError: if the data or the engine cannot be used.
        BackendUnavailableError: if a library is not installed.
    """
    require_boxes(engine, "mAP is of boxes")
    names = engine.header.model.names
    dataset = read_dataset(data.path, names, images=data.images, split=data.split, limit=data.limit)
    with open_session(engine, threads=threads) as session:
        predictions = predict(session, dataset)
    pictures = predictions.pictures
    matches = match(pictures, len(names))
    return Evaluation(
        engine=engine,
        dataset=dataset,
        predictions=predictions,
        measurement=measure(pictures, names),
        matches=matches,
        curves=operating_curves(matches),
        confusion=confusion_matrix(pictures, len(names)),
    )


def compare_evaluations(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two engines on the same pictures; the difference is the second's figure minus the first's.

    Raises:
        InputError: if they differ in their classes or in the pictures.
    """
    names = [evaluation.engine.header.model.names for evaluation in (first, second)]
    if names[0] != names[1]:
        raise InputError(
            f"engines {first.engine.label} and {second.engine.label} have different classes: "
            "compare engines of one model"
        )
    pictures = [[item.picture.path for item in evaluation.pictures] for evaluation in (first, second)]
    if pictures[0] != pictures[1]:
        raise InputError("the two engines were evaluated with different pictures: evaluate them in one run")
    return compare(first.matches, second.matches, len(pictures[0]))
