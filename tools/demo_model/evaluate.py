"""Measure the demo model on held-out rendered pictures, through ONNX Runtime and through PyTorch.

Usage:
    python tools/demo_model/render.py evaluation --out DIR
    python tools/demo_model/evaluate.py --data DIR [--weights FILE] [--no-torch]

Prints COCO's average precision of both, by faster-coco-eval, and the false boxes on sign-free pictures. Needs
``pip install ".[cpu,eval]"`` and, unless --no-torch is given, torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from datasets import SIGN_FREE, Recipe, render_many  # noqa: E402

from yolotrt import Detector, build_engine, load_weights  # noqa: E402
from yolotrt.engines.build import open_session  # noqa: E402
from yolotrt.errors import InputError, YolotrtError  # noqa: E402
from yolotrt.files import require_file  # noqa: E402
from yolotrt.media.images import read_image  # noqa: E402
from yolotrt.postprocess import Boxes, NmsOptions, YoloLayer, non_max_suppression  # noqa: E402
from yolotrt.preprocess import Letterbox  # noqa: E402

Float = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]
Predictor = Callable[[Float], Float]
"""From a letterboxed picture, float32 (1, 3, size, size), to its rows (candidates, 5 + classes)."""

WEIGHTS = Path(__file__).resolve().parents[2] / "yolotrt" / "assets" / "signs-yolov5n.safetensors"
PROTOCOL = NmsOptions(confidence=0.001, iou=0.6, max_detections=300, multi_label=True)
"""YOLOv5's own for evaluation (val.py)."""
SMALL_SIDE = 24
SIZES = {"all": (0, 1e10), "small": (0, SMALL_SIDE**2), "large": (SMALL_SIDE**2, 1e10)}
"""Ranges of a box's area in pixels; COCO's own limit for small objects is 32 x 32."""


@contextlib.contextmanager
def onnxruntime_predictor(weights: Path, threads: int | None = None) -> Iterator[Predictor]:
    """The engine that `python -m yolotrt -s` builds, with yolotrt's own decoding."""
    engine = build_engine(weights, backend="onnxruntime")
    model = engine.header.model
    layer = YoloLayer(model.anchors, model.strides, len(model.names))
    with open_session(engine, threads=threads) as session:
        yield lambda picture: next(layer.candidates(session.run(picture), PROTOCOL.confidence))


@contextlib.contextmanager
def torch_predictor(weights: Path) -> Iterator[Predictor]:
    """The PyTorch model that was trained, in fp32, with the trainer's decoding."""
    import torch
    from model import DetectionModel, decode

    loaded = load_weights(weights)
    model = DetectionModel(loaded.metadata.yaml, loaded.metadata.names)
    state = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in loaded.tensors.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    unknown = [name for name in missing if not name.endswith(("num_batches_tracked", "anchors"))]
    if unknown or surplus:
        raise RuntimeError(f"the weights do not fit the PyTorch model: {unknown + surplus}")
    model.eval()
    with torch.inference_mode():
        yield lambda picture: decode(model(torch.from_numpy(picture)), model.model[-1])[0].numpy()


def detect(images: Iterable[Image], predict: Predictor, size: int = 640) -> Iterator[Boxes]:
    """Detections of pictures in their own pixels, by `PROTOCOL`."""
    picture = np.zeros((1, 3, size, size), np.float32)
    for image in images:
        letterbox = Letterbox.fit((image.shape[0], image.shape[1]), (size, size))
        letterbox.to_input(image, picture[0])
        boxes = non_max_suppression(predict(picture), PROTOCOL)
        yield Boxes(letterbox.inverse(boxes.xyxy), boxes.confidence, boxes.class_id)


def coco_figures(labels: dict[str, Any], found: Sequence[Boxes]) -> dict[str, float]:
    """mAP50 and mAP50-95 by faster-coco-eval.

    Args:
        labels: COCO's json; `found` is in the order of its images.
        found: Detections.

    Returns:
        The two figures for all boxes and for those of a range of `SIZES`.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    rows = [
        {"image_id": image["id"], "category_id": int(c), "bbox": [x, y, right - x, bottom - y], "score": float(s)}
        for image, boxes in zip(labels["images"], found, strict=True)
        for (x, y, right, bottom), s, c in zip(boxes.xyxy.tolist(), boxes.confidence, boxes.class_id, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress
        truth = COCO(labels)
        evaluation = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
        evaluation.params.maxDets = [1, 10, PROTOCOL.max_detections]
        evaluation.params.areaRng = [list(limits) for limits in SIZES.values()]
        evaluation.params.areaRngLbl = list(SIZES)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (10 IoUs, 101 recalls, classes, sizes)
    precision = np.where(precision < 0, np.nan, precision)  # -1: no label of the class in the range
    figures = {}
    for index, name in enumerate(SIZES):
        figures[f"mAP50 {name}"] = round(float(np.nanmean(precision[0, ..., index])), 4)
        figures[f"mAP50-95 {name}"] = round(float(np.nanmean(precision[..., index])), 4)
    return figures


def false_boxes(weights: Path, recipe: Recipe, threads: int | None = None) -> int:
    """Detections at yolotrt's defaults in sign-free pictures."""
    with Detector(build_engine(weights, backend="onnxruntime"), threads=threads) as detector:
        return sum(len(detector(image)) for image, _, _ in render_many(recipe))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        figures = _measure(options)
    except YolotrtError as problem:
        print(f"evaluate.py: error: {problem}", file=sys.stderr)
        return problem.exit_status
    print(json.dumps(figures, indent=1))
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.torch and importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed: run pip install torch, or leave it out with --no-torch")
    labels = json.loads(require_file(options.data / "instances.json", "labels").read_text())
    images = [read_image(options.data / "images" / image["file_name"]) for image in labels["images"]]
    sides = np.array([np.sqrt(item["area"]) for item in labels["annotations"]])
    figures: dict[str, Any] = {
        "pictures": len(images),
        "signs": len(sides),
        "small signs": int((sides < SMALL_SIDE).sum()),
    }
    predictors = {"ONNX Runtime": onnxruntime_predictor(options.weights, options.threads)}
    if options.torch:
        predictors["PyTorch"] = torch_predictor(options.weights)
    for name, opened in predictors.items():
        with opened as predict:
            figures[name] = coco_figures(labels, list(detect(images, predict)))
    figures["sign-free pictures"] = SIGN_FREE.count
    figures["false boxes"] = false_boxes(options.weights, SIGN_FREE, options.threads)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out rendered pictures.")
    parser.add_argument("--data", type=Path, required=True, help="folder that render.py evaluation wrote")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="default: the shipped ones")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out the PyTorch model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
