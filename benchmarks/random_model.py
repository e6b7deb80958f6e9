"""Weights for measuring the speed of an official size: random, with the objectness that YOLOv5 begins a training with.

    python benchmarks/random_model.py s yolov5s-random.safetensors

A network of random weights finds an object in every cell, which no real one does; YOLOv5 sets the objectness's bias for
eight objects a picture of 640 pixels (models/yolo.py, DetectionModel._initialize_biases).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.reference import SIZES, all_weights, official_metadata
from yolotrt.weights import Weights, save_weights

OBJECTNESS = 4
OBJECTS, PICTURE = 8, 640


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    save_weights(with_few_objects(all_weights(official_metadata(options.size))), options.output)


def with_few_objects(weights: Weights) -> Weights:
    """The same weights with the objectness's bias of a fresh YOLOv5 model and without scatter around it."""
    metadata = weights.metadata
    head = len(metadata.yaml["backbone"]) + len(metadata.yaml["head"]) - 1
    values = 5 + len(metadata.names)
    tensors = dict(weights.tensors)
    for level, stride in enumerate(metadata.strides):
        names = f"model.{head}.m.{level}.weight", f"model.{head}.m.{level}.bias"
        kernel, bias = (tensors[name].copy() for name in names)
        kernel[OBJECTNESS::values] = 0
        bias[OBJECTNESS::values] = math.log(OBJECTS / (PICTURE / stride) ** 2)
        tensors.update(zip(names, (kernel, bias), strict=True))
    return replace(weights, tensors=tensors)


if __name__ == "__main__":
    main()
