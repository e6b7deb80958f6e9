"""What INT8 costs in accuracy: every calibration method, several numbers of pictures, both placements of Q/DQ.

python benchmarks/int8_accuracy.py --weights yolov5n.pt --calib calib/ --images val/ --labels instances_val.json

Prints mAP50-95 by YOLOv5's protocol (confidence 0.001, NMS IoU 0.6, several classes a box, 300 detections, square
letterbox) and the signal-to-noise ratio of the raw heads. The placement for TensorRT is computed by ONNX Runtime, with
the roundings where TensorRT has them. Needs ``pip install ".[cpu,eval]"``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolotrt import load_weights
from yolotrt.calibration.activations import OnnxActivations, record
from yolotrt.calibration.calibrate import make_table, observe
from yolotrt.calibration.feed import PictureFeed
from yolotrt.calibration.objects import ObjectFinder
from yolotrt.calibration.options import OBJECTS, RULES
from yolotrt.calibration.table import TableSource
from yolotrt.engines.base import CompleteOptions
from yolotrt.engines.definition import BuildHooks, build_plan
from yolotrt.engines.onnx import inference_session
from yolotrt.media.images import read_image
from yolotrt.network import recorder
from yolotrt.network.builder import INPUT_NAME
from yolotrt.network.quantize import ONNX_RUNTIME, TENSORRT, Placement, Quantization
from yolotrt.network.ranges import lowest_values
from yolotrt.postprocess import NmsOptions, YoloLayer, non_max_suppression
from yolotrt.preprocess import Letterbox
from yolotrt.weights import Weights

Float = npt.NDArray[np.float32]
Run = Callable[[Float], list[Float]]

PROTOCOL = NmsOptions(confidence=0.001, iou=0.6, max_detections=300, multi_label=True)
PLACEMENTS = {"ONNX Runtime": ONNX_RUNTIME, "TensorRT": replace(TENSORRT, high_precision="fp32")}
SNR_PICTURES = 16


class Validation:
    """Labelled pictures, letterboxed."""

    def __init__(self, images: Path, labels: Path, weights: Weights) -> None:
        model = weights.metadata
        self.imgsz = model.imgsz
        self._labels = json.loads(labels.read_text())
        self._layer = YoloLayer(model.anchors, model.strides, len(model.names))
        self._inputs = [self._letterboxed(images / Path(row["file_name"]).name) for row in self._labels["images"]]
        self._reference: list[list[Float]] = []

    def measure(self, run: Run) -> tuple[float, float]:
        """mAP50-95, and dB against the first network that was measured (infinite for that one)."""
        heads = [run(image) for _, image in self._inputs[:SNR_PICTURES]]
        self._reference = self._reference or heads
        return self._mean_average_precision(run), _snr_db(self._reference, heads)

    def _letterboxed(self, path: Path) -> tuple[Letterbox, Float]:
        image = read_image(path)
        letterbox = Letterbox.fit((image.shape[0], image.shape[1]), self.imgsz)
        out = np.zeros((1, 3, *self.imgsz), np.float32)
        letterbox.to_input(image, out[0])
        return letterbox, out

    def _mean_average_precision(self, run: Run) -> float:
        from faster_coco_eval import COCO, COCOeval_faster

        rows: list[dict[str, Any]] = []
        for picture, (letterbox, image) in zip(self._labels["images"], self._inputs, strict=True):
            boxes = non_max_suppression(next(self._layer.candidates(run(image), PROTOCOL.confidence)), PROTOCOL)
            corners = letterbox.inverse(boxes.xyxy).tolist()
            for (x, y, right, bottom), score, category in zip(corners, boxes.confidence, boxes.class_id, strict=True):
                box = [x, y, right - x, bottom - y]
                rows.append(
                    {"image_id": picture["id"], "category_id": int(category), "bbox": box, "score": float(score)}
                )
        with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
            truth = COCO(self._labels)
            evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
            evaluation.params.maxDets = [1, 10, PROTOCOL.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (10 IoUs, 101 recalls, classes)
        return float(precision[precision >= 0].mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one table."""
    options = _parser().parse_args(arguments)
    weights = load_weights(options.weights)
    validation = Validation(options.images, options.labels, weights)
    activations = OnnxActivations(weights, validation.imgsz, options.threads)
    feed = PictureFeed.find(options.calib, validation.imgsz)

    def network(precision: str, placement: Placement, quantization: Quantization | None = None) -> Run:
        complete = CompleteOptions(precision, validation.imgsz, (1, 1, 1), quantization=quantization)
        session = inference_session(
            build_plan(recorder, weights, complete, BuildHooks(placement)).data, options.threads
        )
        return lambda image: session.run(None, {INPUT_NAME: image})

    print(f"fp32: mAP50-95 {validation.measure(network('fp32', TENSORRT))[0]:.4f}\n")
    print("| placement | method | " + " | ".join(f"{count} pictures" for count in options.counts) + " |")
    print("| --- | --- |" + " --- |" * len(options.counts))
    feeds = [PictureFeed(feed.paths[:count], feed.imgsz) for count in options.counts]
    everywhere = [observe(activations, few)[0] for few in feeds]
    finder = ObjectFinder(weights, validation.imgsz, options.threads)
    at_objects = [observe(activations, few, finder)[0] for few in feeds]
    for name, placement in PLACEMENTS.items():
        for method in (*RULES, OBJECTS):
            source = TableSource("", validation.imgsz, method, "", {})
            observed = at_objects if method == OBJECTS else everywhere
            lowest = lowest_values(record(weights, validation.imgsz)) if placement.has_zero_points else {}
            tables = [make_table(histograms, activations.groups, source, 0, lowest) for histograms in observed]
            results = [
                validation.measure(network("int8", placement, Quantization(table.scales, tuple(options.keep))))
                for table in tables
            ]
            cells = " | ".join(f"{precision:.4f}, {snr:.1f} dB" for precision, snr in results)
            print(f"| {name} | {method} | {cells} |", flush=True)


def _snr_db(reference: Sequence[Sequence[Float]], found: Sequence[Sequence[Float]]) -> float:
    """Signal-to-noise ratio of raw heads, picture by picture and level by level; all levels count alike."""
    noise = [
        sum(np.square(a[level] - b[level]).sum() for a, b in zip(reference, found, strict=True))
        / sum(np.square(a[level]).sum() for a in reference)
        for level in range(len(reference[0]))
    ]
    mean = float(np.mean(noise))
    return float("inf") if mean == 0 else float(-10 * np.log10(mean))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True, help="calibration pictures")
    parser.add_argument("--images", type=Path, required=True, help="labelled pictures")
    parser.add_argument("--labels", type=Path, required=True, help="their labels, COCO json; categories count from 0")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64, 128], help="numbers of calibration pictures")
    parser.add_argument("--keep", nargs="*", default=[], help="layers in high precision")
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
