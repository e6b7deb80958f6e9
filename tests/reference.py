"""Models for tests: the official YOLOv5 layer list, a tiny one, and weights made up for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yolotrt.engines.base import BuildOptions, CompleteOptions
from yolotrt.network import recorder
from yolotrt.network.builder import NetworkBuilder
from yolotrt.weights.model import FloatArray, Metadata, Weights

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.50), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}
"""Depth and width multiple of the official models."""

ANCHORS = (
    ((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
    ((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    ((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
)

BACKBONE = [
    [-1, 1, "Conv", [64, 6, 2, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 3, "C3", [128]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 6, "C3", [256]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 9, "C3", [512]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 3, "C3", [1024]],
    [-1, 1, "SPPF", [1024, 5]],
]
HEAD = [
    [-1, 1, "Conv", [512, 1, 1]],
    [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
    [[-1, 6], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [256, 1, 1]],
    [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 3, "C3", [256, False]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 14], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 10], 1, "Concat", [1]],
    [-1, 3, "C3", [1024, False]],
    [[17, 20, 23], 1, "Detect", ["nc", "anchors"]],
]

TINY_YAML: Mapping[str, Any] = {
    "nc": 2,
    "depth_multiple": 0.5,
    "width_multiple": 0.5,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 4, "C3", [32]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [[6, 4], 1, "Detect", ["nc", "anchors"]],
    ],
}
"""Two levels of strides 4 and 8; every block of the official models, at a thousandth of the cost."""


P6_BACKBONE = [
    *BACKBONE[:7],
    [-1, 1, "Conv", [768, 3, 2]],
    [-1, 3, "C3", [768]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 3, "C3", [1024]],
    [-1, 1, "SPPF", [1024, 5]],
]
P6_HEAD = [
    [-1, 1, "Conv", [768, 1, 1]],
    [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
    [[-1, 8], 1, "Concat", [1]],
    [-1, 3, "C3", [768, False]],
    [-1, 1, "Conv", [512, 1, 1]],
    [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
    [[-1, 6], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [256, 1, 1]],
    [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 3, "C3", [256, False]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 20], 1, "Concat", [1]],
    [-1, 3, "C3", [512, False]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 16], 1, "Concat", [1]],
    [-1, 3, "C3", [768, False]],
    [-1, 1, "Conv", [768, 3, 2]],
    [[-1, 12], 1, "Concat", [1]],
    [-1, 3, "C3", [1024, False]],
    [[23, 26, 29, 32], 1, "Detect", ["nc", "anchors"]],
]


def official_metadata(size: str, class_count: int = 80) -> Metadata:
    """A model of release 6.0 and later, such as ``s``, or with four levels, such as ``s6``."""
    depth, width = SIZES[size[0]]
    is_p6 = size.endswith("6")
    yaml = {
        "nc": class_count,
        "depth_multiple": depth,
        "width_multiple": width,
        "backbone": P6_BACKBONE if is_p6 else BACKBONE,
        "head": P6_HEAD if is_p6 else HEAD,
    }
    names = tuple(f"class{index}" for index in range(class_count))
    if is_p6:
        return Metadata(yaml, names, strides=(8, 16, 32, 64), anchors=(*ANCHORS, ANCHORS[-1]), imgsz=(1280, 1280))
    return Metadata(yaml, names, strides=(8, 16, 32), anchors=ANCHORS)


def tiny_metadata(**changes: Any) -> Metadata:
    """A model of some 15,000 parameters; `changes` as the fields of `Metadata`."""
    fields = {
        "yaml": TINY_YAML,
        "names": ("cat", "dog"),
        "strides": (4, 8),
        "anchors": (((10.0, 13.0), (16.0, 30.0)), ((30.0, 61.0), (62.0, 45.0))),
        "imgsz": (32, 48),
    }
    return Metadata(**{**fields, **changes})


@dataclass(frozen=True)
class MadeUpWeights(Weights):
    """Has every tensor that is asked for.

    Attributes:
        made: What was asked for so far.
        limit: Larger tensors are missing.
    """

    made: dict[str, FloatArray] = field(default_factory=dict)
    limit: int = 1 << 30

    def take(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        if math.prod(shape) > self.limit:
            return super().take(name, shape)
        if name not in self.made:
            self.made[name] = _made_up(name, shape, np.random.default_rng(len(self.made)))
        return self.made[name]


def made_up_weights(metadata: Metadata, limit: int = 1 << 30) -> MadeUpWeights:
    """Weights for any model: nothing is made before it is asked for. Tensors above `limit` values are missing."""
    return MadeUpWeights({}, metadata, limit=limit)


def all_weights(metadata: Metadata) -> Weights:
    """Weights of a model as a file would hold them: the tensors that its network needs, and no others."""
    weights = made_up_weights(metadata)
    builder = NetworkBuilder(recorder.Network(), recorder, weights, compute_dtype=recorder.float32)
    builder.build(1, builder.graph.size_multiple, builder.graph.size_multiple)
    return Weights(dict(weights.made), metadata)


def _made_up(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> FloatArray:
    """Values that keep activations near 1 through any number of layers; BatchNorm statistics differ by channel."""
    if name.endswith((".bn.weight", ".running_var")):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    gain = 0.2 if ".tr." in name else 2  # a transformer adds to its input, and large scores would make softmax a choice
    scale = 0.1 if len(shape) == 1 else math.sqrt(gain / max(math.prod(shape[1:]), 1))
    return generator.standard_normal(shape, np.float32) * np.float32(scale)


def complete(**options: Any) -> CompleteOptions:
    """Build options without gaps, for functions below `build_engine`."""
    return BuildOptions(**options).completed("fp32", (640, 640))
