"""What a checkpoint becomes: named arrays and the metadata that make them a network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt.errors import WeightsError

FloatArray = npt.NDArray[np.float32]
Anchors = tuple[tuple[tuple[float, float], ...], ...]

TASKS = ("detect", "segment", "classify")
BATCH_NORM_EPSILON = 1e-3
"""YOLOv5 sets this on every BatchNorm2d (utils/torch_utils.py, initialize_weights); PyTorch's own default is 1e-5."""

MAX_CLASSES = 100_000
MAX_STRIDE = 1024
MAX_IMAGE_SIZE = 32_768


@dataclass(frozen=True)
class Metadata:
    """Everything besides the arrays that a YOLOv5 network needs. All values are of JSON types or tuples of them.

    Attributes:
        yaml: The checkpoint's model description: `nc`, `depth_multiple`, `width_multiple`, `anchors`, `backbone` and
            `head`.
        names: Class names, in class order.
        strides: Input pixels per cell of each detection level, such as ``(8, 16, 32)``. Empty for classification.
        anchors: Per level, per anchor: width and height in network-input pixels. Empty for classification.
        task: ``detect``, ``segment`` or ``classify``.
        version: YOLOv5's release as far as the checkpoint tells, such as ``v6.0+``; empty if unknown.
        activation: Activation of every convolution block that `activations` does not name, such as ``SiLU``.
        activations: Exceptions, by module name: ``{"model.2.act": "LeakyReLU(0.1)"}``.
        batch_norm_epsilon: Epsilon of every BatchNorm2d that `batch_norm_epsilons` does not name.
        batch_norm_epsilons: Exceptions, by module name: ``{"model.9.conv.bn": 1e-05}``.
        imgsz: Height and width in pixels that the model was made for.
        source_sha256: SHA-256 of the file that the weights came from, in hexadecimal.
        inferred: What was not written in the file but concluded from tensor shapes, one phrase each, for the user.
    """

    yaml: Mapping[str, Any]
    names: tuple[str, ...]
    strides: tuple[int, ...] = ()
    anchors: Anchors = ()
    task: str = "detect"
    version: str = ""
    activation: str = "SiLU"
    activations: Mapping[str, str] = field(default_factory=dict)
    batch_norm_epsilon: float = BATCH_NORM_EPSILON
    batch_norm_epsilons: Mapping[str, float] = field(default_factory=dict)
    imgsz: tuple[int, int] = (640, 640)
    source_sha256: str = ""
    inferred: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values against each other, so that a wrong class count cannot exist."""
        problem = _first_problem(self)
        if problem:
            raise WeightsError(f"model metadata: {problem}: export the weights again with gen_wts.py")

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return len(self.names)

    def epsilon_of(self, batch_norm: str) -> float:
        """Epsilon of the BatchNorm2d of that name, such as ``model.0.bn``."""
        return self.batch_norm_epsilons.get(batch_norm, self.batch_norm_epsilon)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """Read what `to_json` wrote.

        Raises:
            WeightsError: if the text is no JSON object with the right keys and types.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise TypeError(f"a {type(values).__name__} where an object was expected")
            known = {item.name for item in fields(cls)}
            values = {key: value for key, value in values.items() if key in known}
            for key in ("names", "strides", "imgsz", "inferred"):
                if key in values:
                    values[key] = tuple(values[key])
            if "anchors" in values:
                values["anchors"] = tuple(tuple((float(w), float(h)) for w, h in level) for level in values["anchors"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as problem:
            raise WeightsError(
                f"model metadata is damaged ({problem}): export the weights again with gen_wts.py"
            ) from problem


@dataclass(frozen=True)
class Weights:
    """A model's arrays under YOLOv5's own names, and its metadata.

    Attributes:
        tensors: float32 arrays by name, such as ``model.0.conv.weight`` with shape (out, in, height, width). A file
            without shapes (a bare .wts) gives flat arrays; `take` shapes them.
        metadata: See `Metadata`.
    """

    tensors: Mapping[str, FloatArray]
    metadata: Metadata

    @property
    def parameter_count(self) -> int:
        """Number of values in all arrays."""
        return sum(array.size for array in self.tensors.values())

    def take(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        """Return the array `name`, which must have `shape` (or be flat and of that size).

        Raises:
            WeightsError: if it is missing, or has another shape; the message names the tensor and both shapes.
        """
        try:
            array = self.tensors[name]
        except KeyError:
            raise WeightsError(
                f"tensor {name} with shape {shape} is missing from the weights: they do not belong to this graph"
            ) from None
        if array.shape == shape:
            return array
        if array.ndim == 1 and array.size == math.prod(shape):
            return array.reshape(shape)
        raise WeightsError(
            f"tensor {name} has shape {array.shape}, the graph needs {shape}: the weights do not belong to this graph"
        )


def _first_problem(metadata: Metadata) -> str:
    """What is wrong with the values, or an empty string."""
    problem = _type_problem(metadata)
    if problem:
        return problem
    if metadata.task not in TASKS:
        return f"task {metadata.task!r} is not one of {', '.join(TASKS)}"
    if not 1 <= len(metadata.names) <= MAX_CLASSES:
        return f"{len(metadata.names)} class names"
    declared = metadata.yaml.get("nc", len(metadata.names))
    if declared != len(metadata.names):
        return f"{len(metadata.names)} class names for nc = {declared}"
    if len(metadata.anchors) != len(metadata.strides):
        return f"anchors for {len(metadata.anchors)} levels but {len(metadata.strides)} strides"
    if any(not 1 <= stride <= MAX_STRIDE for stride in metadata.strides):
        return f"strides {metadata.strides}"
    if any(not level or len(level) != len(metadata.anchors[0]) for level in metadata.anchors):
        return "a different number of anchors on each level, or none"
    if any(not (math.isfinite(side) and side > 0) for level in metadata.anchors for anchor in level for side in anchor):
        return "an anchor side that is not a positive number"
    if len(metadata.imgsz) != 2 or any(not 1 <= side <= MAX_IMAGE_SIZE for side in metadata.imgsz):
        return f"image size {metadata.imgsz}"
    for epsilon in (metadata.batch_norm_epsilon, *metadata.batch_norm_epsilons.values()):
        if not 0 < epsilon < 1:
            return f"BatchNorm epsilon {epsilon}"
    return ""


def _type_problem(metadata: Metadata) -> str:
    """The first field whose type is wrong, in words, or an empty string."""

    def all_of(values: Any, kind: type) -> bool:
        return isinstance(values, tuple) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)

    checks = {
        "yaml": isinstance(metadata.yaml, Mapping),
        "names": all_of(metadata.names, str),
        "strides": all_of(metadata.strides, int),
        "anchors": all_of(metadata.anchors, tuple),
        "task": isinstance(metadata.task, str),
        "version": isinstance(metadata.version, str),
        "activation": isinstance(metadata.activation, str),
        "activations": isinstance(metadata.activations, Mapping)
        and all(isinstance(v, str) for pair in metadata.activations.items() for v in pair),
        "batch_norm_epsilon": isinstance(metadata.batch_norm_epsilon, float),
        "batch_norm_epsilons": isinstance(metadata.batch_norm_epsilons, Mapping)
        and all(isinstance(k, str) and isinstance(v, float) for k, v in metadata.batch_norm_epsilons.items()),
        "imgsz": all_of(metadata.imgsz, int),
        "source_sha256": isinstance(metadata.source_sha256, str),
        "inferred": all_of(metadata.inferred, str),
    }
    return next((f"{name} is of the wrong type" for name, right in checks.items() if not right), "")
